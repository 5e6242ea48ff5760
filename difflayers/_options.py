"""Which values the options of solvers and adjoints may have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields
from functools import cache
from typing import Any, NamedTuple

from difflayers.errors import ProblemError


class _Range(NamedTuple):
    words: str
    holds: Callable[[Any], bool]


def _at_least(least: int) -> _Range:
    return _Range(f"an integer of at least {least}", lambda value: isinstance(value, int) and value >= least)


_NOT_NEGATIVE = _Range("zero or more", lambda value: isinstance(value, int | float) and value >= 0)
_POSITIVE = _Range("positive", lambda value: isinstance(value, int | float) and value > 0)
_FRACTION = _Range("between 0 and 1", lambda value: isinstance(value, int | float) and 0 < value < 1)
# By name: an option of one name means the same in every solver.
_RANGES = {
    **dict.fromkeys(("rtol", "atol", "rho"), _NOT_NEGATIVE),
    **dict.fromkeys(("tol", "damping", "factor", "step_size", "drift", "check", "tau"), _POSITIVE),
    **dict.fromkeys(
        ("max_evaluations", "patience", "memory", "restart", "refactor", "threads", "states"), _at_least(1)
    ),
    **dict.fromkeys(("max_steps", "steps", "dense_size", "dense_entries"), _at_least(0)),
    "newton": _FRACTION,
}


def check_options(options: Any) -> None:
    """Raise :class:`~difflayers.errors.ProblemError`, naming the option, unless all values of a dataclass make sense.

    None is fine where it is the default.
    """
    kind: Any = type(options)
    for name, default, (words, holds) in _ranges(kind):
        value = getattr(options, name)
        if value is not default and not holds(value):
            raise ProblemError(f"{name} of {type(options).__name__} must be {words}, got {value!r}")


@cache
def _ranges(kind: Any) -> tuple[tuple[str, Any, _Range], ...]:
    known = [(field.name, field.default, _RANGES.get(field.name)) for field in fields(kind)]
    return tuple((name, None if default is MISSING else default, found) for name, default, found in known if found)
