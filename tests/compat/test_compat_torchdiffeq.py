"""torchdiffeq's programs with another import: the same numbers, the same signatures, and errors that say what to do."""

import inspect

import pytest
import torch
import torchdiffeq
from torch import nn

from difflayers.compat import torchdiffeq as ours
from difflayers.errors import ProblemError, SolverError, UnknownNameError
from difflayers.ode import Rodas

TIMES = torch.linspace(0.0, 2.0, 9, dtype=torch.float64)

# The README's call, with something to solve.
README = """
import torch
from torchdiffeq import odeint

def func(t, y):
    return -y + torch.sin(t)

y0 = torch.tensor([1.0, -0.5])
t = torch.linspace(0, 2, 5)
found = odeint(func, y0, t)
"""

ADJOINT = """
import torch
from torch import nn
from torchdiffeq import odeint_adjoint as odeint

class ODEFunc(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 10), nn.Tanh(), nn.Linear(10, 2))

    def forward(self, t, y):
        return self.net(y**3)

torch.manual_seed(0)
func = ODEFunc()
pred_y = odeint(func, torch.tensor([[2.0, 0.0]]), torch.linspace(0, 1, 5), method='dopri5')
pred_y.abs().mean().backward()
found = pred_y, func.net[0].weight.grad
"""

BOUNCE = """
import torch
from torchdiffeq import odeint, odeint_event

gravity = torch.tensor(9.81, requires_grad=True)
t, height, speed = (torch.tensor([x], requires_grad=True) for x in (0.0, 10.0, 1.0))

def fall(t, state):
    return state[1], -gravity * torch.ones_like(state[1])

t_hit, states = odeint_event(
    fall, (height, speed), t, event_fn=lambda t, state: state[0], odeint_interface=odeint, atol=1e-9, rtol=1e-9)
found = t_hit, *states, *torch.autograd.grad(t_hit + states[1][-1].sum(), (gravity, t, height, speed))
"""


def run(program, package):
    names = {}
    exec(program.replace("from torchdiffeq import", f"from {package} import"), names)
    found = names["found"]
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("program", [README, ADJOINT, BOUNCE], ids=["README", "adjoint", "event"])
def test_a_program_with_another_import_gives_the_same_numbers(program):
    for here, there in zip(*(run(program, p) for p in ("difflayers.compat.torchdiffeq", "torchdiffeq")), strict=True):
        torch.testing.assert_close(here, there, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ours.__all__)
def test_signatures_are_equal(name):
    def said(module):
        parameters = inspect.signature(getattr(module, name)).parameters.values()
        # The one default that is a function of the package itself.
        return [(p.name, p.kind, "odeint" if callable(p.default) else p.default) for p in parameters]

    assert said(ours) == said(torchdiffeq)


class Field(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, t, y):
        return self.net(y) + torch.sin(t)


def solved(module, interface="odeint", **options):
    field, y0 = Field(), torch.tensor([[1.0, 0.2], [-0.5, 0.3]], requires_grad=True)
    t = TIMES.clone().requires_grad_()
    ys = getattr(module, interface)(field, y0, t, **options)
    return ys, *torch.autograd.grad(ys[-1].square().sum(), (y0, t, *field.parameters()))


