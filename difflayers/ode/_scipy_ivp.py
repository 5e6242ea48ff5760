"""The solvers of ``scipy.integrate.solve_ivp``, one sample at a time."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from difflayers._autodiff import value_and_jacobian
from difflayers._problem import Form, Problem
from difflayers._progress import Bar, counted, shown
from difflayers._solution import Solution, Status
from difflayers._solver import Array, Solver
from difflayers.errors import UnknownNameError
from difflayers.ode._host import Field, Outcome, TooManyEvaluations, fields
from difflayers.ode._problem import InitialValueProblem, check_tolerances

_METHODS = ("RK45", "RK23", "DOP853", "Radau", "BDF", "LSODA")
_IMPLICIT = ("Radau", "BDF", "LSODA")


@dataclass(frozen=True)
class ScipyIVP(Solver):
    """The solvers behind ``scipy.integrate.solve_ivp``, in float64 on the host; every sample with its own steps.

    ``Radau``, ``BDF`` and ``LSODA`` are for stiff problems and get the exact Jacobian. SciPy controls the error in a
    norm of its own, and outputs are interpolated from its steps. Its derivative is :class:`BacksolveAdjoint`, whose
    backward solve is explicit: for stiff problems it says that it went wrong.

    Args:
        method: ``"RK45"``, ``"RK23"``, ``"DOP853"``, ``"Radau"``, ``"BDF"`` or ``"LSODA"``.
        rtol: relative tolerance of one step; raised to what rounding allows, 16 units in the last place.
        atol: absolute tolerance of one step.
        max_evaluations: evaluations of ``fn`` before a sample is ``MAX_STEPS``.
    """

    method: str = "RK45"
    rtol: float = 1e-6
    atol: float = 1e-8
    max_evaluations: int = 100_000
    serves: ClassVar[frozenset[Form]] = frozenset({"ode"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in _METHODS:
            raise UnknownNameError("method", self.method, _METHODS)
        check_tolerances(self.rtol, self.atol)

    def solve(self, problem: Problem, params: Sequence[Any], init: Tensor) -> Solution:
        if not isinstance(problem, InitialValueProblem):
            raise TypeError(f"expected an InitialValueProblem, got {type(problem).__name__}")
        y0, t, *tensors = (p.detach() for p in params)
        rows = y0.reshape(problem.samples, y0.shape[-1])
        outcome = Outcome(rows, t)
        outcome.stats["steps"] = torch.zeros_like(outcome.stats["outputs"])
        with torch.no_grad():
            alone = fields(problem, tensors, rows, t[..., 0], self.max_evaluations)
            for i in counted(range(problem.samples), problem.samples):
                times = (t[i] if t.dim() > 1 else t).double().tolist()
                self._solve_one(alone(i), rows[i : i + 1], times, outcome, i)
        return outcome.solution(y0.shape[:-1])

    def _solve_one(self, field: Field, y0: Tensor, times: list[float], outcome: Outcome, sample: int) -> None:
        run = _Run(self, field, y0, times)
        if len(outcome.status) == 1:  # several are counted
            run.bar = shown()
        status = run.run()
        made = torch.as_tensor(np.stack(run.values), dtype=y0.dtype, device=y0.device)
        outcome.put(slice(sample, sample + 1), made[None], status, field.evaluations, run.t)
        outcome.stats["steps"][sample] = run.steps


class _Run:
    """One sample, step by step: that shows how far it got."""

    def __init__(self, solver: ScipyIVP, field: Field, y0: Tensor, times: list[float]) -> None:
        self.solver, self.field, self.times, self.like = solver, field, times, y0
        self.t, self.steps = times[0], 0
        start: Array = y0[0].cpu().double().numpy()
        self.values = [start]
        self.bar: Bar | None = None

    def run(self) -> Status:
        """Step to the end, or to where it gets no further."""
        start = self.values[0]
        while len(self.values) < len(self.times) and (self.times[len(self.values)] == self.t or not start.size):
            self.values.append(start)
        if len(self.values) == len(self.times):
            return Status.SUCCESS
        try:
            with np.errstate(all="ignore"), warnings.catch_warnings():
                # What they warn of shows in the status.
                warnings.simplefilter("ignore")
                return self._steps()
        except TooManyEvaluations:
            return Status.MAX_STEPS
        except (ArithmeticError, ValueError, RuntimeError, np.linalg.LinAlgError):
            if self.field.raised is not None:
                raise
            return Status.BACKEND_ERROR if self.field.finite else Status.NONFINITE

    def _steps(self) -> Status:
        if not np.isfinite(self._slope(self.t, self.values[0])).all():
            return Status.NONFINITE
        stepper = self._stepper()
        direction = np.sign(self.times[-1] - self.t)
        while len(self.values) < len(self.times):
            stepper.step()
            if stepper.status == "failed" or not np.isfinite(stepper.y).all():
                finite = self.field.finite and np.isfinite(stepper.y).all()
                return Status.STALLED if finite else Status.NONFINITE
            self.t, self.steps = float(stepper.t), self.steps + 1
            if self.bar is not None:
                self.bar.show(self._report)
            dense = None
            while len(self.values) < len(self.times) and (self.times[len(self.values)] - self.t) * direction <= 0:
                time = self.times[len(self.values)]
                dense = stepper.dense_output() if dense is None and time != self.t else dense
                self.values.append(stepper.y.copy() if time == self.t or dense is None else dense(time))
        return Status.SUCCESS

    def _report(self) -> tuple[float, str]:
        return (self.t - self.times[0]) / (self.times[-1] - self.times[0]), f"{self.steps:,} steps"

    def _stepper(self) -> Any:
        import scipy.integrate

        solver = self.solver
        jacobian = {"jac": self._jacobian} if solver.method in _IMPLICIT else {}
        eps = torch.finfo(self.like.dtype).eps
        # Below 100 units in the last place of its own, SciPy complains.
        rtol = max(solver.rtol, 16 * eps, 1e-13)
        kind = getattr(scipy.integrate, solver.method)
        return kind(self._slope, self.t, self.values[0], self.times[-1], rtol=rtol, atol=solver.atol, **jacobian)

    def _slope(self, t: float, y: Array) -> Array:
        slope: Array = self.field(self._time(t), self._row(y))[0].cpu().double().numpy()
        return slope

    def _jacobian(self, t: float, y: Array) -> Array:
        time = self._time(t)
        try:
            _, jacobian = value_and_jacobian(lambda row: self.field.untracked(time, row), self._row(y), 1)
        except Exception as error:
            self.field.raised = error
            raise
        matrix: Array = jacobian[0].cpu().double().numpy()
        return matrix

    def _row(self, y: Array) -> Tensor:
        return torch.tensor(y[None], dtype=self.like.dtype, device=self.like.device)

    def _time(self, t: float) -> Tensor:
        return torch.tensor(t, dtype=self.like.dtype, device=self.like.device)
