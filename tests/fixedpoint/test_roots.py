"""Root solvers from rough starts: systems of Moré, Garbow and Hillstrom (1981, ACM TOMS 7(1), 17-41)."""

import contracts
import pytest
import torch

from difflayers import Status
from difflayers.fixedpoint import Dogleg, LevenbergMarquardt, Newton, root


def rosenbrock(z):
    return torch.stack([1 - z[..., 0], 10 * (z[..., 1] - z[..., 0] ** 2)], -1)


def powell_badly_scaled(z):
    return torch.stack([1e4 * z[..., 0] * z[..., 1] - 1, torch.exp(-z).sum(-1) - 1.0001], -1)


def helical_valley(z):
    angle = torch.atan2(z[..., 1], z[..., 0]) / (2 * torch.pi)
    radius = z[..., :2].norm(dim=-1)
    return torch.stack([10 * (z[..., 2] - 10 * angle), 10 * (radius - 1), z[..., 2]], -1)


def broyden_tridiagonal(z):
    before = torch.nn.functional.pad(z[..., :-1], (1, 0))
    after = torch.nn.functional.pad(z[..., 1:], (0, 1))
    return (3 - 2 * z) * z - before - 2 * after + 1


SYSTEMS = [
    (rosenbrock, [-1.2, 1.0]), (powell_badly_scaled, [0.0, 1.0]), (helical_valley, [-1.0, 0.0, 0.0]),
    (broyden_tridiagonal, [-1.0] * 10),
]  # fmt: skip


@pytest.mark.parametrize("solver", [Dogleg(), LevenbergMarquardt()], ids=repr)
@pytest.mark.parametrize(("system", "start"), SYSTEMS, ids=lambda value: getattr(value, "__name__", ""))
def test_standard_and_perturbed_starts(system, start, solver):
    start = torch.tensor(start)
    starts = start + 0.1 * torch.randn(8, len(start)) * start.abs().clamp_min(1)
    solution = root(system, starts, batch_dims=1, solver=solver)
    residual = system(solution.value).norm(dim=1)
    assert (residual <= 1e-8 * system(starts).norm(dim=1).clamp_min(1)).all()


@pytest.mark.parametrize("solver", [Dogleg(), LevenbergMarquardt()], ids=repr)
def test_a_local_minimum_of_the_norm_is_no_root(solver):
    solution = root(lambda z: z**2 + 1, torch.tensor([[1.0], [0.5]]), batch_dims=1, solver=solver, on_failure="ignore")
    assert solution.status.tolist() == [Status.STALLED] * 2


@pytest.mark.parametrize("solver", [Newton(), Newton(refactor=4)], ids=repr)
def test_newton_without_a_root_stalls(solver):
    solution = root(lambda z: z**2 + 1, torch.tensor([[0.5], [3.0]]), batch_dims=1, solver=solver, on_failure="ignore")
    assert solution.status.tolist() == [Status.STALLED] * 2
    assert solution.stats["steps"].max() < solver.max_steps


@pytest.mark.parametrize("solver", [Dogleg(), LevenbergMarquardt(), Newton(), Newton(refactor=4)], ids=repr)
def test_nan_at_a_trial_point_shortens_the_step(solver):
    solution = root(
        lambda z: torch.log(z), torch.tensor([[4.0], [torch.nan]]), batch_dims=1, solver=solver, on_failure="ignore"
    )
    assert solution.status.tolist() == [Status.SUCCESS, Status.NONFINITE]
    contracts.assert_close(solution.value[0], torch.ones(1))


def test_chord_method_factorizes_less_often():
    counts = []

    class Counting(Newton):
        def _factored(self, residual, z, state, due):
            counts[-1] += int(due.any())
            return super()._factored(residual, z, state, due)

    for refactor in (1, 5):
        counts.append(0)
        solution = root(broyden_tridiagonal, -torch.ones(10), solver=Counting(refactor=refactor))
        contracts.assert_close(broyden_tridiagonal(solution.value), torch.zeros(10))
    assert counts[1] < counts[0]
