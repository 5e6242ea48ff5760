"""Output times of which every sample has its own number."""

import copy

import numpy as np
import pytest
import torch
from contracts import assert_close
from torch import nn
from torch.func import grad, vmap

from difflayers import UnrolledAdjoint
from difflayers.errors import ProblemError
from difflayers.ode import (
    RK4,
    BacksolveAdjoint,
    CheckpointedAdjoint,
    Dopri5,
    Dopri8,
    ODELayer,
    ScipyIVP,
    TorchDiffEq,
    odeint,
)

TIMES = [[0.0, 0.5, 0.9, 2.0], [1.0], [3.0, 2.5, 2.5]]
Y0 = [[1.0, -1.0], [0.5, 2.0], [0.3, -0.2]]
TIGHT = {"rtol": 1e-9, "atol": 1e-9}
SOLVERS = [Dopri5(**TIGHT), Dopri8(**TIGHT), RK4(0.01), TorchDiffEq("dopri5", **TIGHT), ScipyIVP("RK45", **TIGHT)]


def field(t, y, rate):
    return torch.sin(rate * y + t)


def ragged():
    return [torch.tensor(own, requires_grad=True) for own in TIMES]


def inputs():
    return torch.tensor(Y0, requires_grad=True), torch.tensor(0.7, requires_grad=True)


def one_by_one(solver, y0, times, rate):
    """Every sample alone, ``(T, n)`` each."""
    return [
        odeint(field, y0[i : i + 1], own.unsqueeze(0), (rate,), batch_dims=1, solver=solver).ys[:, 0]
        for i, own in enumerate(times)
    ]


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_every_sample_as_if_alone(solver):
    (y0, rate), times = inputs(), ragged()
    solution = odeint(field, y0, times, (rate,), batch_dims=1, solver=solver)
    assert solution.ys.shape == (4, 3, 2)
    assert solution.ok.all()
    assert solution.stats["outputs"].tolist() == [4, 1, 3]
    for i, alone in enumerate(one_by_one(solver, y0, times, rate)):
        assert_close(solution.ys[: len(alone), i], alone, 1e-6)
        assert solution.ys[len(alone) :, i].isnan().all()
        assert_close(solution.t[i, : len(alone)], times[i])
        assert solution.t[i, len(alone) :].isnan().all()


ADJOINTS = [
    None,
    CheckpointedAdjoint(2),
    CheckpointedAdjoint(stage_parallel=True),
    UnrolledAdjoint(),
    BacksolveAdjoint(),
]


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_gradients(adjoint):
    """In the start, the arguments and every time; what was padded has none."""
    found = []
    for alone in (False, True):
        (y0, rate), times, solver = inputs(), ragged(), Dopri5(**TIGHT)
        if alone:
            total = sum((ys**3).sum() for ys in one_by_one(solver, y0, times, rate))
        else:
            ys = odeint(field, y0, times, (rate,), batch_dims=1, solver=solver, adjoint=adjoint).ys
            total = (ys[ys.isfinite()] ** 3).sum()
        found.append(torch.autograd.grad(total, (y0, rate, *times)))
    assert_close(*found, 1e-6)


def test_padded_with_nan():
    (y0, rate), solver = inputs(), Dopri5(**TIGHT)
    padded = torch.nn.utils.rnn.pad_sequence(ragged(), batch_first=True, padding_value=torch.nan).detach()
    listed = odeint(field, y0, ragged(), (rate,), batch_dims=1, solver=solver)
    given = odeint(field, y0, padded.requires_grad_(), (rate,), batch_dims=1, solver=solver)
    torch.testing.assert_close(given.ys, listed.ys, equal_nan=True, rtol=0, atol=0)
    (found,) = torch.autograd.grad(given.ys.nansum(), padded)
    assert not found[padded.isnan()].any()


def test_transforms():
    y0, rate = (one.detach() for one in inputs())
    padded = torch.nn.utils.rnn.pad_sequence(ragged(), batch_first=True, padding_value=torch.nan).detach()

    def end(y0, rate):
        return odeint(field, y0, padded, (rate,), batch_dims=1, solver=Dopri5(**TIGHT)).ys.nansum()

    moved = (y0.clone().requires_grad_(), rate.clone().requires_grad_())
    expected = torch.autograd.grad(end(*moved), moved)
    assert_close(grad(end, (0, 1))(y0, rate), expected, 1e-10)
    every = vmap(grad(end, 1), (None, 0))(y0, torch.stack([rate, 2 * rate]))
    assert_close(every[0], expected[1], 1e-7)


def test_numbers_and_arrays():
    solve = lambda y0, t: odeint(lambda t, y: -y, y0, t, batch_dims=1).ys  # noqa: E731
    expected = solve(torch.tensor(Y0), ragged()).detach()
    torch.testing.assert_close(solve(torch.tensor(Y0), TIMES), expected, equal_nan=True)
    arrays = solve(np.array(Y0), [np.array(own) for own in TIMES])
    torch.testing.assert_close(torch.from_numpy(arrays), expected, equal_nan=True)


def test_layer():
    class Field(nn.Module):
        def forward(self, t, y):
            return -y

    layer = copy.deepcopy(ODELayer(Field(), TIMES, batch_dims=1))
    assert layer(torch.tensor(Y0)).isnan().sum(0)[:, 0].tolist() == [0, 3, 1]


@pytest.mark.parametrize("t", [[[0.0, float("nan"), 1.0], [0.0, 0.5, 1.0]], [[0.0, 1.0], [float("nan")] * 2]])
def test_nan_elsewhere_is_refused(t):
    with pytest.raises(ProblemError, match="isn't finite"):
        odeint(lambda t, y: -y, torch.ones(2, 1), t, batch_dims=1)


@pytest.mark.parametrize("t", [[torch.ones(2), torch.ones(0)], [torch.ones(2), torch.ones(2, 2)]])
def test_shapes_that_do_not_fit(t):
    with pytest.raises(ProblemError, match="one tensor"):
        odeint(lambda t, y: -y, torch.ones(2, 1), t, batch_dims=1)
    with pytest.raises(ProblemError, match="t has shape"):
        odeint(lambda t, y: -y, torch.ones(3, 1), [torch.ones(2), torch.ones(1)], batch_dims=1)
