"""What every solve reports, to whoever listens."""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from difflayers._progress import current_bar
from difflayers._solution import Solution, Status

Role = Literal["forward", "adjoint", "tangent"]
_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True, eq=False)
class Trace:
    """A solve step by step, as plain data; row 0 is the start. Samples are those of the batch, flattened.

    Attributes:
        residual: residual norms, ``(steps + 1, samples)``; NaN once a sample is done.
        tolerance: what the residual of every sample had to fall below at its last step, ``(samples,)``.
        status: how every sample ended, the name of its :class:`~difflayers.Status`.
    """

    residual: np.ndarray[Any, np.dtype[np.float64]]
    tolerance: np.ndarray[Any, np.dtype[np.float64]]
    status: tuple[str, ...]


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
        mean_steps: the mean over the samples of the steps that they took; None likewise.
        trace: the solve step by step, where ``monitor(trace=True)`` asked for it and the solver is an
            :class:`~difflayers.IterativeSolver`.
    """

    role: Role
    solver: str
    samples: int
    steps: int | None
    evaluations: int | None
    residual: float | None
    status: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    mean_steps: float | None = None
    trace: Trace | None = field(default=None, repr=False, compare=False)

    @property
    def failed(self) -> int:
        """How many samples didn't succeed."""
        return self.samples - self.status.get(Status.SUCCESS.name, 0)

    def as_dict(self) -> dict[str, str | int | float | None]:
        """One flat row for JSON or a table, without the trace; statuses are ``"status/SUCCESS"`` and so on.

        >>> from difflayers import Record
        >>> Record("forward", "Picard()", 2, 7, 8, 1e-9, {"SUCCESS": 2}).as_dict()["status/SUCCESS"]
        2
        """
        names = ("role", "solver", "samples", "steps", "mean_steps", "evaluations", "residual", "failed", "seconds")
        row: dict[str, str | int | float | None] = {name: getattr(self, name) for name in names}
        return row | {f"status/{name}": count for name, count in self.status.items()}

    def scalars(self) -> dict[str, float]:
        """The numbers of :meth:`as_dict` that are known, under ``"forward/steps"`` and so on; see :func:`log_to`."""
        row = self.as_dict()
        return {f"{self.role}/{name}": value for name, value in row.items() if isinstance(value, int | float)}


@dataclass(frozen=True, eq=False)
class _Listener:
    trace: bool
    log: list[Record] = field(default_factory=list)


class Tracer:
    """Where a loop leaves what it sees at every step; it stays on its device until the solve is over."""

    def __init__(self, solver: object) -> None:
        self.solver = solver
        self._steps: list[tuple[Tensor, Tensor | None]] = []
        self._tolerance: Tensor | None = None

    def add(self, error: Tensor, rows: Tensor | None) -> None:
        """The errors of the samples ``rows`` after one more step; None for all samples."""
        self._steps.append((error.detach(), rows))

    def finish(self, tolerance: Tensor) -> None:
        """The tolerance of every sample at its last step."""
        self._tolerance = tolerance.detach()

    def trace(self, solution: Solution) -> Trace | None:
        """What was left here, or None if nothing was."""
        if self._tolerance is None:
            return None
        steps, status = solution.stats["steps"].flatten(), solution.status.flatten()
        residual = self._tolerance.new_full((int(steps.max()) + 1, steps.numel()), torch.nan)
        for row, (error, samples) in zip(residual, self._steps, strict=False):
            row[slice(None) if samples is None else samples] = error.flatten()
        numbers = torch.arange(len(residual), device=steps.device)
        residual[numbers[:, None] > steps] = torch.nan
        names = tuple(Status(code).name for code in status.tolist())
        return Trace(_plain(residual), _plain(self._tolerance.flatten()), names)


# A module-wide list, not a context variable: autograd runs backward solves in threads of its own.
_listeners: list[_Listener] = []
# A context variable: one solve stays in its thread, and another one inside it has a tracer of its own.
_tracer: ContextVar[Tracer | None] = ContextVar("tracer", default=None)


