"""Which factorization of a cone program's Jacobian: by size, and where one fails the next."""

from __future__ import annotations

from collections.abc import Callable

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
    """A factorization, and other ones for some of the samples, of which the last one counts."""

    def __init__(self, base: ConeFactor, samples: Tensor, part: ConeFactor) -> None:
        self.n, self.degenerate = base.n, base.degenerate.index_put((samples,), part.degenerate)
        self._base, before = _divided(base)
        first, own = _divided(part)
        before = [(which, other) for which, other in before if bool((which & ~samples).any())]
        own = [(samples.index_put((samples,), which), other) for which, other in own]
        self._parts = [*before, (samples, first), *own]

    def solve(self, first: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        x, v = self._base.solve(first, rows)
        return self._patched(x, v, lambda which, part: part.solve(first[which], rows[which]))

    def solve_transposed(self, first: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        x, v = self._base.solve_transposed(first, rows)
        return self._patched(x, v, lambda which, part: part.solve_transposed(first[which], rows[which]))

    def _patched(
        self, x: Tensor, v: Tensor, solve: Callable[[Tensor, ConeFactor], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        for which, part in self._parts:
            own, rows = solve(which, part)
            x, v = x.index_put((which,), own), v.index_put((which,), rows)
        return x, v


def _divided(factor: ConeFactor) -> tuple[ConeFactor, list[tuple[Tensor, ConeFactor]]]:
    """What a factorization is patched of: the base, and masks of samples with theirs."""
    return (factor._base, factor._parts) if isinstance(factor, Patched) else (factor, [])
