"""Steps that ``torch.compile`` makes one function of."""

import functools
import math
import shutil
from weakref import WeakKeyDictionary

import pytest
import torch
from contracts import assert_close, compiles, wanting
from torch import nn

from difflayers.errors import ProblemError
from difflayers.ode import RK4, CheckpointedAdjoint, Dopri5, Kvaerno5, ODELayer, Rodas, _compiled, odeint

pytestmark = [compiles, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]
STEPS = CheckpointedAdjoint(stage_parallel=False)


@pytest.fixture
def traced_only(monkeypatch):
    """What torch.compile makes is run as it was traced: a C++ compiler takes longer than everything else here."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(_compiled, "_known", WeakKeyDictionary())


def field(t, y, A, rate):
    return rate * torch.sin(y @ A) + torch.cos(t)


def gradients(solver, batch_dims, times=(0.0, 0.3, 1.0)):
    inputs = wanting(
        (torch.linspace(-1, 1, 6).reshape(3, 2), torch.tensor([[0.5, 1.0], [-1.0, 0.1]]), torch.tensor(2.0))
    )
    solution = odeint(lambda t, y, *args: field(t, y, *args), inputs[0], times, inputs[1:], batch_dims=batch_dims,
                      solver=solver, adjoint=STEPS)  # fmt: skip
    return solution, torch.autograd.grad(solution.ys.pow(2).sum(), inputs)


def compare(batch_dims):
    ours, found = gradients(Dopri5(compile=True), batch_dims)
    plain, expected = gradients(Dopri5(), batch_dims)
    assert_close(ours.ys, plain.ys, 1e-13)
    assert_close(found, expected, 1e-12)
    assert ours.stats["evaluations"].equal(plain.stats["evaluations"])


@pytest.mark.parametrize("batch_dims", [0, 1])
def test_same_answers_as_traced(batch_dims, traced_only):
    compare(batch_dims)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_same_answers():
    compare(1)


def test_compiled_once(traced_only):
    from torch._dynamo.utils import counters

    gradients(Dopri5(compile=True), 1)
    before = counters["stats"]["unique_graphs"]
    for end in (0.5, 2.0):
        gradients(Dopri5(compile=True, rtol=1e-4), 1, (0.0, 0.1, end))
    assert counters["stats"]["unique_graphs"] == before


def test_parameters_that_move(traced_only):
    """Of a module, between calls: what was compiled has no values in it."""

    class Decay(nn.Module):
        def __init__(self):
            super().__init__()
            self.rate = nn.Parameter(torch.tensor(1.0))

        def forward(self, t, y):
            return -self.rate * y

    layer = ODELayer(Decay(), [0.0, 1.0], solver=RK4(0.01, compile=True), adjoint=STEPS)
    for rate in (1.0, 0.5):
        layer.fn.rate.data.fill_(rate)
        layer.zero_grad()
        end = layer(torch.ones(1))[-1, 0]
        end.backward()
        assert_close((end.detach(), layer.fn.rate.grad), (torch.tensor(math.exp(-rate)), -end.detach()), 1e-8)


def test_a_sample_that_fails_leaves_the_others(traced_only):
    y0 = torch.tensor([[1.0], [0.1]], requires_grad=True)
    solution = odeint(lambda t, y: y**2, y0, [0.0, 2.0], batch_dims=1, solver=Dopri5(compile=True), adjoint=STEPS,
                      on_failure="ignore")  # fmt: skip
    assert solution.ok.tolist() == [False, True]
    (found,) = torch.autograd.grad(solution.ys[-1, 1].sum(), y0)
    assert_close(found[1, 0], torch.tensor(1 / 0.8**2), 1e-5)


def test_higher_orders_and_transforms_run_without_it(traced_only):
    y0 = torch.ones(2, requires_grad=True)

    def end(y0):
        return odeint(lambda t, y: -(y**2), y0, [0.0, 1.0], solver=Dopri5(rtol=1e-10, compile=True)).ys[-1].sum()

    (first,) = torch.autograd.grad(end(y0), y0, create_graph=True)
    assert_close(torch.autograd.grad(first.sum(), y0)[0], torch.full((2,), -0.25), 1e-7)
    assert_close(torch.func.grad(end)(torch.ones(2)), torch.full((2,), 0.25), 1e-7)


def test_refused_where_it_cannot_serve():
    for make in (
        lambda: Dopri5(compile=True, per_sample=True),
        lambda: Rodas(compile=True),
        lambda: Kvaerno5(compile=True),
    ):
        with pytest.raises(ProblemError, match="compile=True"):
            make()
    with pytest.raises(ProblemError, match="compile=True is for output times"):
        odeint(lambda t, y: y, torch.ones(2, 1), torch.ones(2, 2), batch_dims=1, solver=Dopri5(compile=True))
