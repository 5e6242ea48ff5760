"""What every solver does with input that it can hardly serve: a status or an error, and nobody else harmed."""

from collections.abc import Callable
from dataclasses import dataclass

import contracts
import pytest
import torch

from difflayers import (
    CallableSolver,
    ImplicitAdjoint,
    ImplicitFunction,
    RootProblem,
    Status,
    UnrolledAdjoint,
    available_solvers,
    linear,
)
from difflayers.errors import ConvergenceWarning, LinearSolveError, ProblemError, SolverError
from difflayers.fixedpoint import (
    ForwardBackward,
    MinimizeProblem,
    PeacemanRachford,
    Picard,
    fixed_point,
    least_squares,
    minimize,
    root,
)
from difflayers.fixedpoint._splitting import MonotoneProblem

FUNCTIONS = {"root": root, "fixed_point": fixed_point, "minimize": minimize, "least_squares": least_squares}
FOLLOWERS = ("anderson", "broyden", "picard")  # of the map, or of F itself
SOLVERS = available_solvers("fixedpoint")
PAIRS = [
    pytest.param(form, name, id=f"{form}-{name}")
    for name, cls in SOLVERS.items()
    for form in sorted(cls.serves)
    if name not in FOLLOWERS or form == "fixed_point"  # a root they find only where F leads to it
]
every_pair = pytest.mark.parametrize(("form", "name"), PAIRS)
CLOSED = [p for p in PAIRS if p.values[0] != "least_squares"]  # where what doesn't vanish is no answer
UNROLLABLE = [p for p in CLOSED if p.values[0] != "minimize" and SOLVERS[p.values[1]].traceable]


@dataclass(frozen=True)
class Case:
    """A fixed point ``z = cell(z, ...)`` that is where ``potential(z, ...)``, one number a sample, is stationary."""

    cell: Callable
    potential: Callable

    def solve(self, form, solver, z0, args=(), **options):
        def gap(z, *args):
            return z - self.cell(z, *args)

        fn = {"fixed_point": self.cell, "minimize": self.potential}.get(form, gap)
        return FUNCTIONS[form](fn, z0, args, solver=solver, **options)


WAVE = Case(
    lambda z, w, c: 0.5 * w * torch.sin(z) + c,
    lambda z, w, c: (z**2 / 2 + 0.5 * w * torch.cos(z) - c * z).sum(-1),
)
ADRIFT = Case(lambda z: z + 1, lambda z: -z.sum(-1))
SQUARE = Case(lambda z, s: s * z**2 / 2 + 0.25, lambda z, s: (z**2 / 2 - s * z**3 / 6 - z / 4).sum(-1))
FLAT = Case(lambda z, a, c: z - a * (z - c), lambda z, a, c: (a * (z - c) ** 2 / 2).sum(-1))
BISTABLE = Case(lambda z: torch.tanh(3 * z), lambda z: (z**2 / 2 - torch.nn.functional.softplus(6 * z) / 3 + z).sum(-1))
STEEP = Case(
    lambda z, r, k, c: z - (1 - r) * (z - c) - k * (z - c) ** 3,
    lambda z, r, k, c: ((1 - r) * (z - c) ** 2 / 2 + k * (z - c) ** 4 / 4).sum(-1),
)


def coupled(z, A, c):
    return (A @ z.unsqueeze(-1)).squeeze(-1) + c


COUPLED = Case(coupled, lambda z, A, c: (z * (z / 2 - coupled(z, A, 0) / 2 - c)).sum(-1))


def symmetric():
    """Sample 0 has no coupling, so that one step solves its linear systems; sample 1 has."""
    A = torch.randn(3, 3)
    A = A + A.mT
    return torch.stack([torch.zeros(3, 3), 0.8 * A / torch.linalg.matrix_norm(A, 2)])


def gradients(solution, *params):
    """Of a loss from which failed samples are masked."""
    return torch.autograd.grad(solution.value[solution.ok].sum(), params)


