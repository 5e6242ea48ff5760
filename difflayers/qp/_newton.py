"""What an interior-point method needs of a batch of QPs: residuals, scales, Newton's steps, certificates."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from difflayers.linear._direct import lu_factor
from difflayers.qp._data import Data, times, transposed

# Passes of equilibration.
PASSES = 3
# A certificate's residual beside what it proves, and how far from cancellation that must be.
FARKAS, CANCELED = 1e-7, 1e-9
# Instead of the multiplier of a bound that isn't there: it can be divided by, and no sum notices.
TINY = 1e-300


class Residual(NamedTuple):
    """What is left of the optimality conditions at a point, and by which weights it is relative to their terms."""

    parts: Tensor  # (Px + q + Aᵀy + Cᵀz, Ax - b, Cx + s - d), packed
    weights: Tensor  # packed
    gap: Tensor  # relative to the objective, (samples,)

    def norm(self) -> Tensor:
        """The largest of all, ``(samples,)``."""
        return torch.maximum(self.far_from(0), self.gap)

    def far_from(self, expected: Tensor | float) -> Tensor:
        """The largest difference to other parts."""
        return (self.weights * (self.parts - expected)).abs().amax(-1)

    def part(self, samples: Tensor) -> Residual:
        """Of some samples, by index."""
        return Residual(*[each[samples] for each in self])


class Program(NamedTuple):
    """A batch of ``min ½xᵀPx + qᵀx`` with ``Ax = b``, ``Cx + s = d``, ``s ≥ 0``, and scales that bring it to size one.

    Nothing is scaled but norms, start and regularization: Cholesky factorizations don't depend on scales, and shared
    blocks stay shared. Packed are ``n + p + k`` numbers, of columns, equations, rows of ``C``.
    """

    data: Data
    q: Tensor
    b: Tensor
    d: Tensor
    there: Tensor  # 0 in rows of C without a bound, where d is 0
    scales: Tensor  # packed
    cost: Tensor  # of multipliers, scaled
    extent: Tensor  # of unknowns and slacks, scaled
    sizes: Tensor  # packed: of the terms in a row, before anything is known of x
    unit: Tensor  # packed: the regularization that is as large as a diagonal entry, scaled

    @classmethod
    def of(cls, data: Data, count: int) -> Program:
        """The program of ``count`` samples."""
        q = data.q.expand(count, -1)
        b = q.new_zeros(count, 0) if data.b is None else data.b.expand(count, -1)
        limits = data.limits.expand(count, -1)
        there = limits.isfinite()
        d = torch.where(there, limits, 0)
        scales = _equilibrated(data, q)
        columns, sides = scales[:, : q.shape[-1]], scales[:, q.shape[-1] :]
        given = (sides * torch.cat([b, d], dim=-1)).abs()
        extent, cost = _extents(data, q, columns, given)
        sizes = torch.cat([cost.expand_as(columns), extent + given], dim=-1)
        unit = torch.cat([cost / (extent * columns.square()), extent / (cost * sides.square())], dim=-1)
        return cls(data, q, b, d, there.to(q.dtype), scales, cost, extent, sizes, unit)

    def split(self, packed: Tensor) -> tuple[Tensor, ...]:
        """The parts of columns, equations and rows of ``C``."""
        parts: tuple[Tensor, ...] = packed.split((self.q.shape[-1], self.b.shape[-1], self.d.shape[-1]), dim=-1)
        return parts

    def part(self, samples: Tensor) -> Program:
        """Of some samples, by index."""
        return Program(self.data.rows(samples), *[each[samples] for each in self[1:]])

    def products(self, x: Tensor) -> Tensor:
        """``Cx``, zero where there is no bound."""
        return self.there * self.data.products(x)

    def pulled(self, y: Tensor, z: Tensor) -> Tensor:
        """``Aᵀy + Cᵀz``."""
        total = self.data.pulled(z)
        return total if self.data.A is None else total + transposed(self.data.A, y)

    def equations(self, x: Tensor) -> Tensor:
        """``Ax``."""
        return x[:, :0] if self.data.A is None else times(self.data.A, x)

    def residual(self, x: Tensor, y: Tensor, s: Tensor, z: Tensor) -> Residual:
        """What is left of the conditions at a point."""
        curved = times(self.data.P, x)
        parts = (
            curved + self.q + self.pulled(y, z),
            self.equations(x) - self.b,
            self.products(x) + self.there * s - self.d,
        )
        objective = ((0.5 * curved + self.q) * x).sum(-1)
        gap = (s * z).sum(-1) / ((self.cost * self.extent).squeeze(-1) + objective.abs())
        return Residual(torch.cat(parts, dim=-1), self._weights(x, curved), gap)

    def _weights(self, x: Tensor, curved: Tensor) -> Tensor:
        columns, _, _ = self.split(self.scales)
        gradient, furthest = (t.abs().amax(-1, keepdim=True) for t in (columns * curved, x / columns))
        rows = self.scales.shape[-1] - x.shape[-1]
        terms = torch.cat([gradient.expand_as(x), furthest.expand(-1, rows)], dim=-1)
        return self.scales / (self.sizes + terms)

    def infeasible(self, y: Tensor, z: Tensor) -> Tensor:
        """Which samples ``(y, z ≥ 0)`` proves infeasible: ``Aᵀy + Cᵀz = 0`` and ``bᵀy + dᵀz < 0`` (Farkas)."""
        columns, _, _ = self.split(self.scales)
        zeros = columns * self.pulled(y, z) * self.sizes[:, columns.shape[-1] :].amax(-1, keepdim=True)
        return _proves(torch.cat([self.b * y, self.d * z], dim=-1), zeros)

    def unbounded(self, x: Tensor) -> Tensor:
        """Which samples ``x`` proves unbounded: ``Px = 0``, ``Ax = 0``, ``Cx ≤ 0`` and ``qᵀx < 0``."""
        zeros = times(self.data.P, x) * self.extent / self.cost, self.equations(x), self.products(x).clamp_min(0)
        return _proves(self.q * x / self.cost, self.scales * torch.cat(zeros, dim=-1))


def _proves(terms: Tensor, zeros: Tensor) -> Tensor:
    """Whether the sum of terms is negative beyond rounding, and what should be zero is so beside it."""
    negative = -terms.sum(-1)
    return (negative > CANCELED * terms.abs().sum(-1)) & (zeros.abs().amax(-1) <= FARKAS * negative)


def _equilibrated(data: Data, q: Tensor) -> Tensor:
    """Packed scales that bring the row norms of the KKT matrix near one.

    By Ruiz 2001, "A scaling algorithm to equilibrate both rows and columns norms in matrices", in the 2-norm, which
    takes products with squared entries only.
    """
    layout, count = data.layout, len(q)
    P, A, G = (None if block is None else block.square() for block in (data.P, data.A, data.G))
    u, v, w = (q.new_ones(count, size) for size in (layout.n, layout.p, layout.m))
    for _ in range(PASSES):
        column = torch.zeros_like(u)
        if P is not None:
            curvature = u * times(P, u)
            column = curvature / _positive(curvature.sqrt().mean(-1, keepdim=True)).square()
        if A is not None:
            column = column + u * transposed(A, v)
            v = v / _positive(v * times(A, u)).sqrt()
        if G is not None:
            column = column + u * transposed(G, w)
            w = w / _positive(w * times(G, u)).sqrt()
        u = u / _positive(column).sqrt()
    bounds = [u.reciprocal()] * (bool(layout.low) + bool(layout.high))
    return torch.cat([u, v, w, *bounds], dim=-1).sqrt()


def _extents(data: Data, q: Tensor, columns: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
    """How large unknowns and multipliers will be, scaled, as far as right-hand sides, ``P`` and ``q`` tell."""
    slope = (columns * q).abs().amax(-1, keepdim=True)
    curvature = torch.zeros_like(slope)
    if data.P is not None:
        curvature = (columns * data.P.diagonal(dim1=-2, dim2=-1) * columns).mean(-1, keepdim=True)
    usual = given.sum(-1, keepdim=True) / (given > 0).sum(-1, keepdim=True).clamp_min(1)
    extent = torch.where(usual > 0, usual, _positive(slope / _positive(curvature)))
    return extent, _positive(torch.maximum(curvature * extent, slope))


def _positive(sizes: Tensor) -> Tensor:
    return torch.where(sizes > 0, sizes, 1)


class Workspace:
    """Room for the matrices of a step, kept from step to step: on the CPU, fresh pages cost as much as arithmetic."""

    def __init__(self, program: Program) -> None:
        like, layout, count = program.q, program.data.layout, len(program.q)
        self.rows = like.new_empty(count, layout.m, layout.n)
        self.H = like.new_empty(count, layout.n, layout.n)
        # Column by column, which is what LAPACK writes.
        self.lower = like.new_empty(count, layout.n, layout.n).mT
        self.reached = like.new_empty(count, layout.p, layout.n).mT
        self.info = torch.empty(count, dtype=torch.int32, device=like.device)


class Newton:
    """Newton's steps for the optimality conditions at slacks ``s`` and multipliers ``z``, after one factorization.

    Slacks and their multipliers are eliminated: with ``W = 1 / (s/z + δ)`` what is left is
    ``[[P + ρ + CᵀWC, Aᵀ], [A, -δ]]``, by Cholesky factorizations of its first block and of the Schur complement.
    Samples where one breaks down get an LU factorization of ``[[P + ρ, Aᵀ, Gᵀ], [A, -δ, 0], [G, 0, -1/W]]``.

    Args:
        regularization: packed, ``ρ`` and ``δ``: a proximal term around where the iteration stands.
        room: what it is computed in, for at least as many samples; the next step may use it again.
    """

    def __init__(self, program: Program, s: Tensor, z: Tensor, regularization: Tensor, room: Workspace) -> None:
        self.program, self.data, self.z, self.room = program, program.data, z, room
        rho, delta, self.soft = program.split(regularization)
        self.spread = program.there / (s + self.soft * z)
        layout = self.data.layout
        self.own, low, high = (self.spread * z).split((layout.m, layout.low, layout.high), dim=-1)
        diagonal = rho + low if layout.low else rho
        diagonal = diagonal + high if layout.high else diagonal
        self._factor(diagonal, delta)

    def direction(self, residual: Tensor, complementarity: Tensor) -> Tensor:
        """The step in ``(x, y, s, z)`` that, to first order, takes off ``residual`` and ``complementarity``."""
        stationarity, equations, rows = self.program.split(residual)
        shift = self.spread * (self.z * rows - complementarity)
        x, y = self._solve(-stationarity - self.data.pulled(shift), -equations)
        moved = self.program.products(x)
        z = self.spread * self.z * moved + shift
        return torch.cat([x, y, self.soft * z - rows - moved, z], dim=-1)

    def _factor(self, diagonal: Tensor, delta: Tensor) -> None:
        data, room, count = self.data, self.room, len(diagonal)
        H = room.H[:count]
        if data.G is None:
            H.zero_()
        else:
            torch.mul(self.own.unsqueeze(-1), data.G, out=room.rows[:count])
            torch.matmul(data.G.mT, room.rows[:count], out=H)
        if data.P is not None:
            H += data.P
        H.diagonal(dim1=-2, dim2=-1).add_(diagonal)
        self.lower, info = torch.linalg.cholesky_ex(H, out=(room.lower[:count], room.info[:count]))
        if data.A is not None:
            columns = data.A.mT.expand(count, -1, -1)
            self.reached = torch.linalg.solve_triangular(self.lower, columns, upper=False, out=room.reached[:count])
            schur = self.reached.mT @ self.reached
            schur.diagonal(dim1=-2, dim2=-1).add_(delta)
            self.inner, other = torch.linalg.cholesky_ex(schur)
            info = info + other
        broken = (info != 0).nonzero().squeeze(-1)
        self.mended = _Mended(data.rows(broken), self.own, diagonal, delta, broken) if len(broken) else None

    def _solve(self, first: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
        u, y = torch.linalg.solve_triangular(self.lower, first.unsqueeze(-1), upper=False), rest
        if self.data.A is not None:
            multipliers = torch.cholesky_solve(self.reached.mT @ u - rest.unsqueeze(-1), self.inner)
            u, y = u - self.reached @ multipliers, multipliers.squeeze(-1)
        x = torch.linalg.solve_triangular(self.lower.mT, u, upper=True).squeeze(-1)
        return (x, y) if self.mended is None else self.mended.solve(x, y, first, rest)


class _Mended:
    """The samples for which Cholesky factorizations weren't enough, by LU of the matrix with the rows of ``G``."""

    def __init__(self, data: Data, weights: Tensor, diagonal: Tensor, delta: Tensor, samples: Tensor) -> None:
        self.samples, (n, p) = samples, (diagonal.shape[-1], delta.shape[-1])
        below = torch.cat([delta, 1 / weights], dim=-1)
        system = torch.diag_embed(torch.cat([diagonal, -below], dim=-1)[samples])
        if data.P is not None:
            system[:, :n, :n] += data.P
        for block, start in ((data.A, n), (data.G, n + p)):
            if block is not None:
                rows = slice(start, start + block.shape[-2])
                system[:, rows, :n] = block
                system[:, :n, rows] = block.mT
        self.lu, self.pivots = lu_factor(system)

    def solve(self, x: Tensor, y: Tensor, first: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` and ``y`` with these samples' solutions put in."""
        right = torch.cat([first, rest], dim=-1)[self.samples]
        right = torch.nn.functional.pad(right, (0, self.lu.shape[-1] - right.shape[-1]))
        found = torch.linalg.lu_solve(self.lu, self.pivots, right.unsqueeze(-1)).squeeze(-1)
        n, p = x.shape[-1], y.shape[-1]
        return x.index_copy(0, self.samples, found[:, :n]), y.index_copy(0, self.samples, found[:, n : n + p])
