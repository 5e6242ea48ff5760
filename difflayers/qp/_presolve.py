"""Unknowns that an equation gives as constants times others leave a cone program before it is ever solved."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


class Entries(NamedTuple):
    """A matrix affine in parameters: for each entry a SciPy row, in the parameters and, last, one; and its place."""

    mapping: Any
    rows: Array
    columns: Array
    shape: tuple[int, int]

    @property
    def constant(self) -> Array:
        """Which entries no parameter is in."""
        found: Array = np.diff(self.mapping[:, :-1].tocsr().indptr) == 0
        return found

    def numbers(self) -> Any:
        """The SciPy matrix of constant parts."""
        from scipy.sparse import csr_matrix

        values = np.asarray(self.mapping[:, [-1]].todense()).ravel()
        return csr_matrix((values, (self.rows, self.columns)), shape=self.shape)


class Presolved(NamedTuple):
    """The smaller program, and which unknowns and rows of the original one it has."""

    blocks: dict[str, Entries]
    unknowns: Array
    rows: Array


def presolved(blocks: dict[str, Entries], zero: int, kept_unknowns: Array, kept_rows: Array) -> Presolved:
    """Without unknowns ``xⱼ`` that are alone in an equation ``cⱼ xⱼ + Σ cᵢ xᵢ = d`` of constants and in nothing else.

    CVXPY makes them of ``sum_squares(Ax - b)``. ``P`` must be constant, and may not fill in.

    Args:
        blocks: ``P``, ``q``, ``C`` and ``d``; ``q`` and ``d`` as one column, all entries.
        zero: how many rows are equations.
        kept_unknowns: which unknowns have to stay.
        kept_rows: which rows have to stay.
    """
    from scipy.sparse import csr_matrix

    C, n, m = blocks["C"], blocks["C"].shape[1], blocks["C"].shape[0]
    everything = Presolved(blocks, np.arange(n), np.arange(m))
    P = blocks.get("P")
    if P is None or not P.constant.all() or not zero:
        return everything
    columns, rows = _alone(C, zero, kept_unknowns, kept_rows)
    if not len(columns):
        return everything
    left, below = np.setdiff1d(np.arange(n), columns), np.setdiff1d(np.arange(m), rows)
    picked = C.numbers()[rows]
    # x = T x' + U d, where the equations give the unknowns that leave.
    scale = 1 / np.asarray(picked[np.arange(len(rows)), columns]).ravel()
    eye = csr_matrix((np.ones(len(left)), (left, np.arange(len(left)))), shape=(n, len(left)))
    place = csr_matrix((scale, (columns, np.arange(len(columns)))), shape=(n, len(columns)))
    T = eye - place @ picked[:, left]
    full, d = P.numbers(), blocks["d"].mapping
    smaller = (T.T @ full @ T).tocoo()
    if smaller.nnz > full.nnz + C.numbers().nnz:
        return everything
    shift = (full @ place @ d[rows]).tocsr()
    width = d.shape[1]
    values = csr_matrix((smaller.data, (np.arange(smaller.nnz), np.full(smaller.nnz, width - 1))), (smaller.nnz, width))
    inside = np.isin(C.rows, below)
    number = np.zeros(max(n, m), dtype=np.int64)
    number[left] = np.arange(len(left))
    lines = np.zeros(m, dtype=np.int64)
    lines[below] = np.arange(len(below))
    size = len(left), len(below)
    made = {
        "P": Entries(values, smaller.row.astype(np.int64), smaller.col.astype(np.int64), (size[0], size[0])),
        "q": _vector((T.T @ (blocks["q"].mapping + shift)).tocsr()),
        "C": Entries(C.mapping[inside], lines[C.rows[inside]], number[C.columns[inside]], (size[1], size[0])),
        "d": _vector(d[below]),
    }
    return Presolved(made, left, below)


def _alone(C: Entries, zero: int, kept_unknowns: Array, kept_rows: Array) -> tuple[Array, Array]:
    """Unknowns that may leave, and for each an equation of its own."""
    count = np.bincount(C.columns, minlength=C.shape[1])
    constant = np.ones(C.shape[0], dtype=bool)
    constant[C.rows[~C.constant]] = False
    value = np.asarray(C.mapping[:, [-1]].todense()).ravel()
    fit = (count[C.columns] == 1) & (C.rows < zero) & constant[C.rows] & (value != 0)
    fit &= ~np.isin(C.columns, kept_unknowns) & ~np.isin(C.rows, kept_rows)
    rows, first = np.unique(C.rows[fit], return_index=True)
    return C.columns[fit][first], rows


def _vector(mapping: Any) -> Entries:
    count = mapping.shape[0]
    return Entries(mapping, np.arange(count), np.zeros(count, dtype=np.int64), (count, 1))
