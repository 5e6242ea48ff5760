"""Events: when they happen, who they end, and their derivatives."""

import copy
import math
import pickle

import pytest
import torch
from contracts import assert_close, wanting
from torch import nn
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from difflayers import Status, UnrolledAdjoint, monitor
from difflayers.errors import ProblemError
from difflayers.ode import (
    RK4,
    BacksolveAdjoint,
    Bosh3,
    CheckpointedAdjoint,
    Dopri5,
    Dopri8,
    Event,
    Kvaerno5,
    Midpoint,
    ODELayer,
    Rodas,
    ScipyIVP,
    TorchDiffEq,
    Tsit5,
    odeint,
)

KINDS = [Bosh3, Dopri5, Tsit5, Dopri8, Rodas, Kvaerno5]
TIGHT = [kind(rtol=1e-9, atol=1e-9, per_sample=own) for kind in KINDS for own in (False, True)]
SOLVERS = [*TIGHT, RK4(step_size=0.05)]
ADJOINTS = [CheckpointedAdjoint(), CheckpointedAdjoint(states=3), UnrolledAdjoint(), BacksolveAdjoint()]
FALLS = torch.tensor([[2.0, 1.0], [0.5, -1.0], [3.0, 0.0]], dtype=torch.float64)


def ball(t, y, gravity, rise):
    return torch.stack([y[..., 1], -gravity + 0 * y[..., 1]], -1)


def floor(t, y, gravity, rise):
    """The floor rises."""
    return y[..., 0] - rise * t


def landing(y0, gravity, rise, start=0.0):
    """When and in which state the ball meets the floor, in closed form."""
    height, speed = y0[..., 0] - rise * start, y0[..., 1] - rise
    fall = (speed + (speed**2 + 2 * gravity * height).sqrt()) / gravity
    t, v = start + fall, y0[..., 1] - gravity * fall
    return t, torch.stack([rise * t, v], -1)


def thrown(solver, adjoint=None, batch_dims=1, event=floor):
    def call(y0, gravity, rise, start=0.0):
        t = torch.stack([torch.as_tensor(start), torch.tensor(3.0)])
        solution = odeint(
            ball, y0, t, (gravity, rise), batch_dims=batch_dims, solver=solver, adjoint=adjoint, event=event
        )
        return solution.event_t, solution.event_y

    return call


def total(fn):
    def number(*args):
        t, y = fn(*args)
        return t.pow(2).sum() + y.pow(3).sum()

    return number


def falls():
    return FALLS.clone(), torch.tensor(9.81), torch.tensor(0.2), torch.tensor(0.1)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_landing(solver):
    inputs = falls()
    assert_close(thrown(solver)(*inputs), landing(*inputs), 1e-12)


@pytest.mark.parametrize("solver", [TIGHT[2], TIGHT[3], TIGHT[8], TIGHT[9], RK4(step_size=0.05)], ids=repr)
@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_gradients(solver, adjoint):
    inputs = wanting(falls())
    ours = torch.autograd.grad(total(thrown(solver, adjoint))(*inputs), inputs)
    assert_close(ours, torch.autograd.grad(total(landing)(*inputs), inputs), 1e-9)


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("solver", [Tsit5(), Dopri8(), Dopri8(per_sample=True)], ids=repr)
def test_stages_in_parallel(solver, parallel):
    """The steps of a lone system, and those of samples of which each can be evaluated alone."""
    for batch_dims in (0, 1):
        for event in (Event(line, parts=1), Event(line, terminal=False)):
            grads = []
            for adjoint in (CheckpointedAdjoint(stage_parallel=parallel), UnrolledAdjoint()):
                y0 = torch.tensor([[1.0, 0.3], [0.8, -0.2]])[slice(None) if batch_dims else 0]
                inputs = wanting((y0, torch.tensor(0.7), torch.tensor([0.0, 0.5, 4.0])))
                solution = odeint(swing, y0.requires_grad_(), inputs[2], (inputs[1],), batch_dims=batch_dims,
                                  solver=solver, adjoint=adjoint, event=event)  # fmt: skip
                loss = torch.nansum(solution.event_t.pow(2)) + torch.nansum(solution.event_y.pow(3))
                grads.append(torch.autograd.grad(loss + solution.ys[1].pow(2).sum(), (y0, *inputs[1:])))
            assert_close(*grads, 1e-11)


