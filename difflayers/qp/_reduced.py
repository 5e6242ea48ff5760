"""The linear system of a QP on a given active set, factored for a whole batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from difflayers.qp._data import Data, cholesky, times, transposed

# What Cholesky factorizations of well-conditioned systems leave, in units of rounding.
ROUNDING = 64


class Solved(NamedTuple):
    """A solution of the reduced system, and what it leaves of the right-hand sides."""

    x: Tensor
    y: Tensor
    z: Tensor
    gradient: Tensor
    equations: Tensor
    slack: Tensor  # of all inequalities, active or not
    exact: bool  # whether that is no more than rounding

    def left(self, active: Tensor) -> Tensor:
        """All that is left, ``(samples, n + p + rows)``: of inequalities, in active rows."""
        return torch.cat([self.gradient, self.equations, torch.where(active, self.slack, 0)], dim=-1)

    @property
    def violation(self) -> Tensor:
        """The largest violation of an optimality condition, ``(samples,)``."""
        # min(z, slack) = 0 says that neither is negative, and that one is zero.
        parts = [self.gradient, self.equations, torch.minimum(self.z, self.slack)]
        return torch.cat(parts, dim=-1).abs().amax(-1)


class Reduced:
    """``[[P, Cᵀ], [C, 0]]``, where ``C`` are the equations and the active inequalities of each sample.

    By Cholesky factorizations of ``P`` and of ``C P⁻¹ Cᵀ``, batched; ``P + σCᵀC`` serves for ``P`` where that has no
    curvature of its own. Samples in which rows depend on each other, or the solution isn't unique, get the
    pseudoinverse: least-squares multipliers, and the move of least norm.

    Args:
        data: ``(samples, ...)`` or shared.
        active: which of the rows ``[G; -I; I]`` are active, ``(samples, rows)``.

    Attributes:
        degenerate: the samples that got the pseudoinverse.
    """

    def __init__(self, data: Data, active: Tensor) -> None:
        self.data, self.active, self.layout = data, active, data.layout
        self.dtype, self.samples = data.q.dtype, len(active)
        self._index, self._mask = _positions(active)
        self.rows = self._gathered()
        self._factor()

    def solve(self, first: Tensor, equations: Tensor, inequalities: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(x, y, z)`` with ``Px + Aᵀy + Czᵀ = first``, ``Ax = equations`` and ``Cx = inequalities`` on active rows.

        ``z`` is zero on the others.
        """
        rest = torch.cat([equations, self._picked(inequalities)], dim=-1)
        x, multipliers = self._solve(first, rest)
        y, picked = multipliers.split((self.layout.p, self._index.shape[1]), dim=-1)
        return x, y, torch.zeros_like(inequalities).scatter_add(-1, self._index, picked * self._mask)

    def solved(self, first: Tensor, equations: Tensor, inequalities: Tensor) -> Solved:
        """:meth:`solve` to rounding: once more for what is left, where that is more."""
        sides = first, equations, inequalities
        x, y, z = self.solve(*sides)
        found = self._left(sides, x, y, z)
        if found.exact:
            return found
        dx, dy, dz = self.solve(found.gradient, found.equations, found.slack)
        return self._left(sides, x + dx, y + dy, z + dz)

    def _left(self, sides: tuple[Tensor, Tensor, Tensor], x: Tensor, y: Tensor, z: Tensor) -> Solved:
        first, equations, inequalities = sides
        terms = [times(self.data.P, x), self.pulled(z)]
        products, reached = self.products(x), equations
        gradient = first - terms[0] - terms[1]
        if self.data.A is not None:
            terms.append(transposed(self.data.A, y))
            gradient, reached = gradient - terms[2], times(self.data.A, x)
        equations, slack = equations - reached, inequalities - products
        exact = _is_rounding([gradient], [first, *terms])
        rows = [equations, torch.where(self.active, slack, 0)]
        return Solved(x, y, z, gradient, equations, slack, exact and _is_rounding(rows, [sides[1], reached, products]))

    def products(self, x: Tensor) -> Tensor:
        """``Cx`` for all inequalities."""
        return self.data.products(x)

    def pulled(self, z: Tensor) -> Tensor:
        """``Cᵀz`` for all inequalities."""
        return self.data.pulled(z)

    def _picked(self, inequalities: Tensor) -> Tensor:
        # Not a product: where there is no bound the right-hand side is infinite.
        return torch.where(self._mask > 0, inequalities.gather(-1, self._index), 0)

    def _gathered(self) -> Tensor:
        """``C``, ``(samples, p + k, n)``; zero where a sample has fewer than ``k`` active rows."""
        data, m, n = self.data, self.layout.m, self.layout.n
        rows = data.q.new_zeros(self.samples, self._index.shape[1], n)
        if data.G is not None and m:
            inside = self._index.clamp_max(m - 1)
            picked = data.G[inside] if data.G.dim() == 2 else data.G.gather(1, inside[..., None].expand(-1, -1, n))
            rows = picked * (self._mask * (self._index < m))[..., None]
        if self.layout.low or self.layout.high:
            bound = self._index - m
            column = bound % n
            sign = torch.where(bound < self.layout.low, -1.0, 1.0).to(self.dtype) * (bound >= 0)
            rows = rows.scatter_add(-1, column[..., None], (sign * self._mask)[..., None])
        if data.A is None:
            return rows
        return torch.cat([data.A.expand(self.samples, -1, -1), rows], dim=1)

    def _factor(self) -> None:
        self._sigma: Tensor | None = None
        curvature = self.data.curvature
        lower, curved = curvature if curvature and bool(curvature[1].all()) else self._curved_by_rows()
        self._lower = lower
        self._reached = _triangular(lower, self.rows.mT)
        gram = torch.bmm(self._reached.mT, self._reached)
        padding = 1 - torch.cat([self._mask.new_ones(self.samples, self.layout.p), self._mask], dim=1)
        gram.diagonal(dim1=-2, dim2=-1).add_(padding)
        self._inner, independent = cholesky(gram)
        self.degenerate = ~(independent & curved).expand(self.samples)
        self._pseudoinverse = self._pseudo(padding[self.degenerate]) if bool(self.degenerate.any()) else None

    def _curved_by_rows(self) -> tuple[Tensor, Tensor]:
        """``P + σCᵀC`` factored: the same solutions, wherever they are unique; ``σ = 0`` where ``P`` is definite."""
        P = self.data.P
        gram = self.rows.mT @ self.rows
        if P is None:
            P = torch.zeros_like(gram)
        size, own = (m.diagonal(dim1=-2, dim2=-1).mean(-1) for m in (gram, P))
        ratio = own / torch.where(size > 0, size, 1)
        own_curvature = self.data.curvature[1] if self.data.curvature else torch.zeros_like(ratio, dtype=torch.bool)
        self._sigma = torch.where(own_curvature, 0, torch.where(ratio > 0, ratio, 1))[:, None]
        return cholesky(P + self._sigma[..., None] * gram)

    def _solve(self, first: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
        shifted = first if self._sigma is None else first + self._sigma * transposed(self.rows, rest)
        u = _triangular(self._lower, shifted.unsqueeze(-1))
        inner = torch.baddbmm(rest.unsqueeze(-1), self._reached.mT, u, beta=-1)
        multipliers = torch.cholesky_solve(inner, self._inner)
        left = torch.baddbmm(u, self._reached, multipliers, alpha=-1)
        x = _triangular(self._lower, left, transpose=True).squeeze(-1)
        multipliers = multipliers.squeeze(-1)
        if self._pseudoinverse is not None:
            both = torch.cat([first, rest], dim=-1)[self.degenerate]
            least = times(self._pseudoinverse, both)
            x = x.index_put((self.degenerate,), least[:, : x.shape[1]])
            multipliers = multipliers.index_put((self.degenerate,), least[:, x.shape[1] :])
        return x, multipliers

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
        self.active = base.active.index_put((samples,), part.active)
        self.degenerate = base.degenerate.index_put((samples,), part.degenerate)

    def solve(self, first: Tensor, equations: Tensor, inequalities: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sides = (first, equations, inequalities)
        whole, part = self._base.solve(*sides), self._part.solve(*[side[self._again] for side in sides])
        x, y, z = (old.index_put((self._again,), new) for old, new in zip(whole, part, strict=True))
        return x, y, z


def _is_rounding(left: list[Tensor], terms: list[Tensor]) -> bool:
    """Whether what is left is rounding of its terms in every sample."""
    rest, size = (torch.cat(parts, dim=-1) for parts in (left, terms))
    if rest.shape[-1] == 0:
        return True
    tolerance = ROUNDING * torch.finfo(rest.dtype).eps * size.abs().amax(-1)
    return not bool((rest.abs().amax(-1) > tolerance).any())


def _positions(active: Tensor) -> tuple[Tensor, Tensor]:
    """The active rows of every sample, ``(samples, k)``, and a mask, zero where there are fewer than ``k``."""
    samples, rows = active.nonzero(as_tuple=True)
    slot = active.cumsum(1)[samples, rows] - 1
    k = int(slot.max()) + 1 if len(slot) else 0
    index = torch.zeros(len(active), k, dtype=torch.int64, device=active.device)
    mask = torch.zeros(len(active), k, dtype=torch.float64, device=active.device)
    index[samples, slot], mask[samples, slot] = rows, 1
    return index, mask


def _triangular(lower: Tensor, right: Tensor, *, transpose: bool = False) -> Tensor:
    """``L⁻¹ B``, or ``L⁻ᵀ B``, for ``B`` of shape ``(samples, n, k)`` and ``L`` shared or one per sample."""
    matrix = lower.mT if transpose else lower
    if lower.dim() == 3:
        each: Tensor = torch.linalg.solve_triangular(matrix, right, upper=transpose)
        return each
    samples, n, k = right.shape
    columns = right.movedim(0, 1).reshape(n, samples * k)
    solved: Tensor = torch.linalg.solve_triangular(matrix, columns, upper=transpose)
    return solved.reshape(n, samples, k).movedim(1, 0)