@every_pair
def test_samples_that_are_not_finite_leave_the_others_alone(form, name):
    offsets, z0 = torch.randn(5, 3), torch.randn(5, 3)
    offsets[1, 0], offsets[3], z0[4, 2] = torch.nan, torch.inf, torch.nan
    healthy, start = [0, 2], z0.clone()
    params = contracts.wanting((torch.rand(3), offsets))
    alone = contracts.wanting((params[0].detach(), offsets[healthy]))
    options = {"solver": SOLVERS[name](), "batch_dims": 1}
    solution = WAVE.solve(form, z0=z0, args=params, on_failure="ignore", **options)
    expected = WAVE.solve(form, z0=z0[healthy], args=alone, **options)
    ok, broken = int(Status.SUCCESS), int(Status.NONFINITE)
    assert solution.status.tolist() == [ok, broken, ok, broken, broken]
    assert solution.value[~solution.ok].isnan().all()
    contracts.assert_close(solution.value[healthy], expected.value, 1e-13)
    assert solution.stats["steps"][healthy].tolist() == expected.stats["steps"].tolist()
    assert torch.equal(z0.nan_to_num(), start.nan_to_num())
    shared, own = gradients(solution, *params)
    expected_shared, expected_own = gradients(expected, *alone)
    contracts.assert_close(shared, expected_shared, 1e-12)
    contracts.assert_close(own[healthy], expected_own, 1e-12)
    assert (own[~solution.ok] == 0).all()


@pytest.mark.parametrize(("form", "name"), CLOSED)
def test_without_a_fixed_point_nothing_succeeds(form, name):
    solver = SOLVERS[name](max_steps=3) if name == "scipy_minimize" else SOLVERS[name]()
    options = {"solver": solver, "batch_dims": 1}
    solution = ADRIFT.solve(form, z0=torch.zeros(2, 3), on_failure="ignore", **options)
    assert not solution.ok.any()
    failed = Status(solution.status[0].item()).name
    with pytest.raises(SolverError, match=failed):
        ADRIFT.solve(form, z0=torch.zeros(2, 3), **options)
    with pytest.warns(ConvergenceWarning, match=failed):
        ADRIFT.solve(form, z0=torch.zeros(2, 3), on_failure="warn", **options)


@every_pair
def test_a_divergent_map_leaves_its_neighbor_alone(form, name):
    slope = torch.tensor([[0.5], [3.0]], requires_grad=True)  # two fixed points for slopes below 2, none above
    options = {"solver": SOLVERS[name](), "batch_dims": 1}
    solution = SQUARE.solve(form, z0=torch.zeros(2, 1), args=(slope,), on_failure="ignore", **options)
    alone = SQUARE.solve(form, z0=torch.zeros(1, 1), args=(slope[:1],), **options)
    assert solution.ok[0]
    if form == "least_squares":  # where the gap is least, without being zero
        contracts.assert_close(solution.value[1], torch.full((1,), 1 / 3), 1e-6)
    else:
        assert not solution.ok[1]
    contracts.assert_close(solution.value[:1], alone.value, 1e-12)
    (own,) = torch.autograd.grad(solution.value[0].sum(), slope)
    contracts.assert_close(own[:1], gradients(alone, slope)[0][:1], 1e-12)
    assert own[1].item() == 0


@every_pair
def test_a_singular_jacobian_is_flagged_where_a_derivative_needs_it(form, name):
    a = torch.tensor([[1.0, 1.0], [1.0, 0.0]])  # of sample 1 nothing determines the second entry
    c = torch.ones(2, 2, requires_grad=True)
    options = {"solver": SOLVERS[name](), "batch_dims": 1, "args": (a, c)}
    z0 = torch.zeros(2, 2)
    z0[1, 0] = 1
    solution = FLAT.solve(form, z0=z0, **options)
    contracts.assert_close(solution.value[0], torch.ones(2), 1e-7)
    with pytest.raises(LinearSolveError, match=r"1 of 2 samples \(1\)"):
        solution.value.sum().backward()
    solution = FLAT.solve(form, z0=z0, on_failure="warn", **options)
    with pytest.warns(ConvergenceWarning, match=r"SINGULAR in 1 of 2 samples \(1\)"):
        solution.value.sum().backward()
    contracts.assert_close(c.grad, torch.tensor([[1.0, 1.0], [0.0, 0.0]]), 1e-7)


