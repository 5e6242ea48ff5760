"""What difflayers raises and warns with. Every message says what happened, to which samples, and what to try."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from difflayers._solution import Solution

__all__ = [
    "ConvergenceWarning",
    "LinearSolveError",
    "MissingBackendError",
    "ProblemError",
    "SolverError",
    "UnknownNameError",
]


class ProblemError(ValueError):
    """The problem as stated can't be solved: wrong shapes, dtypes or devices. The message names the sizes."""


class UnknownNameError(ProblemError):
    """A solver, status or option name that doesn't exist. The message suggests the nearest one."""

    def __init__(self, kind: str, name: str, known: Sequence[str]) -> None:
        from difflib import get_close_matches

        near = get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        super().__init__(f"unknown {kind} {name!r}{hint} Known: {', '.join(sorted(known))}.")


class MissingBackendError(ImportError):
    """An optional backend isn't installed. The message is the command that installs it."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; run: pip install difflayers[{extra}]", name=package)


class SolverError(RuntimeError):
    """At least one sample has no answer to the requested accuracy.

    Attributes:
        solution: the whole :class:`~difflayers.Solution`, healthy samples included.
    """

    def __init__(self, message: str, solution: Solution) -> None:
        super().__init__(message)
        self.solution = solution

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.args[0], self.solution)


class LinearSolveError(SolverError):
    """The linear system behind a derivative is singular, or was not solved to its tolerance."""


class ConvergenceWarning(UserWarning):
    """At least one sample failed, and the caller asked to be warned instead of stopped."""
