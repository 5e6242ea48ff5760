"""Cone programs: answers, derivatives of every order and mode, what fails, over backends."""

import contracts
import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from difflayers._solution import Status
from difflayers.errors import ConvergenceWarning, MissingBackendError, ProblemError, SolverError
from difflayers.qp import DAQP, SCS, Clarabel, Cones, Sparse, solve_cone, solve_qp
from difflayers.qp._cone_clarabel import ConeClarabel
from difflayers.qp._cone_problem import cone_optimality
from difflayers.qp._cone_solver import ConeWork
from difflayers.qp._data import Data

KINDS = {
    "second order": Cones(1, 2, (3, 4)),
    "semidefinite": Cones(1, 1, (), (2, 3)),
    "exponential": Cones(1, 1, exponential=2),
    "power": Cones(0, 2, power=(0.3, 0.6)),
    "all": Cones(1, 2, (3,), (2,), 1, (0.4,)),
}
SOLVERS = [Clarabel(), SCS()]


def made(cones, samples=3, n=None, curved=True):
    """Problems with known answers: from a random multiplier minus slack, and a random x."""
    n = n or cones.rows
    generator = torch.Generator().manual_seed(5)

    def random(*shape):
        return torch.randn(samples, *shape, generator=generator, dtype=torch.float64)

    L, C, x, v = random(n, n) / n**0.5, random(cones.rows, n), random(n), random(cones.rows)
    y = cones.project(v)
    Px = (L @ (L.mT @ x.unsqueeze(-1))).squeeze(-1) + x if curved else 0
    q = -Px - (C.mT @ y.unsqueeze(-1)).squeeze(-1)
    d = (C @ x.unsqueeze(-1)).squeeze(-1) + y - v
    return (L, q, C, d), (x, y, y - v)


def call(cones, part="x", **options):
    def solve(L, q, C, d):
        solution = solve_cone(L @ L.mT + torch.eye(L.shape[-1]), q, C, d, cones, **options)
        return solution.x if part == "x" else (solution.x, solution.y, solution.s)

    return solve


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("cones", KINDS.values(), ids=KINDS)
def test_answers_are_exact(cones, solver):
    blocks, answer = made(cones)
    contracts.assert_close(call(cones, "all", solver=solver)(*blocks), answer, 1e-10)


