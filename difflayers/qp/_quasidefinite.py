"""Sparse symmetric systems ``[[P, Cᵀ], [C, 0]]`` for SciPy matrices: scaled, made quasidefinite, factored by QDLDL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from difflayers.errors import MissingBackendError
from difflayers.qp._sparse import Array

SWEEPS = 4


@dataclass(frozen=True, eq=False)
class Rows:
    """A sparse matrix by rows: values, their columns, and where each row begins."""

    values: Array
    columns: Array
    pointers: Array

    @classmethod
    def of(cls, matrix: Any) -> Rows:
        return cls(matrix.data, matrix.indices, matrix.indptr)

    @classmethod
    def below_diagonal(cls, P: Any, n: int) -> Rows:
        """Of a symmetric matrix; None is zero."""
        if P is None:
            return cls(np.zeros(0), np.zeros(0, dtype=np.int32), np.zeros(n + 1, dtype=np.int32))
        whole = cls.of(P)
        rows = whole.rows
        below = whole.columns < rows
        counts = np.bincount(rows[below], minlength=n)
        return cls(whole.values[below], whole.columns[below], np.concatenate([[0], counts.cumsum()]))

    @classmethod
    def stacked(cls, parts: list[Rows]) -> Rows:
        ends = np.cumsum([0] + [part.pointers[-1] for part in parts])
        pointers = [part.pointers[1:] + end for part, end in zip(parts, ends, strict=False)]
        return cls(
            np.concatenate([part.values for part in parts]),
            np.concatenate([part.columns for part in parts]),
            np.concatenate([[0], *pointers]),
        )

    @property
    def rows(self) -> Array:
        """The row of every entry."""
        return np.repeat(np.arange(len(self.pointers) - 1), np.diff(self.pointers))

    def matrix(self, n: int) -> Any:
        """The SciPy matrix with ``n`` columns."""
        from scipy.sparse import csr_matrix

        return csr_matrix((self.values, self.columns, self.pointers), shape=(len(self.pointers) - 1, n), copy=False)


class Quasidefinite:
    """``[[P, Cᵀ], [C, 0]]`` of one sample.

    A multiple of the identity, with a minus on ``C``'s part, makes it quasidefinite after scaling, so that ``LDLᵀ``
    exists for every order of elimination (Vanderbei 1995, SIAM J. Optim. 5(1)).

    Args:
        P: symmetric, or None for zero.
        C: ``(k, n)``.
        scale: the diagonal ``D`` of the scaling ``DKD``; None makes the sums of rows about one.
    """

    def __init__(self, P: Any, C: Any, scale: Array | None = None) -> None:
        rows, self.n = C.shape
        self.P, self.C, self.size = P, C, self.n + rows
        self._transposed = C.T
        self._entries = Rows.stacked([Rows.below_diagonal(P, self.n), Rows.of(C)])
        self._places = self._entries.rows
        self._diagonal = np.zeros(self.size)
        if P is not None:
            self._diagonal[: self.n] = P.diagonal()
        self.scale = self._equilibrated() if scale is None else scale

    def unscaled(self) -> Quasidefinite:
        """The same, but for one scale for all."""
        largest = max(np.abs(self._entries.values).max(initial=0), np.abs(self._diagonal).max(initial=0), 1e-300)
        return Quasidefinite(self.P, self.C, np.full(self.size, 1 / np.sqrt(largest)))

    def times(self, w: Array) -> Array:
        """``Kw``."""
        first = self._transposed @ w[self.n :]
        return np.concatenate([first if self.P is None else first + self.P @ w[: self.n], self.C @ w[: self.n]])

    def scaled_times(self, w: Array) -> Array:
        """``DKDw``."""
        product: Array = self.scale * self.times(self.scale * w)
        return product

    def factor(self, delta: float, epsilon: float) -> Any:
        """QDLDL's factorization of ``DKD`` with ``δ`` and ``-ε`` added to its diagonal, None where it fails."""
        d, e = self.scale, self._entries
        diagonal = self._diagonal * d * d
        diagonal[: self.n] += delta
        diagonal[self.n :] -= epsilon
        values = e.values * d[self._places] * d[e.columns]
        try:
            return ldl(Rows(values, e.columns, e.pointers), diagonal)
        except RuntimeError:  # a pivot is zero
            return None

    def _equilibrated(self) -> Array:
        """Ruiz's scaling (2001, RAL-TR-2001-034) in the 1-norm."""
        rows, columns = self._places, self._entries.columns
        entries, diagonal = np.abs(self._entries.values), np.abs(self._diagonal)
        d = np.ones(self.size)
        for _ in range(SWEEPS):
            scaled = entries * d[rows] * d[columns]
            sums = diagonal * d * d + np.bincount(rows, scaled, self.size) + np.bincount(columns, scaled, self.size)
            d = d / np.sqrt(np.where(sums > 0, sums, 1))
        return d


