"""Methods for stiff problems: order, stiff classics, derivatives, samples that fail."""

import functools
import math

import pytest
import torch
from contracts import assert_close, wanting
from ode_problems import PROBLEMS, RATES, StiffProblem, radau, reference, robertson, van_der_pol, vector
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from difflayers import UnrolledAdjoint
from difflayers.errors import ProblemError
from difflayers.ode import CheckpointedAdjoint, Dopri8, Kvaerno5, Rodas, odeint
from difflayers.ode._kvaerno import KVAERNO5, kvaerno5
from difflayers.ode._methods import stages_of
from difflayers.ode._rodas5p import RODAS5P

PACES = [False, True]
METHODS = [Rodas, Kvaerno5]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)


def swing(t, y):
    return torch.stack([y[..., 1] * (1 + t.sum()), -torch.sin(y[..., 0]) * torch.cos(3 * t.sum())], -1)


@pytest.mark.parametrize("tableau", [RODAS5P, kvaerno5(1e-10, 1e-10, 1e-5)], ids=["rodas5p", "kvaerno5"])
def test_orders(tableau):
    """Halving steps that the controller has no say in."""
    y0 = torch.tensor([[1.0, 0.5]])

    def best(until):
        return odeint(swing, y0, [0.0, until], solver=Dopri8(rtol=1e-14, atol=1e-14)).ys[-1]

    def end(steps):
        y, stages = y0, stages_of(tableau, swing, y0, False)
        for k in range(steps):
            stages.start(k / steps, y)
            y = stages.attempt(k / steps, y, 1 / steps)
        return (y - best(1.0)).norm()

    def inside(h):
        stages = stages_of(tableau, swing, y0, False)
        stages.start(0.0, y0)
        stages.attempt(0.0, y0, h)
        return (stages.inside(0.0, y0, h, 0.4) - best(0.4 * h)).norm(), stages.estimates()[0].norm() * h

    assert abs(math.log2(end(16) / end(32)) - tableau.order) < 0.4
    (one, first), (two, second) = inside(0.1), inside(0.05)
    assert abs(math.log2(one / two) - tableau.interpolant_order - 1) < 0.4
    assert abs(math.log2(first / second) - tableau.error_order) < 0.4


@pytest.mark.parametrize("tableau", [RODAS5P, KVAERNO5], ids=["rodas5p", "kvaerno5"])
def test_interpolant_meets_the_ends(tableau):
    assert_close(torch.tensor(tableau.weights(1.0)), torch.tensor(tableau.b), 1e-13)
    assert not tableau.weights(0.0).any()


def test_order_conditions_of_kvaerno5():
    """Butcher's, up to order five, and four for the embedded method; L-stability; a bounded interpolant."""
    size = KVAERNO5.stages
    A = torch.zeros(size, size)
    for i, row in enumerate(KVAERNO5.rows, 1):
        A[i, : i + 1] = torch.tensor([*row, KVAERNO5.gamma])
    c, one = A.sum(1), torch.ones(size)
    assert_close(c, torch.tensor(KVAERNO5.c), 1e-14)
    Ac, Acc = A @ c, A @ c**2
    four = [(one, 1), (c, 2), (c**2, 3), (Ac, 6), (c**3, 4), (c * Ac, 8), (Acc, 12), (A @ Ac, 24)]
    five = [(c**4, 5), (c**2 * Ac, 10), (Ac * Ac, 20), (c * Acc, 15), (c * (A @ Ac), 30), (A @ c**3, 20),
            (A @ (c * Ac), 40), (A @ Acc, 60), (A @ A @ Ac, 120)]  # fmt: skip
    b, before = A[-1], A[-2]
    assert_close(torch.stack([b @ tree * density for tree, density in four + five]), torch.ones(17), 1e-13)
    assert_close(torch.stack([before @ tree * density for tree, density in four]), torch.ones(8), 1e-13)
    assert abs(before @ c**4 * 5 - 1) > 1e-3
    assert_close(torch.tensor(KVAERNO5.error[0]), b - before, 1e-14)
    for z in (-1e9, *(1j * torch.logspace(-3, 3, 50)).tolist()):
        stages = torch.linalg.solve(torch.eye(size) - z * A.to(torch.complex128), one.to(torch.complex128))
        stability = lambda weights, z=z, k=stages: 1 + z * (weights.to(k) @ k)  # noqa: E731
        assert stability(b).abs() <= (1e-7 if z == -1e9 else 1 + 1e-12)
        if z == -1e9:
            assert max(stability(torch.tensor(KVAERNO5.weights(s))).abs() for s in (0.1, 0.4, 0.7, 0.9)) < 1


