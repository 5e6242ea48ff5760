"""Monotone equilibria: one answer, whatever the weights, and every splitting finds it."""

import contracts
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from difflayers import Status
from difflayers.errors import ProblemError
from difflayers.fixedpoint import Anderson, ForwardBackward, MonotoneConvDEQ, MonotoneDEQ, PeacemanRachford

SOLVERS = [PeacemanRachford(), ForwardBackward()]


def scaled(layer, scale):
    with torch.no_grad():
        for p in (layer.A, layer.B):
            p.mul_(scale)
    return layer


@settings(max_examples=20, deadline=None)
@given(features=st.integers(1, 8), scale=st.floats(0.1, 4), margin=st.floats(0.1, 1), seed=st.integers(0, 10_000))
def test_splittings_agree(features, scale, margin, seed):
    torch.manual_seed(seed)
    x = torch.randn(3, 2, dtype=torch.float64)
    torch.manual_seed(seed)
    layer = scaled(MonotoneDEQ(2, features, margin=margin).double(), scale)
    answers = []
    for solver in SOLVERS:
        layer.solver = solver
        solution = layer.solve(x)
        assert solution.status.tolist() == [Status.SUCCESS] * 3
        answers.append(solution.value)
    torch.testing.assert_close(*answers, rtol=1e-6, atol=1e-7)
    z = answers[0]
    torch.testing.assert_close(z, torch.relu(z @ layer.weight.mT + layer.injection(x)), rtol=1e-6, atol=1e-7)


def test_the_condition_is_strongly_monotone():
    layer = scaled(MonotoneDEQ(2, 6, margin=0.3), 5.0)
    symmetric = torch.eye(6) - (layer.weight + layer.weight.mT) / 2
    assert torch.linalg.eigvalsh(symmetric)[0] >= 0.3 - 1e-12


@pytest.mark.parametrize("solver", [*SOLVERS, Anderson()], ids=repr)
def test_gradients(solver):
    layer = MonotoneDEQ(3, 5, solver=solver)
    x = torch.randn(2, 3, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,), check_forward_ad=True)

    def of_weights(A, B):
        return torch.func.functional_call(layer, {"A": A, "B": B}, (x.detach(),))

    assert torch.autograd.gradcheck(of_weights, contracts.wanting((layer.A.detach(), layer.B.detach())))


def test_convolutions():
    layer = MonotoneConvDEQ(2, 3)
    x = torch.randn(2, 2, 5, 5, requires_grad=True)
    solution = layer.solve(x)
    assert solution.ok.all()
    assert solution.value.shape == (2, 3, 5, 5)
    assert torch.autograd.gradcheck(layer, (x,), fast_mode=True)


def test_wrong_calls():
    with pytest.raises(ProblemError, match="margin must be positive"):
        MonotoneDEQ(2, 3, margin=0.0)
