"""The linearly implicit method: order, stiff classics, derivatives, samples that fail."""

import math

import pytest
import torch
from contracts import assert_close, wanting
from scipy.integrate import solve_ivp
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from difflayers import UnrolledAdjoint
from difflayers.ode import CheckpointedAdjoint, Dopri8, Rodas, odeint
from difflayers.ode._rodas5p import RODAS5P
from difflayers.ode._rosenbrock import RosenbrockStages

PACES = [False, True]
RATES = torch.tensor([0.04, 3e7, 1e4], dtype=torch.float64)


def swing(t, y):
    return torch.stack([y[..., 1] * (1 + t.sum()), -torch.sin(y[..., 0]) * torch.cos(3 * t.sum())], -1)


def robertson(t, y, rates):
    k1, k2, k3 = rates.unbind(-1)
    a, b, c = y.unbind(-1)
    first, second, third = k1 * a, k2 * b * b, k3 * b * c
    return torch.stack((third - first, first - third - second, second), -1)


def van_der_pol(t, y, mu):
    x, v = y.unbind(-1)
    return torch.stack((v, mu * (1 - x * x) * v - x), -1)


def hires(t, y):
    a, b, c, d, e, f, g, h = y.unbind(-1)
    return torch.stack((
        -1.71 * a + 0.43 * b + 8.32 * c + 0.0007,
        1.71 * a - 8.75 * b,
        -10.03 * c + 0.43 * d + 0.035 * e,
        8.32 * b + 1.71 * c - 1.12 * d,
        -1.745 * e + 0.43 * f + 0.43 * g,
        -280 * f * h + 0.69 * d + 1.71 * e - 0.43 * f + 0.69 * g,
        280 * f * h - 1.81 * g,
        -280 * f * h + 1.81 * g,
    ), -1)  # fmt: skip


def radau(fn, y0, t, *args):
    """SciPy's answer, far tighter."""

    def plain(t, y):
        return fn(torch.tensor(t), torch.from_numpy(y), *args).numpy()

    found = solve_ivp(plain, (float(t[0]), float(t[-1])), y0.numpy(), "Radau", t, rtol=3e-9, atol=1e-13)
    return torch.from_numpy(found.y.T)


def test_orders():
    """Halving steps that the controller has no say in."""
    y0 = torch.tensor([[1.0, 0.5]])

    def best(until):
        return odeint(swing, y0, [0.0, until], solver=Dopri8(rtol=1e-14, atol=1e-14)).ys[-1]

    def end(steps):
        y, stages = y0, RosenbrockStages(RODAS5P, swing, y0)
        for k in range(steps):
            stages.start(k / steps, y)
            y = stages.attempt(k / steps, y, 1 / steps)
        return (y - best(1.0)).norm()

    def inside(h):
        stages = RosenbrockStages(RODAS5P, swing, y0)
        stages.start(0.0, y0)
        stages.attempt(0.0, y0, h)
        return (stages.inside(0.0, y0, h, 0.4) - best(0.4 * h)).norm(), stages.estimates()[0].norm() * h

    assert abs(math.log2(end(16) / end(32)) - RODAS5P.order) < 0.4
    (one, first), (two, second) = inside(0.1), inside(0.05)
    assert abs(math.log2(one / two) - RODAS5P.interpolant_order - 1) < 0.4
    assert abs(math.log2(first / second) - RODAS5P.error_order) < 0.4


def test_interpolant_meets_the_ends():
    assert_close(torch.tensor(RODAS5P.weights(1.0)), torch.tensor(RODAS5P.b), 1e-13)
    assert not RODAS5P.weights(0.0).any()


@pytest.mark.parametrize("lambda_", [1e2, 1e8])
def test_stiff_decay_toward_a_curve(lambda_):
    """Prothero and Robinson's problem, whose answer is the curve however stiff the decay: ``∂f/∂t`` counts."""
    t = torch.linspace(0, 3, 7)
    fn = lambda t, y: -lambda_ * (y - torch.sin(t)) + torch.cos(t)  # noqa: E731
    solution = odeint(fn, torch.zeros(1), t, solver=Rodas(rtol=1e-7, atol=1e-7))
    assert_close(solution.ys[:, 0], torch.sin(t), 1e-5)
    assert solution.stats["steps"] < 150


