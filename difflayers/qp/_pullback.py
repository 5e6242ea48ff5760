"""Gradients of the blocks of a QP from the solution of its adjoint system."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from difflayers.qp._data import Data, Point
from difflayers.qp._sparse import Sparse

Outer = Sequence[tuple[Tensor, Tensor]]  # vectors (*batch, rows) and (*batch, columns) whose outer products add up


def gradients(data: Data, w: Point, u: Point, wanted: Sequence[str]) -> tuple[Tensor, ...]:
    """``(∂F/∂θ)ᵀu`` for the blocks ``θ`` of ``F``, :func:`~difflayers.qp._problem.optimality`, at ``w``.

    ``F`` is linear in every block, so that of a matrix is a sum of outer products. Autodiff would find the same, after
    a pass through ``F``.
    """
    return tuple(_gradient(name, data, w, u) for name in wanted)


def _gradient(name: str, data: Data, w: Point, u: Point) -> Tensor:
    match name:
        case "P":
            return of_matrix(data.P, [(u.x, w.x)])
        case "q":
            return of_vector(data.q, u.x)
        case "G":
            return of_matrix(data.G, [(u.v, w.x), (torch.relu(w.v), u.x)])
        case "h":
            return of_vector(data.h, -u.v)
        case "A":
            return of_matrix(data.A, [(u.y, w.x), (w.y, u.x)])
        case "b":
            return of_vector(data.b, -u.y)
        case "lb":
            return _of_bound(data.lb, u.low)
        case _:
            return _of_bound(data.ub, -u.high)


def of_vector(block: Tensor | None, gradient: Tensor) -> Tensor:
    shared = block is not None and block.dim() == 1
    return _summed(gradient) if shared else gradient


def _of_bound(bound: Tensor | None, gradient: Tensor) -> Tensor:
    return of_vector(bound, gradient if bound is None else torch.where(bound.isfinite(), gradient, 0))


def of_matrix(block: Tensor | Sparse | None, outer: Outer) -> Tensor:
    if isinstance(block, Sparse):
        rows, columns = block.pattern.rows, block.pattern.columns
        values = torch.stack([left[..., rows] * right[..., columns] for left, right in outer]).sum(0)
        return values if block.dim() > 2 else _summed(values)
    if block is not None and block.dim() == 2:
        left, right = (torch.cat([_rows(part) for part in side]) for side in zip(*outer, strict=True))
        return left.mT @ right
    total = outer[0][0].unsqueeze(-1) * outer[0][1].unsqueeze(-2)
    for left, right in outer[1:]:
        total.addcmul_(left.unsqueeze(-1), right.unsqueeze(-2))
    return total


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _summed(tensor: Tensor) -> Tensor:
    return _rows(tensor).sum(0)
