"""What every solve reports, to whoever listens."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from torch import Tensor

from difflayers._solution import Solution, Status

Role = Literal["forward", "adjoint", "tangent"]
_Number = TypeVar("_Number", int, float)

# A module-wide list, not a context variable: autograd runs backward solves in threads of its own.
_listeners: list[list[Record]] = []


@dataclass(frozen=True)
class Record:
    """One solve, as plain data.

    Attributes:
        role: ``"forward"``, or ``"adjoint"`` and ``"tangent"`` for the linear solves behind derivatives.
        solver: the solver, as its ``repr``.
        samples: how many independent problems it solved at once.
        steps: the largest number of steps that a sample took; None where the solver doesn't count them.
        evaluations: how often the residual, or the operator, was evaluated; None likewise.
        residual: the largest residual norm among samples that have an answer; None likewise.
        status: how many samples ended with which status name.
        seconds: wall-clock time.
    """

    role: Role
    solver: str
    samples: int
    steps: int | None
    evaluations: int | None
    residual: float | None
    status: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


@contextmanager
def monitor() -> Iterator[list[Record]]:
    """Collect a :class:`Record` of every forward and backward solve that runs inside.

    >>> from difflayers import monitor
    >>> with monitor() as log:
    ...     pass
    >>> log
    []
    """
    log: list[Record] = []
    _listeners.append(log)
    try:
        yield log
    finally:
        # By identity: two empty logs are equal, and nested monitors may end in any order.
        _listeners[:] = [other for other in _listeners if other is not log]


def watch(role: Role, solver: object, solve: Callable[[], Solution]) -> Solution:
    """Run ``solve`` and tell the listeners about it; costs nothing when nobody listens."""
    if not _listeners:
        return solve()
    start = time.perf_counter()
    solution = solve()
    record = _record(role, solver, solution, time.perf_counter() - start)
    for log in _listeners:
        log.append(record)
    return solution


def _record(role: Role, solver: object, solution: Solution, seconds: float) -> Record:
    status, stats = solution.status, solution.stats
    counts = Counter(Status(code).name for code in status.flatten().tolist())
    residual = stats.get("residual")
    if residual is not None:
        residual = residual[status <= Status.STALLED]
    return Record(
        role=role,
        solver=repr(solver),
        samples=status.numel(),
        steps=_largest(stats.get("steps"), int),
        evaluations=_largest(stats.get("evaluations"), int),
        residual=_largest(residual, float),
        status=dict(counts),
        seconds=seconds,
    )


def _largest(stat: Tensor | None, kind: type[_Number]) -> _Number | None:
    return None if stat is None or stat.numel() == 0 else kind(stat.max())
