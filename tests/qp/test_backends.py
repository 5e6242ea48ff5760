"""What every backend promises: the answer, its multipliers and their signs, and a status that is true."""

import itertools
import sys
from dataclasses import dataclass, replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from difflayers import Status
from difflayers.errors import MissingBackendError, ProblemError, SolverError, UnknownNameError
from difflayers.qp import DAQP, OSQP, PIQP, Auto, Clarabel, HiGHS, InteriorPoint, Moreau, ProxQP, QPSolver, solve_qp
from difflayers.qp._data import NAMES, Data
from difflayers.qp._solver import Answers


def needs(package, *solvers):
    missing = pytest.mark.skipif(find_spec(package) is None, reason=f"{package} isn't installed")
    return [pytest.param(solver, marks=missing) for solver in solvers]


QP = [Auto(), DAQP(), PIQP(), Clarabel(), OSQP(), InteriorPoint(), *needs("proxsuite", ProxQP()),
      *needs("moreau", Moreau(), Moreau(method="active_set"))]  # fmt: skip
LP = [*QP, HiGHS()]
every_solver = pytest.mark.parametrize("solver", QP, ids=repr)
every_solver_of_lps = pytest.mark.parametrize("solver", LP, ids=repr)


def problem(samples=3, n=4, m=3, p=1, curvature=1.0, seed=0):
    """Feasible, with some of every kind of inequality active; ``curvature`` scales ``P``, 0 is a linear program."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(samples, *shape, generator=generator, dtype=torch.float64)

    root, inside = draw(n, n), draw(n)
    blocks = {
        "P": curvature * (root @ root.mT + 0.1 * torch.eye(n)),
        "q": 3 * draw(n),
        "G": draw(m, n),
        "A": draw(p, n),
    }
    blocks["h"] = (blocks["G"] @ inside[..., None])[..., 0] + draw(m).abs() / 3
    blocks["b"] = (blocks["A"] @ inside[..., None])[..., 0]
    return blocks | {"lb": inside - draw(n).abs(), "ub": inside + draw(n).abs()}


def without(blocks, *names):
    return {name: block for name, block in blocks.items() if name not in names}


def inequalities(blocks, i):
    """``C x ≤ d`` of one sample, bounds included."""
    n = blocks["q"].shape[-1]
    rows = [blocks["G"][i].numpy()] if "G" in blocks else []
    sides = [blocks["h"][i].numpy()] if "G" in blocks else []
    for name, sign in (("lb", -1.0), ("ub", 1.0)):
        if name in blocks:
            rows.append(sign * np.eye(n))
            sides.append(sign * blocks[name][i].numpy())
    return np.concatenate([np.zeros((0, n)), *rows]), np.concatenate([np.zeros(0), *sides])


def by_enumeration(blocks):
    """The minimizer of each sample: the stationary point of the one active set that is feasible and has z ≥ 0."""
    return torch.stack([torch.from_numpy(_enumerated(blocks, i)) for i in range(len(blocks["q"]))])


def _enumerated(blocks, i):
    n = blocks["q"].shape[-1]
    C, d = inequalities(blocks, i)
    P = blocks["P"][i].numpy() if "P" in blocks else np.zeros((n, n))
    A, b = (blocks["A"][i].numpy(), blocks["b"][i].numpy()) if "A" in blocks else (np.zeros((0, n)), np.zeros(0))
    for size in range(n - len(b) + 1):
        for active in map(list, itertools.combinations(range(len(d)), size)):
            rows = np.concatenate([A, C[active]])
            kkt = np.block([[P, rows.T], [rows, np.zeros((len(rows), len(rows)))]])
            if np.linalg.cond(kkt) > 1e12:
                continue
            point = np.linalg.solve(kkt, np.concatenate([-blocks["q"][i].numpy(), b, d[active]]))
            if (C @ point[:n] <= d + 1e-10).all() and (point[n + len(b) :] >= -1e-10).all():
                return point[:n]
    raise AssertionError("no active set is optimal")


def check_conditions(blocks, solution, tolerance=1e-9):
    """``Px + q + Gᵀz + Aᵀy + z_box = 0``, feasibility, signs and complementarity."""
    x, gradient = solution.x, blocks["q"] + solution.z_box
    for name, times in (("P", x), ("G", solution.z), ("A", solution.y)):
        if name in blocks:
            gradient = gradient + (blocks[name].mT @ times[..., None])[..., 0]
    scale = 1 + max(float(blocks[name].abs().max()) for name in ("P", "q", "h", "b") if name in blocks)
    close = {"rtol": 0, "atol": tolerance * scale}
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), **close)
    signed = []
    if "G" in blocks:
        signed.append((blocks["h"] - (blocks["G"] @ x[..., None])[..., 0], solution.z))
    if "lb" in blocks:
        signed.append((x - blocks["lb"], (-solution.z_box).clamp_min(0)))
    if "ub" in blocks:
        signed.append((blocks["ub"] - x, solution.z_box.clamp_min(0)))
    for slack, z in signed:
        assert (z >= 0).all()
        assert (slack >= -tolerance * scale).all()
        assert (torch.minimum(z, slack).abs() <= tolerance * scale).all()
    if "A" in blocks:
        torch.testing.assert_close((blocks["A"] @ x[..., None])[..., 0], blocks["b"].expand(*x.shape[:-1], -1), **close)


def check(blocks, solver, tolerance=1e-9):
    solution = solve_qp(**{"P": None} | blocks, solver=solver)
    check_conditions(blocks, solution, tolerance)
    torch.testing.assert_close(solution.x, by_enumeration(blocks), rtol=1e-8, atol=1e-8)
    return solution


@every_solver
@pytest.mark.parametrize(
    "left_out", [(), ("lb",), ("ub",), ("lb", "ub"), ("G", "h"), ("A", "b"), ("A", "b", "G", "h")], ids=str
)
def test_solves_with_any_block_missing(solver, left_out):
    check(without(problem(), *left_out), solver)


@every_solver
def test_equations_alone_and_nothing_at_all(solver):
    check(without(problem(p=2), "G", "h", "lb", "ub"), solver)
    check(without(problem(), "G", "h", "A", "b", "lb", "ub"), solver)


@every_solver_of_lps
def test_linear_programs(solver):
    for seed in range(3):
        check(without(problem(seed=seed), "P"), solver)
        check(problem(seed=seed, curvature=0.0), solver)


@every_solver
def test_semidefinite(solver):
    blocks = problem()
    flat = torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0]))
    check(blocks | {"P": flat @ blocks["P"] @ flat}, solver)


@every_solver
def test_shared_blocks_are_those_of_every_sample(solver):
    blocks = problem()
    for name in ("P", "G", "A", "lb"):
        shared = blocks | {name: blocks[name][0]}
        if name == "lb":
            shared["lb"] = blocks["lb"].amin(0)
        if name in ("G", "A"):
            side, inside = {"G": "h", "A": "b"}[name], (blocks["lb"] + blocks["ub"]) / 2
            shared[side] = (shared[name] @ inside[..., None])[..., 0] + (0.1 if name == "G" else 0.0)
            shared |= {"lb": inside - 9, "ub": inside + 9} | (
                {"G": blocks["G"] * 0, "h": blocks["h"].abs()} if name == "A" else {}
            )
        full = {key: block.expand(3, *block.shape[-2 if key in "PGA" else -1 :]) for key, block in shared.items()}
        ours, expected = solve_qp(**shared, solver=solver), solve_qp(**full, solver=solver)
        torch.testing.assert_close(ours.x, expected.x, rtol=1e-10, atol=1e-10)
        check_conditions(full, ours)


@every_solver
def test_no_batch_is_one_sample(solver):
    blocks = problem()
    alone = solve_qp(**{name: block[0] for name, block in blocks.items()}, solver=solver)
    assert alone.x.shape == (4,)
    torch.testing.assert_close(alone.x, by_enumeration(blocks)[0])


@every_solver
def test_float32(solver):
    blocks = problem()
    solution = solve_qp(**{name: block.float() for name, block in blocks.items()}, solver=solver)
    assert {getattr(solution, name).dtype for name in ("x", "y", "z", "z_box")} == {torch.float32}
    torch.testing.assert_close(solution.x.double(), by_enumeration(blocks), rtol=1e-5, atol=1e-5)


@every_solver_of_lps
def test_infeasible_has_a_proof(solver):
    row = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    # x ≤ -1 and x ≥ 1 in the first sample, x ≤ 1 and x ≥ -1 in the second.
    blocks = {"P": None, "q": torch.ones(2), "G": row, "h": torch.tensor([[-1.0, -1.0], [1.0, 1.0]])}
    box = {"lb": torch.full((2,), -5.0), "ub": torch.full((2,), 5.0)}
    solution = solve_qp(**blocks, **box, solver=solver, on_failure="ignore")
    assert solution.status.tolist() == [Status.INFEASIBLE, Status.SUCCESS]
    assert solution.x[0].isnan().all()
    torch.testing.assert_close(solution.x[1], torch.tensor([-1.0, -5.0]))
    with pytest.raises(SolverError, match="no point satisfies the constraints"):
        solve_qp(**blocks, **box, solver=solver)


@every_solver_of_lps
def test_unbounded(solver):
    solution = solve_qp(None, torch.ones(2), torch.eye(2), torch.ones(2), solver=solver, on_failure="ignore")
    assert solution.status == Status.UNBOUNDED
    assert solution.x.isnan().all()


@every_solver
def test_unbounded_along_what_is_flat(solver):
    P, q = torch.diag(torch.tensor([1.0, 0.0])), torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    solution = solve_qp(P, q, lb=torch.tensor([-9.0, -torch.inf]), solver=solver, on_failure="ignore")
    assert solution.status.tolist() == [Status.UNBOUNDED, Status.SUCCESS]
    assert solution.x[1, 0] == -1


@every_solver_of_lps
def test_contradictory_bounds_and_equations(solver):
    q, one = torch.ones(2), torch.ones(1)
    wrong = solve_qp(
        None, q, lb=torch.ones(2), ub=torch.tensor([[2.0, 2.0], [0.0, 2.0]]), solver=solver, on_failure="ignore"
    )
    assert wrong.status.tolist() == [Status.SUCCESS, Status.INFEASIBLE]
    A, b = torch.ones(2, 2), torch.cat([one, 2 * one])
    wrong = solve_qp(None, q, A=A, b=b, lb=torch.zeros(2), solver=solver, on_failure="ignore")
    assert wrong.status == Status.INFEASIBLE
    assert solve_qp(None, q, A=A, b=b, solver=solver, on_failure="ignore").status == Status.INFEASIBLE


@every_solver_of_lps
def test_infinite_bounds_bound_nothing(solver):
    blocks = without(problem(), "P", "A", "b")
    blocks["lb"][:, 0], blocks["ub"][1, 2], blocks["ub"][:, 3] = -torch.inf, torch.inf, torch.inf
    blocks["q"][:, 0], blocks["q"][:, 2:] = -1.0, 1.0
    blocks["G"] = -blocks["G"].abs()
    solution = check(blocks, solver)
    assert (solution.z_box[:, 3] <= 0).all()
    nowhere = torch.full((4,), torch.inf)
    free = solve_qp(None, torch.zeros(4), blocks["G"], blocks["h"], lb=-nowhere, ub=nowhere, solver=solver)
    assert not free.z_box.any()


@every_solver
def test_step_limit(solver):
    if not hasattr(solver, "max_steps"):
        pytest.skip("has no steps of its own")
    blocks = problem(samples=1, n=30, m=30, p=3)
    limited = replace(solver, max_steps=1)
    answers = limited.answers(Data(**blocks), 1)
    assert answers.status.tolist() == [Status.MAX_STEPS]
    solution = solve_qp(**blocks, solver=limited, on_failure="ignore")
    assert int(solution.status) in (Status.MAX_STEPS, Status.SUCCESS)  # the active set may be near enough to correct
    if solution.ok.all():
        check_conditions(blocks, solution)


@every_solver
@pytest.mark.parametrize("name", NAMES)
def test_nan_sample_among_healthy_ones(solver, name):
    blocks = problem()
    broken = {key: block.clone() for key, block in blocks.items()}
    broken[name][1].flatten()[0] = torch.nan
    broken[name].requires_grad_()
    solution = solve_qp(**broken, solver=solver, on_failure="ignore")
    assert solution.status.tolist() == [Status.SUCCESS, Status.NONFINITE, Status.SUCCESS]
    assert solution.x[1].isnan().all()
    healthy = {key: block[[0, 2]].clone() for key, block in blocks.items()}
    healthy[name].requires_grad_()
    expected = solve_qp(**healthy, solver=solver)
    torch.testing.assert_close(solution.x[[0, 2]], expected.x, rtol=1e-13, atol=1e-13)
    solution.x[solution.ok].pow(2).sum().backward()
    expected.x.pow(2).sum().backward()
    torch.testing.assert_close(broken[name].grad[[0, 2]], healthy[name].grad, rtol=1e-10, atol=1e-12)
    assert not broken[name].grad[1].any()


@every_solver
@pytest.mark.parametrize("factor", [1e-6, 1e6])
@pytest.mark.parametrize("names", [("P", "q"), ("G", "h"), ("A", "b")], ids=str)
def test_scale_of_objective_and_rows(solver, factor, names):
    blocks = problem()
    scaled = blocks | {name: factor * blocks[name] for name in names}
    solution = solve_qp(**scaled, solver=solver)
    torch.testing.assert_close(solution.x, by_enumeration(blocks), rtol=1e-8, atol=1e-8)
    check_conditions(scaled, solution, 1e-8)


@every_solver
def test_duplicate_and_redundant_rows(solver):
    blocks = problem()
    twice = blocks | {name: torch.cat([blocks[name], blocks[name]], 1) for name in ("G", "h", "A", "b")}
    solution = solve_qp(**twice, solver=solver)
    torch.testing.assert_close(solution.x, by_enumeration(blocks))
    check_conditions(twice, solution)
    once = solve_qp(**blocks, solver=solver)
    # Which of two equal rows carries the multiplier is open; their sum isn't.
    torch.testing.assert_close(solution.z.unflatten(-1, (2, 3)).sum(1), once.z)
    torch.testing.assert_close(solution.y.unflatten(-1, (2, 1)).sum(1), once.y)


@every_solver
def test_empty_blocks(solver):
    blocks = without(problem(), "G", "h", "A", "b")
    empty = {"G": torch.zeros(0, 4), "h": torch.zeros(0), "A": torch.zeros(3, 0, 4), "b": torch.zeros(3, 0)}
    solution = solve_qp(**blocks, **empty, solver=solver)
    torch.testing.assert_close(solution.x, by_enumeration(blocks))
    assert solution.z.shape == solution.y.shape == (3, 0)


@every_solver_of_lps
def test_batch_of_zero(solver):
    blocks = {name: block[:0].requires_grad_() for name, block in without(problem(), "P").items()}
    solution = solve_qp(None, **blocks, solver=solver)
    assert solution.x.shape == (0, 4)
    solution.x.sum().backward()
    assert blocks["G"].grad.shape == (0, 3, 4)


@every_solver
def test_derivatives(solver):
    blocks = {name: block[:2].requires_grad_() for name, block in problem().items()}

    def answer(root, *rest):
        P = blocks["P"] + root + root.mT
        solution = solve_qp(P, *rest, solver=solver)
        return solution.x, solution.y, solution.z, solution.z_box

    rest = [blocks[name] for name in NAMES[1:]]
    assert torch.autograd.gradcheck(answer, (torch.zeros(2, 4, 4, requires_grad=True), *rest))


@every_solver
def test_threads_change_nothing(solver):
    if not getattr(solver, "releases_gil", False):
        pytest.skip("keeps Python's lock")
    blocks = problem(samples=20)
    alone, together = (solve_qp(**blocks, solver=replace(solver, threads=count)) for count in (1, 3))
    assert torch.equal(alone.x, together.x)


@pytest.mark.parametrize("solver", [*QP[:5], ProxQP(), Moreau(), HiGHS()], ids=repr)
def test_missing_backend_says_how_to_install_it(solver, monkeypatch):
    package = DAQP.package if isinstance(solver, Auto) else solver.package
    monkeypatch.setitem(sys.modules, package, None)
    blocks = problem(curvature=0.0 if isinstance(solver, HiGHS) else 1.0)
    with pytest.raises(MissingBackendError, match=rf"{package} is not installed; run: pip install difflayers\[qp\]"):
        solve_qp(**blocks, solver=solver)


def test_highs_refuses_curvature():
    with pytest.raises(ProblemError, match=r"HiGHS solves linear programs.*PIQP\(\)"):
        solve_qp(**problem(), solver=HiGHS())


def test_unknown_method_of_moreau():
    with pytest.raises(UnknownNameError, match="did you mean 'active_set'"):
        Moreau(method="active-set")


def test_auto_chooses_by_device_curvature_and_size():
    chosen = lambda blocks, **fields: solve_qp(**blocks, solver=Auto(**fields)).solver  # noqa: E731
    blocks = problem()
    assert chosen(blocks) == DAQP()
    assert chosen(blocks | {"P": None}) == PIQP()
    assert chosen(blocks | {"P": blocks["P"] * torch.tensor([1.0, 0.0, 1.0])[:, None, None]}) == PIQP()
    assert chosen(blocks, unknowns=3) == PIQP()
    assert chosen(blocks, inequalities=3 + 2 * 8) == DAQP()
    assert chosen(blocks, inequalities=3 + 2 * 8 - 1) == PIQP()
    assert chosen(without(blocks, "G", "h", "lb", "ub")) == Auto()
    elsewhere = Data(**{name: block.to("meta") for name, block in blocks.items()})
    assert Auto().choices(elsewhere)[0] == InteriorPoint()
    assert solve_qp(**blocks).solver == DAQP()
    assert solve_qp(**blocks, solver="osqp").solver == OSQP()


@dataclass(frozen=True)
class Scripted(QPSolver):
    """Claims a status of some samples, and gives zeros."""

    claim: Status
    asked: list

    def answers(self, data, count):
        self.asked.append(count)
        layout = data.layout
        zeros = [torch.zeros(count, size) for size in (layout.n, layout.p, layout.inequalities)]
        return Answers(*zeros, torch.full((count,), int(self.claim)), torch.ones(count, dtype=torch.int64))


@dataclass(frozen=True)
class InTurn(QPSolver):
    backends: tuple

    def choices(self, data):
        return self.backends

    def answers(self, data, count):
        raise AssertionError("its choices are asked")


@pytest.mark.parametrize("claim", [Status.INFEASIBLE, Status.UNBOUNDED, Status.BACKEND_ERROR])
def test_false_claims_are_not_believed(claim):
    blocks, liar = problem(), Scripted(claim, [])
    alone = solve_qp(**blocks, solver=liar, on_failure="ignore")
    assert alone.status.tolist() == [Status.BACKEND_ERROR] * 3
    check(blocks, InTurn((liar, Scripted(claim, []), PIQP())))


def test_others_get_only_what_is_open():
    blocks = problem()
    blocks["ub"][1] = blocks["lb"][1] - 1  # contradictory: nobody is asked
    blocks["G"][2, :2], blocks["h"][2, :2] = torch.eye(4)[0] * torch.tensor([[1.0], [-1.0]]), -9.0  # infeasible
    right, first, second = Scripted(Status.INFEASIBLE, []), Scripted(Status.BACKEND_ERROR, []), PIQP()
    last = Scripted(Status.BACKEND_ERROR, [])
    solution = solve_qp(**blocks, solver=InTurn((right, first, second, last)), on_failure="ignore")
    assert solution.status.tolist() == [Status.SUCCESS, Status.INFEASIBLE, Status.INFEASIBLE]
    # A proof settles the third at once; the fourth backend has nothing left to do.
    assert [right.asked, first.asked, last.asked] == [[2], [1], []]
    assert solution.stats["certificate"].any(-1).tolist() == [False, True, True]
    torch.testing.assert_close(solution.x[0], by_enumeration({k: v[:1] for k, v in blocks.items()})[0])
