"""Unknowns, rows and objective in units in which they are about one: the same problem, easier to judge."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from difflayers._arrays import finite
from difflayers.qp._data import Data, Matrix
from difflayers.qp._sparse import Sparse

# Within this factor of one nothing needs scaling; beyond the other, what is small in absolute terms says nothing.
_MODERATE, _MISLEADING = 1e3, 1e4
_SWEEPS = 8


class Scaling:
    """A problem in ``u = x/bD``, ``(P, q)`` divided by its largest entry, rows by their lengths; the way back.

    ``b`` is a size of ``x``: what rows reach, or what the objective asks for.

    All by powers of two, so that it is the same problem to the last bit.

    Attributes:
        data: the scaled problem.
        severe: in which samples some size was far from one.
    """

    def __init__(self, data: Data, samples: int) -> None:
        layout = data.layout
        self._columns = equilibrated(data, samples)
        data = _in_units(data, self._columns)
        none = data.q.new_ones(samples, 0)
        G, A = (none if m is None else power_of_two(_lengths(m)).expand(samples, -1) for m in (data.G, data.A))
        self._size = size = power_of_two(_reach(data, G, A).expand(samples))[:, None]
        self._objective = power_of_two(objective_size(replace(data, q=data.q / size)).expand(samples))[:, None]
        # A bound on u is a row of length one already: that on x, in its unit.
        self._rows = torch.cat([G, *[self._columns] * (bool(layout.low) + bool(layout.high))], dim=-1)
        self._equations = A
        units = 1 / self._objective
        self.data = replace(
            data,
            P=None if data.P is None else scaled(data.P, units, torch.ones_like(units)),
            q=data.q * units / size,
            G=None if data.G is None else scaled(data.G, 1 / G, torch.ones_like(units)),
            h=None if data.h is None else data.h / (G * size),
            A=None if data.A is None else scaled(data.A, 1 / A, torch.ones_like(units)),
            b=None if data.b is None else data.b / (A * size),
            lb=None if data.lb is None else data.lb / size,
            ub=None if data.ub is None else data.ub / size,
        )
        every = torch.cat([self._size, self._objective, self._rows, self._equations, self._columns], dim=-1)
        self.severe = (every.log().abs() > torch.tensor(_MODERATE).log()).any(-1)

    def point(self, u: Tensor) -> Tensor:
        """The ``x`` of the original problem."""
        return self._size * self._columns * u

    def multipliers(self, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the original problem."""
        unit = self._size * self._objective
        return unit * y / self._equations, unit * z / self._rows

    def violation(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        """How far the conditions of the scaled problem are from holding at a point of the original one."""
        unit = self._size * self._objective
        x, y, z = x / (self._size * self._columns), y * self._equations / unit, z * self._rows / unit
        return self.data.violation(x, y, z, self.data.limits - self.data.products(x))

    def proof(self, proof: Tensor) -> Tensor:
        """That of the original problem, from :func:`~difflayers.qp._certificates.certified`."""
        units = torch.cat([self._columns, 1 / self._equations, 1 / self._rows], dim=-1)
        return proof * units


def misleading(data: Data, samples: int) -> Tensor:
    """In which samples a row of ``G`` or ``A`` or the objective is of a size far from one, ``(samples,)``.

    Or all sides are small: large ones are what residuals are compared with anyway.
    """
    sides = _sides(data)
    found = ((sides > 0) & (sides < 1 / _MISLEADING)).expand(samples)
    for sizes in (objective_size(data)[..., None], *[_lengths(m) for m in (data.G, data.A) if m is not None]):
        outside = (sizes > _MISLEADING) | (sizes < 1 / _MISLEADING)
        found = found | (outside & (sizes > 0)).any(-1)
    return found


def ordinary(data: Data) -> bool:
    """Whether, at a glance, no sample is odd: all finite, no bounds that contradict, no :func:`misleading` size."""
    if data.sparse or not _bounds_fit(data):
        return False
    sides = _sides(data).reshape(-1).clamp_max(1)
    sizes = torch.cat([_lengths(data.matrix).reshape(-1), objective_size(data).reshape(-1), sides])
    least, largest = map(float, sizes.aminmax())
    total = data.magnitude.sum() if data.P is None else data.magnitude.sum() + data.P.sum()
    return least >= 1 / _MISLEADING and largest <= _MISLEADING and math.isfinite(total)


def _bounds_fit(data: Data) -> bool:
    fits = [] if data.lb is None else [(data.lb < torch.inf).all()]
    fits += [] if data.ub is None else [(data.ub > -torch.inf).all()]
    fits += [] if data.lb is None or data.ub is None else [(data.lb <= data.ub).all()]
    return all(map(bool, fits))


def equilibrated(data: Data, samples: int, shared: Callable[[Tensor], Tensor] = lambda sizes: sizes) -> Tensor:
    """Units of the unknowns, by Ruiz's equilibration (2001, RAL-TR-2001-034) of ``P`` and the rows; on average one.

    ``shared`` makes the sizes of rows those of rows that must have one unit.
    """
    d, one = data.q.new_ones(samples, data.layout.n), data.q.new_ones(1)
    matrices = [m for m in (data.G, data.A) if m is not None and m.shape[-2]]
    for _ in range(_SWEEPS):
        sizes = torch.zeros_like(d)
        for reached in (scaled(m, one, d) for m in matrices):
            rows = scaled(reached, 1 / power_of_two(shared(largest_in(reached, -1))), one)
            sizes = torch.maximum(sizes, largest_in(rows, -2))
        if data.P is not None:
            curved = largest_in(scaled(data.P, d, d), -2)
            sizes = torch.maximum(sizes, curved / power_of_two(curved.amax(-1, keepdim=True)))
        d = d / power_of_two(sizes).sqrt()
        d = d / d.log().mean(-1, keepdim=True).exp()
    return power_of_two(d)


def _in_units(data: Data, d: Tensor) -> Data:
    """The problem in ``u = x/d``."""
    one = d.new_ones(1)
    return replace(
        data,
        P=None if data.P is None else scaled(data.P, d, d),
        q=data.q * d,
        G=None if data.G is None else scaled(data.G, one, d),
        A=None if data.A is None else scaled(data.A, one, d),
        lb=None if data.lb is None else data.lb / d,
        ub=None if data.ub is None else data.ub / d,
    )


def _sides(data: Data) -> Tensor:
    """The largest right-hand side or bound, or entry of ``q`` where there is curvature: what ``x`` goes with."""
    if data.P is not None:
        return data.magnitude
    return _largest_of([data.b, data.limits], data.q)


def _reach(data: Data, G: Tensor, A: Tensor) -> Tensor:
    """How far rows of these lengths and bounds are from zero; where none is, how far a minimum without them is."""
    rows = [None if side is None else side / length for side, length in ((data.h, G), (data.b, A))]
    reach = _largest_of([*rows, data.lb, data.ub], data.q)
    if data.P is None or not data.P.numel():
        return reach
    curvature = largest_in(data.P, -1).amax(-1)
    asked = data.q.abs().amax(-1) / torch.where(curvature > 0, curvature, 1)
    return torch.where(reach > 0, reach, torch.where(curvature > 0, asked, 0))


def _largest_of(sides: Sequence[Tensor | None], like: Tensor) -> Tensor:
    """The largest finite entry of all that there are; zero where there is none."""
    sizes = [finite(side).abs().amax(-1) for side in sides if side is not None and side.shape[-1]]
    return functools.reduce(torch.maximum, sizes, like.new_zeros(()))


def objective_size(data: Data) -> Tensor:
    """The largest entry of ``q`` and, as that is on the diagonal of a semidefinite matrix, of ``P``."""
    size = data.q.abs().amax(-1)
    if data.P is None or not data.P.numel():
        return size
    own = largest_in(data.P, -1) if isinstance(data.P, Sparse) else data.P.diagonal(dim1=-2, dim2=-1)
    return torch.maximum(size, own.amax(-1))


def scaled(matrix: Matrix, rows: Tensor, columns: Tensor) -> Matrix:
    """Times the diagonals of ``rows`` and ``columns``; one entry stands for all."""
    if not isinstance(matrix, Sparse):
        return matrix * rows[..., :, None] * columns[..., None, :]
    pattern = matrix.pattern
    left, right = (
        factor if factor.shape[-1] == 1 else factor[..., place]
        for factor, place in ((rows, pattern.rows), (columns, pattern.columns))
    )
    return matrix.map(lambda values: values * left * right)


def largest_in(matrix: Matrix, dim: int) -> Tensor:
    """The largest absolute value in every row (``dim`` is -1) or column (-2)."""
    if not isinstance(matrix, Sparse):
        largest: Tensor = matrix.abs().amax(dim)
        return largest
    place = matrix.pattern.rows if dim == -1 else matrix.pattern.columns
    values = matrix.values.abs()
    found = values.new_zeros(*values.shape[:-1], matrix.shape[-3 - dim])
    return found.scatter_reduce(-1, place.expand_as(values), values, "amax")


def _lengths(matrix: Matrix) -> Tensor:
    """The Euclidean length of every row."""
    if not isinstance(matrix, Sparse):
        lengths: Tensor = torch.linalg.vector_norm(matrix, dim=-1)
        return lengths
    squares = matrix.values.square()
    found = squares.new_zeros(*squares.shape[:-1], matrix.shape[-2])
    return found.index_add(-1, matrix.pattern.rows, squares).sqrt()


def power_of_two(size: Tensor) -> Tensor:
    """A power of two near it: rounding would give a singular ``P`` some curvature."""
    size = torch.where((size > 0) & size.isfinite(), size, 1)
    return torch.exp2(torch.frexp(size).exponent.to(size))
