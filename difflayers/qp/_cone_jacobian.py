"""The Jacobian of a cone program's optimality conditions, and its inverse by one batched factorization."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from difflayers._autodiff import Pullback, pull
from difflayers.errors import ProblemError
from difflayers.linear import LinearOperator
from difflayers.linear._direct import lu_factor
from difflayers.qp._cones import Cones
from difflayers.qp._data import Data, Matrix, times, transposed
from difflayers.qp._jacobian import ActiveSetSolve
from difflayers.qp._reduced import _positions

# Below this share of the largest pivot the system counts as singular.
SINGULAR = 1e-13


def constraints(data: Data) -> tuple[Matrix, Tensor]:
    """``C`` and ``d``, which the data has under the names that a QP's inequalities have."""
    if data.G is None or data.h is None:
        raise ProblemError("a cone program has constraints; for none use solve_qp")
    return data.G, data.h


class ConeJacobian(LinearOperator):
    """``[[P, CᵀD], [C, D - I]]`` at ``w = (x, v)``, with ``D`` the derivative of the projection at ``v``."""

    def __init__(self, data: Data, cones: Cones, point: Tensor, batch_dims: int) -> None:
        self.like, self.batch_dims, self.properties = point, batch_dims, frozenset()
        self.data, self.cones, self.solver = data, cones, ActiveSetSolve()
        self.C, _ = constraints(data)

    def apply(self, x: Tensor) -> Tensor:
        dx, dv = self._split(x)
        projected = self._projected(dv)
        first = times(self.data.P, dx) + transposed(self.C, projected)
        return torch.cat([first, times(self.C, dx) + projected - dv], dim=-1)

    def apply_transpose(self, x: Tensor) -> Tensor:
        ux, uv = self._split(x)
        second = self._projected(times(self.C, ux) + uv) - uv
        return torch.cat([times(self.data.P, ux) + transposed(self.C, uv), second], dim=-1)

    def _projected(self, dv: Tensor) -> Tensor:
        """``D dv``; ``D`` is symmetric, so a pullback serves, with derivatives of every order."""
        (pulled,) = self._pullback(dv)
        return torch.zeros_like(dv) if pulled is None else pulled

    @cached_property
    def _pullback(self) -> Pullback:
        return pull(self.cones.project, (self._split(self.like)[1],))

    def _split(self, w: Tensor) -> tuple[Tensor, Tensor]:
        x, v = w.split((self.data.layout.n, self.data.layout.m), dim=-1)
        return x, v

    @cached_property
    def inverse(self) -> LinearOperator:  # type: ignore[override]
        """The inverse, factored on first use; least squares where there is none."""
        batch = self.like.shape[: self.batch_dims]
        data = self.data.flattened(batch).dense().map(lambda block: block.detach().double())
        v = self._split(self.like.detach())[1].reshape(batch.numel(), -1).double()
        return ConeInverse(ConeFactor(data, self.cones, v), self.like, self.batch_dims)


