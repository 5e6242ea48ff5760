"""The optimality conditions of a cone program, as one system of equations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from difflayers._problem import Form, Residual
from difflayers.linear import LinearOperator, Property
from difflayers.qp._blocks import BlockProblem
from difflayers.qp._cone_factor import constraints
from difflayers.qp._cone_jacobian import ConeJacobian
from difflayers.qp._cones import Cones
from difflayers.qp._data import Data, times, transposed
from difflayers.qp._pullback import of_matrix, of_vector
from difflayers.qp._sparse import Pattern


def cone_optimality(w: Tensor, data: Data, cones: Cones, y: Tensor | None = None) -> Tensor:
    """The map whose root is the solution, ``(*batch, n + m)``, of the unknown ``(x, v)``.

    ``v = y - s`` is multiplier minus slack: ``y = Π(v)`` and ``s = Π(v) - v``, with ``Π`` the projection on the dual
    cone, which may be known. ``C`` and ``d`` are the blocks ``G`` and ``h`` of the data.
    """
    x, v = w.split((data.layout.n, data.layout.m), dim=-1)
    C, d = constraints(data)
    y = cones.project(v) if y is None else y
    stationary = times(data.P, x) + data.q + transposed(C, y)
    return torch.cat([stationary, times(C, x) + y - v - d], dim=-1)


def sizes_of_terms(w: Tensor, data: Data, y: Tensor) -> Tensor:
    """Of every equation of :func:`cone_optimality`, the largest numbers that it could be made of."""
    x, v = w.split((data.layout.n, data.layout.m), dim=-1)
    sizes, (C, d) = data.map(torch.abs), constraints(data.map(torch.abs))
    first = times(sizes.P, x.abs()) + sizes.q + transposed(C, y.abs())
    return torch.cat([first, times(C, x.abs()) + y.abs() + (y - v).abs() + d], dim=-1)


class ConeConditions(Residual):
    """:func:`cone_optimality` of bound data."""

    def __init__(self, data: Data, problem: ConeProblem) -> None:
        super().__init__(lambda w: cone_optimality(w, data, problem.cones), problem)
        self.data = data


@dataclass(frozen=True)
class ConeProblem(BlockProblem):
    """``argmin ½xᵀPx + qᵀx`` subject to ``Cx + s = d``, ``s ∈ K``, as a root of ``cone_optimality``.

    The unknown is ``(x, v)``, with ``v`` multiplier minus slack (Busseti, Moursi, Boyd 2019, "Solution refinement at
    regular points of conic problems", Computational Optimization and Applications 74).

    Args:
        cones: the cone ``K``.
        blocks: which blocks are there, in the order in which they come as parameters; ``C`` is ``G``, ``d`` is ``h``.
        batch_dims: how many leading dimensions index samples.
        warm: whether a solve starts from a solution of a similar problem.
        patterns: of the blocks that are sparse, by name; the parameter is then the values.
        maps: which parameters ``vmap`` took a dimension from, innermost first.
        known: the parameters that it will be bound to, off the graph and in float64, where somebody has them already.
    """

    cones: Cones
    blocks: tuple[str, ...] = ("P", "q", "G", "h")
    batch_dims: int = 1
    warm: bool = False
    patterns: Mapping[str, Pattern] = field(default_factory=dict, repr=False, compare=False)
    maps: tuple[tuple[int | None, ...], ...] = ()
    known: Data | None = field(default=None, repr=False, compare=False)
    properties: frozenset[Property] = frozenset()
    form: ClassVar[Form] = "cone"
    advice: ClassVar[str] = "Clarabel() or SCS()"

    def bind(self, *params: Any) -> ConeConditions:
        return ConeConditions(self.data(params), self)

    def jacobian(self, residual: Residual, z: Tensor) -> LinearOperator:
        if not isinstance(residual, ConeConditions):
            raise TypeError(f"expected the residual that bind() made, got {type(residual).__name__}")
        return ConeJacobian(residual.data, self.cones, z, self.batch_dims)

    def pullback(self, residual: Residual, z: Tensor, wanted: Sequence[int]) -> Callable[[Tensor], Sequence[Tensor]]:
        if not isinstance(residual, ConeConditions):
            raise TypeError(f"expected the residual that bind() made, got {type(residual).__name__}")
        data, sizes = residual.data, (residual.data.layout.n, residual.data.layout.m)
        x, v = z.split(sizes, dim=-1)
        y = self.cones.project(v)

        def gradients(u: Tensor) -> Sequence[Tensor]:
            ux, uv = u.split(sizes, dim=-1)
            return [_gradient(self.blocks[i], data, (x, y), (ux, uv)) for i in wanted]

        return gradients


def _gradient(name: str, data: Data, w: tuple[Tensor, Tensor], u: tuple[Tensor, Tensor]) -> Tensor:
    """``(∂F/∂block)ᵀu`` at ``w = (x, y)``: ``F`` is linear in every block."""
    match name:
        case "P":
            return of_matrix(data.P, [(u[0], w[0])])
        case "q":
            return of_vector(data.q, u[0])
        case "G":
            return of_matrix(data.G, [(u[1], w[0]), (w[1], u[0])])
        case _:
            return of_vector(data.h, -u[1])