@every_pair
def test_several_answers_are_told_apart_by_the_start(form, name):
    z0 = torch.tensor([[0.5], [-0.5], [1.5], [-1.5]])
    first, again = (BISTABLE.solve(form, SOLVERS[name](), z0, batch_dims=1) for _ in range(2))
    assert torch.equal(first.value, again.value)
    contracts.assert_close(torch.tanh(3 * first.value), first.value, 1e-7)
    contracts.assert_close(first.value[::2], -first.value[1::2], 1e-7)


@every_pair
def test_a_hard_sample_costs_the_others_nothing(form, name):
    # Slow for those that follow the map; far away for those that linearize.
    slow, far = (0.99, 0.0) if name in FOLLOWERS else (0.1, 1e4)
    r, k = torch.tensor([0.1, 0.1, slow])[:, None], torch.tensor([0.0, 0.0, 0.0 if far == 0 else 1.0])[:, None]
    c = torch.tensor([[1.0, 2.0], [0.5, -1.0], [1.0, 2.0]])
    z0 = torch.tensor([[0.0, 0.0], [0.0, 0.0], [far, -far]])
    solver = Picard(max_steps=5000, patience=5000) if name == "picard" else SOLVERS[name]()
    options = {"solver": solver, "batch_dims": 1}
    together = STEEP.solve(form, z0=z0, args=(r, k, c), on_failure="ignore", **options)
    alone = STEEP.solve(form, z0=z0[:2], args=(r[:2], k[:2], c[:2]), **options)
    steps = together.stats["steps"]
    if name != "anderson" and name != "broyden":  # which know a linear map after a few steps
        assert steps[2] > 2 * steps[0] or not together.ok[2]
    if name == "picard":
        assert steps[2] > 100 * steps[0]
    assert steps[:2].tolist() == alone.stats["steps"].tolist()
    contracts.assert_close(together.value[:2], alone.value, 1e-13)


@every_pair
def test_unconverged_solves_are_flagged_per_sample(form, name):
    c = torch.tensor([[0.3], [0.6]])
    z0 = torch.zeros(2, 1)
    options = {"batch_dims": 1, "args": (torch.ones(1), c)}
    z0[0] = WAVE.solve(form, SOLVERS[name](), z0, **options).value[0]
    solver = SOLVERS[name](max_steps=1)
    solution = WAVE.solve(form, solver, z0, on_failure="ignore", **options)
    assert solution.status[1].item() == Status.MAX_STEPS
    assert solution.value.isfinite().all()
    with pytest.raises(SolverError, match=r"MAX_STEPS in . of 2 samples"):
        WAVE.solve(form, solver, z0, **options)
    with pytest.warns(ConvergenceWarning, match="MAX_STEPS"):
        WAVE.solve(form, solver, z0, on_failure="warn", **options)
    if not name.startswith("scipy"):
        assert solution.status[0].item() == Status.SUCCESS
        assert solution.stats["steps"].tolist() == [0, 1]


@pytest.mark.parametrize(("form", "name"), UNROLLABLE)
def test_unconverged_unrolled_solves_are_flagged(form, name):
    c = torch.tensor([[0.3], [0.6]], requires_grad=True)
    options = {"batch_dims": 1, "args": (torch.ones(1), c), "adjoint": UnrolledAdjoint()}
    with pytest.warns(ConvergenceWarning, match="MAX_STEPS in 2 of 2 samples"):
        solution = WAVE.solve(form, SOLVERS[name](max_steps=1), torch.zeros(2, 1), on_failure="warn", **options)
    assert solution.value.isfinite().all()


