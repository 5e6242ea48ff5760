"""Explicit Runge–Kutta methods."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from difflayers._autodiff import in_functorch, is_tracked, numbers
from difflayers._problem import Form, Problem
from difflayers._solution import OnFailure, Solution, in_shape
from difflayers._solver import Solver
from difflayers.errors import ProblemError
from difflayers.ode._along import along, in_rows
from difflayers.ode._compiled import CompiledStages
from difflayers.ode._dop853 import DOP853
from difflayers.ode._joint import JointRun
from difflayers.ode._mesh import Mesh, RowMesh
from difflayers.ode._problem import Evaluate, InitialValueProblem, check_tolerances
from difflayers.ode._replay import moved
from difflayers.ode._rows import RowRun
from difflayers.ode._stability import doubt_unrolled
from difflayers.ode._tableaus import BOSH3, DOPRI5, EULER, MIDPOINT, TSIT5, Tableau
from difflayers.ode._tableaus import RK4 as CLASSICAL


class OneStepSolver(Solver):
    """What methods that know only the last state share, explicit or implicit.

    A solution's ``value`` is ``(samples, T, n)``, NaN after the time at which a sample failed. Under
    ``torch.no_grad()`` the loop runs in buffers, otherwise on the graph.
    """

    serves: ClassVar[frozenset[Form]] = frozenset({"ode"})
    traceable: ClassVar[bool] = True
    tableau: ClassVar[Tableau]
    adaptive: ClassVar[bool] = True
    explicit: ClassVar[bool] = True
    rtol: float = 0.0
    atol: float = 0.0
    per_sample: bool = False
    compile: bool = False
    max_steps: int

    def solve(self, problem: Problem, params: Sequence[Any], init: Tensor) -> Solution:
        if not isinstance(problem, InitialValueProblem):
            raise TypeError(f"expected an InitialValueProblem, got {type(problem).__name__}")
        mesh = self.mesh(params[1], states=0)
        if isinstance(mesh, Mesh):
            return self.march(problem, params, mesh)
        with torch.no_grad():
            solution = self.march(problem, params, mesh)
        if not torch.is_grad_enabled():
            return solution
        value = along(problem, self.tableau, mesh, mesh.columns(), params, is_tracked(params[1]))
        return replace(solution, value=torch.where(solution.value.isnan(), torch.nan, value))

    def mesh(self, t: Tensor, states: int | None, keep_stages: bool = False) -> Mesh | RowMesh:
        """Where the steps of a solve with these output times are kept."""
        if self.compile and t.dim() > 1:
            raise ProblemError(
                f"compile=True is for output times (T,) that all samples share; t has shape {tuple(t.shape)}"
            )
        return RowMesh(states) if self.per_sample or t.dim() > 1 else Mesh(states, keep_stages)

    def march(
        self, problem: InitialValueProblem, params: Sequence[Any], mesh: Mesh | RowMesh, slope: Tensor | None = None
    ) -> Solution:
        """The solution; ``mesh`` gets the steps that made it. ``slope`` is that at the start, if somebody knows it."""
        y, t, *tensors = params
        evaluate = problem.evaluator(tensors)
        if isinstance(mesh, RowMesh):
            own_times = in_rows(t.detach().double(), y.shape[:-1])

            def part(rows: Tensor) -> Evaluate | None:
                found = problem.divided(tensors, rows)
                return None if found is None else problem.evaluator(found[0])

            solution = RowRun(self, evaluate, part, own_times, y.reshape(-1, y.shape[-1]), mesh).run(slope)
            return in_shape(solution, y.shape[:-1], "value")
        times = mesh.times = numbers(t.detach().to("cpu", torch.float64))
        tracked = torch.is_grad_enabled() and is_tracked(t)
        rows = y.reshape(problem.samples, y.shape[-1])
        start = moved(evaluate, times[0], rows, t[0], start=True) if tracked else rows
        run = JointRun(self, evaluate, times, start.reshape(self.layout(problem)), problem.samples, mesh)
        if self.compile and not torch.is_grad_enabled() and not in_functorch():
            run.stages = CompiledStages(self.tableau, evaluate, run.y, problem, tensors)
        solution = run.run(slope)
        if not problem.samples:
            # How many numbers nobody has, a state in its native shape doesn't say.
            solution = replace(solution, value=rows.unsqueeze(1).repeat(1, len(times), 1))
        if tracked:
            own = [moved(evaluate, times[i], solution.value[:, i], t[i]) for i in range(1, len(times))]
            solution = replace(solution, value=torch.stack([rows, *own], dim=1))
        return in_shape(solution, y.shape[:-1], "value")

    def layout(self, problem: InitialValueProblem) -> torch.Size:
        """The shape in which states of the whole batch go through a step that all make together."""
        return problem.native

    def doubt(self, solution: Solution, on_failure: OnFailure) -> None:
        doubt_unrolled(solution, on_failure)

    def steps_between(self, length: float) -> int:
        """How many equal steps a method of fixed step makes between two output times."""
        raise TypeError(f"{type(self).__name__} chooses its steps by itself")


@dataclass(frozen=True)
class FixedStepSolver(OneStepSolver):
    """A method of fixed step: outputs lie at the ends of steps, and nothing controls the error.

    Args:
        step_size: the longest step; None makes one step between two output times.
        max_steps: steps before a solve is ``MAX_STEPS``.
        compile: as for :class:`AdaptiveSolver`.
    """

    step_size: float | None = None
    max_steps: int = 1_000_000
    compile: bool = False
    adaptive: ClassVar[bool] = False

    def steps_between(self, length: float) -> int:
        # Without the rounding of a quotient that is meant to be whole.
        return 1 if self.step_size is None else max(1, math.ceil(length / self.step_size * (1 - 1e-12)))


@dataclass(frozen=True)
class Euler(FixedStepSolver):
    """Euler's method, of order 1.

    Further options are those of :class:`FixedStepSolver`.
    """

    tableau: ClassVar[Tableau] = EULER


@dataclass(frozen=True)
class Midpoint(FixedStepSolver):
    """The explicit midpoint rule, of order 2 (Runge 1895).

    Further options are those of :class:`FixedStepSolver`.
    """

    tableau: ClassVar[Tableau] = MIDPOINT


@dataclass(frozen=True)
class RK4(FixedStepSolver):
    """The classical method of order 4 (Kutta 1901).

    Further options are those of :class:`FixedStepSolver`.
    """

    tableau: ClassVar[Tableau] = CLASSICAL


@dataclass(frozen=True)
class AdaptiveSolver(OneStepSolver):
    """A pair of methods whose difference controls the step.

    A step is accepted where the root mean square of estimated error over ``atol + rtol · |y|`` is at most 1. Output
    times inside a step are interpolated. Tolerances below what rounding allows are raised to that: ``rtol`` to 16
    units in the last place, ``atol`` to one of the largest number of ``y0``.

    Args:
        rtol: relative tolerance of one step.
        atol: absolute tolerance of one step.
        max_steps: steps tried before a sample is ``MAX_STEPS``.
        per_sample: whether every sample has its own step and its own error norm. Otherwise all share the step that the
            whole batch as one system needs, and a sample that fails also shortens the steps of the others until it is
            given up.
        compile: whether ``torch.compile`` makes one function of the stages of a step, with ``fn`` in it, and another of
            their vector-Jacobian products. It takes seconds, once for every right-hand side, and a C++ compiler. For
            explicit methods where all samples step together; derivatives of higher order, in forward mode and under
            ``torch.func`` don't use it.
    """

    rtol: float = 1e-6
    atol: float = 1e-8
    max_steps: int = 10_000
    per_sample: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compile and (self.per_sample or not self.explicit):
            raise ProblemError("compile=True is for explicit methods whose samples all step together; leave it False")
        check_tolerances(self.rtol, self.atol)


@dataclass(frozen=True)
class Bosh3(AdaptiveSolver):
    """Order 3 with an embedded 2 (Bogacki, Shampine 1989); cubic Hermite interpolant of order 3.

    Further options are those of :class:`AdaptiveSolver`.
    """

    tableau: ClassVar[Tableau] = BOSH3


@dataclass(frozen=True)
class Dopri5(AdaptiveSolver):
    """Order 5 with an embedded 4 (Dormand, Prince 1980); interpolant of order 4 (Shampine 1986).

    Further options are those of :class:`AdaptiveSolver`.
    """

    tableau: ClassVar[Tableau] = DOPRI5


@dataclass(frozen=True)
class Tsit5(AdaptiveSolver):
    """Order 5 with an embedded 4 (Tsitouras 2011); interpolant of order 4.

    Further options are those of :class:`AdaptiveSolver`.
    """

    tableau: ClassVar[Tableau] = TSIT5


@dataclass(frozen=True)
class Dopri8(AdaptiveSolver):
    """Order 8 with embedded 5 and 3: Hairer's DOP853; interpolant of order 7, at three evaluations more.

    Further options are those of :class:`AdaptiveSolver`.
    """

    tableau: ClassVar[Tableau] = DOP853