def swing(t, y, length):
    return torch.stack([y[..., 1], -torch.sin(y[..., 0]) / length], -1) + 0.1 * torch.cos(t) * torch.arange(2)


def line(t, y, length):
    return y[..., 0] + 0.3 * y[..., 1] ** 2 - 0.2 * torch.sin(3 * t) * length


@pytest.mark.parametrize(("batch_dims", "per_sample"), [(0, False), (1, True)])
def test_finite_differences(batch_dims, per_sample):
    y0 = torch.tensor([[1.0, 0.3], [0.8, -0.2]])[slice(None) if batch_dims else 0]

    def happened(y0, length, start):
        t = torch.stack([start, torch.tensor(6.0)])
        solver = Dopri8(rtol=1e-9, atol=1e-9, per_sample=per_sample)
        solution = odeint(swing, y0, t, (length,), batch_dims=batch_dims, solver=solver, event=line)
        assert bool((solution.stats["event"] == 0).all())
        return solution.event_t, solution.event_y

    inputs = wanting((y0, torch.tensor(0.7), torch.tensor(0.0)))
    assert torch.autograd.gradcheck(happened, inputs, eps=1e-5, atol=1e-7, rtol=1e-6, fast_mode=True)
    assert torch.autograd.gradgradcheck(happened, inputs, eps=1e-5, atol=1e-6, rtol=1e-5, fast_mode=True)


def test_higher_derivatives():
    """To third order, through every mixture of modes."""
    inputs, every = falls(), (0, 1, 2, 3)
    ours, exact = total(thrown(TIGHT[2])), total(landing)
    assert_close(grad(ours, every)(*inputs), grad(exact, every)(*inputs), 1e-9)
    assert_close(jacfwd(thrown(TIGHT[2]), every)(*inputs), jacfwd(landing, every)(*inputs), 1e-9)
    assert_close(jvp(thrown(TIGHT[2]), inputs, inputs), jvp(landing, inputs, inputs), 1e-9)
    expected = hessian(exact, every)(*inputs)
    for second in (hessian(ours, every), jacrev(jacrev(ours, every), every), jacfwd(jacfwd(ours, every), every)):
        assert_close(second(*inputs), expected, 1e-8)
    third = jacrev(jacrev(jacrev(ours, 1), 2), 1)(*inputs)
    assert_close(third, jacrev(jacrev(jacrev(exact, 1), 2), 1)(*inputs), 1e-7)
    assert_close(jacfwd(hessian(ours, 1), 1)(*inputs), jacfwd(hessian(exact, 1), 1)(*inputs), 1e-7)


@pytest.mark.parametrize("last", [jacrev, jacfwd])
def test_a_fourth_derivative_is_refused(last):
    inputs = falls()
    ours = total(thrown(TIGHT[2]))
    with pytest.raises(ProblemError, match="events have derivatives up to order 3"):
        last(jacrev(hessian(ours, 1), 1), 1)(*inputs)
    gravity = inputs[1].requires_grad_()
    value = ours(inputs[0], gravity, *inputs[2:])
    for _ in range(3):
        (value,) = torch.autograd.grad(value, gravity, create_graph=True)
    with pytest.raises(ProblemError, match="events have derivatives up to order 3"):
        value.backward()


def test_eager_forward_mode():
    inputs = falls()
    directions = tuple(map(torch.randn_like, inputs))
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(*pair) for pair in zip(inputs, directions, strict=True)]
        ours = [forward_ad.unpack_dual(value).tangent for value in thrown(TIGHT[2])(*duals)]
    assert_close(ours, list(jvp(landing, inputs, directions)[1]), 1e-9)


