"""Solvers by name: what a string in ``solver="..."`` means in an area."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from difflayers._solver import Solver
from difflayers.errors import ProblemError, UnknownNameError

AREAS = ("fixedpoint", "ode", "qp")


def available_solvers(area: str) -> dict[str, type[Solver]]:
    """The names that ``solver="..."`` understands in an area, and their classes.

    >>> sorted(available_solvers("fixedpoint"))[:7]
    ['anderson', 'broyden', 'dogleg', 'lbfgs', 'lm', 'newton', 'picard']
    """
    if area not in AREAS:
        raise UnknownNameError("area", area, AREAS)
    return dict(importlib.import_module(f"difflayers.{area}").SOLVERS)


def resolve(solver: str | Solver, known: Mapping[str, type[Solver]]) -> Solver:
    """The solver that was meant: an object as it is, a name as that class with its defaults."""
    if isinstance(solver, Solver):
        return solver
    if not isinstance(solver, str):
        raise ProblemError(f"solver must be a Solver or a name, got {type(solver).__name__}; did you forget ()?")
    if solver not in known:
        raise UnknownNameError("solver", solver, tuple(known))
    return known[solver]()