@contextmanager
def monitor(*, trace: bool = False) -> Iterator[list[Record]]:
    """Collect a :class:`Record` of every forward and backward solve that runs inside.

    Args:
        trace: whether records of forward solves also hold the residual of every sample after every step, which is
            8 bytes each, for :func:`difflayers.plot.convergence`.

    >>> from difflayers import monitor
    >>> with monitor() as log:
    ...     pass
    >>> log
    []
    """
    listener = _Listener(trace)
    _listeners.append(listener)
    try:
        yield listener.log
    finally:
        # Nested monitors may end in any order.
        _listeners.remove(listener)


class Writer(Protocol):
    """What takes scalars, such as ``torch.utils.tensorboard.SummaryWriter``."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int, /) -> Any:
        """Take one number."""


def log_to(writer: Writer, records: Iterable[Record], step: int) -> None:
    """Write the solves of one training step as scalars: ``"forward/mean_steps"``, ``"adjoint/failed"`` and so on.

    Solves with the same role make one record: samples, evaluations, statuses and seconds add up, steps and residual are
    the largest. The names are those of :meth:`Record.scalars`.

    Args:
        writer: anything with ``add_scalar(name, value, step)``: TensorBoard's ``SummaryWriter``, or one of your own.
        records: what :func:`monitor` collected in this step.
        step: its number.

    >>> from difflayers import Record, log_to
    >>> class Printer:
    ...     def add_scalar(self, name, value, step):
    ...         print(step, name, value)
    >>> log_to(Printer(), [Record("forward", "Picard()", 2, 7, 8, 1e-9, {"SUCCESS": 2}, seconds=0.5)], step=3)
    3 forward/samples 2
    3 forward/steps 7
    3 forward/evaluations 8
    3 forward/residual 1e-09
    3 forward/failed 0
    3 forward/seconds 0.5
    3 forward/status/SUCCESS 2
    """
    roles: dict[Role, list[Record]] = {}
    for record in records:
        roles.setdefault(record.role, []).append(record)
    for alike in roles.values():
        for name, value in _together(alike).scalars().items():
            writer.add_scalar(name, value, step)


def _together(records: Sequence[Record]) -> Record:
    """One record for solves with the same role."""

    def known(name: str) -> list[Any]:
        return [value for record in records if (value := getattr(record, name)) is not None]

    counted = [record for record in records if record.mean_steps is not None]
    total = sum(record.samples for record in counted)
    return Record(
        role=records[0].role,
        solver=", ".join(dict.fromkeys(record.solver for record in records)),
        samples=sum(record.samples for record in records),
        steps=max(known("steps"), default=None),
        evaluations=sum(known("evaluations")) if known("evaluations") else None,
        residual=max(known("residual"), default=None),
        status=dict(sum((Counter(record.status) for record in records), Counter())),
        seconds=sum(record.seconds for record in records),
        mean_steps=sum(record.samples * (record.mean_steps or 0) for record in counted) / total if total else None,
    )


def tracer(solver: object) -> Tracer | None:
    """Where the solve that runs here leaves its steps, if it is one by ``solver`` and somebody wants to see them."""
    current = _tracer.get()
    return current if current is not None and current.solver is solver else None


def watch(role: Role, solver: object, solve: Callable[[], Solution]) -> Solution:
    """Run ``solve``, on a bar if one is shown, and tell the listeners about it; costs nothing when nobody listens.

    A solver that is ``watched`` only hands on what was told already.
    """
    bar = current_bar()
    if (bar is None and not _listeners) or getattr(solver, "watched", False):
        return solve()
    if bar is not None:
        name = type(getattr(solver, "linear_solver", solver)).__name__
        solve = functools.partial(bar.follow, name if role == "forward" else f"{role}, {name}", solve)
    if not _listeners:
        return solve()
    own = Tracer(solver) if any(listener.trace for listener in _listeners) else None
    outer = _tracer.set(own)
    start = time.perf_counter()
    try:
        solution = solve()
    finally:
        _tracer.reset(outer)
    record = _record(role, solver, solution, time.perf_counter() - start)
    traced = record if own is None else replace(record, trace=own.trace(solution))
    for listener in _listeners:
        listener.log.append(traced if listener.trace else record)
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
        mean_steps=_mean(stats.get("steps")),
    )


def _largest(stat: Tensor | None, kind: type[_Number]) -> _Number | None:
    return None if stat is None or stat.numel() == 0 else kind(stat.max())


def _mean(stat: Tensor | None) -> float | None:
    return None if stat is None or stat.numel() == 0 else float(stat.double().mean())


def _plain(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    return tensor.cpu().double().numpy()
