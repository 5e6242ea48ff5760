"""Layers that are defined by a condition instead of a list of operations.

``ImplicitFunction(problem, solver, adjoint)`` is a differentiable function from parameters to the answer of
``F(z, params) = 0``. The areas build on the same parts: :mod:`difflayers.fixedpoint`, :mod:`difflayers.qp` and
:mod:`difflayers.ode`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from difflayers import errors, fixedpoint, linear, ode, plot, qp
    from difflayers._adjoint import Adjoint, ImplicitAdjoint, UnrolledAdjoint
    from difflayers._areas import available_solvers
    from difflayers._implicit import ImplicitFunction
    from difflayers._monitor import Record, Trace, log_to, monitor
    from difflayers._problem import Problem, Residual, RootProblem
    from difflayers._progress import progress
    from difflayers._solution import Solution, Status
    from difflayers._solver import CallableSolver, HostResidual, HostResult, HostSolver, IterativeSolver, Solver

__version__ = "0.1.0"

_HOMES = {
    "_adjoint": ("Adjoint", "ImplicitAdjoint", "UnrolledAdjoint"),
    "_areas": ("available_solvers",),
    "_implicit": ("ImplicitFunction",),
    "_monitor": ("Record", "Trace", "log_to", "monitor"),
    "_problem": ("Problem", "Residual", "RootProblem"),
    "_progress": ("progress",),
    "_solution": ("Solution", "Status"),
    "_solver": ("CallableSolver", "HostResidual", "HostResult", "HostSolver", "IterativeSolver", "Solver"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}
_MODULES = ("errors", "fixedpoint", "linear", "ode", "plot", "qp")

__all__ = [
    "Adjoint",
    "CallableSolver",
    "HostResidual",
    "HostResult",
    "HostSolver",
    "ImplicitAdjoint",
    "ImplicitFunction",
    "IterativeSolver",
    "Problem",
    "Record",
    "Residual",
    "RootProblem",
    "Solution",
    "Solver",
    "Status",
    "Trace",
    "UnrolledAdjoint",
    "available_solvers",
    "errors",
    "fixedpoint",
    "linear",
    "log_to",
    "monitor",
    "ode",
    "plot",
    "progress",
    "qp",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"difflayers.{name}")
    if name in _HOME:
        value = getattr(importlib.import_module(f"difflayers.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'difflayers' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