@pytest.mark.parametrize("lambda_", [1e2, 1e8])
@every_method
def test_stiff_decay_toward_a_curve(method, lambda_):
    """Prothero and Robinson's problem, whose answer is the curve however stiff the decay: ``∂f/∂t`` counts."""
    t = torch.linspace(0, 3, 7)
    fn = lambda t, y: -lambda_ * (y - torch.sin(t)) + torch.cos(t)  # noqa: E731
    solution = odeint(fn, torch.zeros(1), t, solver=method(rtol=1e-7, atol=1e-7))
    assert_close(solution.ys[:, 0], torch.sin(t), 1e-5)
    assert solution.stats["steps"] < 150


@every_method
@pytest.mark.parametrize("problem", [p for p in PROBLEMS if p.mass is None], ids=str)
def test_classics(problem: StiffProblem, method):
    expected = reference(problem.name)
    if problem.end is not None:
        assert_close(expected[-1] / problem.end, torch.ones_like(problem.end), 1e-9)
    steps = {"robertson": 200, "van_der_pol": 1500, "hires": 500, "orego": 2000}[problem.name]
    for per_sample in PACES[: 2 if problem.name == "robertson" else 1]:
        solver = method(rtol=1e-7, atol=1e-11, per_sample=per_sample)
        y0 = problem.y0.expand(2, -1)
        solution = odeint(problem.fn, y0, problem.t, problem.args, batch_dims=1, solver=solver)
        error = (solution.ys[:, 0] - expected).abs() / (expected.abs() + 1e-6)
        assert error.max() < 2e-5
        assert_close(solution.ys[:, 0], solution.ys[:, 1], 1e-9)
        assert solution.stats["steps"].max() < steps


SHORT = {"van_der_pol": 500.0, "hires": 2.0, "orego": 10.0}


def end(problem, y0, args, solve):
    """The state at a time where differences can still tell, each of its numbers in units of its size."""
    ys = solve(problem.fn, y0, [0.0, SHORT[problem.name]], args)
    return (ys[-1] / expected_end(problem.name)).sum()


@functools.cache
def expected_end(name):
    (problem,) = (p for p in PROBLEMS if p.name == name)
    return radau(problem.fn, problem.y0, [0.0, SHORT[name]], *problem.args)[-1]


@functools.cache
def differences(name):
    """The derivatives in relative changes of the start and of the rates, by differences of SciPy's answer."""
    (problem,) = (p for p in PROBLEMS if p.name == name)
    solve = lambda fn, y0, t, args: radau(fn, y0, t, *args, rtol=1e-9, atol=1e-13)  # noqa: E731
    found = []
    for start, rates in ((1e-4, 0.0), (0.0, 1e-4))[: 1 + bool(problem.args)]:
        up, down = (end(problem, problem.y0 * (1 + sign * start), [p * (1 + sign * rates) for p in problem.args], solve)
                    for sign in (1, -1))  # fmt: skip
        found.append((up - down) / 2e-4)
    return torch.stack(found)


@every_method
@pytest.mark.parametrize("problem", [p for p in PROBLEMS if p.name in SHORT], ids=str)
def test_gradients_of_classics(problem, method):
    inputs = wanting((problem.y0, *problem.args))
    solver = method(rtol=1e-6, atol=1e-10)
    value = end(problem, inputs[0], inputs[1:], lambda *p: odeint(*p, solver=solver).ys)
    start, *rates = (g * x.detach() for g, x in zip(torch.autograd.grad(value, inputs), inputs, strict=True))
    assert_close(torch.stack([g.sum() for g in (start, *rates)]), differences(problem.name), 1e-4)


def field(t, y, A, b, rate):
    return rate * torch.tanh(y @ A.mT) + b * torch.cos(3 * t) * torch.sin(y)