def ldl(below: Rows, diagonal: Array) -> Any:
    """QDLDL's factorization of the symmetric matrix with these rows below its diagonal.

    Raises:
        MissingBackendError: QDLDL isn't installed.
        RuntimeError: a pivot is zero.
    """
    try:
        import qdldl
    except ModuleNotFoundError as error:
        raise MissingBackendError("qdldl", "qp") from error
    from scipy.sparse import csc_matrix

    # The upper triangle by columns is the lower one by rows, each row with its diagonal entry at the end.
    size, count = len(diagonal), len(below.values)
    pointers = below.pointers + np.arange(size + 1)
    values, index = np.empty(count + size), np.empty(count + size, dtype=np.int32)
    place = np.arange(count) + below.rows
    last = pointers[1:] - 1
    values[place], index[place] = below.values, below.columns
    values[last], index[last] = diagonal, np.arange(size)
    return qdldl.Solver(csc_matrix((values, index, pointers), shape=(size, size), copy=False), upper=True)


def front(P: Any, C: Any) -> int:
    """The widest level of a breadth-first search through the graph of the system, from a node far out.

    A measure of what factorizations fill in: small along a chain, of the order of the size where anything is near to
    anything else.
    """
    from scipy.sparse import bmat
    from scipy.sparse.csgraph import breadth_first_order

    graph = bmat([[P, C.T], [C, None]], format="csr")
    graph.data = np.ones(len(graph.data))
    far = breadth_first_order(graph, 0, return_predecessors=False)[-1]
    order, before = breadth_first_order(graph, far)
    place = np.empty(graph.shape[0], dtype=np.int64)
    place[order] = np.arange(len(order))
    parents = place[before[order[1:]]]  # in the order of the search, so they only go up
    widest, start, end = 1, 0, 1
    while start < end:
        start, end = end, 1 + int(np.searchsorted(parents, end))
        widest = max(widest, end - start)
    return widest


def negative_curvature(P: Any, tolerance: float) -> bool:
    """Whether a symmetric matrix has an eigenvalue below ``-tolerance``."""
    diagonal, below = P.diagonal(), Rows.below_diagonal(P, P.shape[0])
    beside = np.bincount(below.rows, np.abs(below.values), len(diagonal))
    beside += np.bincount(below.columns, np.abs(below.values), len(diagonal))
    if bool((diagonal >= beside).all()):  # diagonally dominant
        return False
    # Sylvester's law of inertia.
    return bool((ldl(below, diagonal + tolerance).factors()[1] < 0).any())


def least_eigenvalue(P: Any) -> float:
    """The least eigenvalue of a symmetric matrix."""
    from scipy.sparse.linalg import eigsh

    if P.shape[0] <= 500:
        return float(np.linalg.eigvalsh(P.toarray())[0])
    return float(eigsh(P, k=1, which="SA", tol=1e-3, return_eigenvectors=False)[0])
