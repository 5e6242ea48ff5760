"""Which factorization of a cone program's Jacobian: by size, and where one fails the next."""

from __future__ import annotations

import torch
from torch import Tensor

from difflayers.qp._cone_factor import ConeFactor, Exact, Proximal, constraints
from difflayers.qp._cone_projection import Nearest, NearestFactor
from difflayers.qp._cone_sparse import SparseFactor
from difflayers.qp._cones import Cones
from difflayers.qp._data import Data, times, transposed

# From how many unknowns on one factorization in x is the faster one.
LARGE = 40
# From how many unknowns and rows on sparse blocks are factored as such.
SPARSE = 500
# A test problem's solution that is off by more than this says that there are several. A refinement step squares it.
UNDETERMINED = 1e-3


def factored(data: Data, cones: Cones, v: Tensor, y: Tensor) -> ConeFactor:
    """The Jacobian at ``v``, where the projection is ``y``; ``(samples, rows)``."""
    rotation = cones.rotation(v, y)
    if data.sparse and data.layout.n + data.layout.m > SPARSE:
        return SparseFactor(data, cones, rotation)
    data = data.dense()
    if data.layout.n < LARGE:
        return Exact(data, cones, rotation)
    nearest = Nearest.of(data, cones)
    if nearest is not None:
        factor: ConeFactor = NearestFactor(nearest, data, cones, rotation)
        doubtful = factor.degenerate
    else:
        factor = Proximal(data, cones, rotation)
        doubtful = factor.degenerate | _undetermined(factor, data)
    if not bool(doubtful.any()):
        return factor
    part = Exact(data.rows(doubtful), cones, cones.rotation(v[doubtful], y[doubtful]))
    return part if bool(doubtful.all()) else Patched(factor, doubtful, part)


def refactored(factor: ConeFactor, which: Tensor, data: Data, cones: Cones, v: Tensor, y: Tensor) -> ConeFactor:
    """The same but for some samples, whose ``v`` is another one now."""
    if 2 * int(which.sum()) > len(which):
        return factored(data, cones, v, y)
    return Patched(factor, which, factored(data.rows(which), cones, v[which], y[which]))


def _undetermined(factor: Proximal, data: Data) -> Tensor:
    """Which samples' test problem has another solution too."""
    generator = torch.Generator().manual_seed(0)
    x, v = (torch.rand(size, generator=generator, dtype=torch.float64) + 0.5 for size in (factor.n, data.layout.m))
    x, v = (t.to(data.q).expand(len(factor.values), -1) for t in (x, v))
    C = constraints(data)[0]

    projected = factor.turned(factor.values * factor.turned(v), back=True)
    first, rows = times(data.P, x) + transposed(C, projected), times(C, x) + projected - v
    found, other = factor.solve(first, rows)
    error = torch.maximum((found - x).abs().amax(-1), (other - v).abs().amax(-1))
    return ~(error <= UNDETERMINED)


def start(data: Data, cones: Cones, samples: int) -> Tensor | None:
    """Where Newton's method may start without a backend, if there is such a point."""
    small = data.layout.n < LARGE or (data.sparse and data.layout.n + data.layout.m > SPARSE)
    nearest = None if small else Nearest.of(data, cones)
    return None if nearest is None else nearest.start(data, cones, samples)


class Patched(ConeFactor):
    """A factorization, and another one for some of the samples."""

    def __init__(self, base: ConeFactor, samples: Tensor, part: ConeFactor) -> None:
        self.n, self._base, self._samples, self._part = base.n, base, samples, part
        self.degenerate = base.degenerate.index_put((samples,), part.degenerate)

    def solve(self, first: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self._patched(self._base.solve(first, rows), self._part.solve(*self._some(first, rows)))

    def solve_transposed(self, first: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        whole = self._base.solve_transposed(first, rows)
        return self._patched(whole, self._part.solve_transposed(*self._some(first, rows)))

    def _some(self, *parts: Tensor) -> list[Tensor]:
        return [part[self._samples] for part in parts]

    def _patched(self, whole: tuple[Tensor, Tensor], part: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, v = (old.index_put((self._samples,), new) for old, new in zip(whole, part, strict=True))
        return x, v
