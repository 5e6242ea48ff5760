"""Nearest points of cones, with equations: the Jacobian is then a small matrix, of the equations alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from difflayers.qp._cone_factor import ConeFactor, constraints
from difflayers.qp._cones import Cones, Rotation
from difflayers.qp._data import Data, cholesky
from difflayers.qp._sparse import Sparse


@dataclass(frozen=True)
class Nearest:
    """``½ Σ cᵢ zᵢ² + q̂ᵀz`` subject to ``Az = b`` and ``d - z`` in the cones after the zero ones, where ``zᵢ = sᵢ xⱼ``.

    That is what a cone program is whose ``P`` is diagonal and whose rows after the equations have one unknown each, all
    different, if curvature ``c`` is the same within each cone. ``column`` is ``j`` for every ``i``.
    """

    column: Tensor
    scale: Tensor
    curvature: Tensor
    equations: Tensor

    @classmethod
    def of(cls, data: Data, cones: Cones) -> Nearest | None:
        """The structure, if it is there and samples share it."""
        C, P, n, first = constraints(data)[0], data.P, data.layout.n, cones.zero
        if P is None or C.dim() > 2 or P.dim() > 2 or cones.rows - first != n:
            return None
        P, C = (m.dense() if isinstance(m, Sparse) else m for m in (P, C))
        weights = P.diagonal()
        rows = C[first:]
        present = rows != 0
        alone = bool((present.sum(0) == 1).all()) and bool((present.sum(1) == 1).all())
        if not alone or bool((torch.diag(weights) != P).any()) or not bool((weights > 0).all()):
            return None
        column = present.to(torch.int8).argmax(1)
        scale = rows.gather(1, column[:, None]).squeeze(1)
        curvature = weights[column] / scale.square()
        return cls(column, scale, curvature, C[:first, column] / scale) if _uniform(curvature, cones) else None

    def to_rows(self, x: Tensor) -> Tensor:
        """``x / s`` in the order of rows."""
        return x[:, self.column] / self.scale

    def to_unknowns(self, z: Tensor) -> Tensor:
        """``x`` from ``z``."""
        return torch.empty_like(z).index_copy(1, self.column, z / self.scale)

    def start(self, data: Data, cones: Cones, samples: int) -> Tensor:
        """The solution ``(x, v)`` without the equations, to start from."""
        q, d, first = data.q.expand(samples, -1), constraints(data)[1].expand(samples, -1), cones.zero
        target = -(self.curvature * d[:, first:] + self.to_rows(q))
        whole = torch.cat([torch.zeros_like(d[:, :first]), target], dim=-1)
        y = cones.project(whole)[:, first:]
        s = (y - target) / self.curvature
        return torch.cat([self.to_unknowns(d[:, first:] - s), whole[:, :first], y - s], dim=-1)


def _uniform(curvature: Tensor, cones: Cones) -> bool:
    parts = curvature[cones.nonnegative :].split(list(cones.sizes))
    return all(bool(((part - part[0]).abs() <= 1e-13 * part[0]).all()) for part in parts)


class NearestFactor(ConeFactor):
    """In the eigenvectors of ``D``, everything but the multipliers of the equations is eliminated in closed form."""

    def __init__(self, nearest: Nearest, data: Data, cones: Cones, rotation: Rotation) -> None:
        self.n, self._cones, self._rotation, self._nearest = data.layout.n, cones, rotation, nearest
        c, values = nearest.curvature, rotation.values[:, cones.zero :]
        self._values, self._inverse = values, 1 / (c * (1 - values) + values)
        self._weight = (1 - values) * self._inverse
        columns = nearest.equations.mT.expand(len(values), -1, -1)
        self._columns = self._turned(columns)
        self._lower, fine = cholesky(self._columns.mT @ (self._weight.unsqueeze(-1) * self._columns))
        self.degenerate = ~fine

    def solve(self, first: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        sides, rows = rows.split((self._cones.zero, self.n), dim=-1)
        rows = self._turn(rows)
        rest = self._turn(self._nearest.to_rows(first)) - self._nearest.curvature * rows
        multipliers = self._equations(rows + self._weight * rest, sides)
        v = self._inverse * (rest - self._spread(multipliers))
        return self._packed(rows + (1 - self._values) * v, multipliers, v)

    def solve_transposed(self, first: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        sides, rows = rows.split((self._cones.zero, self.n), dim=-1)
        rows, first = self._turn(rows), self._turn(self._nearest.to_rows(first))
        multipliers = self._equations(self._weight * first + self._inverse * rows, sides)
        rest = first - self._spread(multipliers)
        v = self._inverse * (self._values * rest - self._nearest.curvature * rows)
        return self._packed(self._weight * rest + self._inverse * rows, multipliers, v)

    def _equations(self, z: Tensor, sides: Tensor) -> Tensor:
        short = (self._columns.mT @ z.unsqueeze(-1)).squeeze(-1) - sides
        return torch.cholesky_solve(short.unsqueeze(-1), self._lower).squeeze(-1)

    def _spread(self, multipliers: Tensor) -> Tensor:
        return (self._columns @ multipliers.unsqueeze(-1)).squeeze(-1)

    def _packed(self, z: Tensor, multipliers: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        x = self._nearest.to_unknowns(self._turn(z, back=True))
        return x, torch.cat([multipliers, self._turn(v, back=True)], dim=-1)

    def _turn(self, rows: Tensor, *, back: bool = False) -> Tensor:
        return self._turned(rows.unsqueeze(-1), back=back).squeeze(-1)

    def _turned(self, rows: Tensor, *, back: bool = False) -> Tensor:
        plain = self._cones.nonnegative
        curved = self._cones.turned_curved(self._rotation, rows[:, plain:], back=back)
        return torch.cat([rows[:, :plain], curved], dim=1) if plain else curved