@pytest.mark.parametrize("cones", KINDS.values(), ids=KINDS)
def test_first_and_second_derivatives_of_everything(cones):
    blocks = contracts.wanting(made(cones, samples=2)[0])
    fn = call(cones, "all")
    assert torch.autograd.gradcheck(fn, blocks, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(call(cones), blocks, fast_mode=True)


@pytest.mark.parametrize("cones", KINDS.values(), ids=KINDS)
def test_gradients_are_those_of_central_differences(cones):
    blocks, _ = made(cones, samples=1)
    directions = [torch.randn_like(block) for block in blocks]
    wanted = contracts.wanting(blocks)
    gradients = torch.autograd.grad(call(cones)(*wanted).pow(2).sum(), wanted)
    ours = sum((g * e).sum() for g, e in zip(gradients, directions, strict=True))

    def loss(step):
        return call(cones)(*[b + step * e for b, e in zip(blocks, directions, strict=True)]).pow(2).sum()

    # Richardson's extrapolation, so that the reference isn't the worse of the two.
    one, two = ((loss(h) - loss(-h)) / (2 * h) for h in (2e-5, 1e-5))
    numeric = (4 * two - one) / 3
    assert abs(ours - numeric) <= 1e-8 * (1 + abs(numeric))


def test_transforms():
    cones = KINDS["all"]
    L, q, C, d = made(cones, samples=2)[0]

    def of_q(q):
        return call(cones)(L, q, C, d)

    eager = torch.autograd.functional.jacobian(of_q, q)
    contracts.assert_close(jacrev(of_q)(q), eager)
    contracts.assert_close(jacfwd(of_q)(q), eager)
    cubed = contracts.cubed(of_q)
    contracts.assert_close(hessian(cubed)(q), torch.autograd.functional.hessian(cubed, q))
    each = vmap(grad(lambda L, q, C, d: call(cones)(L, q, C, d).pow(3).sum(), argnums=1))(L, q, C, d)
    contracts.assert_close(each, grad(cubed)(q))
    shared = vmap(lambda q: call(cones)(L[0], q, C[0], d[0]))(torch.stack([q[0], q[0]]))
    contracts.assert_close(shared[1], call(cones)(L[0], q[0], C[0], d[0]))


def test_shared_blocks_and_leading_dimensions():
    cones = KINDS["second order"]
    L, q, C, d = made(cones)[0]
    C, many = C[0].requires_grad_(), torch.stack([q, q])
    d = made(cones)[1][2] + (C.detach() @ made(cones)[1][0].unsqueeze(-1)).squeeze(-1)
    x = call(cones)(L, many, C, d)
    assert x.shape == (2, 3, q.shape[-1])
    x.pow(2).sum().backward()
    own = C.detach().expand(3, -1, -1).clone().requires_grad_()
    call(cones)(L, q, own, d).pow(2).sum().backward()
    contracts.assert_close(C.grad, 2 * own.grad.sum(0), 1e-10)


@pytest.mark.parametrize("scale", [1e-4, 0.01, 0.05, 1.0, 1e3])
def test_portfolios_have_the_same_weights_in_all_units_of_returns(scale):
    # Least ‖Rw‖ - μᵀw over w ≥ 0 that sum up to one, whose conditions are small where returns are.
    n, samples = 20, 40
    generator = torch.Generator().manual_seed(0)
    returns = 0.01 + 0.05 * torch.randn(samples, 60, n, generator=generator)
    R, mean = torch.linalg.qr(returns / 60**0.5).R * scale, returns.mean(1) * scale
    cones = Cones(1, n, (1 + n,))
    C = torch.zeros(samples, cones.rows, 1 + n)
    C[:, 0, 1:], C[:, 1 : 1 + n, 1:], C[:, 1 + n, 0], C[:, 2 + n :, 1:] = 1, -torch.eye(n), -1, -R
    d = torch.zeros(cones.rows)
    d[0] = 1
    q = torch.cat([torch.ones(samples, 1), -mean], dim=1)
    solution = solve_cone(None, q, C, d, cones)
    assert (solution.stats["residual"] <= 1e-10 * max(scale, 1)).all()
    w, y = solution.x[:, 1:], solution.y[:, 1 : 1 + n]
    # Its conditions, in the units of the returns, where a residual of 1e-10 is more the smaller they are.
    gradient = (R.mT @ (R @ w.unsqueeze(-1))).squeeze(-1) / (R @ w.unsqueeze(-1)).norm(dim=1) - mean
    rest = (gradient + solution.y[:, :1] - y) / scale
    assert rest.abs().max() < 1e-9 * max(1, 1 / scale)
    assert w.min() > -1e-12
    contracts.assert_close(w.sum(-1), torch.ones(samples), 1e-12)


def test_what_is_wrong_in_units_of_its_own_is_not_called_solved():
    cones = Cones(nonnegative=1, second_order=(2,))
    C, d = torch.tensor([[-1.0], [0.0], [0.0]]), torch.tensor([0.0, 1.0, 0.0])
    data = Data.of({"P": torch.eye(1) * 1e-9, "q": torch.tensor([[-1e-9]]), "G": C, "h": d})
    work = ConeWork(ConeClarabel(), data, cones, 1)
    for x, right in ((1.0, True), (0.5, False)):
        work.w = torch.tensor([[x, -x, -1.0, 0.0]])
        work.residual = cone_optimality(work.w, data, cones).abs().amax(-1)
        assert work._holds(1e-6).item() is right


def test_zero_and_nonnegative_cones_are_a_quadratic_program():
    cones = Cones(1, 4)
    (L, q, C, d), (x, y, s) = made(cones)
    P = L @ L.mT + torch.eye(5)
    for solver in ("clarabel", DAQP(), "scs"):
        solution = solve_cone(P, q, C, d, cones, solver=solver)
        contracts.assert_close((solution.x, solution.y, solution.s), (x, y, s), 1e-9)
    other = solve_qp(P, q, C[:, 1:], d[:, 1:], C[:, :1], d[:, :1])
    contracts.assert_close(other.x, solution.x, 1e-9)
    again = solve_cone(P, q, C, d, cones, init=solve_cone(P, q, C, d, cones))
    assert not again.stats["steps"].any()


def test_warm_starts_need_no_backend():
    cones = KINDS["all"]
    (L, q, C, d), _ = made(cones)
    P = L @ L.mT + torch.eye(len(q[0]))
    first = solve_cone(P, q, C, d, cones)
    near = solve_cone(P, q + 1e-4, C, d, cones, init=first)
    assert not near.stats["steps"].any()
    contracts.assert_close(near.x, solve_cone(P, q + 1e-4, C, d, cones).x, 1e-9)


def test_threads_and_sparse_blocks_give_the_same():
    cones = KINDS["all"]
    (L, q, C, d), _ = made(cones, samples=9)
    P = L @ L.mT + torch.eye(len(q[0]))
    expected = solve_cone(P, q, C, d, cones)
    threaded = solve_cone(P, q, C, d, cones, solver=Clarabel(threads=2))
    contracts.assert_close(threaded.x, expected.x, 1e-12)
    values = C.flatten(1).clone().requires_grad_()
    rows, columns = torch.meshgrid(torch.arange(C.shape[1]), torch.arange(C.shape[2]), indexing="ij")
    sparse = Sparse(torch.stack([rows.flatten(), columns.flatten()]), values, C.shape[1:])
    x = solve_cone(P, q, sparse, d, cones).x
    contracts.assert_close(x, expected.x, 1e-12)
    x.pow(2).sum().backward()
    dense = C.clone().requires_grad_()
    solve_cone(P, q, dense, d, cones).x.pow(2).sum().backward()
    contracts.assert_close(values.grad, dense.grad.flatten(1), 1e-10)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_samples_without_a_solution_among_healthy_ones(solver):
    """Minimize x₁ in a disk, where one disk is empty, one direction is free, and one number is NaN."""
    cones = Cones(1, 1, (3,))
    C = torch.tensor([[0.0, 0, 1], [-1, 0, 0], [0, 0, 0], [-1, 0, 0], [0, -1, 0]]).repeat(4, 1, 1)
    d = torch.tensor([1.0, 5, 2, 0, 0]).repeat(4, 1)
    d[1, 2] = -1
    C[2, 3:] = 0
    C[2, 1] = torch.tensor([1.0, 0, 0])
    d[3, 4] = torch.nan
    q = torch.tensor([1.0, 0.5, 0]).repeat(4, 1).requires_grad_()
    with pytest.raises(SolverError, match="INFEASIBLE in 1 of 4 samples \\(1\\)"):
        solve_cone(None, q, C, d, cones, solver=solver)
    with pytest.warns(ConvergenceWarning):
        solution = solve_cone(None, q, C, d, cones, solver=solver, on_failure="warn")
    assert solution.status.tolist() == [Status.SUCCESS, Status.INFEASIBLE, Status.UNBOUNDED, Status.NONFINITE]
    assert solution.x[1:].isnan().all()
    assert solution.y[1:].isnan().all()
    assert (solution.stats["certificate"][1, 3:] @ d[1]) < 0
    contracts.assert_close(solution.x[0, :2], -2 * q[0, :2].detach() / q[0, :2].detach().norm(), 1e-9)
    solution.x[solution.ok].sum().backward()
    assert q.grad.isfinite().all()
    assert not q.grad[1:].any()
    alone = q.detach()[:1].clone().requires_grad_()
    solve_cone(None, alone, C[:1], d[:1], cones, solver=solver).x.sum().backward()
    contracts.assert_close(q.grad[0], alone.grad[0], 1e-9)


def test_float32_and_numpy():
    cones = KINDS["all"]
    (L, q, C, d), (x, _, _) = made(cones)
    narrow = [block.float().requires_grad_() for block in (q, C, d)]
    P = (L @ L.mT + torch.eye(len(q[0]))).float()
    solution = solve_cone(P, *narrow, cones)
    assert solution.x.dtype == solution.s.dtype == torch.float32
    contracts.assert_close(solution.x.double(), x, 1e-4)
    gradients = torch.autograd.grad(solution.x.pow(2).sum(), narrow)
    wide = contracts.wanting((q, C, d))
    expected = torch.autograd.grad(solve_cone(P.double(), *wide, cones).x.pow(2).sum(), wide)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert ours.dtype == torch.float32
        assert (ours.double() - theirs).norm() <= 1e-3 * (1 + theirs.norm())
    wide = [block.numpy() for block in (L @ L.mT + torch.eye(len(q[0])), q, C, d)]
    named = {"zero": 1, "nonnegative": 2, "second_order": [3], "semidefinite": [2], "exponential": 1, "power": [0.4]}
    arrays = solve_cone(*wide, named)
    assert abs(arrays.x - x.numpy()).max() < 1e-9


def test_an_empty_batch():
    cones = KINDS["second order"]
    blocks = [block[:0].requires_grad_() for block in made(cones)[0]]
    x = call(cones)(*blocks)
    assert x.shape == (0, cones.rows)
    x.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"C": (9, 3)}, "C has 3 columns but q has 10"),
        ({"d": (3,)}, "C has 10 rows but d has 3"),
        ({"P": (3, 3)}, "P has 3 columns but q has 10"),
        ({"P": -torch.eye(10, dtype=torch.float64)}, "isn't positive semidefinite"),
        ({"cones": Cones(1, 1)}, "the cones have 2 rows but d has 10"),
        ({"q": None}, "q is missing"),
        ({"d": torch.ones(10, dtype=torch.float32)}, "d is torch.float32"),
        ({"q": torch.ones(10, dtype=torch.int64)}, "q has dtype torch.int64"),
        ({"init": 3}, "init is int"),
        ({"solver": "clarabell"}, "did you mean 'clarabel'"),
    ],
)
def test_wrong_calls(change, message):
    cones = KINDS["second order"]
    change = {name: torch.ones(value) if isinstance(value, tuple) else value for name, value in change.items()}
    arguments = {"P": torch.eye(10), "q": torch.ones(10), "C": torch.eye(10), "d": torch.ones(10), "cones": cones}
    with pytest.raises(ProblemError, match=message):
        solve_cone(**{**arguments, **change})


def test_a_solver_for_quadratic_programs_is_refused():
    cones = KINDS["second order"]
    with pytest.raises(TypeError, match="DAQP serves qp, not cone; use Clarabel"):
        solve_cone(None, torch.ones(10), torch.eye(10), torch.ones(10), cones, solver=DAQP())


def test_a_backend_that_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "scs", None)
    with pytest.raises(MissingBackendError, match="pip install"):
        call(KINDS["all"], solver="scs")(*made(KINDS["all"])[0])


def test_several_threads_factor_large_systems():
    """Where torch's batched LU factorization fails."""
    cones = Cones(second_order=(120,))
    blocks, (x, _, _) = made(cones, samples=8)
    torch.set_num_threads(2)
    try:
        contracts.assert_close(call(cones)(*blocks), x, 1e-9)
    finally:
        torch.set_num_threads(1)