def test_vmap():
    y0, gravity, rise, _ = falls()
    several = torch.stack([gravity, 2 * gravity])
    dims = (None, 0, None)
    for batch_dims, states in ((1, y0), (0, y0[0])):
        ours = thrown(TIGHT[2], batch_dims=batch_dims)
        assert_close(vmap(ours, dims)(states, several, rise), vmap(landing, dims)(states, several, rise), 1e-9)
        assert_close(
            vmap(grad(total(ours), 1), dims)(states, several, rise),
            vmap(grad(total(landing), 1), dims)(states, several, rise),
            1e-9,
        )
    ours = thrown(TIGHT[3], batch_dims=0)
    assert_close(vmap(jacrev(ours, 0), (0, None, None))(y0, gravity, rise)[0],
                 vmap(jacrev(landing, 0), (0, None, None))(y0, gravity, rise)[0], 1e-9)  # fmt: skip
    assert_close(vmap(vmap(ours, dims), (0, None, None))(y0, several, rise),
                 vmap(vmap(landing, dims), (0, None, None))(y0, several, rise), 1e-9)  # fmt: skip


def test_outputs_end_at_the_event():
    t = torch.tensor([0.0, 0.0, 0.25, 0.5, 3.0])
    for solver in (Dopri5(), Dopri5(per_sample=True), RK4(step_size=0.1)):
        solution = odeint(ball, FALLS, t, falls()[1:3], batch_dims=1, solver=solver, event=floor)
        height = FALLS[:, 0] + FALLS[:, 1] * t[:, None] - 9.81 / 2 * t[:, None] ** 2
        before = t[:, None] <= solution.event_t
        torch.testing.assert_close(
            solution.ys[..., 0], torch.where(before, height, torch.nan), equal_nan=True, rtol=1e-9, atol=1e-9
        )
        assert solution.stats["outputs"].tolist() == before.sum(0).tolist()
        assert solution.ok.all()
        assert solution.stats["event"].tolist() == [0, 0, 0]
        assert not solution.stats["grazing"].any()
        torch.testing.assert_close(solution.stats["time"], solution.event_t)


def test_output_gradients_are_those_without_events():
    """Of outputs before the event, and of samples that it doesn't end."""
    t = torch.tensor([0.0, 0.3, 0.6])
    for solver in (Dopri5(), Dopri5(per_sample=True), Rodas()):
        grads = []
        for event in (None, Event(lambda t, y, length: y[..., 0] + 5), Event(line, terminal=False)):
            inputs = wanting((torch.tensor([[1.0, 0.3], [0.8, -0.2]]), torch.tensor(0.7), t))
            solution = odeint(swing, *inputs[::2], (inputs[1],), batch_dims=1, solver=solver, event=event)
            grads.append(torch.autograd.grad(solution.ys.pow(3).sum(), inputs))
        assert_close(grads[1], grads[0], 1e-12)
        assert_close(grads[2], grads[0], 1e-12)


def oscillator(t, y, speed):
    return torch.stack([y[..., 1], -(speed**2) * y[..., 0]], -1)


def height(t, y, speed):
    return y[..., 0]


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize(("direction", "first", "every"), [(0, 0.5, 1), (1, 1.5, 2), (-1, 0.5, 2)])
def test_every_crossing(per_sample, direction, first, every):
    speed = torch.tensor([1.0, 2.0, 0.1], requires_grad=True)
    y0 = torch.tensor([[1.0, 0.0]]).expand(3, 2)
    solver = Tsit5(rtol=1e-9, atol=1e-9, per_sample=per_sample)
    event = Event(height, terminal=False, direction=direction)
    solution = odeint(oscillator, y0, [0.0, 10.0], (speed,), batch_dims=1, solver=solver, event=event)
    counts = [len(range(int(first * 2), int(20 * s / math.pi) + 1, 2 * every)) for s in (1.0, 2.0, 0.1)]
    assert solution.event_count.tolist() == counts
    assert solution.event_t.shape == (3, max(counts))
    assert solution.event_y.shape == (max(counts), 3, 2)
    expected = math.pi * (first + every * torch.arange(max(counts))) / speed[:, None]
    met = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
    assert solution.event_t.isnan().equal(~met)
    assert_close(solution.event_t[met], expected[met], 1e-7)
    assert solution.ys[-1].isfinite().all()
    found, exact = solution.event_t[met], expected[met]
    gradients = [torch.autograd.grad(value.sum(), speed, retain_graph=True)[0] for value in (found, exact)]
    assert_close(*gradients, 1e-6)
    assert gradients[0][2] == 0
    assert (solution.stats["event"] == -1).all()


