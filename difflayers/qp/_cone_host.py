"""Backends of cone programs, one sample at a time on the host, in threads where they release Python's lock."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from difflayers._solution import Status
from difflayers.qp._cone_solver import ConeAnswers, ConeSolver
from difflayers.qp._cones import Cones
from difflayers.qp._data import Data
from difflayers.qp._host import Array, in_pieces
from difflayers.qp._sparse import Sparse

# The accuracy that is asked for first.
ROUGH = 1e-5


class Columns:
    """A matrix by columns, for every sample: one pattern, and the values of each.

    Attributes:
        values: ``(count, entries)``.
        varying: which entries aren't the same in all samples.
    """

    def __init__(self, matrix: Any, count: int, *, triangle: bool = False) -> None:
        sparse = matrix if isinstance(matrix, Sparse) else Sparse.of(matrix)
        rows, columns = sparse.pattern.rows.cpu().numpy(), sparse.pattern.columns.cpu().numpy()
        kept = np.flatnonzero(rows <= columns) if triangle else np.arange(len(rows))
        order = kept[np.lexsort((rows[kept], columns[kept]))]
        self.shape = sparse.pattern.shape
        self.rows = rows[order].astype(np.int32)
        self.offsets = np.concatenate([[0], np.bincount(columns[order], minlength=self.shape[1]).cumsum()])
        values = np.ascontiguousarray(sparse.values.detach().cpu().numpy()[..., order])
        self.varying = np.flatnonzero((values != values[0]).any(0)) if values.ndim > 1 else np.zeros(0, dtype=np.int64)
        self.values = np.broadcast_to(values, (count, len(order)))

    def at(self, i: int) -> Any:
        """The SciPy matrix of one sample."""
        from scipy.sparse import csc_matrix

        return csc_matrix((self.values[i], self.rows, self.offsets.astype(np.int32)), shape=self.shape)

    def change(self, i: int) -> tuple[Array, Array] | Array:
        """Of one sample what isn't the same in all: places and values, or where that is most, all values."""
        # With NumPy before 2.4 Clarabel takes a pair of arrays of one entry each for two values.
        few = 1 < len(self.varying) < self.values.shape[1] / 2
        return (self.varying, self.values[i, self.varying]) if few else self.values[i]


class ConeSamples:
    """The blocks of every sample as float64 arrays."""

    def __init__(self, data: Data, cones: Cones, count: int) -> None:
        self.cones, self.count, self.n = cones, count, data.layout.n
        P = data.q.new_zeros(self.n, self.n) if data.P is None else data.P
        self.P, self.C = Columns(P, count, triangle=True), Columns(data.G, count)
        self.q, self.d = (self._rows(block, count) for block in (data.q, data.h))

    @cached_property
    def without_curvature(self) -> bool:
        """Whether all are linear in the objective."""
        return not self.P.values.any()

    @staticmethod
    def _rows(block: Tensor | None, count: int) -> Array:
        array: Array = np.asarray(block)
        return np.ascontiguousarray(np.broadcast_to(array, (count, array.shape[-1])))


@dataclass
class ConeResults:
    """Where the loop leaves what it found."""

    x: Array
    y: Array
    s: Array
    status: Array
    steps: Array

    @classmethod
    def empty(cls, n: int, rows: int, count: int) -> ConeResults:
        status = np.full(count, int(Status.BACKEND_ERROR))
        x, y, s = (np.zeros((count, size)) for size in (n, rows, rows))
        return cls(x, y, s, status, np.zeros(count, dtype=np.int64))


@dataclass(frozen=True)
class HostConeSolver(ConeSolver):
    """A backend that solves one sample at a time.

    Args:
        tol: feasibility and duality gap, absolute and relative; the answer is polished afterwards.
        max_steps: iterations before a sample is ``MAX_STEPS``.
        threads: how many; None is ``torch.get_num_threads()``.
    """

    tol: float = 1e-9
    max_steps: int = 200
    threads: int | None = None
    releases_gil: ClassVar[bool] = True

    def rough(self) -> ConeSolver | None:
        return replace(self, tol=ROUGH) if self.tol < ROUGH else None

    @abstractmethod
    def solve_samples(self, samples: ConeSamples, rows: Sequence[int], results: ConeResults) -> None:
        """Solve the samples in ``rows`` and leave what was found in ``results``."""

    def answers(self, data: Data, cones: Cones, count: int) -> ConeAnswers:
        on_host = data.map(lambda block: block.cpu())
        samples, results = ConeSamples(on_host, cones, count), ConeResults.empty(data.layout.n, cones.rows, count)
        threads = min(self.threads or torch.get_num_threads(), count) if self.releases_gil else 1
        in_pieces(lambda rows: self.solve_samples(samples, rows, results), count, threads)
        arrays = (results.x, results.y, results.s, results.status, results.steps)
        return ConeAnswers(*[torch.from_numpy(array).to(data.q.device) for array in arrays])