@pytest.mark.parametrize(
    ("fn", "y0", "t", "args", "steps"),
    [
        (robertson, [1.0, 0.0, 0.0], [0.0, 0.4, 40.0, 1e4], (RATES,), 200),
        (van_der_pol, [2.0, 0.0], [0.0, 600.0, 1500.0, 2000.0], (torch.tensor(1000.0, dtype=torch.float64),), 1500),
        (hires, [1.0, 0, 0, 0, 0, 0, 0, 0.0057], [0.0, 5.0, 100.0, 321.8122], (), 500),
    ],
    ids=["robertson", "van_der_pol", "hires"],
)
def test_classics(fn, y0, t, args, steps):
    y0 = torch.tensor(y0)
    expected = radau(fn, y0, t, *args)
    for per_sample in PACES:
        solver = Rodas(rtol=1e-7, atol=1e-11, per_sample=per_sample)
        solution = odeint(fn, y0.expand(2, -1), t, args, batch_dims=1, solver=solver)
        error = (solution.ys[:, 0] - expected).abs() / (expected.abs() + 1e-6)
        assert error.max() < 2e-5
        assert_close(solution.ys[:, 0], solution.ys[:, 1], 1e-9)
        assert solution.stats["steps"].max() < steps


def field(t, y, A, b, rate):
    return rate * torch.tanh(y @ A.mT) + b * torch.cos(3 * t) * torch.sin(y)


