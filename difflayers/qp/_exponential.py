"""Projection on the exponential cone, by one scalar equation per cone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from difflayers.qp._scalar_root import bracketed_root, polished_root


def exponential_cone(x: Tensor) -> Tensor:
    """The nearest point ``(r, s, t)`` with ``s exp(r/s) ≤ t``, ``s > 0``, or with ``r ≤ 0, s = 0, t ≥ 0``.

    Elsewhere than in the cone, its polar and over that face, the point is ``a (ρ, 1, exp ρ)`` and the rest of ``x`` is
    ``b (1, 1 - ρ, -exp -ρ)``, for the one ``ρ`` where both add up to ``t`` and are positive (Friberg 2023, "Projection
    onto the exponential cone: a univariate root-finding problem", Optimization Methods and Software 38).

    Args:
        x: finite, ``(*batch, 3)``.
    """
    r, s, t = x.unbind(-1)
    inside, polar, face = _regions(x.detach())
    general = ~(inside | polar | face)
    r, s, t = torch.where(general, r, 1), torch.where(general, s, 1), torch.where(general, t, 0)
    a, rho = _multiple(r, s, t)
    point = torch.stack([a * rho, a, a * _exp(rho)], dim=-1)
    flat = torch.stack([x[..., 0], torch.zeros_like(r), torch.relu(x[..., 2])], dim=-1)
    point = torch.where(face.unsqueeze(-1), flat, point)
    point = torch.where(polar.unsqueeze(-1), 0, point)
    return torch.where(inside.unsqueeze(-1), x, point)


def _regions(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which are in the cone, which in its polar, which over the face ``s = 0``."""
    r, s, t = x.unbind(-1)
    exponent = torch.where(s > 0, r / torch.where(s > 0, s, 1), 0)
    inside = ((s > 0) & (s * exponent.exp() <= t)) | ((s == 0) & (r <= 0) & (t >= 0))
    # The polar: r > 0 and r exp(s/r - 1) <= -t, or its limit.
    exponent = torch.where(r > 0, s / torch.where(r > 0, r, 1) - 1, 0)
    polar = ((r > 0) & (r * exponent.exp() <= -t)) | ((r == 0) & (s <= 0) & (t <= 0))
    return inside, polar & ~inside, (r <= 0) & (s <= 0) & ~inside & ~polar


def _multiple(r: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """``a`` and ``ρ``.

    ``a`` is positive above ``1 - s/r``, ``b`` below ``r/s``. The unknown is the logarithm of how far ``ρ`` is from the
    nearer of these two: where an exponential is large, that is far less than what rounding leaves of ``ρ`` itself.
    """

    def parts(unknown: Tensor, r: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        distance = unknown.exp()
        low = 1 - s / torch.where(above, r, 1)
        high = r / torch.where(above, 1, s)
        rho = torch.where(above, low + distance, high - distance)
        size = rho * (rho - 1) + 1
        a = torch.where(above, r * distance, (rho - 1) * r + s) / size
        return rho, size, a, torch.where(above, r - rho * s, s * distance) / size

    def equation(unknown: Tensor, r: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        rho, size, a, b = parts(unknown, r, s)
        up, down = _exp(rho), _exp(-rho)
        in_a, in_b = (r - a * (2 * rho - 1)) / size, (-s - b * (2 * rho - 1)) / size
        slope = (in_a + a) * up + (b - in_b) * down
        value = a * up - b * down - t
        return torch.where(above, value, -value), slope * unknown.exp()

    with torch.no_grad():
        fixed = r.detach(), s.detach(), t.detach()
        low, high = _bounds(fixed[0], fixed[1])
        above = fixed[0] > 0
        half = equation(((high - low) / 2).log(), *fixed)[0]
        above = above & ((fixed[1] <= 0) | (half >= 0))
        nearest = torch.full_like(low, -_largest(low))
        unknown = bracketed_root(lambda u: equation(u, *fixed), nearest, (high - low).log())
    unknown = polished_root(lambda u: equation(u, r, s, t), unknown)
    rho, _, a, _ = parts(unknown, r, s)
    return a, rho


def _bounds(r: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """What ``ρ`` is between."""
    largest = _largest(r)
    low = torch.where(r > 0, 1 - s / torch.where(r > 0, r, 1), -torch.inf)
    high = torch.where(s > 0, r / torch.where(s > 0, s, 1), torch.inf)
    nearer = torch.maximum(low, high.clamp_max(largest) - 2 * largest)
    return nearer, torch.minimum(high, low.clamp_min(-largest) + 2 * largest)


def _largest(like: Tensor) -> float:
    """Whose exponential, and its inverse, are numbers with some room."""
    return -0.98 * math.log(torch.finfo(like.dtype).tiny)


def _exp(x: Tensor) -> Tensor:
    return x.clamp_max(_largest(x)).exp()
