"""Projection on power cones, by one scalar equation per cone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from difflayers.qp._scalar_root import scalar_root


def power_cone(x: Tensor, alpha: Tensor) -> Tensor:
    """The nearest point ``(x, y, z)`` with ``x^α y^(1 - α) ≥ |z|``, ``x, y ≥ 0``.

    Where neither ``x`` nor its negative is in the cone or its dual, it is ``(φ(x, α), φ(y, 1 - α), ± r)`` with
    ``φ(x, α) = (x + √(x² + 4 α r (|z| - r)))/2``, for the one ``r`` between zero and ``|z|`` on the boundary (Hien
    2015, "Differential properties of Euclidean projection onto power cone", Math. Methods of Operations Research 82).

    Args:
        x: finite, ``(*batch, 3)``.
        alpha: between zero and one, ``(*batch,)``.
    """
    first, second, z = x.unbind(-1)
    inside, polar, flat = _regions(x.detach(), alpha)
    general = ~(inside | polar | flat)
    first, second = torch.where(general, first, 0), torch.where(general, second, 0)
    sign, size = z.detach().sign(), torch.where(general, z.abs(), 1)
    share, product = _shares(_root(first, second, size, alpha))
    product = product * size.square()
    coordinates = [_coordinate(first, alpha, product)[0], _coordinate(second, 1 - alpha, product)[0]]
    point = torch.stack([*coordinates, sign * size * share], dim=-1)
    corner = torch.cat([torch.relu(x[..., :2]), torch.zeros_like(x[..., :1])], dim=-1)
    point = torch.where(flat.unsqueeze(-1), corner, point)
    point = torch.where(polar.unsqueeze(-1), 0, point)
    return torch.where(inside.unsqueeze(-1), x, point)


def _regions(x: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which are in the cone, which in its polar, which have ``z = 0``."""
    first, second, z = x.unbind(-1)
    inside = (first >= 0) & (second >= 0) & (_mean(first.clamp_min(0), second.clamp_min(0), alpha) >= z.abs())
    one, two = (-first).clamp_min(0) / alpha, (-second).clamp_min(0) / (1 - alpha)
    polar = (first <= 0) & (second <= 0) & (_mean(one, two, alpha) >= z.abs())
    return inside, polar & ~inside, (z == 0) & ~inside & ~polar


def _mean(first: Tensor, second: Tensor, alpha: Tensor) -> Tensor:
    return first**alpha * second ** (1 - alpha)


def _coordinate(x: Tensor, weight: Tensor, product: Tensor) -> tuple[Tensor, Tensor]:
    """``φ`` and the root in it, for ``product = r (|z| - r)``."""
    product = 4 * weight * product
    root = torch.sqrt(x.square() + product)
    # The other form where the first one cancels.
    return torch.where(x >= 0, x + root, product / torch.where(x >= 0, 1, root - x)) / 2, root


def _shares(logit: Tensor) -> tuple[Tensor, Tensor]:
    """``r / |z|``, and that times one minus that."""
    share = torch.sigmoid(logit)
    return share, share * torch.sigmoid(-logit)


def _root(first: Tensor, second: Tensor, size: Tensor, alpha: Tensor) -> Tensor:
    """The logit of ``r / |z|``, which may be near zero or one."""
    # Where the share has no more bits, and where its square still is a number.
    edge = torch.full_like(size, -0.49 * math.log(torch.finfo(size.dtype).tiny))
    return scalar_root(_equation, -edge, edge, torch.zeros_like(size), first, second, size, alpha)


def _equation(logit: Tensor, first: Tensor, second: Tensor, size: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides as logarithms."""
    share, product = _shares(logit)
    product = product * size.square()
    value = size.log() + torch.nn.functional.logsigmoid(logit)
    slope = 1 - share
    for x, weight in ((first, alpha), (second, 1 - alpha)):
        coordinate, root = _coordinate(x, weight, product)
        value = value - weight * coordinate.log()
        slope = slope - weight * weight * product * (1 - 2 * share) / (root * coordinate)
    return value, slope
