"""What torchdiffeq's ``method`` and ``options`` are here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from difflayers import ode
from difflayers._solver import Solver
from difflayers.compat._ignored import ignored
from difflayers.errors import ProblemError, UnknownNameError
from difflayers.ode._tableaus import Tableau, hermite


@dataclass(frozen=True)
class ThreeEighths(ode.FixedStepSolver):
    """What ``"rk4"`` is in torchdiffeq: Kutta's other method of order 4, the 3/8 rule (1901)."""

    tableau: ClassVar[Tableau] = Tableau(
        order=4,
        rows=((1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0), (1 / 8, 3 / 8, 3 / 8, 1 / 8)),
        stages=4,
        interpolant=hermite((1 / 8, 3 / 8, 3 / 8, 1 / 8)),
        interpolant_order=3,
    )


@dataclass(frozen=True)
class Heun2(ode.FixedStepSolver):
    """Heun's method of order 2 (1900), the trapezoidal rule made explicit."""

    tableau: ClassVar[Tableau] = Tableau(
        order=2, rows=((1.0,), (0.5, 0.5)), stages=2, interpolant=hermite((0.5, 0.5)), interpolant_order=2
    )


@dataclass(frozen=True)
class Heun3(ode.FixedStepSolver):
    """Heun's method of order 3 (1900)."""

    tableau: ClassVar[Tableau] = Tableau(
        order=3,
        rows=((1 / 3,), (0.0, 2 / 3), (0.25, 0.0, 0.75)),
        stages=3,
        interpolant=hermite((0.25, 0.0, 0.75)),
        interpolant_order=3,
    )


ADAPTIVE: dict[str, type[ode.AdaptiveSolver]] = {
    "bosh3": ode.Bosh3, "dopri5": ode.Dopri5, "dopri8": ode.Dopri8, "kvaerno5": ode.Kvaerno5, "rodas": ode.Rodas,
    "tsit5": ode.Tsit5,
}  # fmt: skip
FIXED: dict[str, type[ode.FixedStepSolver]] = {
    "euler": ode.Euler, "heun2": Heun2, "heun3": Heun3, "midpoint": ode.Midpoint, "rk4": ThreeEighths,
}  # fmt: skip
# What only torchdiffeq has.
THEIRS_ADAPTIVE = ("adaptive_heun", "fehlberg2")
THEIRS_FIXED = ("explicit_adams", "fixed_adams", "implicit_adams")
METHODS = (*ADAPTIVE, *FIXED, *THEIRS_ADAPTIVE, *THEIRS_FIXED, "scipy_solver")

# How steps are chosen within the tolerances, and how torchdiffeq computes.
IGNORED = (
    "dfactor", "dtype", "eps", "first_step", "grid_points", "ifactor", "interp", "min_step", "safety",
)  # fmt: skip
_PIECES = "solve from one of these times to the next, each by a call of its own"
_DEFAULTS = "its Adams methods run with their defaults; use another method of difflayers.ode"
REFUSED = {
    "grid_constructor": f"give step_size, or {_PIECES}",
    "jump_t": _PIECES,
    "max_iters": _DEFAULTS,
    "max_order": _DEFAULTS,
    "max_step": "use a method of fixed step with step_size, or solve in pieces",
    "norm": "errors are measured by the root mean square of the whole state; for a measure and steps of every sample's "
    "own call difflayers.ode.odeint with batch_dims=1 and solver=Dopri5(per_sample=True)",
    "perturb": _PIECES,
    "step_t": _PIECES,
}


def solver_of(method: Any, rtol: Any, atol: Any, options: Mapping[str, Any] | None) -> Solver:
    """The solver that was meant.

    Raises:
        ProblemError: an option or tolerance that can't be had here; the message says what to use.
        UnknownNameError: a method or option that nobody has.
    """
    given = dict(options or {})
    if isinstance(method, Solver):
        if given:
            raise ProblemError(f"{type(method).__name__} has its own options; pass {sorted(given)} to it")
        return method
    name = "dopri5" if method is None else method
    if name not in METHODS:
        raise UnknownNameError("method", str(name), METHODS)
    tolerances: dict[str, Any] = {"rtol": number("rtol", rtol), "atol": number("atol", atol)}
    if name in ADAPTIVE:
        return ADAPTIVE[name](**tolerances, **_own(given, {"max_num_steps": "max_steps"}))
    if name in FIXED:
        return FIXED[name](**_own(given, {"step_size": "step_size"}))
    if name == "scipy_solver":
        return ode.ScipyIVP(**{"method": "LSODA"} | tolerances | _own(given, {"solver": "method"}))
    theirs = {"step_size": "step_size"} if name in THEIRS_FIXED else {}
    return ode.TorchDiffEq(name, **tolerances | _own(given, theirs))


def seminorm_of(method: Any, options: Mapping[str, Any] | None) -> bool:
    """Whether parameters have no say in the steps of the backward solve."""
    if method not in (None, "dopri5"):
        ignored(f"adjoint_method={method!r}", "the backward solve is Dopri5's")
    norm = (options or {}).get("norm", "seminorm")
    if norm != "seminorm":
        raise ProblemError(f'the norm of adjoint_options may be "seminorm" here; {REFUSED["norm"]}')
    if others := sorted(set(options or {}) - {"norm"}):
        ignored(f"adjoint_options but for norm, {others},", "use adjoint_rtol and adjoint_atol")
    return "norm" in (options or {})


def _own(options: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The options that a solver has, by its names; with a warning for those without a meaning here."""
    for name, value in options.items():
        if name in REFUSED and value is not None and value is not False:
            raise ProblemError(f"the option {name} of torchdiffeq isn't there; {REFUSED[name]}")
        if name in IGNORED:
            ignored(f"the option {name} of torchdiffeq", "rtol and atol say it all")
        elif name not in names and name not in REFUSED:
            raise UnknownNameError("option", name, [*names, *IGNORED, *REFUSED])
    return {own: options[name] for name, own in names.items() if options.get(name) is not None}


def number(name: str, value: Any) -> float:
    """A tolerance.

    Raises:
        ProblemError: it is more than one number.
    """
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ProblemError(
            f"{name} must be one number for the whole state, got {type(value).__name__}; scale the parts of the state "
            "instead"
        ) from error
