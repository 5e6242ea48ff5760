"""How cotangents go through one step, for many pairs of step and sample at once; pairs are the last dimension.

Small matrices are multiplied as long rows of numbers that way.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from difflayers.ode._tableaus import Coefficients, Tableau


def propagators(
    tableau: Tableau, known: Coefficients, jacobian: Callable[[int], Tensor], outside: Tensor, h: Tensor
) -> tuple[list[Tensor], Tensor]:
    """The cotangents of all stages, and that of the start, as functions of that of the end.

    Each is ``(n, n + 1, pairs)``: a matrix, and a column for what comes from elsewhere.

    Args:
        tableau: the method.
        known: its coefficients.
        jacobian: of a stage, ``(n, n, pairs)``.
        outside: what slopes get from elsewhere, ``(stages, n, pairs)``.
        h: how long the steps are, ``(pairs,)``.
    """
    stages, n, pairs = outside.shape
    unit = torch.eye(n, dtype=outside.dtype, device=outside.device).unsqueeze(-1)
    each, pulled = [], outside.new_zeros(stages, n, n + 1, pairs)
    for i in range(stages - 1, -1, -1):
        later = pulled[i + 1 :].flatten(1)
        total = torch.mv(later.t(), known.columns[i][: len(later)]).view_as(pulled[0])
        if i < tableau.stages:
            total[:, :n] += known.b[i] * unit
        total.mul_(h)
        total[:, n] += outside[i]
        each.append(total)
        pulled[i] = product(jacobian(i).transpose(0, 1), total)
    start = pulled.sum(0)
    start[:, :n] += unit
    return each[::-1], start


def product(left: Tensor, right: Tensor, total: Tensor | None = None) -> Tensor:
    """``total + left @ right`` of ``(a, b, pairs)`` and ``(b, c, pairs)``."""
    if len(right) > 6:
        found = torch.bmm(left.permute(2, 0, 1), right.permute(2, 0, 1)).permute(1, 2, 0)
        return found if total is None else total + found
    for column, row in zip(left.unsqueeze(2).unbind(1), right, strict=True):
        total = column * row if total is None else torch.addcmul(total, column, row)
    return torch.zeros_like(right) if total is None else total


def jacobians(leaf: Tensor, slope: Tensor) -> Tensor:
    """``∂slope/∂leaf`` of pairs ``(…, pairs, n)`` by ``n`` products, ``(…, n, n, pairs)``."""
    n = leaf.shape[-1]
    if not slope.requires_grad:
        return leaf.new_zeros(*leaf.shape[:-2], n, n, leaf.shape[-2])
    rows = []
    for unit in torch.eye(n, dtype=leaf.dtype, device=leaf.device):
        one = unit.expand_as(leaf)
        rows.append(torch.autograd.grad(slope, leaf, one, retain_graph=True, materialize_grads=True)[0].mT)
    return torch.stack(rows, dim=-3)