def test_several_events():
    """A terminal one ends a sample, the others see nothing after it."""
    speed = torch.tensor([1.0, 2.0])
    y0 = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    clock = Event(lambda t, y, speed: t - torch.tensor([4.0, 20.0]))
    events = [Event(height, terminal=False), clock, lambda t, y, speed: t - 9]
    for per_sample in (False, True):
        solver = Dopri5(rtol=1e-9, atol=1e-9, per_sample=per_sample)
        solution = odeint(oscillator, y0, [0.0, 3.0, 10.0], (speed,), batch_dims=1, solver=solver, event=events)
        assert solution.stats["event"].tolist() == [1, 2]
        crossings, first, second = solution.event_t
        assert solution.event_count[0].tolist() == [1, 6]
        assert_close(crossings[1], math.pi / 4 + math.pi / 2 * torch.arange(6), 1e-7)
        assert_close((first[0], second[1]), (torch.tensor(4.0), torch.tensor(9.0)), 1e-12)
        assert bool(first[1].isnan() & second[0].isnan())
        assert_close(solution.event_y[1][0, 0], torch.cos(torch.tensor(4.0)), 1e-7)
        assert solution.ys[2].isnan().all()
        assert solution.ys[1].isfinite().all()


def test_events_in_one_step():
    """The solver's only step meets both; the first one counts, wherever it is in the list."""
    y0 = torch.tensor([0.0])
    early, late = (lambda t, y: y[0] - 0.31), (lambda t, y: y[0] - 0.72)
    for events in ((early, late), (late, early)):
        solution = odeint(lambda t, y: y * 0 + 1, y0, [0.0, 1.0], event=events, solver=RK4())
        assert events[int(solution.stats["event"])] is early
        assert solution.event_count[events.index(late)] == 0
        assert_close(solution.event_t[events.index(early)], torch.tensor(0.31), 1e-12)


def test_two_crossings_in_one_step():
    """Seen with parts of the step, not at its ends."""
    bump = [Event(lambda t, y: (y[0] - 0.3) * (y[0] - 0.6), terminal=False, parts=parts) for parts in (1, 8)]
    solution = odeint(lambda t, y: y * 0 + 1, torch.zeros(1), [0.0, 1.0], event=bump[:1], solver=RK4())
    assert solution.event_count[0] == 0
    solution = odeint(lambda t, y: y * 0 + 1, torch.zeros(1), [0.0, 1.0], event=bump[1], solver=RK4())
    assert_close(solution.event_t, torch.tensor([0.3, 0.6]), 1e-12)


@pytest.mark.parametrize("per_sample", [False, True])
def test_never_met(per_sample):
    """Not a failure; NaN, and no gradient."""
    inputs = wanting((FALLS.clone(), torch.tensor([9.81, 9.81, -1.0]), torch.tensor(0.2)))
    solver = Dopri5(per_sample=per_sample)
    solution = odeint(ball, inputs[0], [0.0, 1.2], inputs[1:], batch_dims=1, solver=solver, event=floor)
    t, y = landing(inputs[0][:2], inputs[1][:2], inputs[2])
    assert solution.stats["event"].tolist() == [0, 0, -1]
    assert solution.ok.all()
    assert solution.event_t[2].isnan()
    assert solution.event_y[2].isnan().all()
    assert solution.event_count.tolist() == [1, 1, 0]
    assert solution.ys[:, 2].isfinite().all()
    assert_close(solution.event_t[:2], t, 1e-9)
    ours = torch.autograd.grad(torch.nansum(solution.event_t) + solution.event_y[:2].sum(), inputs)
    assert_close(ours, torch.autograd.grad(t.sum() + y.sum(), inputs), 1e-9)
    assert ours[0][2].tolist() == [0, 0]


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_a_bad_sample_leaves_the_others_alone(per_sample, adjoint):
    solver = Dopri5(per_sample=per_sample)
    found = []
    for broken in (False, True):
        y0, gravity, rise, _ = falls()
        y0[1] = torch.nan if broken else y0[1]
        inputs = wanting((y0, gravity, rise))
        solution = odeint(
            ball, y0.requires_grad_(), [0.0, 3.0], inputs[1:], batch_dims=1, solver=solver, adjoint=adjoint,
            event=floor, on_failure="ignore",
        )  # fmt: skip
        keep = torch.tensor([0, 2])
        loss = solution.event_t[keep].pow(2).sum() + solution.event_y[keep].pow(2).sum()
        found.append((solution.event_t[keep], *torch.autograd.grad(loss, (y0, *inputs[1:]))))
    assert solution.status.tolist() == [0, Status.NONFINITE, 0]
    assert solution.event_t[1].isnan()
    assert found[1][1][1].tolist() == [0, 0]
    assert_close(found[1][0], found[0][0], 1e-9)
    assert_close(found[1][1][keep], found[0][1][keep], 1e-6)
    assert_close(found[1][2:], found[0][2:], 1e-6)