def params():
    """``y0, A, b, rate, t``: two shared arguments, and one that goes with the samples."""
    rate = torch.tensor([[0.5], [1.0], [4.0]])
    return torch.randn(3, 2), torch.randn(2, 2), torch.randn(2), rate, torch.tensor([0.0, 0.2, 0.2, 0.5])


def layer(solver, adjoint=None):
    def call(y0, A, b, rate, t):
        return odeint(field, y0, t, (A, b, rate), batch_dims=1, solver=solver, adjoint=adjoint).ys

    return call


def cubed(fn):
    return lambda *args: fn(*args).pow(3).sum()


@pytest.mark.parametrize("per_sample", PACES)
@pytest.mark.parametrize("states", [None, 3])
def test_gradient_is_that_of_the_discrete_solution(per_sample, states):
    inputs, solver = wanting(params()), Rodas(rtol=1e-3, atol=1e-3, per_sample=per_sample)
    ours, unrolled = (
        torch.autograd.grad(cubed(layer(solver, rule))(*inputs), inputs)
        for rule in (CheckpointedAdjoint(states), UnrolledAdjoint())
    )
    assert_close(ours, unrolled, 1e-11)


@pytest.mark.parametrize("per_sample", PACES)
@pytest.mark.parametrize("states", [None, 3])
def test_gradient_follows_the_implicit_function_theorem(per_sample, states):
    """However loose the tolerance is, if only the stages are solved: as on the tape of the same steps."""
    inputs, solver = wanting(params()), Kvaerno5(rtol=1e-3, atol=1e-3, per_sample=per_sample, newton=1e-9)
    value = cubed(layer(solver, CheckpointedAdjoint(states)))(*inputs)
    taped = torch.autograd.grad(value, inputs, create_graph=True)
    assert_close(torch.autograd.grad(value, inputs), taped, 1e-9)
    unrolled = torch.autograd.grad(cubed(layer(solver, UnrolledAdjoint()))(*inputs), inputs)
    assert_close(taped, unrolled, 1e-9 if per_sample else 1e-4)  # joint steps follow an estimate far below its rounding


def solvers(per_sample):
    return [Rodas(rtol=1e-8, atol=1e-8, per_sample=per_sample),
            Kvaerno5(rtol=1e-8, atol=1e-8, per_sample=per_sample, newton=1e-3)]  # fmt: skip


