"""Backends that solve one sample at a time on the host: the loop over samples, in threads, and its arrays."""

from __future__ import annotations

import collections
import importlib
from abc import abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import torch

from difflayers._progress import counted, shown
from difflayers._solution import Status
from difflayers.errors import MissingBackendError
from difflayers.qp._data import MATRICES, NAMES, Data, Layout, joined
from difflayers.qp._solver import Answers, QPSolver
from difflayers.qp._sparse import Sparse
from difflayers.qp._sparse_reduced import constraints, samples_of

Array = np.ndarray[Any, np.dtype[Any]]
_CONIC = {
    "Solved": Status.SUCCESS,
    "AlmostSolved": Status.SUCCESS,
    "PrimalInfeasible": Status.INFEASIBLE,
    "AlmostPrimalInfeasible": Status.INFEASIBLE,
    "DualInfeasible": Status.UNBOUNDED,
    "AlmostDualInfeasible": Status.UNBOUNDED,
    "MaxIterations": Status.MAX_STEPS,
    "NumericalError": Status.STALLED,
    "InsufficientProgress": Status.STALLED,
}


class Samples:
    """The blocks of every sample as float64 arrays: ``samples.P[i]``, None where there is none."""

    P: Sequence[Array]
    q: Sequence[Array]
    G: Sequence[Array] | None
    h: Sequence[Array] | None
    A: Sequence[Array] | None
    b: Sequence[Array] | None
    lb: Sequence[Array] | None
    ub: Sequence[Array] | None

    def __init__(self, data: Data, count: int) -> None:
        self.layout, self.count, self.sparse = data.layout, count, data.sparse
        data = data.all_sparse() if self.sparse else data
        self._data = data if data.P is not None else replace(data, P=data.q.new_zeros(data.layout.n, data.layout.n))

    def __getattr__(self, name: str) -> Sequence[Array] | None:
        if name not in NAMES:
            raise AttributeError(name)
        block = getattr(self._data, name)
        listed = None if block is None else _listed(block, self.count, 2 if name in MATRICES else 1)
        setattr(self, name, listed)  # made when a backend asks for it, once
        return listed

    def at(self, i: int) -> tuple[Array | None, ...]:
        """The blocks of one sample, in the order of ``NAMES``."""
        return tuple(None if block is None else block[i] for block in (getattr(self, name) for name in NAMES))

    @cached_property
    def two_sided(self) -> tuple[Sequence[Array], Sequence[Array], Sequence[Array]]:
        """``[A; G]``, and what its rows are between, with bounds on ``x`` first where there are any."""
        data, layout = self._data, self.layout
        upper = data.sides[..., : layout.p + layout.m]
        lower = upper.clone()
        lower[..., layout.p :] = -torch.inf
        if layout.low or layout.high:
            free = data.q.new_full((layout.n,), torch.inf)
            lower = joined([-free if data.lb is None else data.lb, lower], dim=-1)
            upper = joined([free if data.ub is None else data.ub, upper], dim=-1)
        return _listed(data.matrix, self.count, 2), _listed(lower, self.count, 1), _listed(upper, self.count, 1)

    @cached_property
    def one_sided(self) -> tuple[Sequence[Array], Sequence[Array]]:
        """``[A; G; -I; I]`` and the right-hand sides of its rows, infinite where there is no bound."""
        data = self._data
        sides = _listed(data.sides, self.count, 1)
        if self.sparse:
            every = np.arange(self.layout.inequalities)
            stacked = [constraints(A, G, every, data) for _, A, G in samples_of(data, self.count)]
            return stacked, sides
        eye = torch.eye(self.layout.n, dtype=torch.float64, device=data.q.device)
        bounds = (None if data.lb is None else -eye, None if data.ub is None else eye)
        matrices = [data.matrix, *[block for block in bounds if block is not None]]
        return _listed(joined(matrices, dim=-2), self.count, 2), sides


@dataclass
class Results:
    """Where the loop leaves what it found: multipliers ``y``, and ``z`` of ``[G; -I; I]``."""

    layout: Layout
    x: Array
    y: Array
    z: Array
    status: Array
    steps: Array

    @classmethod
    def empty(cls, layout: Layout, count: int) -> Results:
        status = np.full(count, int(Status.BACKEND_ERROR))
        x, y, z = (np.zeros((count, size)) for size in (layout.n, layout.p, layout.inequalities))
        return cls(layout, x, y, z, status, np.zeros(count, dtype=np.int64))

    def set_signed(self, i: int | slice, bounds: Array, rows: Array) -> None:
        """Multipliers of some samples, positive where the upper side is active: of ``x``, and of ``[A; G]``."""
        p, m, low = self.layout.p, self.layout.m, self.layout.low
        self.y[i] = rows[..., :p]
        np.maximum(rows[..., p:], 0, out=self.z[i, :m])
        if low:
            np.maximum(-bounds, 0, out=self.z[i, m : m + low])
        if self.layout.high:
            np.maximum(bounds, 0, out=self.z[i, m + low :])


@dataclass(frozen=True)
class HostQPSolver(QPSolver):
    """A backend that solves one sample at a time, in threads where it releases Python's lock.

    Args:
        threads: how many; None is ``torch.get_num_threads()``.
    """

    threads: int | None = None
    package: ClassVar[str]
    extra: ClassVar[str] = "qp"
    releases_gil: ClassVar[bool] = False

    @abstractmethod
    def solve_samples(self, samples: Samples, rows: range, results: Results) -> None:
        """Solve the samples in ``rows`` and leave what was found in ``results``."""

    @classmethod
    def module(cls) -> ModuleType:
        """The backend, imported when it is first needed.

        Raises:
            MissingBackendError: it isn't installed.
        """
        return backend(cls.package, cls.extra)

    def answers(self, data: Data, count: int) -> Answers:
        samples, results = Samples(data, count), Results.empty(data.layout, count)
        threads = min(self.threads or torch.get_num_threads(), count) if self.releases_gil else 1
        self.module()
        in_pieces(lambda rows: self.solve_samples(samples, rows, results), count, threads)
        arrays = (results.x, results.y, results.z, results.status, results.steps)
        return Answers(*[torch.from_numpy(array).to(data.q.device) for array in arrays])


def in_pieces(solve: Callable[[range], None], count: int, threads: int) -> None:
    """Solve samples piece by piece, counted on the bar if one is shown."""
    # A few pieces for each thread: samples differ in how long they take.
    pieces = 1 if threads == 1 else 4 * threads
    size = max(1, -(-count // (pieces if shown() is None else max(pieces, 100))))
    ranges = [range(start, min(start + size, count)) for start in range(0, count, size)]
    if threads == 1:
        for rows in counted(ranges, count, size):
            solve(rows)
    else:
        with ThreadPoolExecutor(threads) as pool:
            collections.deque(counted(pool.map(solve, ranges), count, size), maxlen=0)


def conic_status(said: object) -> Status:
    """What Clarabel says of a sample, and Moreau in the same words."""
    return _CONIC.get(str(said), Status.BACKEND_ERROR)


def backend(package: str, extra: str) -> ModuleType:
    """The module of a backend.

    Raises:
        MissingBackendError: it isn't installed; the message is the command that installs it.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise MissingBackendError(package, extra) from error


def _listed(block: Any, count: int, event: int) -> Sequence[Any]:
    if isinstance(block, Sparse):
        return block.csr(count)
    array = np.ascontiguousarray(block.cpu().numpy())
    return list(array) if array.ndim > event else [array] * count
