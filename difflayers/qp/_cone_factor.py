"""The Jacobian of a cone program, factored: what all ways have in common, and the one for small ones."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from difflayers.errors import ProblemError
from difflayers.linear._direct import lu_factor
from difflayers.qp._cone_gram import Gram
from difflayers.qp._cones import Cones, Rotation
from difflayers.qp._data import Data, Matrix, times, transposed
from difflayers.qp._reduced import positions

# Below this share of the largest pivot the system counts as singular.
SINGULAR = 1e-13


def constraints(data: Data) -> tuple[Matrix, Tensor]:
    """``C`` and ``d``, which the data has under the names that a QP's inequalities have."""
    if data.G is None or data.h is None:
        raise ProblemError("a cone program has constraints; for none use solve_qp")
    return data.G, data.h


class ConeFactor(ABC):
    """``[[P, CᵀD], [C, D - I]]``, factored.

    Attributes:
        n: how many unknowns ``x`` there are.
        degenerate: the samples where it is singular, which get the pseudoinverse.
    """

    n: int
    degenerate: Tensor

    @abstractmethod
    def solve(self, first: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """``(x, v)`` with ``Px + CᵀDv = first`` and ``Cx + (D - I)v = rows``."""

    @abstractmethod
    def solve_transposed(self, first: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """``(x, v)`` with ``Px + Cᵀv = first`` and ``D(Cx + v) - v = rows``."""


class Eliminated(ConeFactor):
    """In the eigenvectors of ``D``, some rows of ``v`` eliminated.

    With ``D = QΛQᵀ``, ``C̃ = QᵀC`` and ``z̃ = Λ Qᵀv``, rows of weight ``W = λ/(1 - λ)`` are eliminated, which leaves
    ``[[P + C̃ᵀWC̃, C̃ᵀ], [C̃, -(1 - Λ)/Λ]]`` of ``x`` and the kept ``z̃``. A row that isn't active at all costs nothing.
    """

    def __init__(self, data: Data, cones: Cones, rotation: Rotation) -> None:
        self.cones, self.n, self.rotation, self.values = cones, data.layout.n, rotation, rotation.values
        self.C: Tensor = constraints(data)[0]
        self.kept = torch.zeros_like(self.values, dtype=torch.bool)
        self.idle = self.weight = self.values
        self._factor(data.P)

    @abstractmethod
    def _factor(self, P: Tensor | None) -> None:
        """Choose the rows that are kept, the weights of the others, and factor."""

    @abstractmethod
    def _solve(self, first: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """``x``, and ``z̃`` of all rows, zero where they aren't kept."""

    def solve(self, first: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.turned(rows)
        x, z = self._solve(first + self._transposed(self.weight * rows), rows)
        idle = self.idle * (self._times(x) - rows)
        return x, self.turned(torch.where(self.kept, z / torch.where(self.kept, self.values, 1), idle), back=True)

    def solve_transposed(self, first: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.turned(rows)
        kept = rows / torch.where(self.kept, self.values, 1)
        x, u = self._solve(first + self._transposed(self.idle * rows), kept)
        idle = self.weight * self._times(x) - self.idle * rows
        return x, self.turned(torch.where(self.kept, u, idle), back=True)

    def _times(self, x: Tensor) -> Tensor:
        """``C̃ x``."""
        return self.turned(times(self.C, x))

    def _transposed(self, z: Tensor) -> Tensor:
        """``C̃ᵀ z``."""
        return transposed(self.C, self.turned(z, back=True))

    def turned(self, rows: Tensor, *, back: bool = False) -> Tensor:
        """``Qᵀ v``, or ``Q v``."""
        if not self.rotation.spectra:
            return rows
        return self.cones.turned(self.rotation, rows.unsqueeze(-1), back=back).squeeze(-1)


class Exact(Eliminated):
    """Rows with ``λ < ½`` eliminated, and one LU factorization of the rest; the pseudoinverse where it is singular."""

    def _factor(self, P: Tensor | None) -> None:
        self.kept = self.values >= 0.5
        # D / (1 - D) of eliminated rows, (1 - D) / D of kept ones: where the other form would divide by zero.
        self.idle = torch.where(self.kept, 0, 1 / torch.where(self.kept, 1, 1 - self.values))
        self.weight = self.values * self.idle
        self.index, mask = positions(self.kept)
        self.mask = mask.to(self.values)
        self.turned_C = self.cones.turned(self.rotation, self.C.expand(len(self.values), -1, -1))
        matrix = self._matrix(P)
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

    def _matrix(self, P: Tensor | None) -> Tensor:
        samples, k, n = len(self.values), self.index.shape[1], self.n
        matrix = self.values.new_zeros(samples, n + k, n + k)
        if P is not None:
            matrix[:, :n, :n] = P
        if self.rotation.spectra:
            curved = slice(self.cones.linear, None)
            rows = self.turned_C[:, curved]
            matrix[:, :n, :n] += rows.mT @ (self.weight[:, curved, None] * rows)
        picked = self.turned_C.gather(1, self.index[..., None].expand(-1, -1, n)) * self.mask[..., None]
        matrix[:, n:, :n], matrix[:, :n, n:] = picked, picked.mT
        values = torch.where(self.mask > 0, self.values.gather(1, self.index), 1)
        # Padding: an equation of its own.
        matrix[:, n:, n:].diagonal(dim1=-2, dim2=-1).copy_(1 - self.mask - (1 - values) / values)
        return matrix

    def _times(self, x: Tensor) -> Tensor:
        return times(self.turned_C, x)

    def _transposed(self, z: Tensor) -> Tensor:
        return transposed(self.turned_C, z)

    def _solve(self, first: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        rest = torch.where(self.mask > 0, kept.gather(-1, self.index), 0)
        rhs = torch.cat([first, rest], dim=-1) * self.scale
        found = torch.linalg.lu_solve(self.lu, self.pivots, rhs.unsqueeze(-1)).squeeze(-1)
        if self.pseudo is not None:
            found = found.index_put((self.degenerate,), times(self.pseudo, rhs[self.degenerate]))
        x, z = (found * self.scale).split((self.n, self.index.shape[1]), dim=-1)
        return x, torch.zeros_like(kept).scatter_add(-1, self.index, z * self.mask)


class Proximal(Eliminated):
    """All rows eliminated and one Cholesky factorization in ``x``: of ``D - (1 + ε)I`` instead of ``D - I``.

    What that leaves, refinement ends: it is the proximal method of multipliers. So ``degenerate`` are the samples where
    a test problem isn't solved, because the system is singular or nearly so.
    """

    def _factor(self, P: Tensor | None) -> None:
        gram, n = Gram(self.C, self.cones, self.rotation), self.n
        soft = torch.where(self.values < 0.5, self.values / (1 - self.values), 0)
        size = (soft * gram.lengths).sum(-1)
        size = size if P is None else size + P.diagonal(dim1=-2, dim2=-1).sum(-1)
        # Weights are large next to what curvature there is, if there is any.
        least = gram.lengths / (HEAVY * torch.where(size > 0, size / n, 1).unsqueeze(-1))
        self.idle = 1 / (1 - self.values + least)
        self.weight = self.values * self.idle
        matrix = gram(self.weight)
        matrix = matrix if P is None else matrix + P
        self.lower, info = torch.linalg.cholesky_ex(matrix)
        self.degenerate = (info != 0) | ~self.lower.sum((-2, -1)).isfinite()

    def _solve(self, first: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cholesky_solve(first.unsqueeze(-1), self.lower).squeeze(-1), kept


# How much heavier the rows that hold are than the rest.
HEAVY = 1e7
