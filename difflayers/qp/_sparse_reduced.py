"""The linear system of a QP on a given active set, sparse: one factorization per sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from difflayers.qp._data import Data
from difflayers.qp._quasidefinite import Quasidefinite, Rows, front
from difflayers.qp._reduced import Reduced, Solved, with_equations
from difflayers.qp._sparse import Array, Sparse

# In this order, until one solves a test problem.
REGULARIZATIONS, LARGER = (1e-8, 1e-6, 1e-10), (1e-4, 1e-6)
STEPS = 40
# A test problem's solution that is off by more than this says that there are several.
UNDETERMINED = 1e-6


def reduced(data: Data, active: Tensor, before: Reduced | None = None) -> Reduced:
    """The factored system, by the structure of the data.

    ``before``: of the same data, on active sets of which some may be the same.
    """
    known = before.known if isinstance(before, SparseReduced) and before.data is data else {}
    return SparseReduced(data, active, known) if data.sparse else Reduced(data, active)


class SparseReduced(Reduced):
    """``[[P, Cᵀ], [C, 0]]``, where ``C`` are the equations and the active inequalities of each sample.

    Regularized, and refined until the regularization has no effect. That is the proximal method of multipliers, which
    from zero converges to the solution of least norm where there are several (of scaled unknowns, if scales differ).
    """

    def __init__(self, data: Data, active: Tensor, known: Mapping[Any, _System]) -> None:
        self.data, self.layout = data, data.layout
        self.dtype, self.samples = data.q.dtype, active.shape[0]
        self.kept = with_equations(active, self.layout.p)
        keys, self.known = _systems(data, active, known)
        self._systems = [self.known[key] for key in keys]
        flags = [system.degenerate for system in self._systems]
        self.degenerate = torch.tensor(flags, dtype=torch.bool, device=active.device)

    def solve(self, first: Tensor, sides: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, w = np.zeros(tuple(first.shape)), np.zeros(tuple(sides.shape))
        given = [t.detach().cpu().numpy() for t in (first, sides)]
        for i, system in enumerate(self._systems):
            x[i], w[i, system.kept] = system.solve(*[side[i] for side in given])
        return torch.from_numpy(x).to(first), torch.from_numpy(w).to(first), first.new_zeros(self.samples, 1)

    def solved(self, first: Tensor, sides: Tensor) -> Solved:
        return self._left(first, sides, *self.solve(first, sides))


def samples_of(data: Data, count: int) -> list[tuple[Any, Any, Any]]:
    """``P``, ``A`` and ``G`` of every sample as SciPy matrices by rows, None where there is none."""
    from scipy.sparse import csr_matrix

    def listed(block: Any) -> list[Any]:
        if block is None or isinstance(block, Sparse):
            return [None] * count if block is None else block.csr(count)
        dense = block.cpu().numpy()
        return [csr_matrix(dense)] * count if dense.ndim == 2 else [csr_matrix(own) for own in dense]

    return list(zip(*map(listed, (data.P, data.A, data.G)), strict=True))


def width(data: Data) -> int:
    """How wide the graph of a sparse problem is; see :func:`~difflayers.qp._quasidefinite.front`."""
    whole = data.all_sparse()
    P, A, G = (None if m is None else m.pattern.csr(np.ones(len(m.pattern.rows))) for m in (whole.P, whole.A, whole.G))
    return front(P, constraints(A, G, np.arange(data.layout.m), data))


def constraints(A: Any, G: Any, rows: Array, data: Data) -> Any:
    """``A`` above the chosen rows of ``[G; -I; I]``."""
    layout, parts = data.layout, []
    bounds = rows[rows >= layout.m] - layout.m
    if A is not None:
        parts.append(Rows.of(A))
    if G is not None:
        parts.append(Rows.of(G[rows[rows < layout.m]]))
    signs = np.where(bounds < layout.low, -1.0, 1.0)
    parts.append(Rows(signs, (bounds % layout.n).astype(np.int32), np.arange(len(bounds) + 1)))
    return Rows.stacked(parts).matrix(layout.n)


def _systems(data: Data, active: Tensor, known: Mapping[Any, _System]) -> tuple[list[Any], dict[Any, _System]]:
    """A key for each sample, and the systems; samples that share matrices and active rows share one."""
    batched = any(block is not None and block.dim() > 2 for block in (data.P, data.A, data.G))
    keys, systems = [], {}
    for i, (own, (P, A, G)) in enumerate(zip(active.cpu().numpy(), samples_of(data, len(active)), strict=True)):
        key = (i if batched else 0, own.tobytes())
        keys.append(key)
        if key in known:
            systems[key] = known[key]
        elif key not in systems:
            rows = np.flatnonzero(own)
            kept = np.concatenate([np.arange(data.layout.p), data.layout.p + rows])
            systems[key] = _System(kept, P, constraints(A, G, rows, data))
    return keys, systems


class _System:
    """The system of one sample, solved to rounding.

    Attributes:
        kept: which rows of ``[A; G; -I; I]`` are in it.
        degenerate: whether it is singular.
    """

    def __init__(self, kept: Array, P: Any, C: Any) -> None:
        self.kept = kept
        matrix = Quasidefinite(P, C)
        self._factored = _first(matrix, REGULARIZATIONS, 1e-11)
        self.degenerate = self._factored.unknown > UNDETERMINED
        if self.degenerate:
            # Of the solution of least norm, rounding over regularization is lost.
            for each in (matrix.unscaled(), matrix):
                sharper = _first(each, LARGER, 1e-13)
                if sharper.left <= 1e-13:
                    self._factored = sharper
                    break

    def solve(self, first: Array, sides: Array) -> tuple[Array, Array]:
        """``x`` and the multipliers of the kept rows."""
        found = self._factored.solve(np.concatenate([first, sides[self.kept]]))
        return found[: len(first)], found[len(first) :]


def _first(matrix: Quasidefinite, sizes: tuple[float, ...], enough: float) -> _Factored:
    """The factorization with the first of these regularizations that is good enough, else the best."""
    best = _Factored(matrix, sizes[0])
    for size in sizes[1:]:
        if best.left <= enough:
            break
        best = min(best, _Factored(matrix, size), key=lambda factored: factored.left)
    return best


class _Factored:
    """A factorization, and how it does on a test problem.

    Attributes:
        left: the residual of the test problem.
        unknown: the error of its solution, which is of the order of one where there are several.
    """

    def __init__(self, matrix: Quasidefinite, regularization: float) -> None:
        self._matrix, self._ldl = matrix, matrix.factor(regularization, regularization)
        generator = np.random.default_rng(0)
        test = generator.choice([-1.0, 1.0], matrix.size) * generator.uniform(0.5, 1, matrix.size)
        self.left = self.unknown = np.inf
        if self._ldl is not None:
            found, rest = self._refined(matrix.scaled_times(test))
            self.left, self.unknown = _largest(rest), _largest(found - test)

    def solve(self, rhs: Array) -> Array:
        scaled = self._matrix.scale * rhs
        if self._ldl is None:
            return np.full_like(rhs, np.nan)
        w, rest = self._refined(scaled)
        if self.unknown > UNDETERMINED and _largest(rest) > 1e-9 * _largest(scaled):
            # What no solution reaches is orthogonal to what others do: without it, the rest is solved exactly.
            w, _ = self._refined(scaled - rest)
        solution: Array = self._matrix.scale * w
        return solution

    def _refined(self, rhs: Array) -> tuple[Array, Array]:
        """The scaled solution, and what it leaves of the right-hand side."""
        w, rest = np.zeros_like(rhs), rhs
        for _ in range(STEPS):
            proposal = w + self._ldl.solve(rest)
            left = rhs - self._matrix.scaled_times(proposal)
            before, after = _largest(rest), _largest(left)
            if not after < before:
                break
            w, rest = proposal, left
            size = _largest(rhs) + _largest(w)
            if after <= 1e-16 * size or after > 0.9 * before or (after > 0.5 * before and after <= 1e-13 * size):
                break
        return w, rest


def _largest(w: Array) -> float:
    return float(np.abs(w).max(initial=0))
