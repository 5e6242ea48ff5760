"""The methods of torchdiffeq behind the interface of solvers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from difflayers._problem import Form, Problem
from difflayers._progress import counted
from difflayers._solution import Solution, Status
from difflayers._solver import Solver
from difflayers.errors import ProblemError, UnknownNameError
from difflayers.ode._control import tolerances
from difflayers.ode._host import Field, Outcome, TooManyEvaluations, fields
from difflayers.ode._problem import InitialValueProblem, check_tolerances

_ADAPTIVE = ("dopri8", "dopri5", "bosh3", "fehlberg2", "adaptive_heun")
_FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams", "implicit_adams", "fixed_adams")
_METHODS = (*_ADAPTIVE, *_FIXED, "scipy_solver")


@dataclass(frozen=True)
class TorchDiffEq(Solver):
    """The methods of torchdiffeq (Chen 2018), for numbers; it never sees autograd.

    It doesn't tell which steps it accepted, and steps from output to output would be those of another method: its
    derivative is :class:`BacksolveAdjoint`. Adaptive methods step to every output time, since torchdiffeq interpolates
    less accurately than it steps. All samples step together, unless they have their own output times; when
    such a solve fails, every sample is solved alone to tell which one it was. Of a sample that fails nothing but the
    start is known, unless the method is one of fixed step.

    Args:
        method: ``"dopri8"``, ``"dopri5"``, ``"bosh3"``, ``"fehlberg2"``, ``"adaptive_heun"``; of fixed step
            ``"euler"``, ``"midpoint"``, ``"heun2"``, ``"heun3"``, ``"rk4"``, ``"explicit_adams"``,
            ``"implicit_adams"`` (also ``"fixed_adams"``); or ``"scipy_solver"``, which is LSODA.
        rtol: relative tolerance of one step, raised to what rounding allows.
        atol: absolute tolerance of one step, likewise.
        step_size: the step of a method of fixed step; None makes one step between two output times.
        max_evaluations: evaluations of ``fn`` before a solve is ``MAX_STEPS``.
    """

    method: str = "dopri5"
    rtol: float = 1e-6
    atol: float = 1e-8
    step_size: float | None = None
    max_evaluations: int = 100_000
    serves: ClassVar[frozenset[Form]] = frozenset({"ode"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in _METHODS:
            raise UnknownNameError("method", self.method, _METHODS)
        check_tolerances(self.rtol, self.atol)
        if self.step_size is not None and self.method not in _FIXED:
            raise ProblemError(f"step_size needs a method of fixed step: {', '.join(_FIXED)}; got {self.method!r}")

    @property
    def adaptive(self) -> bool:
        """Whether the method controls its error."""
        return self.method not in _FIXED

    def solve(self, problem: Problem, params: Sequence[Any], init: Tensor) -> Solution:
        if not isinstance(problem, InitialValueProblem):
            raise TypeError(f"expected an InitialValueProblem, got {type(problem).__name__}")
        y0, t, *tensors = (p.detach() for p in params)
        rows = y0.reshape(problem.samples, y0.shape[-1])
        outcome = Outcome(rows, t)
        with torch.no_grad():
            together = t.dim() == 1
            if together:
                field = Field(problem.evaluator(tensors), self.max_evaluations, own_time=False)
                together = self._solve(field, rows, t, outcome, slice(None)).has_answer or problem.samples == 1
            if not together:
                alone = fields(problem, tensors, rows, t[..., 0], self.max_evaluations)
                for i in counted(range(problem.samples), problem.samples):
                    times = t[i] if t.dim() > 1 else t
                    self._solve(alone(i), rows[i : i + 1], times, outcome, slice(i, i + 1))
        return outcome.solution(y0.shape[:-1])

    def _solve(self, field: Field, y0: Tensor, t: Tensor, outcome: Outcome, rows: slice) -> Status:
        # Equal times are refused there.
        times, place = torch.unique_consecutive(t.double(), return_inverse=True)
        made, status = y0[None], Status.SUCCESS
        if len(times) > 1 and y0.numel():
            made, status = self._attempt(field, y0, times)
        reached = float(times[-1]) if len(made) == len(times) else float(times[0])
        count = int((place < len(made)).sum())
        values = made.expand(len(times), *y0.shape) if not y0.numel() else made
        outcome.put(rows, values[place[:count]].transpose(0, 1), status, field.evaluations, reached)
        return status

    def _attempt(self, field: Field, y0: Tensor, times: Tensor) -> tuple[Tensor, Status]:
        """The states at these times and how it went; only the start where it broke down."""
        import torchdiffeq

        rtol, atol = tolerances(self.rtol, self.atol, y0)
        options: dict[str, Any] = {} if self.step_size is None else {"step_size": self.step_size, "interp": "cubic"}
        if self.method in _ADAPTIVE:
            # Its interpolants are of order 4 at most, and for dopri8 and bosh3 far less accurate than the steps.
            options["step_t"] = times[1:]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                made = torchdiffeq.odeint(field, y0, times, rtol=rtol, atol=atol, method=self.method, options=options)
            except TooManyEvaluations:
                return y0[None], Status.MAX_STEPS
            except (AssertionError, ArithmeticError, ValueError, RuntimeError) as error:
                if field.raised is not None:
                    raise field.raised from None
                return y0[None], _explained(field, error)
        if made.shape[0] != len(times):
            return y0[None], Status.STALLED if field.finite else Status.NONFINITE
        # implicit_adams says so when its iteration didn't get to its tolerance, and goes on.
        unsolved = any("did not converge" in str(warning.message) for warning in caught)
        made = torch.cat([y0[None], made[1:]])  # LSODA's first output is interpolated too
        return made, Status.STALLED if unsolved else Status.SUCCESS


def _explained(field: Field, error: Exception) -> Status:
    """The status that stands for an exception of torchdiffeq's own."""
    if not field.finite or "non-finite" in str(error):
        return Status.NONFINITE
    return Status.STALLED if "underflow" in str(error) else Status.BACKEND_ERROR
