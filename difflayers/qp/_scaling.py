"""Rows of unit length and an objective of size one: the same problem, easier to judge."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from difflayers.qp._data import Data

# Within this factor of one nothing needs scaling.
_MODERATE = 1e3


class Scaling:
    """A dense problem, ``(P, q)`` divided by its largest entry, rows of ``G`` and ``A`` by their lengths; the way back.

    Attributes:
        data: the scaled problem; its minimizer is that of the original.
        severe: whether some size was far from one.
    """

    def __init__(self, data: Data, samples: int) -> None:
        layout, sizes = data.layout, [data.q.abs().amax(-1).expand(samples)]
        if data.P is not None:
            sizes.append(data.P.abs().amax((-2, -1)).expand(samples))
        self._objective = _sized(torch.stack(sizes).amax(0))[:, None]
        G, A = (None if m is None else _sized(m.norm(dim=-1)) for m in (data.G, data.A))
        unit = data.q.new_ones(samples, layout.low + layout.high)
        rows = data.q.new_ones(samples, 0) if G is None else G.expand(samples, -1)
        self._rows = torch.cat([rows, unit], dim=-1)
        self._equations = data.q.new_ones(samples, 0) if A is None else A.expand(samples, -1)
        self.data = replace(
            data,
            P=None if data.P is None else data.P / self._objective[..., None],
            q=data.q / self._objective,
            **_divided("G", "h", data, G),
            **_divided("A", "b", data, A),
        )
        every = torch.cat([self._objective, self._rows, self._equations], dim=-1)
        self.severe = bool((every.log().abs() > torch.tensor(_MODERATE).log()).any())

    def multipliers(self, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the original problem."""
        return self._objective * y / self._equations, self._objective * z / self._rows

    def proof(self, proof: Tensor) -> Tensor:
        """That of the original problem, from :func:`~difflayers.qp._certificates.certified`."""
        sides = torch.cat([self._equations, self._rows], dim=-1)
        n = proof.shape[-1] - sides.shape[-1]
        return torch.cat([proof[:, :n], proof[:, n:] / sides], dim=-1)


def _sized(size: Tensor) -> Tensor:
    return torch.where(size > 0, size, 1)


def _divided(matrix: str, side: str, data: Data, size: Tensor | None) -> dict[str, Tensor]:
    if size is None:
        return {}
    return {matrix: getattr(data, matrix) / size[..., None], side: getattr(data, side) / size}