@every_pair
def test_unconverged_adjoints_are_flagged_per_sample(form, name):
    c = torch.randn(2, 3, requires_grad=True)
    options = {
        "solver": SOLVERS[name](), "batch_dims": 1, "args": (symmetric(), c),
        "adjoint": ImplicitAdjoint(linear.BiCGSTAB(max_steps=1)),
    }  # fmt: skip
    with pytest.raises(LinearSolveError, match=r"adjoint system of a derivative: MAX_STEPS in 1 of 2 samples \(1\)"):
        COUPLED.solve(form, z0=torch.zeros(2, 3), **options).value.sum().backward()
    solution = COUPLED.solve(form, z0=torch.zeros(2, 3), on_failure="warn", **options)
    with pytest.warns(ConvergenceWarning, match=r"MAX_STEPS in 1 of 2 samples \(1\)"):
        solution.value.sum().backward()
    contracts.assert_close(c.grad[0], torch.ones(3), 1e-7)
    assert c.grad.isfinite().all()


LIMITED = [
    linear.GCR(max_steps=1), linear.GMRES(max_steps=1), linear.BiCGSTAB(max_steps=1), linear.CG(max_steps=1),
    linear.Picard(max_steps=1), linear.Anderson(max_steps=1),
]  # fmt: skip


@pytest.mark.parametrize("mode", ["reverse", "forward"])
@pytest.mark.parametrize("linear_solver", LIMITED, ids=repr)
def test_unconverged_linear_solvers_are_flagged(linear_solver, mode):
    A, c = symmetric(), torch.randn(2, 3)
    if isinstance(linear_solver, linear.CG):
        problem = MinimizeProblem(COUPLED.potential, 1, frozenset({"symmetric", "positive_definite"}))
        solver = "newton"
    else:
        problem, solver = None, "anderson"

    def call(c, on_failure):
        if problem is not None:
            fn = ImplicitFunction(problem, SOLVERS[solver](), ImplicitAdjoint(linear_solver), on_failure)
            return fn(A, c, init=torch.zeros(2, 3)).value
        return COUPLED.solve(
            "fixed_point", solver, torch.zeros(2, 3), (A, c), batch_dims=1, adjoint=ImplicitAdjoint(linear_solver),
            on_failure=on_failure,
        ).value  # fmt: skip

    def derivative(on_failure):
        if mode == "forward":
            return torch.func.jvp(lambda c: call(c, on_failure), (c,), (torch.ones(2, 3),))[1]
        (leaf,) = contracts.wanting((c,))
        return torch.autograd.grad(call(leaf, on_failure).sum(), leaf)[0]

    role = "adjoint" if mode == "reverse" else "tangent"
    with pytest.raises(LinearSolveError, match=rf"{role} system of a derivative: \w+ in 1 of 2 samples \(1\)"):
        derivative("raise")
    with pytest.warns(ConvergenceWarning, match=r"1 of 2 samples \(1\)"):
        found = derivative("warn")
    contracts.assert_close(found[0], torch.ones(3))
    exact = torch.linalg.solve(torch.eye(3) - A[1], torch.ones(3))
    assert (found[1] - exact).norm() > 1e-3  # as far as one step leads: hence the warning
    assert found.isfinite().all()


@every_pair
def test_a_function_that_ignores_its_unknown_is_found_out(form, name):
    if form == "fixed_point":  # which is a fixed point, and a trivial one
        c = torch.randn(2, 3, requires_grad=True)
        value = fixed_point(lambda z, c: 2 * c, torch.zeros(2, 3), (c,), solver=name, batch_dims=1).value
        contracts.assert_close(value, 2 * c, 1e-7)
        contracts.assert_close(torch.autograd.grad(value.sum(), c)[0], torch.full((2, 3), 2.0), 1e-7)
        return
    total = {"minimize": lambda z, c: c.sum(-1)}.get(form, lambda z, c: c)
    detached = {"minimize": lambda z, c: z.detach().sum(-1)}.get(form, lambda z, c: z.detach() - c)
    for fn in (total, detached):
        with pytest.raises(ProblemError, match="doesn't depend on its unknown"):
            FUNCTIONS[form](fn, torch.zeros(2, 3), (torch.ones(2, 3),), solver=name, batch_dims=1)


@every_pair
def test_parameters_that_are_ignored_get_no_gradient(form, name):
    w, c, unused = contracts.wanting((torch.ones(3), torch.randn(2, 3), torch.ones(4)))
    case = Case(lambda z, w, c, _: WAVE.cell(z, w, c), lambda z, w, c, _: WAVE.potential(z, w, c))
    case.solve(form, SOLVERS[name](), torch.zeros(2, 3), (w, c, unused), batch_dims=1).value.sum().backward()
    assert unused.grad is None or (unused.grad == 0).all()
    assert (c.grad != 0).all()


