"""Steps, status and output times of every sample's own."""

import itertools
import math

import pytest
import torch
from contracts import assert_close, wanting
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from difflayers import UnrolledAdjoint, ode
from difflayers.errors import ProblemError
from difflayers.ode import RK4, Bosh3, CheckpointedAdjoint, Dopri5, Dopri8, Tsit5, odeint

TIGHT = {"rtol": 1e-11, "atol": 1e-11, "per_sample": True}
SOLVERS = [Bosh3(rtol=1e-8, atol=1e-8, per_sample=True), *[kind(**TIGHT) for kind in (Dopri5, Tsit5, Dopri8)]]
TIMES = torch.tensor([[0.0, 0.3, 0.3, 1.0], [1.0, 0.5, 0.2, -0.4], [0.5, 0.5, 0.5, 0.5]], dtype=torch.float64)


def field(t, y, A, b, rate):
    return rate * torch.tanh(y @ A.mT) + b * torch.cos(3 * t)


def params():
    """``y0, A, b, rate``: two shared arguments, and one that goes with the samples."""
    return torch.randn(3, 2), torch.randn(2, 2), torch.randn(2), torch.tensor([[0.5], [1.0], [4.0]])


def layer(solver=SOLVERS[1], adjoint=None):
    def call(y0, A, b, rate, t=TIMES):
        return odeint(field, y0, t, (A, b, rate), batch_dims=1, solver=solver, adjoint=adjoint).ys

    return call


def traced(y0, A, b, rate, t=TIMES, steps=60):
    """By fixed steps on the graph, with step sizes that follow the times."""
    values, y = [y0], y0
    for start, end in itertools.pairwise(t.expand(3, -1).unsqueeze(-1).unbind(1)):
        h = (end - start) / steps
        for k in range(steps):
            s = start + k * h
            k1 = field(s, y, A, b, rate)
            k2 = field(s + h / 2, y + h / 2 * k1, A, b, rate)
            k3 = field(s + h / 2, y + h / 2 * k2, A, b, rate)
            k4 = field(s + h, y + h * k3, A, b, rate)
            y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        values.append(y)
    return torch.stack(values)


def cubed(fn):
    return lambda *args: fn(*args).pow(3).sum()


@pytest.mark.parametrize("adjoint", [CheckpointedAdjoint(), CheckpointedAdjoint(states=3), UnrolledAdjoint()], ids=repr)
@pytest.mark.parametrize("solver", [*SOLVERS, Dopri5(rtol=1e-11, atol=1e-11), RK4(step_size=0.01)], ids=repr)
def test_gradients(solver, adjoint):
    inputs = wanting((*params(), TIMES))
    assert_close(layer(solver)(*inputs), traced(*inputs), 1e-6)
    ours = torch.autograd.grad(cubed(layer(solver, adjoint))(*inputs), inputs)
    assert_close(ours, torch.autograd.grad(cubed(traced)(*inputs), inputs), 1e-5)


def test_shared_times():
    t = torch.tensor([0.0, 0.4, 1.0])
    inputs = wanting((*params(), t))
    ours = torch.autograd.grad(cubed(layer())(*inputs), inputs)
    assert_close(ours, torch.autograd.grad(cubed(traced)(*inputs), inputs), 1e-6)


EXACT = [CheckpointedAdjoint(2), *[CheckpointedAdjoint(stage_parallel=choice) for choice in (True, False)]]


@pytest.mark.parametrize("solver", [Dopri5(rtol=1e-3, atol=1e-3, per_sample=True), Dopri8(rtol=1e-4, per_sample=True),
                                    RK4(step_size=0.2)], ids=repr)  # fmt: skip
@pytest.mark.parametrize("adjoint", EXACT, ids=repr)
def test_gradient_is_that_of_the_discrete_solution(solver, adjoint):
    inputs = wanting(params())
    ours, unrolled = (
        torch.autograd.grad(cubed(layer(solver, rule))(*inputs), inputs) for rule in (adjoint, UnrolledAdjoint())
    )
    assert_close(ours, unrolled, 1e-11)


def test_pairs_in_chunks(monkeypatch):
    from difflayers.ode import _parallel_rows

    monkeypatch.setattr(_parallel_rows.ParallelRows, "most", 7)
    inputs, solver = wanting(params()), Dopri5(per_sample=True)
    gradients = [torch.autograd.grad(cubed(layer(solver, rule))(*inputs), inputs) for rule in EXACT[1:]]
    assert_close(*gradients, 1e-12)


