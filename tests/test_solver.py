"""The masked loop with scripted iterations, and the loop over samples."""

from dataclasses import dataclass, replace

import contracts
import numpy as np
import problems
import pytest
import torch

from difflayers import CallableSolver, ImplicitFunction, IterativeSolver, RootProblem, Status
from difflayers.errors import SolverError

DISTANCE = RootProblem(lambda z, target: z - target, batch_dims=1)


@dataclass(frozen=True)
class Scripted(IterativeSolver):
    """Walks one unit a step towards zero residual: sample ``i`` needs as many steps as its residual says."""

    def init(self, residual, z):
        return torch.zeros(z.shape[0])

    def step(self, residual, z, state):
        return z - torch.sign(residual(z)), state + 1


@dataclass(frozen=True)
class Leaping(Scripted):
    """Proposes NaN for samples beyond a wall, and gives up where told."""

    singular: int = -1

    def step(self, residual, z, state):
        return z - 8 * torch.sign(residual(z)), state + 1

    def failure(self, state):
        status = torch.zeros(len(state), dtype=torch.int64)
        if self.singular >= 0:
            status[self.singular] = Status.SINGULAR
        return status


def walk(solver, target, z0=None, problem=DISTANCE):
    target = torch.tensor(target)[:, None]
    return solver.solve(problem, (target,), torch.zeros(len(target), 1) if z0 is None else z0)


def test_counts_are_exact_and_done_samples_stand_still():
    solution = walk(Scripted(max_steps=10), [0.0, 3.0, 7.0])
    assert solution.stats["steps"].tolist() == [0, 3, 7]
    assert solution.status.tolist() == [Status.SUCCESS] * 3
    assert solution.stats["evaluations"].tolist() == [8] * 3
    contracts.assert_close(solution.value, torch.tensor([[0.0], [3.0], [7.0]]))


def test_max_steps_gives_the_best_iterate():
    solution = walk(Scripted(max_steps=5), [3.0, 7.0])
    assert solution.status.tolist() == [Status.SUCCESS, Status.MAX_STEPS]
    assert solution.value.flatten().tolist() == [3.0, 5.0]
    assert solution.stats["residual"].tolist() == [0.0, 2.0]


def test_no_progress_stalls_at_the_best_iterate():
    solution = walk(Scripted(max_steps=100, patience=4), [2.5])  # ends up hopping around its target
    assert solution.status.tolist() == [Status.STALLED]
    assert solution.stats["residual"].tolist() == [0.5]
    assert solution.stats["steps"].item() < 10


def test_relative_tolerance_is_of_the_first_residual():
    solution = walk(Scripted(rtol=0.3, atol=0.0, max_steps=10), [10.0, 100.0])
    assert solution.stats["steps"].tolist() == [7, 10]
    assert solution.status.tolist() == [Status.SUCCESS, Status.MAX_STEPS]


def test_nan_at_a_trial_point_shrinks_the_step():
    walled = RootProblem(lambda z, target: torch.where(z > 5, torch.nan, z - target), batch_dims=1)
    solution = walk(Leaping(max_steps=2), [4.0, -8.0], problem=walled)
    assert solution.status.tolist() == [Status.SUCCESS, Status.SUCCESS]
    assert solution.value.flatten().tolist() == [4.0, -8.0]


def test_failures_are_per_sample():
    solution = walk(Leaping(singular=1, max_steps=1), [8.0, 8.0, 8.0])
    assert solution.status.tolist() == [Status.SUCCESS, Status.SINGULAR, Status.SUCCESS]
    broken = walk(Scripted(max_steps=5), [3.0, float("nan"), float("inf")])
    assert broken.status.tolist() == [Status.SUCCESS, Status.NONFINITE, Status.NONFINITE]
    assert broken.stats["steps"].tolist() == [3, 0, 0]


def test_empty_batch():
    solution = Scripted().solve(DISTANCE, (torch.zeros(0, 1),), torch.zeros(0, 1))
    assert solution.value.shape == (0, 1)
    assert solution.status.shape == (0,)


def bisection(residual, z0):
    low, high = z0 - 10, z0 + 10
    for _ in range(60):
        middle = (low + high) / 2
        above = residual(middle) > 0
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    return (low + high) / 2


def test_any_numpy_routine_is_a_layer_with_derivatives_of_every_order():
    fn = ImplicitFunction(RootProblem(lambda z, a: z**3 + z - a, batch_dims=1), CallableSolver(bisection))
    a = torch.tensor([1.0, 2.0, -3.0], requires_grad=True)

    def call(a):
        return fn(a, init=torch.zeros(3)).value

    assert torch.autograd.gradcheck(call, (a,), check_forward_ad=True, atol=1e-4)
    z = call(a)
    (first,) = torch.autograd.grad(z.sum(), a, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), a)
    contracts.assert_close(first, 1 / (3 * z**2 + 1))
    contracts.assert_close(second, -6 * z / (3 * z**2 + 1) ** 3)


def test_callable_gets_the_jacobian_and_its_own_exceptions_pass():
    def newton(residual, z):
        for _ in range(30):
            z = z - np.linalg.solve(residual.jacobian(z), residual(z))
        return z

    problem = RootProblem(lambda z, a: z**3 + z.sum() - a)
    fn = ImplicitFunction(problem, CallableSolver(newton))
    z = fn(torch.tensor([1.0, 2.0]), init=torch.ones(2)).value
    contracts.assert_close(z**3 + z.sum(), torch.tensor([1.0, 2.0]))

    def broken(residual, z):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        ImplicitFunction(problem, CallableSolver(broken))(torch.ones(2), init=torch.ones(2))


def test_an_answer_that_is_none_is_found_out():
    lazy = ImplicitFunction(RootProblem(lambda z, a: z - a), CallableSolver(lambda residual, z: z))
    with pytest.raises(SolverError, match="STALLED"):
        lazy(torch.ones(2), init=torch.zeros(2))
    wild = ImplicitFunction(
        RootProblem(lambda z, a: z - a), CallableSolver(lambda residual, z: z * np.nan), on_failure="ignore"
    )
    solution = wild(torch.ones(2), init=torch.ones(2) * 3)
    assert solution.status.item() == Status.NONFINITE
    assert solution.value.isnan().all()


@pytest.mark.parametrize("solver", contracts.SOLVERS, ids=contracts.label)
def test_nothing_is_sized_by_the_limit_of_steps(solver):
    if hasattr(solver, "max_steps"):
        contracts.check_solution(problems.TANH, replace(solver, max_steps=10**9))
