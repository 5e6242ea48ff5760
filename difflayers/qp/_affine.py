"""From parameters to the data of a cone program: one affine map for a whole batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from difflayers.qp._sparse import Pattern, Sparse

# Up to how many entries a matrix is dense.
DENSE = 2**17


@dataclass(frozen=True, eq=False)
class Source:
    """Entries of a parameter in CVXPY's vector of all, from ``start`` on; ``other``: the mean with these is taken."""

    parameter: int
    start: int
    index: Tensor
    other: Tensor | None
    logarithm: bool


@dataclass(frozen=True, eq=False)
class Block:
    """A matrix or vector whose entries are affine in the parameters ``θ``: ``constant + Σ weight θ[column]``."""

    rows: Tensor
    columns: Tensor
    weights: Tensor
    constant: Tensor
    pattern: Pattern

    @classmethod
    def of(cls, mapping: Any, rows: Any, columns: Any, shape: tuple[int, int]) -> Block:
        """From a SciPy matrix: a row for each entry, and a column for each parameter and, last, for the constant."""
        order = np.lexsort((columns, rows))
        parts = mapping[order].tocoo()
        varies = parts.col < mapping.shape[1] - 1
        constant = np.asarray(mapping[order][:, [-1]].todense()).ravel()
        pattern = Pattern(_index(rows[order]), _index(columns[order]), shape)
        index = _index(parts.row[varies]), _index(parts.col[varies])
        return cls(
            index[0], index[1], torch.from_numpy(parts.data[varies].copy()), torch.from_numpy(constant.copy()), pattern
        )

    def values(self, theta: Tensor) -> Tensor:
        """The entries, ``(*batch, entries)``; without a batch if no parameter is in them."""
        device = theta.device
        constant = self.constant.to(theta)
        if not len(self.rows):
            return constant
        terms = theta.index_select(-1, self.columns.to(device)) * self.weights.to(theta)
        if self._one_each:
            return terms + constant
        zeros = terms.new_zeros(*terms.shape[:-1], len(constant))
        return zeros.index_add(-1, self.rows.to(device), terms) + constant

    @cached_property
    def _fixed(self) -> Tensor | None:
        """The dense matrix, if no parameter is in it and it is small."""
        rows, columns = self.pattern.shape
        return None if len(self.rows) or rows * columns > DENSE else Sparse.on(self.pattern, self.constant).dense()

    @cached_property
    def _one_each(self) -> bool:
        count = len(self.constant)
        return len(self.rows) == count and bool((self.rows == torch.arange(count)).all())

    def vector(self, theta: Tensor) -> Tensor:
        """As a vector, zero where there is no entry."""
        if self._fixed is not None:
            return self._fixed.to(theta).squeeze(-1)
        values, size = self.values(theta), self.pattern.shape[0]
        if values.shape[-1] == size:
            return values
        zeros = values.new_zeros(*values.shape[:-1], size)
        return zeros.index_add(-1, self.pattern.rows.to(values.device), values)

    def matrix(self, theta: Tensor) -> Tensor | Sparse:
        """As a matrix, dense if it is small."""
        if self._fixed is not None:
            return self._fixed.to(theta)
        values = self.values(theta)
        pattern = self.pattern
        if values.device.type != "cpu":
            pattern = Pattern(pattern.rows.to(values.device), pattern.columns.to(values.device), pattern.shape)
        sparse = Sparse.on(pattern, values)
        return sparse.dense() if pattern.shape[0] * pattern.shape[1] <= DENSE else sparse


def _index(array: Any) -> Tensor:
    return torch.from_numpy(array.astype(np.int64))


@dataclass(frozen=True, eq=False)
class AffineMap:
    """All blocks of a cone program in ``n`` unknowns."""

    blocks: Mapping[str, Block]
    sources: tuple[Source, ...]
    n: int

    def __call__(self, values: Sequence[Tensor], batch: torch.Size) -> tuple[Any, Tensor, Any, Tensor]:
        """``P, q, C, d`` for parameters ``(*batch, entries)``; P is None where there is none."""
        theta = self._theta(values, batch)
        P = self.blocks["P"].matrix(theta) if "P" in self.blocks else None
        return P, self.blocks["q"].vector(theta), self.blocks["C"].matrix(theta), self.blocks["d"].vector(theta)

    def _theta(self, values: Sequence[Tensor], batch: torch.Size) -> Tensor:
        parts = []
        for source in self.sources:
            value = values[source.parameter]
            part = value.index_select(-1, source.index.to(value.device))
            if source.other is not None:
                part = (part + value.index_select(-1, source.other.to(value.device))) / 2
            parts.append((part.log() if source.logarithm else part).expand(*batch, -1))
        return torch.cat(parts, dim=-1)