def test_finite_differences():
    times = torch.tensor([[0.0, 0.3, 1.0], [1.0, 0.5, 0.2], [0.5, 0.6, 0.7]])
    inputs, solve = wanting((*params(), times)), layer(Dopri8(rtol=1e-10, atol=1e-10, per_sample=True))
    assert torch.autograd.gradcheck(solve, inputs, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(solve, inputs, atol=1e-5, fast_mode=True)


def test_transforms():
    inputs, every = (*params(), TIMES.clone()), (0, 1, 3, 4)
    solve, flow = layer(Dopri8(rtol=1e-7, atol=1e-7, per_sample=True)), lambda *p: traced(*p, steps=20)
    ours, theirs = cubed(solve), cubed(flow)
    assert_close(grad(ours, every)(*inputs), grad(theirs, every)(*inputs), 1e-4)
    assert_close(jvp(solve, inputs, inputs), jvp(flow, inputs, inputs), 1e-4)
    assert_close(jacrev(solve, (1, 3))(*inputs), jacrev(flow, (1, 3))(*inputs), 1e-4)
    expected = hessian(theirs, (1, 4))(*inputs)
    assert_close(hessian(ours, (1, 4))(*inputs), expected, 1e-4)
    assert_close(jacfwd(jacfwd(ours, (1, 4)), (1, 4))(*inputs), expected, 1e-4)


def test_vmap():
    y0, A, b, rate = params()
    stacked, times = torch.stack([A, 0.9 * A]), torch.stack([TIMES, TIMES / 2])
    for dims in ((None, 0, None, None, None), (None, 0, None, None, 0)):
        args = (y0, stacked, b, rate, TIMES if dims[-1] is None else times)
        assert_close(vmap(layer(), dims)(*args), vmap(traced, dims)(*args), 1e-6)
        ours, theirs = (vmap(grad(cubed(fn), (1, 4)), dims)(*args) for fn in (layer(), traced))
        assert_close(ours, theirs, 1e-5)
    # Shared times that differ between the mapped problems are nobody's shared times any more.
    t = torch.tensor([[0.0, 1.0], [0.0, 2.0]])
    joint = Dopri5(rtol=1e-10, atol=1e-10)
    many = vmap(lambda t: odeint(lambda t, y: -t * y, y0, t, solver=joint).ys)(t)
    assert_close(many[:, 1], y0 * torch.exp(-(t[:, 1] ** 2) / 2)[:, None, None], 1e-8)


def oscillators(t, y, speed):
    return speed * torch.stack([y[..., 1], -y[..., 0]], -1)


def test_every_sample_has_the_steps_that_it_needs():
    speed, t = torch.tensor([[1.0], [5.0], [30.0]]), torch.linspace(0, 2, 5)
    y0 = torch.randn(3, 2)
    solver = Dopri5(per_sample=True)
    together = odeint(oscillators, y0, t, (speed,), batch_dims=1, solver=solver)
    assert together.stats["steps"].diff().min() > 10
    for i in range(3):
        alone = odeint(oscillators, y0[[i]], t, (speed[[i]],), batch_dims=1, solver=solver)
        for name in ("steps", "accepted", "rejected", "evaluations"):
            assert together.stats[name][i] == alone.stats[name][0]
        assert_close(together.ys[:, i], alone.ys[:, 0], 1e-12)


def test_finished_samples_are_left_behind():
    rows = 0

    def counted(t, y, speed):
        nonlocal rows
        rows += len(y)
        return oscillators(t, y, speed)

    speed = torch.exp(3 * torch.rand(200, 1))
    y0, t = torch.randn(200, 2), torch.tensor([0.0, 3.0])
    with torch.no_grad():
        solution = odeint(counted, y0, t, (speed,), batch_dims=1, solver=Dopri5(per_sample=True))
    assert solution.ok.all()
    assert rows <= 1.1 * solution.stats["evaluations"].sum()


def test_arguments_that_only_look_like_the_batch_are_not_divided():
    """A square matrix for as many samples as it has rows."""
    A, y0 = torch.randn(4, 4), torch.randn(4, 4)
    fn = lambda t, y, A, speed: speed * torch.tanh(y @ A.mT)  # noqa: E731
    speed = torch.tensor([[0.1], [1.0], [3.0], [9.0]])
    solver = Dopri5(rtol=1e-10, atol=1e-10, per_sample=True)
    inputs = wanting((A, speed))
    ys = odeint(fn, y0, [0.0, 1.0], inputs, batch_dims=1, solver=solver).ys
    joint = odeint(fn, y0, [0.0, 1.0], inputs, batch_dims=1, solver=Dopri5(rtol=1e-10, atol=1e-10)).ys
    assert_close(ys, joint, 1e-7)
    assert_close(torch.autograd.grad(ys.sum(), inputs), torch.autograd.grad(joint.sum(), inputs), 1e-6)


def test_failed_samples_leave_the_others_alone():
    def fn(t, y, kind, scale):
        nan = torch.where(t > 0.6, torch.nan, -y)
        return scale * torch.where(kind == 0, -y, torch.where(kind == 1, nan, torch.where(kind == 2, y * y, -y.sign())))

    kind, scale = torch.tensor([[0.0], [1.0], [2.0], [3.0], [0.0]]), torch.ones((), requires_grad=True)
    y0, t = torch.ones(5, 1, requires_grad=True), torch.linspace(0, 2, 9)
    solver = Dopri5(per_sample=True)
    solution = odeint(fn, y0, t, (kind, scale), batch_dims=1, solver=solver, on_failure="ignore")
    assert solution.status.tolist() == [0, 3, 2, 2, 0]
    assert_close(solution.stats["time"], torch.tensor([2.0, 0.6, 1.0, 1.0, 2.0]), 1e-3)
    assert solution.stats["evaluations"].max() < 20000
    healthy = odeint(lambda t, y: -y, torch.ones(2, 1), t, batch_dims=1, solver=solver)
    assert_close(solution.ys[:, [0, 4]], healthy.ys, 1e-13)
    assert solution.stats["steps"][0] == healthy.stats["steps"][0]
    assert solution.ys[:, 1].isfinite().sum() == 3
    solution.ys[:, solution.ok].sum().backward()
    assert y0.grad[1:4].tolist() == [[0.0]] * 3
    assert_close(scale.grad, -2 * (t * torch.exp(-t)).sum(), 1e-5)


def test_max_steps_by_sample():
    solution = odeint(oscillators, torch.ones(2, 2), [0.0, 1.0], (torch.tensor([[1.0], [100.0]]),), batch_dims=1,
                      solver=Dopri5(per_sample=True, max_steps=40), on_failure="ignore")  # fmt: skip
    assert solution.status.tolist() == [0, 1]
    assert solution.stats["steps"][1] == 40
    assert solution.ys[1].isfinite().all(1).tolist() == [True, False]


def test_dtypes_shapes_and_batches():
    t = torch.tensor([[0.0, 1.0]])
    for y0 in (torch.ones(2, 3, 2, dtype=torch.float32), torch.ones(2, 3, 2, dtype=torch.complex64)):
        times = t.expand(2, 3, 2).float()
        ys = odeint(lambda t, y: -y * t, y0, times, batch_dims=2).ys
        assert ys.dtype == y0.dtype
        assert_close(ys[-1], y0 * math.exp(-0.5), 1e-4)
    tree = {"a": torch.ones(3, 2), "b": torch.ones(3, 1)}
    ys = odeint(lambda t, y: {"a": -y["a"] * t, "b": y["b"]}, tree, t.expand(3, 2), batch_dims=1).ys
    assert_close(ys["b"][-1], tree["b"] * math.e, 1e-4)
    for solver in (*[kind(per_sample=True) for kind in (Dopri5, Dopri8)], RK4()):
        assert odeint(lambda t, y: -y, torch.zeros(0, 2), t.expand(0, 2), batch_dims=1, solver=solver).ys.shape == (
            2,
            0,
            2,
        )
    with pytest.raises(ProblemError, match=r"\(3, 2\)"):
        odeint(lambda t, y: -y, torch.ones(2, 2), torch.zeros(3, 2), batch_dims=1)


def test_every_adaptive_solver_can():
    assert {name for name, kind in ode.SOLVERS.items() if hasattr(kind, "per_sample") and "per_sample" in
            kind.__dataclass_fields__} == {"bosh3", "dopri5", "dopri8", "kvaerno5", "rodas", "tsit5"}  # fmt: skip
