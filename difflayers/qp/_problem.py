"""The optimality conditions of a quadratic program, as one system of equations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from difflayers._problem import Form, Residual
from difflayers.linear import LinearOperator, Property
from difflayers.qp._blocks import BlockProblem
from difflayers.qp._data import Data, Point, times, transposed
from difflayers.qp._jacobian import OptimalityJacobian
from difflayers.qp._pullback import gradients
from difflayers.qp._sparse import Pattern


def optimality(point: Point, data: Data) -> Tensor:
    """The map whose root is the solution, ``(*batch, n + p + m + low + high)``.

    ``v = z - s`` is multiplier minus slack of an inequality: ``z = max(v, 0)`` and ``s = max(-v, 0)``.
    """
    x, y, v, low, high = point
    z_low, z_high = torch.relu(low), torch.relu(high)
    stationary = times(data.P, x) + data.q
    rows = []
    if data.A is not None and data.b is not None:
        stationary = stationary + transposed(data.A, y)
        rows.append(times(data.A, x) - data.b)
    if data.G is not None and data.h is not None:
        z = torch.relu(v)
        stationary = stationary + transposed(data.G, z)
        rows.append(times(data.G, x) + z - v - data.h)
    if data.lb is not None:
        stationary = stationary - z_low
        rows.append(_bounded(-x + z_low - low, -data.lb, low))
    if data.ub is not None:
        stationary = stationary + z_high
        rows.append(_bounded(x + z_high - high, data.ub, high))
    return torch.cat([stationary, *rows], dim=-1)


def _bounded(row: Tensor, bound: Tensor, v: Tensor) -> Tensor:
    """``row = bound``; where there is no bound, ``v = -1`` says so."""
    finite = bound.isfinite()
    return torch.where(finite, row - torch.where(finite, bound, 0), -1 - v)


class Conditions(Residual):
    """:func:`optimality` of bound data."""

    def __init__(self, data: Data, problem: QPProblem) -> None:
        super().__init__(lambda w: optimality(data.layout.split(w), data), problem)
        self.data = data


@dataclass(frozen=True)
class QPProblem(BlockProblem):
    """``argmin ½xᵀPx + qᵀx`` subject to ``Gx ≤ h``, ``Ax = b``, ``lb ≤ x ≤ ub``, as a root of ``optimality``.

    The unknown is ``(x, y, v, low, high)``: ``y`` are the multipliers of the equations, the other three are, for each
    row of ``G``, lower and upper bound, multiplier minus slack. This is the residual map of cone programs (Busseti,
    Moursi, Boyd 2019, "Solution refinement at regular points of conic problems") for the cone of linear programs.

    Args:
        blocks: which blocks are there, in the order in which they come as parameters.
        batch_dims: how many leading dimensions index samples.
        warm: whether a solve starts from a solution of a similar problem, whose active set is a good guess.
        patterns: of the blocks that are sparse, by name; the parameter is then the values.
        maps: which parameters ``vmap`` took a dimension from, innermost first.
        known: the parameters that it will be bound to, off the graph and in float64, where somebody has them already.
    """

    blocks: tuple[str, ...] = ("P", "q", "G", "h", "A", "b")
    batch_dims: int = 1
    warm: bool = False
    patterns: Mapping[str, Pattern] = field(default_factory=dict, repr=False, compare=False)
    maps: tuple[tuple[int | None, ...], ...] = ()
    known: Data | None = field(default=None, repr=False, compare=False)
    properties: frozenset[Property] = frozenset()
    form: ClassVar[Form] = "qp"
    advice: ClassVar[str] = "DAQP(), PIQP() or InteriorPoint()"

    def bind(self, *params: Any) -> Conditions:
        return Conditions(self.data(params), self)

    def jacobian(self, residual: Residual, z: Tensor) -> LinearOperator:
        return OptimalityJacobian(_data_of(residual), z, self.batch_dims)

    def pullback(self, residual: Residual, z: Tensor, wanted: Sequence[int]) -> Callable[[Tensor], Sequence[Tensor]]:
        data, names = _data_of(residual), [self.blocks[i] for i in wanted]
        point, layout = data.layout.split(z), data.layout
        return lambda u: gradients(data, point, layout.split(u), names)


def _data_of(residual: Residual) -> Data:
    if not isinstance(residual, Conditions):
        raise TypeError(f"expected the residual that bind() made, got {type(residual).__name__}")
    return residual.data