class ConeFactor:
    """The Jacobian in the eigenvectors of ``D``, on the rows that matter, factored.

    With ``D = QΛQᵀ``, ``C̃ = QᵀC`` and ``z̃ = Λ Qᵀdv``, rows with ``λ ≥ ½`` are kept and the others eliminated, which
    leaves the symmetric ``[[P + C̃ᵀWC̃, C̃ᵀ], [C̃, -(1 - Λ)/Λ]]`` of ``x`` and the kept ``z̃``, where ``W = λ/(1 - λ)`` of
    the eliminated rows. A row that isn't active at all costs nothing.

    Attributes:
        degenerate: the samples that are singular and got the pseudoinverse.
    """

    def __init__(self, data: Data, cones: Cones, v: Tensor) -> None:
        self.cones, self.n, samples = cones, data.layout.n, len(v)
        self.rotation = cones.rotation(v)
        self.values = self.rotation.values
        self.kept = self.values >= 0.5
        # D / (1 - D) of eliminated rows, (1 - D) / D of kept ones: where the other form would divide by zero.
        self.idle = torch.where(self.kept, 0, 1 / torch.where(self.kept, 1, 1 - self.values))
        self.weight = self.values * self.idle
        self.index, self.mask = _positions(self.kept)
        C = constraints(data)[0].expand(samples, -1, -1)
        self.C = cones.turned(self.rotation, C) if self.rotation.spectra else C
        self._factor(self._matrix(data.P))

    def _matrix(self, P: Tensor | None) -> Tensor:
        samples, k, n = len(self.values), self.index.shape[1], self.n
        matrix = self.values.new_zeros(samples, n + k, n + k)
        if P is not None:
            matrix[:, :n, :n] = P
        if self.rotation.spectra:
            curved = slice(self.cones.linear, None)
            rows = self.C[:, curved]
            matrix[:, :n, :n] += rows.mT @ (self.weight[:, curved, None] * rows)
        picked = self.C.gather(1, self.index[..., None].expand(-1, -1, n)) * self.mask[..., None]
        matrix[:, n:, :n], matrix[:, :n, n:] = picked, picked.mT
        values = torch.where(self.mask > 0, self.values.gather(1, self.index), 1)
        # Padding: an equation of its own.
        matrix[:, n:, n:].diagonal(dim1=-2, dim2=-1).copy_(1 - self.mask - (1 - values) / values)
        return matrix

    def _factor(self, matrix: Tensor) -> None:
        rows = matrix.abs().amax(-1)
        self.scale = torch.where(rows > 0, rows, 1).rsqrt()
        matrix = self.scale.unsqueeze(-1) * matrix * self.scale.unsqueeze(-2)
        finite = rows.isfinite().all(-1)
        if not bool(finite.all()):
            matrix = torch.where(finite[:, None, None], matrix, 0)
        self.lu, self.pivots = lu_factor(matrix)
        size = self.lu.diagonal(dim1=-2, dim2=-1).abs()
        self.degenerate = size.amin(-1) <= SINGULAR * size.amax(-1)
        self.pseudo: Tensor | None = None
        if bool(self.degenerate.any()):
            self.pseudo = torch.linalg.pinv(matrix[self.degenerate], hermitian=True, rtol=1e-11)

    def solve(self, first: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """``x``, and ``z̃`` of all rows, zero where they aren't kept."""
        rest = torch.where(self.mask > 0, kept.gather(-1, self.index), 0)
        rhs = torch.cat([first, rest], dim=-1) * self.scale
        found = torch.linalg.lu_solve(self.lu, self.pivots, rhs.unsqueeze(-1)).squeeze(-1)
        if self.pseudo is not None:
            found = found.index_put((self.degenerate,), times(self.pseudo, rhs[self.degenerate]))
        x, z = (found * self.scale).split((self.n, self.index.shape[1]), dim=-1)
        return x, torch.zeros_like(kept).scatter_add(-1, self.index, z * self.mask)

    def turned(self, rows: Tensor, *, back: bool = False) -> Tensor:
        """``Qᵀ v``, or ``Q v``."""
        if not self.rotation.spectra:
            return rows
        return self.cones.turned(self.rotation, rows.unsqueeze(-1), back=back).squeeze(-1)


class ConeInverse(LinearOperator):
    """The inverse of :class:`ConeJacobian`."""

    def __init__(self, factor: ConeFactor, like: Tensor, batch_dims: int) -> None:
        self.like, self.batch_dims, self.properties = like, batch_dims, frozenset()
        self.factor = factor

    def apply(self, x: Tensor) -> Tensor:
        f = self.factor
        first, rows = self._parts(x)
        dx, z = f.solve(first + transposed(f.C, f.weight * rows), rows)
        moved = times(f.C, dx)
        kept = z / torch.where(f.kept, f.values, 1)
        dv = f.turned(torch.where(f.kept, kept, f.idle * (moved - rows)), back=True)
        return self._packed(x, dx, dv)

    def apply_transpose(self, x: Tensor) -> Tensor:
        f = self.factor
        first, rows = self._parts(x)
        ux, u = f.solve(first + transposed(f.C, f.idle * rows), rows / torch.where(f.kept, f.values, 1))
        idle = f.weight * times(f.C, ux) - f.idle * rows
        return self._packed(x, ux, f.turned(torch.where(f.kept, u, idle), back=True))

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        flat = x.reshape(self.samples, self.size).double()
        return flat[:, : self.factor.n], self.factor.turned(flat[:, self.factor.n :])

    def _packed(self, like: Tensor, *parts: Tensor) -> Tensor:
        return torch.cat(parts, dim=-1).to(like.dtype).reshape(like.shape)