def test_decreasing_time():
    """Directions are those along the integration."""
    y0, t = torch.tensor([0.0, 1.0], requires_grad=True), [0.0, -10.0]
    for solver in (Dopri5(rtol=1e-9, atol=1e-9), Rodas(rtol=1e-9, atol=1e-9, per_sample=True)):
        for direction, expected in ((1, -math.pi), (-1, -2 * math.pi), (0, -math.pi)):
            event = Event(height, direction=direction)
            solution = odeint(oscillator, y0, t, (torch.tensor(1.0),), solver=solver, event=event)
            assert_close(solution.event_t, torch.tensor(expected), 1e-7)
            (found,) = torch.autograd.grad(solution.event_t, y0)
            assert_close(found, torch.tensor([-1.0, 0.0]), 1e-6)  # y₀ cos t + y₁ sin t = 0


def test_start_on_the_event():
    """It has to be left first; rounding is no crossing."""
    for start in (0.0, 1e-15, -1e-15):
        for direction in (0, -1):
            event = Event(lambda t, y: y[0], direction=direction)
            fall = odeint(lambda t, y: torch.stack([y[1], -torch.ones(())]), torch.tensor([start, 1.0]), [0.0, 5.0],
                          event=event)  # fmt: skip
            assert_close(fall.event_t, torch.tensor(2.0), 1e-12)


def test_exactly_at_a_step():
    """Zero at the end of a step and of its parts."""
    for end in (1.0, 2.0):
        event = Event(lambda t, y: y[0] - 1, terminal=False)
        solution = odeint(lambda t, y: y * 0 + 1, torch.zeros(1), [0.0, end], event=event, solver=Midpoint())
        assert solution.event_t.tolist() == [1.0]


def test_grazing_is_flagged():
    level, y0 = torch.tensor([0.5, 0.5, 0.9]), torch.zeros(3)
    events = [lambda t, y, level: (y - level) ** 3, lambda t, y, level: (y - level) ** 2 - 0.01]
    flags = [odeint(lambda t, y, level: y * 0 + 1, y0, [0.0, 0.8], (level,), batch_dims=1, event=event).stats["grazing"]
             for event in events]  # fmt: skip
    assert flags[0].tolist() == [True, True, False]
    assert flags[1].tolist() == [False, False, False]


def test_trees_complex_numbers_and_float32():
    y0 = {"z": torch.tensor([1.0 + 0j, 2.0]), "level": torch.tensor([[0.5], [0.2]])}

    def turn(t, y):
        return {"z": 1j * y["z"], "level": 0 * y["level"]}

    event = Event(lambda t, y: y["z"].real - y["level"][:, 0])
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-4)):
        state = {
            "z": y0["z"].to(dtype.to_complex()),
            "level": y0["level"].detach().to(dtype, copy=True).requires_grad_(),
        }
        solution = odeint(turn, state, torch.tensor([0.0, 4.0], dtype=dtype), batch_dims=1, event=event)
        expected = torch.acos(torch.tensor([0.5, 0.1], dtype=dtype))
        assert solution.event_t.dtype == dtype
        assert_close(solution.event_t, expected, tolerance)
        listed = odeint(turn, state, [0.0, 4.0], batch_dims=1, event=event).event_t
        assert listed.dtype == dtype
        assert_close(solution.event_y["z"], torch.polar(torch.tensor([1.0, 2], dtype=dtype), expected), tolerance)
        solution.event_t.sum().backward()
        slope = -1 / torch.sqrt(torch.tensor([1.0, 4.0], dtype=dtype) - torch.tensor([0.25, 0.04], dtype=dtype))
        assert_close(state["level"].grad[:, 0], slope, 10 * tolerance)