@pytest.mark.parametrize("solver", [*solvers(False), *solvers(True)], ids=repr)
def test_finite_differences(solver):
    inputs = wanting((*params()[:4], torch.tensor([0.0, 0.02, 0.04])))
    solve = layer(solver)
    assert torch.autograd.gradcheck(solve, inputs, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    few = wanting((torch.randn(1, 2), torch.randn(2, 2), torch.randn(2), torch.ones(1, 1), torch.tensor([0.0, 0.04])))
    assert torch.autograd.gradgradcheck(solve, few, atol=1e-5, fast_mode=True)


@every_method
@pytest.mark.parametrize("per_sample", PACES)
def test_transforms(method, per_sample):
    inputs, every = params(), (0, 1, 3)
    solve = layer(method(rtol=1e-6, atol=1e-6, per_sample=per_sample))
    other = layer(Dopri8(rtol=1e-8, atol=1e-8))
    assert_close(grad(cubed(solve), every)(*inputs), grad(cubed(other), every)(*inputs), 1e-3)
    assert_close(jacrev(solve, 3)(*inputs), jacrev(other, 3)(*inputs), 1e-3)
    assert_close(jacfwd(solve, 3)(*inputs), jacfwd(other, 3)(*inputs), 1e-3)
    few = (inputs[0], *inputs[1:4], torch.tensor([0.0, 0.1]))
    assert_close(hessian(cubed(solve), 3)(*few), hessian(cubed(other), 3)(*few), 1e-2)
    y0, A, b, rate, t = inputs
    dims, args = (None, 0, None, None, None), (y0, torch.stack([A, 0.9 * A]), b, rate, t)
    assert_close(vmap(solve, dims)(*args), vmap(other, dims)(*args), 1e-4)
    ours, theirs = (vmap(grad(cubed(fn), 1), dims)(*args) for fn in (solve, other))
    assert_close(ours, theirs, 1e-3)


@pytest.mark.parametrize("per_sample", PACES)
@every_method
def test_stiff_gradient(method, per_sample):
    """Robertson's rates, against differences of SciPy's answer."""
    y0, t = torch.tensor([1.0, 0.0, 0.0]), [0.0, 40.0]
    rates = RATES.clone().requires_grad_()
    solver = method(rtol=1e-8, atol=1e-12, per_sample=per_sample)
    ys = odeint(robertson, y0[None], t, (rates,), batch_dims=1, solver=solver).ys
    (ours,) = torch.autograd.grad(ys[-1, 0, 0], rates)
    assert_close(ours * RATES, robertson_differences(), 1e-5)


@functools.cache
def robertson_differences():
    found = []
    for step in torch.diag(1e-3 * RATES):
        up, down = (radau(robertson, vector(1, 0, 0), [0.0, 40.0], RATES + sign * step)[-1, 0] for sign in (1, -1))
        found.append((up - down) / 2e-3)
    return torch.stack(found)


@every_method
def test_every_sample_has_the_steps_that_it_needs(method):
    mu, t, y0 = torch.tensor([1.0, 10.0, 1000.0]), torch.tensor([0.0, 8.0]), torch.tensor([[2.0, 0.0]])
    solver = method(per_sample=True)
    together = odeint(van_der_pol, y0.expand(3, -1), t, (mu,), batch_dims=1, solver=solver)
    assert len(set(together.stats["steps"].tolist())) == 3
    for i in range(3):
        alone = odeint(van_der_pol, y0, t, (mu[[i]],), batch_dims=1, solver=solver)
        # A step takes the iterations that the slowest of its samples needs.
        for name in ("steps", "accepted", "rejected", "evaluations")[: 3 if method is Kvaerno5 else 4]:
            assert together.stats[name][i] == alone.stats[name][0]
        assert_close(together.ys[:, i], alone.ys[:, 0], 1e-11)


@every_method
def test_one_system_of_any_shape(method):
    y0, A = torch.randn(2, 3), torch.randn(3, 3)
    fn = lambda t, y, A: torch.tanh(y.flip(0) @ A) - y.mean()  # noqa: E731
    inputs, t = wanting((y0, A)), [0.0, 0.5, 1.0]
    ours, theirs = (odeint(fn, inputs[0], t, inputs[1:], solver=kind(rtol=1e-9, atol=1e-9)).ys
                    for kind in (method, Dopri8))  # fmt: skip
    assert_close(ours, theirs, 1e-7)
    assert_close(*(torch.autograd.grad(ys.pow(2).sum(), inputs) for ys in (ours, theirs)), 1e-6)


@every_method
def test_trees_complex_numbers_and_dtypes(method):
    tree = {"a": torch.ones(3, 2), "b": torch.ones(3, dtype=torch.complex128)}
    fn = lambda t, y: {"a": -2 * t * y["a"], "b": 1j * y["b"]}  # noqa: E731
    for batch_dims in (0, 1):
        ys = odeint(fn, tree, [0.0, 1.0], batch_dims=batch_dims, solver=method(rtol=1e-9, atol=1e-9)).ys
        assert_close(ys["a"][-1], tree["a"] / math.e, 1e-7)
        assert_close(ys["b"][-1], tree["b"] * complex(math.cos(1), math.sin(1)), 1e-7)
    single = odeint(lambda t, y: -y, torch.ones(2, dtype=torch.float32), [0.0, 1.0], solver=method.__name__.lower()).ys
    assert single.dtype == torch.float32
    assert_close(single[-1], torch.full((2,), math.exp(-1), dtype=torch.float32), 1e-5)
    for per_sample in PACES:
        nobody = {"a": torch.zeros(0, 2, requires_grad=True), "b": torch.zeros(0, 3)}
        solver = method(per_sample=per_sample)
        empty = odeint(lambda t, y: {k: -v for k, v in y.items()}, nobody, [0.0, 1.0], batch_dims=1, solver=solver).ys
        assert (empty["a"].shape, empty["b"].shape) == ((2, 0, 2), (2, 0, 3))
        empty["a"].sum().backward()


@every_method
def test_fields_without_a_derivative(method):
    """Constants, and parameters that a field closes over."""
    ys = odeint(lambda t, y: torch.ones_like(y), torch.zeros(2, requires_grad=True), [0.0, 1.0], solver=method()).ys
    assert_close(ys[-1], torch.ones(2), 1e-12)
    rate = torch.tensor(2.0, requires_grad=True)
    ys = odeint(lambda t, y: -rate * y, torch.ones(1), [0.0, 1.0], solver=method(rtol=1e-9, atol=1e-9)).ys
    assert_close(torch.autograd.grad(ys[-1].sum(), rate)[0], torch.tensor(-math.exp(-2)), 1e-7)
    with torch.inference_mode():
        ys = odeint(lambda t, y: -y, torch.ones(1), [0.0, 1.0], solver=method()).ys
        assert_close(ys[-1], torch.tensor([math.exp(-1)]), 1e-5)


@pytest.mark.parametrize("per_sample", PACES)
@every_method
def test_failed_samples_leave_the_others_alone(method, per_sample):
    def fn(t, y, kind, scale):
        nan = torch.where(t > 0.6, torch.nan, -y)
        root = y * torch.where(kind == 2, torch.inf, 1.0)
        return scale * torch.where(kind == 0, -y, torch.where(kind == 1, nan, root))

    kind, scale = torch.tensor([[0.0], [1.0], [2.0], [0.0]]), torch.ones((), requires_grad=True)
    y0, t = torch.ones(4, 1, requires_grad=True), torch.linspace(0, 2, 9)
    solver = method(per_sample=per_sample)
    solution = odeint(fn, y0, t, (kind, scale), batch_dims=1, solver=solver, on_failure="ignore")
    assert solution.ok.tolist() == [True, False, False, True]
    assert solution.status.tolist()[1:3] == [3, 3]
    assert_close(solution.stats["time"], torch.tensor([2.0, 0.6, 0.0, 2.0]), 1e-3)
    assert solution.stats["evaluations"].max() < 10000
    assert_close(solution.ys[:, 0], torch.exp(-t)[:, None], 1e-5)
    gradients = torch.autograd.grad(solution.ys[:, solution.ok].sum(), (y0, scale), retain_graph=True)
    assert gradients[0][1:3].tolist() == [[0.0]] * 2
    assert_close(gradients[1], -2 * (t * torch.exp(-t)).sum(), 1e-5)
    (again,) = torch.autograd.grad(solution.ys[:, solution.ok].sum(), scale, create_graph=True)
    assert_close(again, gradients[1], 1e-10)
    if per_sample:
        healthy = odeint(lambda t, y: -y, torch.ones(2, 1), t, batch_dims=1, solver=solver)
        assert_close(solution.ys[:, [0, 3]], healthy.ys, 1e-13)


@pytest.mark.parametrize("per_sample", PACES)
@pytest.mark.parametrize("fn", [lambda t, y: y * y, lambda t, y: -y.sign(), lambda t, y: y * torch.nan,
                                lambda t, y: -1 / y.clamp_min(0).sqrt()])  # fmt: skip
@every_method
def test_evaluations_are_bounded(method, fn, per_sample):
    solution = odeint(fn, torch.ones(1, 1), [0.0, 3.0], batch_dims=1, solver=method(per_sample=per_sample),
                      on_failure="ignore")  # fmt: skip
    assert not solution.ok.any()
    assert solution.stats["evaluations"] < 20000


@every_method
def test_evaluations_are_counted(method):
    calls = 0

    def fn(t, y):
        nonlocal calls
        calls += 1
        return swing(t, y)

    with torch.no_grad():
        for per_sample in PACES:
            calls = 0
            solution = odeint(fn, torch.ones(2), torch.linspace(0, 3, 20), solver=method(per_sample=per_sample))
            assert solution.stats["evaluations"] == calls


@every_method
def test_stages_in_parallel_are_for_explicit_methods(method):
    with pytest.raises(TypeError, match="explicit"):
        odeint(
            lambda t, y: -y,
            torch.ones(1),
            [0.0, 1.0],
            solver=method(),
            adjoint=CheckpointedAdjoint(stage_parallel=True),
        )


def test_bad_options():
    with pytest.raises(ProblemError, match="newton"):
        Kvaerno5(newton=0.0)
    with pytest.raises(ProblemError, match="rtol"):
        Kvaerno5(rtol=-1.0)