@every_pair
@pytest.mark.parametrize("fault", ["shape", "dtype", "number"])
def test_a_function_that_changes_its_mind_midway_is_refused(form, name, fault):
    spoil = {
        "shape": lambda value: value[:1] if form in ("minimize", "least_squares") else value[..., :1],
        "dtype": lambda value: value.float(),
        "number": lambda value: value.sum().item(),
    }[fault]
    messages = {
        "shape": r"returned shape \(",
        "dtype": "torch.float32, but the unknown is torch.float64",
        "number": "returned float",
    }
    calls = []

    def fickle(fn):
        def changing(z, *args):
            calls.append(1)
            value = fn(z, *args)
            return spoil(value) if len(calls) > 3 else value

        return changing

    case = Case(fickle(WAVE.cell), fickle(WAVE.potential))
    args = torch.ones(3), torch.randn(2, 3)
    if form in ("root", "least_squares"):

        def gap(z, *args):
            return z - WAVE.cell(z, *args)

        with pytest.raises(ProblemError, match=messages[fault]):
            FUNCTIONS[form](fickle(gap), torch.zeros(2, 3), args, solver=name, batch_dims=1)
        return
    with pytest.raises(ProblemError, match=messages[fault]):
        case.solve(form, name, torch.zeros(2, 3), args, batch_dims=1)


@every_pair
@pytest.mark.parametrize(
    ("z0", "args", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.int64), (torch.ones(3), torch.ones(2, 3)), r"torch.int64.*try init.double\(\)"),
        (torch.zeros(2, 3, dtype=torch.bool), (torch.ones(3), torch.ones(2, 3)), "torch.bool"),
        (torch.zeros(2, 3), (torch.ones(3), torch.ones(2, 3).double()),
         "torch.float64, but the unknown is torch.float32"),
        (torch.zeros(2, 3), (torch.ones(3), torch.ones(2, 3, device="meta")), r"parameter 1 .* is on meta"),
        (torch.zeros(2, 3, device="meta"), (torch.ones(3), torch.ones(2, 3)), r"parameter 0 .* init is on meta"),
        (torch.zeros(()), (torch.ones(3), torch.ones(2, 3)), "no 1 batch dimensions"),
    ],
    ids=["integer", "bool", "dtypes", "parameter elsewhere", "init elsewhere", "no batch"],
)  # fmt: skip
def test_tensors_that_do_not_fit(form, name, z0, args, message):
    args = tuple(arg.float() if arg.dtype != torch.float64 else arg for arg in args)
    with pytest.raises(ProblemError, match=message):
        WAVE.solve(form, name, z0, args, batch_dims=1)


@every_pair
def test_names_and_options_that_do_not_exist(form, name):
    with pytest.raises(ProblemError, match=f"unknown solver '{name}x'; did you mean '{name}'"):
        WAVE.solve(form, name + "x", torch.zeros(1), (torch.ones(1), torch.ones(1)))
    with pytest.raises(ProblemError, match=r"did you forget \(\)"):
        WAVE.solve(form, SOLVERS[name], torch.zeros(1), (torch.ones(1), torch.ones(1)))
    with pytest.raises(TypeError, match="tolerance"):
        SOLVERS[name](tolerance=1e-3)
    with pytest.raises(ProblemError, match="unknown on_failure 'rise'; did you mean 'raise'"):
        WAVE.solve(form, name, torch.zeros(1), (torch.ones(1), torch.ones(1)), on_failure="rise")


@pytest.mark.parametrize("name", [*FOLLOWERS, "scipy", "dogleg", "scipy_least_squares"])
def test_solvers_that_cannot_tell_a_minimum_from_a_maximum_are_refused(name):
    with pytest.raises(TypeError, match=r"not minimize; use LBFGS\(\), Newton\(\) or ScipyMinimize\(\)"):
        minimize(lambda z: (z**2).sum(), torch.ones(2), solver=name)