def test_numpy():
    y0 = FALLS.numpy()
    event = [Event(lambda t, y, g, r: y[..., 0]), Event(lambda t, y, g, r: y[..., 1], terminal=False)]
    solution = odeint(ball, y0, [0.0, 3.0], (9.81, 0.0), batch_dims=1, event=event)
    assert isinstance(solution.event_t[0], type(y0))
    assert solution.event_y[1].shape == (1, 3, 2)
    torch.testing.assert_close(torch.as_tensor(solution.event_t[0]), landing(FALLS, 9.81, 0.0)[0])


@pytest.mark.parametrize("samples", [0, 1])
def test_few_samples(samples):
    event = [floor, Event(floor, terminal=False)]
    solution = odeint(ball, FALLS[:samples], [0.0, 1.0], falls()[1:3], batch_dims=1, event=event)
    assert solution.event_t[0].shape == (samples,)
    assert solution.event_y[0].shape == (samples, 2)
    assert solution.event_t[1].shape == (samples, samples)
    shapes = odeint(ball, FALLS[:1], [0.0], falls()[1:3], batch_dims=1, event=event).event_t
    assert [tuple(one.shape) for one in shapes] == [(1,), (1, 0)]


def test_own_times():
    """Every sample has its own output times, and some have left when others meet the event."""
    t = torch.tensor([[0.0, 0.1, 3.0], [0.0, 0.0, 0.1], [1.0, 1.2, 2.0]], requires_grad=True)
    y0 = FALLS.clone().requires_grad_()
    solution = odeint(ball, y0, t, falls()[1:3], batch_dims=1, event=floor)
    times, _ = landing(FALLS, 9.81, 0.2, t[:, 0].detach())
    assert solution.stats["event"].tolist() == [0, -1, 0]
    assert_close(solution.event_t[[0, 2]], times[[0, 2]], 1e-9)
    (found,) = torch.autograd.grad(torch.nansum(solution.event_t), t)
    moved = t.detach()[:, 0].requires_grad_()
    (expected,) = torch.autograd.grad(landing(FALLS, 9.81, 0.2, moved)[0][[0, 2]].sum(), moved)
    assert_close(found[:, 0], expected, 1e-9)
    assert (found[:, 1:] == 0).all()


def test_many_samples_finish_at_their_own_time():
    """Those that are left go on alone."""
    y0 = torch.stack([torch.linspace(0.1, 30, 200), torch.zeros(200)], -1).requires_grad_()
    gravity = torch.full((200,), 9.81, requires_grad=True)
    for per_sample in (False, True):
        solver = Dopri5(rtol=1e-9, atol=1e-9, per_sample=per_sample)
        solution = odeint(ball, y0, [0.0, 10.0], (gravity, 0.0), batch_dims=1, solver=solver, event=floor)
        t, y = landing(y0, gravity, 0.0)
        assert_close((solution.event_t, solution.event_y), (t, y), 1e-9)
        ours = torch.autograd.grad(solution.event_t.sum() + solution.event_y.sum(), (y0, gravity))
        assert_close(ours, torch.autograd.grad(t.sum() + y.sum(), (y0, gravity)), 1e-8)


class Field(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, t, y):
        return torch.tanh(self.linear(y)) + 1


class Plane(nn.Module):
    def __init__(self):
        super().__init__()
        self.normal = nn.Parameter(torch.tensor([1.0, 0.5]))

    def forward(self, t, y):
        return y @ self.normal - 2