@pytest.mark.parametrize("step_size", [None, 0.125])
@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4", "heun2", "heun3"])
def test_fixed_steps_to_rounding(method, step_size):
    options = {"method": method, "options": {"step_size": step_size}}
    here, there = solved(ours, **options), solved(torchdiffeq, **options)
    for i in (0, 1, *range(3, len(here))):  # the gradient of times is the slope there, theirs that of a step's formula
        torch.testing.assert_close(here[i], there[i], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3", None])
def test_adaptive_steps_to_the_tolerance(method):
    # Where torchdiffeq needn't interpolate, which costs it digits.
    there = solved(torchdiffeq, method=method, options={"step_t": TIMES[1:]})
    for pair in zip(solved(ours, method=method), there, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["dopri8", "bosh3"])
def test_outputs_between_steps(method):
    exact = solved(ours, method="dopri8", rtol=1e-12, atol=1e-12)[0]
    here, there = (float((solved(m, method=method)[0] - exact).detach().abs().max()) for m in (ours, torchdiffeq))
    assert here < 1e-7
    assert there > 100 * here


@pytest.mark.parametrize("method", ["adaptive_heun", "fehlberg2", "explicit_adams", "implicit_adams", "scipy_solver"])
def test_methods_that_run_there(method):
    options = {"rtol": 1e-5, "atol": 1e-6}
    exact = solved(ours, method="dopri8", rtol=1e-12, atol=1e-12)
    for here, right in zip(solved(ours, method=method, **options), exact, strict=True):
        torch.testing.assert_close(here, right, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@pytest.mark.parametrize("seminorm", [False, True])
def test_gradients_of_the_adjoint(method, seminorm):
    options = {"method": method, "adjoint_options": {"norm": "seminorm"} if seminorm else {}}
    if method == "rk4":
        options = {"method": method}
    pairs = zip(
        solved(ours, "odeint_adjoint", **options), solved(torchdiffeq, "odeint_adjoint", **options), strict=True
    )
    for here, there in pairs:
        torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5)


def test_parameters_that_a_function_closes_over():
    rate = torch.tensor(0.7, requires_grad=True)
    for module in (ours, torchdiffeq):
        ys = module.odeint_adjoint(lambda t, y: -rate * y, torch.ones(2), TIMES, adjoint_params=(rate,))
        (gradient,) = torch.autograd.grad(ys[-1, 0], rate)
        torch.testing.assert_close(gradient, -2 * torch.exp(-2 * rate.detach()), rtol=1e-6, atol=0.0)
    with pytest.raises(ValueError, match="adjoint_params"):
        ours.odeint_adjoint(lambda t, y: -y, torch.ones(2), TIMES)


def test_tuples_and_time_that_runs_backward():
    def turn(t, state):
        return state[1], -state[0]

    start = torch.ones(2, 1), torch.zeros(2, 1)
    here, there = (module.odeint(turn, start, TIMES.flip(0)) for module in (ours, torchdiffeq))
    assert isinstance(here, tuple)
    torch.testing.assert_close(here, there, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("interface", ["odeint", "odeint_adjoint"])
def test_the_first_of_several_events(reverse, interface):
    def either(t, y):
        return torch.stack([y[0] - 0.5, y[0] + 2.0, t + 0.3])

    found = []
    for module in (ours, torchdiffeq):
        field, y0, t0 = Field(), torch.tensor([1.0, 0.2], requires_grad=True), torch.tensor(0.0, requires_grad=True)
        t, ys = module.odeint_event(
            field, y0, t0, event_fn=either, reverse_time=reverse, odeint_interface=getattr(module, interface)
        )
        found.append((t, ys, *torch.autograd.grad(t + ys[-1].sum(), (y0, field.net[0].weight))))
    (t, ys, *gradients), (their_t, their_ys, *their_gradients) = found
    torch.testing.assert_close((t, ys), (their_t, their_ys), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradients, their_gradients, rtol=1e-5, atol=1e-6)


def test_an_event_gives_gradients_to_what_it_closes_over():
    level = torch.tensor(0.5, requires_grad=True)
    t, _ = ours.odeint(lambda t, y: -y, torch.ones(1), TIMES[:2], event_fn=lambda t, y: y - level)
    torch.testing.assert_close(torch.autograd.grad(t, level)[0], torch.tensor(-2.0), rtol=1e-6, atol=0.0)
    fixed = {"method": "rk4", "options": {"step_size": 0.01}}
    t, _ = ours.odeint(lambda t, y: -y, torch.ones(1), TIMES[:2], event_fn=lambda t, y: y - level, **fixed)
    torch.testing.assert_close(t.detach(), torch.tensor(2.0).log(), rtol=1e-9, atol=0.0)


def test_events_that_can_not_be_found():
    ground = {"event_fn": lambda t, y: y[0] + 1.0}
    with pytest.raises(SolverError, match="didn't change its sign until"):
        ours.odeint(lambda t, y: torch.ones_like(y), torch.ones(1), TIMES[:2], **ground)
    with pytest.raises(ProblemError, match="got 9 times"):
        ours.odeint(lambda t, y: -y, torch.ones(1), TIMES, **ground)
    with pytest.raises(ProblemError, match="step_size"):
        ours.odeint(lambda t, y: -y, torch.ones(1), TIMES[:2], method="rk4", **ground)


def test_a_blow_up_says_where():
    with pytest.raises(SolverError, match="after t = 1"):
        ours.odeint(lambda t, y: y**2, torch.ones(1), TIMES)


def test_float32_at_tolerances_beyond_rounding():
    ys = ours.odeint(lambda t, y: -y, torch.ones(2, dtype=torch.float32), TIMES.float())
    assert ys.dtype == torch.float32
    torch.testing.assert_close(ys[-1], torch.full((2,), -2.0, dtype=torch.float32).exp(), rtol=2e-5, atol=0.0)


def test_a_stiff_solver_as_the_method():
    def stiff(t, y):
        return -1e4 * (y - torch.cos(t))

    expected = torch.cos(TIMES[-1:])
    for method in ("rodas", Rodas()):
        torch.testing.assert_close(
            ours.odeint(stiff, torch.ones(1), TIMES, method=method, rtol=1e-6, atol=1e-8)[-1],
            expected,
            rtol=1e-3,
            atol=0.0,
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"options": {"norm": abs}}, "batch_dims=1"),
        ({"options": {"jump_t": TIMES}}, "call of its own"),
        ({"options": {"step_t": TIMES}}, "call of its own"),
        ({"options": {"max_step": 0.1}}, "step_size"),
        ({"method": "rk4", "options": {"grid_constructor": max}}, "step_size"),
        ({"method": "rk4", "options": {"perturb": True}}, "call of its own"),
        ({"method": "explicit_adams", "options": {"max_order": 4}}, "defaults"),
        ({"rtol": (1e-6, 1e-7)}, "one number"),
        ({"method": Rodas(), "options": {"max_num_steps": 5}}, "own options"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(ProblemError, match=message):
        ours.odeint(lambda t, y: -y, torch.ones(1), TIMES, **options)


@pytest.mark.parametrize(
    "options", [{"method": "dopri6"}, {"options": {"max_steps": 5}}, {"options": {"step_size": 1}}]
)
def test_unknown_names(options):
    with pytest.raises(UnknownNameError, match="Known: "):
        ours.odeint(lambda t, y: -y, torch.ones(1), TIMES, **options)


def test_options_without_a_meaning_warn():
    with pytest.warns(UserWarning, match="first_step of torchdiffeq has no meaning"):
        ours.odeint(lambda t, y: -y, torch.ones(1), TIMES, options={"first_step": 0.1})
    with pytest.warns(UserWarning, match="Dopri5's"):
        ours.odeint_adjoint(Field(), torch.ones(1, 2), TIMES, adjoint_method="rk4")
    with pytest.warns(UserWarning, match=r"\['step_size'\]"):
        ours.odeint_adjoint(Field(), torch.ones(1, 2), TIMES, adjoint_options={"step_size": 0.1})
    with pytest.raises(ProblemError, match="adjoint_rtol must be one number"):
        ours.odeint_adjoint(Field(), torch.ones(1, 2), TIMES, adjoint_rtol=(1e-3, 1e-4))
    with pytest.raises(ProblemError, match="seminorm"):
        ours.odeint_adjoint(Field(), torch.ones(1, 2), TIMES, adjoint_options={"norm": max})


def test_callbacks_are_told_of_the_monitor():
    field = Field()
    field.callback_step = lambda t, y, dt: None
    with pytest.warns(UserWarning, match=r"callback_step of func .* difflayers\.monitor"):
        ours.odeint(field, torch.ones(1, 2), TIMES)


def test_second_derivatives():
    field, y0 = Field(), torch.tensor([[0.4, 0.2]], requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda y0: ours.odeint(field, y0, TIMES[:3], rtol=1e-9, atol=1e-9), y0)


def test_the_step_limit():
    with pytest.raises(SolverError, match="MAX_STEPS"):
        ours.odeint(lambda t, y: torch.sin(50 * t) * y, torch.ones(1), TIMES, options={"max_num_steps": 5})
