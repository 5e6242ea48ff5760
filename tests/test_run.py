"""Samples that are done leave the batch; the others go on alone only where that changes nothing."""

import contracts
import pytest
import torch

from difflayers.fixedpoint import Anderson, Broyden, Newton, Picard, fixed_point, root

SOLVERS = [Anderson(), Broyden(), Picard(max_steps=3000)]


def slow_first(samples=64):
    slope = torch.full((samples, 1), 0.2)
    slope[0] = 0.99
    return slope


def test_a_slow_sample_costs_its_own_steps():
    rows = []

    def fn(z, slope):
        rows.append(len(z))
        return slope * z + 1

    solution = fixed_point(fn, torch.zeros(64, 3), (slow_first(),), batch_dims=1, solver=Picard(max_steps=3000))
    assert solution.ok.all()
    assert solution.stats["steps"][0] > 5 * solution.stats["steps"][1:].max()
    assert rows[-1] == 1
    assert sum(rows) < 64 * (int(solution.stats["steps"][1:].max()) + 8) + 2 * len(rows)
    assert solution.stats["evaluations"][1:].max() < solution.stats["evaluations"][0]


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_the_others_are_what_they_are_without_it(solver):
    slope = slow_first()
    together = fixed_point(lambda z, s: s * torch.sin(z) + 1, torch.zeros(64, 3), (slope,), batch_dims=1, solver=solver)
    alone = fixed_point(
        lambda z, s: s * torch.sin(z) + 1, torch.zeros(63, 3), (slope[1:],), batch_dims=1, solver=solver
    )
    contracts.assert_close(together.value[1:], alone.value, 1e-14)
    assert together.stats["steps"][1:].tolist() == alone.stats["steps"].tolist()


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_what_cannot_be_divided_stays_whole(solver):
    slope, rows = slow_first(), []

    def closure(z):  # knows its samples by heart
        rows.append(len(z))
        return slope * torch.sin(z) + 1

    expected = fixed_point(lambda z, s: s * torch.sin(z) + 1, torch.zeros(64, 3), (slope,), batch_dims=1, solver=solver)
    solution = fixed_point(closure, torch.zeros(64, 3), batch_dims=1, solver=solver)
    contracts.assert_close(solution.value, expected.value)
    assert rows[-1] == 64


def test_a_shared_matrix_as_large_as_the_batch_is_not_divided():
    weight = 0.3 * torch.randn(6, 6) / 6**0.5
    bias = torch.randn(6, 6)
    bias[1:] *= 1e-9  # all but one sample are done at once
    solution = fixed_point(lambda z, w, b: torch.tanh(z @ w.mT) + b, torch.zeros(6, 6), (weight, bias), batch_dims=1)
    z = solution.value
    contracts.assert_close(torch.tanh(z @ weight.mT) + bias, z)


def test_gradients_after_a_division():
    slope = slow_first(8).requires_grad_()
    for solver in (Newton(), Broyden(), Anderson()):
        z = root(lambda z, s: s * torch.sin(z) + 1 - z, torch.zeros(8, 3), (slope,), batch_dims=1, solver=solver).value
        (gradient,) = torch.autograd.grad(z.sum(), slope)
        expected = (torch.sin(z) / (1 - slope * torch.cos(z))).sum(1, keepdim=True)
        contracts.assert_close(gradient, expected.detach(), 1e-6)