def test_newton_fits_more_residuals_than_unknowns():
    b = torch.tensor([1.0, -2.0, 3.0], requires_grad=True)

    def gap(z, b):
        return torch.cat([z.exp(), z.sum(-1, keepdim=True)], -1) - b.abs()

    value = least_squares(gap, torch.zeros(2), (b,), solver="newton").value
    contracts.assert_close(value, least_squares(gap, torch.zeros(2), (b,), solver="lm").value)
    assert torch.autograd.gradcheck(lambda b: least_squares(gap, torch.zeros(2), (b,), solver="newton").value, (b,))


def test_a_result_that_ran_away_does_not_confirm_itself():
    """``1 + exp(-z²)`` has no root; relative to ``‖z‖`` it seems to have one at 1e12."""
    wild = ImplicitFunction(
        RootProblem(lambda z: 1 + torch.exp(-(z**2))), CallableSolver(lambda residual, z: z + 1e12), on_failure="ignore"
    )
    assert wild(init=torch.zeros(2)).status.item() == Status.STALLED


SPLITTINGS = [PeacemanRachford(), ForwardBackward()]


def monotone(solver, on_failure="raise", adjoint=None):
    return ImplicitFunction(MonotoneProblem(), solver, adjoint or ImplicitAdjoint(), on_failure)


def weight(scale=0.5):
    W = torch.randn(4, 4)
    return scale * W / torch.linalg.matrix_norm(W, 2)


@pytest.mark.parametrize("solver", SPLITTINGS, ids=repr)
def test_splittings_leave_healthy_samples_alone(solver):
    offsets = torch.randn(4, 4)
    offsets[1, 0], offsets[2] = torch.nan, torch.inf
    healthy = [0, 3]
    W, x = contracts.wanting((weight(), offsets))
    alone = contracts.wanting((W.detach(), offsets[healthy]))
    solution = monotone(solver, "ignore")(W, x, init=torch.zeros(4, 4))
    expected = monotone(solver)(*alone, init=torch.zeros(2, 4))
    assert solution.status.tolist() == [Status.SUCCESS, Status.NONFINITE, Status.NONFINITE, Status.SUCCESS]
    contracts.assert_close(solution.value[healthy], expected.value, 1e-13)
    shared, own = gradients(solution, W, x)
    expected_shared, expected_own = gradients(expected, *alone)
    contracts.assert_close(shared, expected_shared, 1e-12)
    contracts.assert_close(own[healthy], expected_own, 1e-12)
    assert (own[~solution.ok] == 0).all()


@pytest.mark.parametrize("solver", SPLITTINGS, ids=repr)
def test_splittings_flag_what_is_unconverged(solver):
    x = torch.stack([-torch.ones(4), torch.rand(4)])  # zero is the answer of sample 0
    limited = type(solver)(max_steps=1)
    solution = monotone(limited, "ignore")(weight(), x, init=torch.zeros(2, 4))
    assert solution.status.tolist() == [Status.SUCCESS, Status.MAX_STEPS]
    with pytest.raises(SolverError, match=r"MAX_STEPS in 1 of 2 samples \(1\)"):
        monotone(limited)(weight(), x, init=torch.zeros(2, 4))
    x.requires_grad_()
    call = monotone(solver, "warn", ImplicitAdjoint(linear.GCR(max_steps=1)))
    with pytest.warns(ConvergenceWarning, match=r"adjoint .*MAX_STEPS in 1 of 2 samples \(1\)"):
        call(weight(), x, init=torch.zeros(2, 4)).value.sum().backward()
    assert (x.grad[0] == 0).all()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("solver", SPLITTINGS, ids=repr)
def test_splittings_on_a_map_that_is_not_monotone(solver):
    limited = type(solver)(max_steps=200)
    solution = monotone(limited, "ignore")(3 * torch.eye(4), torch.ones(2, 4), init=torch.zeros(2, 4))
    assert not solution.ok.any()
    with pytest.raises(TypeError, match="splits a MonotoneProblem"):
        fixed_point(torch.cos, torch.ones(2), solver=solver)