def test_layer_with_a_learnt_event():
    layer = ODELayer(Field(), [0.0, 20.0], batch_dims=1, event=Plane(), solver=Dopri5(rtol=1e-10, atol=1e-10))
    assert "event_functions.0.normal" in layer.state_dict()
    y0 = torch.randn(4, 2)
    solution = layer.solve(y0)
    assert (solution.stats["event"] == 0).all()
    (found,) = torch.autograd.grad(solution.event_t.sum(), layer.event.normal)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other.solve(y0).event_t, solution.event_t)
        other.event.normal.data += torch.tensor([1e-5, 0.0])
        assert other.event_functions[0].normal is other.event.normal
        difference = (other.solve(y0).event_t - solution.event_t).sum() / 1e-5
        assert_close(difference, found[0], 1e-3)


@pytest.mark.parametrize("times", [[0.0, 20.0], torch.tensor([0.0, 20.0], dtype=torch.float64)], ids=["list", "tensor"])
def test_layer_gives_times_of_events_in_the_dtype_of_what_was_given(times):
    layer = ODELayer(Field().float(), times, batch_dims=1, event=Plane().float())
    found = layer.solve(torch.zeros(2, 2, dtype=torch.float32)).event_t
    assert found.isfinite().all()
    assert found.dtype == (torch.float32 if isinstance(times, list) else torch.float64)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own
def test_compiled():
    layer = ODELayer(Field(), [0.0, 20.0], batch_dims=1, event=Plane())
    assert "event=Plane(" in repr(layer)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.linear = layer, nn.Linear(2, 2)

        def forward(self, y):
            solution = self.layer.solve(self.linear(y))
            return solution.event_t.sum() + solution.event_y.sum()

    model, y0 = Model(), torch.randn(3, 2)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(y0), model(y0))
    gradients = [torch.autograd.grad(m(y0), list(model.parameters())) for m in (model, compiled)]
    torch.testing.assert_close(*gradients)


def test_closures():
    """First derivatives reach what events and fields close over; a transform that can't follow says so."""
    level, gravity = torch.tensor(0.3, requires_grad=True), torch.tensor(9.81, requires_grad=True)
    y0 = torch.tensor([2.0, 1.0])

    def fall(t, y):
        return torch.stack([y[1], -gravity])

    t = odeint(fall, y0, [0.0, 3.0], event=lambda t, y: y[0] - level).event_t
    exact = landing(y0 - torch.stack([level, torch.tensor(0.0)]), gravity, 0.0)[0]
    assert_close(*[torch.autograd.grad(value, (level, gravity)) for value in (t, exact)], 1e-9)
    with pytest.raises(ProblemError, match="level"):
        grad(lambda level: odeint(lambda t, y: -y, y0, [0.0, 3.0], event=lambda t, y: y[0] - level).event_t)(
            torch.tensor(0.3)
        )


def test_no_gradient_costs_no_tape():
    y0, gravity, rise, _ = falls()
    with torch.no_grad(), monitor() as log:
        t, y = thrown(Dopri5())(y0, gravity, rise)
    assert not t.requires_grad
    assert not y.requires_grad
    assert [record.role for record in log] == ["forward"]
    assert log[0].seconds > 0


def test_bad_events():
    y0, t, args = FALLS, [0.0, 1.0], (9.81, 0.0)
    for event, message in (
        (3, "callable"),
        ([], "empty"),
        (lambda t, y, *args: y, r"one number per sample, \(3,\)"),
        (lambda t, y, *args: 1.0, "real tensor"),
        (lambda t, y, *args: y[:, 0] + 0j, "real tensor"),
    ):
        with pytest.raises(ProblemError, match=message):
            odeint(ball, y0, t, args, batch_dims=1, event=event)
    with pytest.raises(ProblemError, match="direction"):
        Event(floor, direction=2)
    with pytest.raises(ProblemError, match="parts"):
        Event(floor, parts=0)
    for solver in (TorchDiffEq(), ScipyIVP()):
        with pytest.raises(TypeError, match="steps"):
            odeint(ball, y0, t, args, batch_dims=1, event=floor, solver=solver)
