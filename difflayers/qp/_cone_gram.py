"""``CᵀWC`` of many samples: rows of few entries one by one, the others as products of the columns that they have."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from difflayers.qp._cones import Cones, Rotation
from difflayers.qp._reduced import positions

# Up to how many entries are few.
FEW = 3


class Gram:
    """``Σ wᵢ c̃ᵢ c̃ᵢᵀ`` over the rows of ``C̃ = QᵀC``, for ``C (samples, m, n)`` or ``(m, n)``.

    Attributes:
        lengths: of the rows of ``C̃``, squared; ``(samples, m)`` or ``(m,)``.
    """

    def __init__(self, C: Tensor, cones: Cones, rotation: Rotation) -> None:
        self._n, self._linear = C.shape[-1], cones.linear
        present = (C.amax(0) != 0) | (C.amin(0) != 0) if C.dim() > 2 else C != 0
        linear, counts = C[..., : self._linear, :], present[: self._linear].sum(-1)
        self._few = [_Few.of(linear, present, counts, count) for count in range(1, FEW + 1)]
        self._others = (counts > FEW).nonzero().squeeze(-1)
        self._many = _Many.of(linear.index_select(-2, self._others), present[self._others])
        self.lengths = torch.linalg.vector_norm(linear, dim=-1).square()
        self._curved: _Many | None = None
        if rotation.spectra:
            curved = _Many.of(C[..., self._linear :, :], present[self._linear :])
            rows = cones.turned_curved(rotation, curved.rows.expand(len(rotation.values), -1, -1))
            self._curved = _Many(rows, curved.columns)
            lengths = torch.linalg.vector_norm(rows, dim=-1).square()
            self.lengths = torch.cat([self.lengths.expand(len(rows), -1), lengths], dim=-1)

    def __call__(self, weight: Tensor) -> Tensor:
        """The sums for weights ``(samples, m)``."""
        total = weight.new_zeros(len(weight), self._n * self._n)
        for few in self._few:
            few.add_to(total, weight, self._n)
        if len(self._others):
            heavy, weights = self._many.where(weight.index_select(-1, self._others))
            heavy.add_to(total, weights, self._n)
        if self._curved is not None:
            self._curved.add_to(total, weight[:, self._linear :], self._n)
        return total.reshape(-1, self._n, self._n)


@dataclass(frozen=True)
class _Few:
    """Rows of equally many entries: their numbers, columns ``(k, count)`` and values ``(..., k, count)``."""

    rows: Tensor
    columns: Tensor
    values: Tensor

    @classmethod
    def of(cls, C: Tensor, present: Tensor, counts: Tensor, count: int) -> _Few:
        rows = (counts == count).nonzero().squeeze(-1)
        columns = present[rows].nonzero()[:, 1].reshape(len(rows), count)
        places = rows.unsqueeze(-1) * C.shape[-1] + columns
        return cls(rows, columns, C.flatten(-2).index_select(-1, places.flatten()).unflatten(-1, places.shape))

    def add_to(self, total: Tensor, weight: Tensor, n: int) -> None:
        outer = self.values.unsqueeze(-1) * self.values.unsqueeze(-2)
        places = self.columns.unsqueeze(-1) * n + self.columns.unsqueeze(-2)
        total.index_add_(1, places.flatten(), (weight[:, self.rows, None, None] * outer).flatten(1))


@dataclass(frozen=True)
class _Many:
    """Rows ``(..., k, s)`` of entries in ``s`` columns."""

    rows: Tensor
    columns: Tensor

    @classmethod
    def of(cls, rows: Tensor, present: Tensor) -> _Many:
        columns = present.any(0).nonzero().squeeze(-1)
        return cls(rows if len(columns) == rows.shape[-1] else rows.index_select(-1, columns), columns)

    def where(self, weight: Tensor) -> tuple[_Many, Tensor]:
        """Those of each sample that have a weight, and their weights."""
        index, mask = positions(weight > 0)
        k, size = self.rows.shape[-2:]
        first = torch.arange(len(weight), device=weight.device).unsqueeze(-1) * k if self.rows.dim() > 2 else 0
        picked = self.rows.reshape(-1, size).index_select(0, (index + first).flatten())
        return _Many(picked.reshape(*index.shape, size), self.columns), weight.gather(1, index) * mask

    def add_to(self, total: Tensor, weight: Tensor, n: int) -> None:
        sums = self.rows.mT @ (weight.unsqueeze(-1) * self.rows)
        places = self.columns.unsqueeze(-1) * n + self.columns
        total.index_add_(1, places.flatten(), sums.flatten(1))