def params():
    """``y0, A, b, rate, t``: two shared arguments, and one that goes with the samples."""
    rate = torch.tensor([[0.5], [1.0], [4.0]])
    return torch.randn(3, 2), torch.randn(2, 2), torch.randn(2), rate, torch.tensor([0.0, 0.3, 0.3, 1.0])


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
def test_finite_differences(per_sample):
    inputs = wanting((*params()[:4], torch.tensor([0.0, 0.05, 0.1])))
    solve = layer(Rodas(rtol=1e-8, atol=1e-8, per_sample=per_sample))
    assert torch.autograd.gradcheck(solve, inputs, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    few = wanting((torch.randn(1, 2), torch.randn(2, 2), torch.randn(2), torch.ones(1, 1), torch.tensor([0.0, 0.1])))
    solve = layer(Rodas(rtol=1e-8, atol=1e-8, per_sample=per_sample))
    assert torch.autograd.gradgradcheck(solve, few, atol=1e-5, fast_mode=True)


@pytest.mark.parametrize("per_sample", PACES)
def test_transforms(per_sample):
    inputs, every = params(), (0, 1, 3)
    solve = layer(Rodas(rtol=1e-6, atol=1e-6, per_sample=per_sample))
    other = layer(Dopri8(rtol=1e-9, atol=1e-9))
    assert_close(grad(cubed(solve), every)(*inputs), grad(cubed(other), every)(*inputs), 1e-3)
    assert_close(jacrev(solve, 3)(*inputs), jacrev(other, 3)(*inputs), 1e-3)
    assert_close(jacfwd(solve, 3)(*inputs), jacfwd(other, 3)(*inputs), 1e-3)
    assert_close(hessian(cubed(solve), 3)(*inputs), hessian(cubed(other), 3)(*inputs), 1e-2)
    y0, A, b, rate, t = inputs
    dims, args = (None, 0, None, None, None), (y0, torch.stack([A, 0.9 * A]), b, rate, t)
    assert_close(vmap(solve, dims)(*args), vmap(other, dims)(*args), 1e-4)
    ours, theirs = (vmap(grad(cubed(fn), 1), dims)(*args) for fn in (solve, other))
    assert_close(ours, theirs, 1e-3)


@pytest.mark.parametrize("per_sample", PACES)
def test_stiff_gradient(per_sample):
    """Robertson's rates, against differences of SciPy's answer."""
    y0, t = torch.tensor([1.0, 0.0, 0.0]), [0.0, 40.0]
    rates = RATES.clone().requires_grad_()
    solver = Rodas(rtol=1e-8, atol=1e-12, per_sample=per_sample)
    ys = odeint(robertson, y0[None], t, (rates,), batch_dims=1, solver=solver).ys
    (ours,) = torch.autograd.grad(ys[-1, 0, 0], rates)
    for i, rate in enumerate(RATES):
        step = torch.zeros(3)
        step[i] = 1e-3 * rate
        up, down = (radau(robertson, y0, t, RATES + sign * step)[-1, 0] for sign in (1, -1))
        assert_close(ours[i] * rate, (up - down) / 2e-3, 1e-5)


def test_every_sample_has_the_steps_that_it_needs():
    mu, t, y0 = torch.tensor([1.0, 10.0, 1000.0]), torch.tensor([0.0, 30.0]), torch.tensor([[2.0, 0.0]])
    solver = Rodas(per_sample=True)
    together = odeint(van_der_pol, y0.expand(3, -1), t, (mu,), batch_dims=1, solver=solver)
    assert len(set(together.stats["steps"].tolist())) == 3
    for i in range(3):
        alone = odeint(van_der_pol, y0, t, (mu[[i]],), batch_dims=1, solver=solver)
        for name in ("steps", "accepted", "rejected", "evaluations"):
            assert together.stats[name][i] == alone.stats[name][0]
        assert_close(together.ys[:, i], alone.ys[:, 0], 1e-11)


def test_one_system_of_any_shape():
    y0, A = torch.randn(2, 3), torch.randn(3, 3)
    fn = lambda t, y, A: torch.tanh(y.flip(0) @ A) - y.mean()  # noqa: E731
    inputs, t = wanting((y0, A)), [0.0, 0.5, 1.0]
    ours, theirs = (odeint(fn, inputs[0], t, inputs[1:], solver=kind(rtol=1e-9, atol=1e-9)).ys
                    for kind in (Rodas, Dopri8))  # fmt: skip
    assert_close(ours, theirs, 1e-7)
    assert_close(*(torch.autograd.grad(ys.pow(2).sum(), inputs) for ys in (ours, theirs)), 1e-6)


def test_trees_complex_numbers_and_dtypes():
    tree = {"a": torch.ones(3, 2), "b": torch.ones(3, dtype=torch.complex128)}
    fn = lambda t, y: {"a": -2 * t * y["a"], "b": 1j * y["b"]}  # noqa: E731
    for batch_dims in (0, 1):
        ys = odeint(fn, tree, [0.0, 1.0], batch_dims=batch_dims, solver=Rodas(rtol=1e-9, atol=1e-9)).ys
        assert_close(ys["a"][-1], tree["a"] / math.e, 1e-7)
        assert_close(ys["b"][-1], tree["b"] * complex(math.cos(1), math.sin(1)), 1e-7)
    single = odeint(lambda t, y: -y, torch.ones(2, dtype=torch.float32), [0.0, 1.0], solver="rodas").ys
    assert single.dtype == torch.float32
    assert_close(single[-1], torch.full((2,), math.exp(-1), dtype=torch.float32), 1e-5)
    for per_sample in PACES:
        solver = Rodas(per_sample=per_sample)
        empty = odeint(lambda t, y: -y, torch.zeros(0, 2), [0.0, 1.0], batch_dims=1, solver=solver).ys
        assert empty.shape == (2, 0, 2)


def test_fields_without_a_derivative():
    """Constants, and parameters that a field closes over."""
    ys = odeint(lambda t, y: torch.ones_like(y), torch.zeros(2, requires_grad=True), [0.0, 1.0], solver=Rodas()).ys
    assert_close(ys[-1], torch.ones(2), 1e-12)
    rate = torch.tensor(2.0, requires_grad=True)
    ys = odeint(lambda t, y: -rate * y, torch.ones(1), [0.0, 1.0], solver=Rodas(rtol=1e-9, atol=1e-9)).ys
    assert_close(torch.autograd.grad(ys[-1].sum(), rate)[0], torch.tensor(-math.exp(-2)), 1e-7)
    with torch.inference_mode():
        ys = odeint(lambda t, y: -y, torch.ones(1), [0.0, 1.0], solver=Rodas()).ys
        assert_close(ys[-1], torch.tensor([math.exp(-1)]), 1e-5)


@pytest.mark.parametrize("per_sample", PACES)
def test_failed_samples_leave_the_others_alone(per_sample):
    def fn(t, y, kind, scale):
        nan = torch.where(t > 0.6, torch.nan, -y)
        root = y * torch.where(kind == 2, torch.inf, 1.0)
        return scale * torch.where(kind == 0, -y, torch.where(kind == 1, nan, root))

    kind, scale = torch.tensor([[0.0], [1.0], [2.0], [0.0]]), torch.ones((), requires_grad=True)
    y0, t = torch.ones(4, 1, requires_grad=True), torch.linspace(0, 2, 9)
    solver = Rodas(per_sample=per_sample)
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
def test_evaluations_are_bounded(fn, per_sample):
    solution = odeint(fn, torch.ones(1, 1), [0.0, 3.0], batch_dims=1, solver=Rodas(per_sample=per_sample),
                      on_failure="ignore")  # fmt: skip
    assert not solution.ok.any()
    assert solution.stats["evaluations"] < 20000


def test_evaluations_are_counted():
    calls = 0

    def fn(t, y):
        nonlocal calls
        calls += 1
        return swing(t, y)

    with torch.no_grad():
        for per_sample in PACES:
            calls = 0
            solution = odeint(fn, torch.ones(2), torch.linspace(0, 3, 20), solver=Rodas(per_sample=per_sample))
            assert solution.stats["evaluations"] == calls


def test_stages_in_parallel_are_for_explicit_methods():
    with pytest.raises(TypeError, match="explicit"):
        odeint(
            lambda t, y: -y, torch.ones(1), [0.0, 1.0], solver=Rodas(), adjoint=CheckpointedAdjoint(stage_parallel=True)
        )
