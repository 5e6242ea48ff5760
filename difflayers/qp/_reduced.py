"""The linear system of a QP on a given active set, factored for a whole batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from difflayers.qp._data import Data, cholesky, times, transposed

# What Cholesky factorizations of well-conditioned systems leave, in units of rounding.
ROUNDING = 128


class Solved(NamedTuple):
    """A solution of the reduced system, and what it leaves of the right-hand sides."""

    x: Tensor
    w: Tensor  # multipliers of all rows, zero where a row isn't kept
    gradient: Tensor
    slack: Tensor  # of all rows
    rest: Tensor  # that of the kept ones, zero for others
    of_gradient: tuple[Tensor, ...]  # its terms
    of_rows: tuple[Tensor, ...]  # theirs

    @property
    def exact(self) -> bool:
        """Whether gradient and rest are no more than rounding."""
        more = _is_more(self.gradient, self.of_gradient) | _is_more(self.rest, self.of_rows)
        return not bool(more.any())

    @property
    def left(self) -> Tensor:
        """All that is left, ``(samples, n + rows)``."""
        return torch.cat([self.gradient, self.rest], dim=-1)


class Reduced:
    """``[[P, Cᵀ], [C, 0]]``, where ``C`` are the kept rows of ``[A; G; -I; I]``: equations and active inequalities.

    By Cholesky factorizations of ``P`` and of ``C P⁻¹ Cᵀ``, batched; ``P + σCᵀC`` serves for ``P`` where that has no
    curvature of its own. Samples in which rows depend on each other, or the solution isn't unique, get the
    pseudoinverse: least-squares multipliers, and the move of least norm.

    Args:
        data: ``(samples, ...)`` or shared.
        active: which of the rows ``[G; -I; I]`` are active, ``(samples, rows)``.

    Attributes:
        kept: which of the rows ``[A; G; -I; I]`` are in ``C``, ``(samples, p + rows)``.
        degenerate: the samples that got the pseudoinverse.
    """

    degenerate: Tensor

    def __init__(self, data: Data, active: Tensor) -> None:
        self.data, self.layout = data, data.layout
        self.dtype, self.samples = data.q.dtype, active.shape[0]
        self.kept = with_equations(active, self.layout.p)
        self._index, self._mask = positions(self.kept)
        self.rows = self._gathered()
        self._factor()

    def solve(self, first: Tensor, sides: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(x, w)`` with ``Px + [A; G; -I; I]ᵀw = first`` and ``[A; G; -I; I] x = sides`` in the kept rows.

        ``w`` is zero in the others. And of which size the terms were that cancel in rows, ``(samples, 1)``.
        """
        # Not a product: where there is no bound the right-hand side is infinite.
        x, multipliers, size = self._solve(first, torch.where(self._mask, sides.gather(-1, self._index), 0))
        return x, torch.zeros_like(sides).scatter(-1, self._index, multipliers), size

    def solved(self, first: Tensor, sides: Tensor) -> Solved:
        """:meth:`solve` to rounding: once more for what is left, where that is more."""
        x, w, size = self.solve(first, sides)
        found = self._left(first, sides, x, w, size)
        if found.exact:
            return found
        dx, dw, _ = self.solve(found.gradient, found.slack)
        return self._left(first, sides, x + dx, w + dw, size)

    def _left(self, first: Tensor, sides: Tensor, x: Tensor, w: Tensor, size: Tensor) -> Solved:
        curved, drawn, reached = times(self.data.P, x), self.data.drawn(w), self.data.reached(x)
        gradient, slack = first - curved - drawn, sides - reached
        rest = torch.where(self.kept, slack, 0)
        return Solved(x, w, gradient, slack, rest, (curved, drawn), (reached, size))

    def _gathered(self) -> Tensor:
        """``C``, ``(samples, k, n)``; zero where a sample has fewer than ``k`` rows."""
        layout, matrix = self.layout, self.data.matrix
        (samples, k), (rows, n) = self._index.shape, matrix.shape[-2:]
        bounds = bool(layout.low or layout.high)
        place = self._index.clamp_max(rows - 1) if bounds else self._index
        if rows == 0:
            picked = matrix.new_zeros(samples, k, n)
        elif matrix.dim() == 2:
            picked = matrix.index_select(0, place.reshape(-1)).reshape(samples, k, n)
        else:
            first = torch.arange(0, samples * rows, rows, device=place.device)[:, None]
            picked = matrix.reshape(-1, n).index_select(0, (place + first).reshape(-1)).reshape(samples, k, n)
        if not bounds:
            return picked.mul_(self._mask.unsqueeze(-1))
        column = self._index - rows
        picked = picked.mul_((self._mask & (column < 0)).unsqueeze(-1))
        sign = torch.where(column < layout.low, -1.0, 1.0).to(self.dtype) * (self._mask & (column >= 0))
        return picked.scatter_add(-1, (column % n).unsqueeze(-1), sign.unsqueeze(-1))

    def _factor(self) -> None:
        self._sigma: Tensor | None = None
        curvature = self.data.curvature if self.data.curved else None
        self._lower, curved = curvature or self._curved_by_rows()
        self._upper = self._lower.mT
        self._reached = _triangular(self._lower, self.rows.mT)
        self._drawn = self._reached.mT
        gram = torch.bmm(self._drawn, self._reached)
        padding = ~self._mask
        gram.diagonal(dim1=-2, dim2=-1).add_(padding)
        self._inner, independent = cholesky(gram)
        self.degenerate = ~(independent if curvature else independent & curved)
        self._pseudoinverse = self._pseudo(padding[self.degenerate]) if bool(self.degenerate.any()) else None

    def _curved_by_rows(self) -> tuple[Tensor, Tensor]:
        """``P + σCᵀC`` factored: the same solutions, wherever they are unique; ``σ = 0`` where ``P`` is definite."""
        P, curvature, gram = self.data.P, self.data.curvature, torch.bmm(self.rows.mT, self.rows)
        if P is None or curvature is None:
            self._sigma = gram.new_ones(self.samples, 1)
            return cholesky(gram)
        size, own = (m.diagonal(dim1=-2, dim2=-1).mean(-1) for m in (gram, P))
        ratio = own / torch.where(size > 0, size, 1)
        self._sigma = torch.where(curvature[1], 0, torch.where(ratio > 0, ratio, 1))[:, None]
        return cholesky(P + self._sigma[..., None] * gram)

    def _solve(self, first: Tensor, rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shifted = first if self._sigma is None else first + self._sigma * transposed(self.rows, rest)
        u = _triangular(self._lower, shifted.unsqueeze(-1))
        inner = torch.baddbmm(rest.unsqueeze(-1), self._drawn, u, beta=-1)
        size = torch.linalg.vector_norm(inner, dim=1)
        multipliers = torch.cholesky_solve(inner, self._inner)
        left = torch.baddbmm(u, self._reached, multipliers, alpha=-1)
        x = _triangular(self._upper, left, upper=True).squeeze(-1)
        multipliers = multipliers.squeeze(-1)
        if self._pseudoinverse is not None:
            both = torch.cat([first, rest], dim=-1)[self.degenerate]
            least = times(self._pseudoinverse, both)
            x = x.index_put((self.degenerate,), least[:, : x.shape[1]])
            own = least[:, x.shape[1] :] * self._mask[self.degenerate]
            multipliers = multipliers.index_put((self.degenerate,), own)
            size = size.index_put((self.degenerate,), size.new_zeros(()))
        return x, multipliers, size

    def _pseudo(self, padding: Tensor) -> Tensor:
        rows, n = self.rows[self.degenerate], self.layout.n
        count = rows.shape[1]
        system = rows.new_zeros(len(rows), n + count, n + count)
        if self.data.P is not None:
            system[:, :n, :n] = self.data.P if self.data.P.dim() == 2 else self.data.P[self.degenerate]
        system[:, n:, :n], system[:, :n, n:] = rows, rows.mT
        system[:, n:, n:].diagonal(dim1=-2, dim2=-1).add_(padding)
        finite = system.isfinite().all(-1).all(-1)[:, None, None]
        inverse: Tensor = torch.linalg.pinv(torch.where(finite, system, 0), hermitian=True, rtol=1e-11)
        return inverse


class Patched(Reduced):
    """A factored system, some samples of which were factored again, for other active sets."""

    def __init__(self, base: Reduced, samples: Tensor, part: Reduced) -> None:
        self.data, self.layout = base.data, base.layout
        self.dtype, self.samples = base.dtype, base.samples
        self._base, self._again, self._part = base, samples, part
        self.kept = base.kept.index_put((samples,), part.kept)
        self.degenerate = base.degenerate.index_put((samples,), part.degenerate)

    def solve(self, first: Tensor, sides: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        whole = self._base.solve(first, sides)
        part = self._part.solve(first[self._again], sides[self._again])
        x, w, size = (old.index_put_((self._again,), new) for old, new in zip(whole, part, strict=True))
        return x, w, size


def _is_more(left: Tensor, terms: tuple[Tensor, ...]) -> Tensor:
    """In which samples what is left is more than rounding of its terms."""
    size = torch.linalg.vector_norm(torch.cat(terms, dim=-1), dim=-1)
    more: Tensor = torch.linalg.vector_norm(left, dim=-1) > ROUNDING * torch.finfo(left.dtype).eps * size
    return more


def with_equations(active: Tensor, p: int) -> Tensor:
    """Which rows are kept: ``p`` equations, and the active inequalities."""
    return torch.cat([active.new_ones(active.shape[0], p), active], dim=-1) if p else active


def positions(kept: Tensor) -> tuple[Tensor, Tensor]:
    """The kept rows of every sample, ``(samples, k)``, and a mask, false where there are fewer than ``k``."""
    mask, index = torch.sort(kept, dim=1, descending=True, stable=True)
    k = int(mask.any(0).sum())
    return index[:, :k], mask[:, :k]


def _triangular(matrix: Tensor, right: Tensor, *, upper: bool = False) -> Tensor:
    """``M⁻¹ B`` for ``B`` of shape ``(samples, n, k)`` and a triangular ``M``, shared or one per sample."""
    if matrix.dim() == 3:
        each: Tensor = torch.linalg.solve_triangular(matrix, right, upper=upper)
        return each
    samples, n, k = right.shape
    columns = right.movedim(0, 1).reshape(n, samples * k)
    solved: Tensor = torch.linalg.solve_triangular(matrix, columns, upper=upper)
    return solved.reshape(n, samples, k).movedim(1, 0)
