"""Projection on the exponential cone, by one scalar equation per cone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from difflayers.qp._scalar_root import scalar_root


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
    point = _general(r, s, t)
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


def _general(r: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """The point ``a (ρ, 1, exp ρ)``.

    ``ρ`` is above ``1 - s/r``, where ``a`` is zero, and below ``r/s``, where ``b`` is. The equation is
    ``log(a exp ρ) = log(t + b exp -ρ)``, or for negative ``t`` ``log(a exp ρ - t) = log(b exp -ρ)``. The unknown is the
    logarithm of how far ``ρ`` is from the nearer bound: where an exponential is large, that is far less than what
    rounding leaves of ``ρ`` itself.
    """
    positive = t.detach() >= 0
    above = _in_lower_half(r.detach(), s.detach(), t.detach(), positive)
    low, high, start = _bracket(r.detach(), s.detach(), t.detach(), positive, above)
    unknown = scalar_root(_equation, low, high, start, r, s, t, positive.to(r.dtype), above.to(r.dtype))
    rho, size, up, down = _parts(unknown, r, s, above)
    a = torch.where(above, r * unknown.exp(), (rho - 1) * r + s) / size
    # The side of the equation without a term that may be zero times infinity.
    last = torch.where(positive, t + torch.where(positive, down, 0).exp(), torch.where(positive, 0, up).exp())
    return torch.stack([a * rho, a, last], dim=-1)


def _in_lower_half(r: Tensor, s: Tensor, t: Tensor, positive: Tensor) -> Tensor:
    """Whether ``ρ`` is nearer to its lower bound, if it has both; else whether it has that one."""
    both = (r > 0) & (s > 0)
    one, other = torch.where(both, r, 1), torch.where(both, s, 1)
    half = (one / other - 1 + other / one) / 2
    value, _ = _equation(half.log(), one, other, t, positive.to(r.dtype), torch.ones_like(r))
    return torch.where(both, value >= 0, r > 0)


def _equation(
    unknown: Tensor, r: Tensor, s: Tensor, t: Tensor, positive: Tensor, above: Tensor
) -> tuple[Tensor, Tensor]:
    positive, above = positive > 0, above > 0
    smallest = torch.finfo(r.dtype).tiny
    rho, size, up, down = _parts(unknown, r, s, above)
    log_t = t.abs().clamp_min(smallest).log()
    value = torch.where(positive, up - torch.logaddexp(log_t, down), torch.logaddexp(log_t, up) - down)
    distance, bend = unknown.exp(), (2 * rho - 1) / size
    a, b = _other(rho, r, s, above)
    in_up = torch.where(above, 1, distance * r / a) + distance * (1 - bend)
    in_down = torch.where(above, -distance * s / b, -1) - distance * (1 + bend)
    slope = torch.where(
        positive, in_up - torch.sigmoid(down - log_t) * in_down, torch.sigmoid(up - log_t) * in_up - in_down
    )
    return torch.where(above, value, -value), slope


def _parts(unknown: Tensor, r: Tensor, s: Tensor, above: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``ρ``, ``ρ² - ρ + 1``, and the logarithms of ``a exp ρ`` and ``b exp -ρ``."""
    low = 1 - s / torch.where(above, r, 1)
    high = r / torch.where(above, 1, s)
    distance = unknown.exp()
    rho = torch.where(above, low + distance, high - distance)
    size = rho * (rho - 1) + 1
    near = torch.where(above, r, s).clamp_min(torch.finfo(r.dtype).tiny).log() + unknown
    a, b = _other(rho, r, s, above)
    up = torch.where(above, near, a.log()) - size.log() + rho
    return rho, size, up, torch.where(above, b.log(), near) - size.log() - rho


def _other(rho: Tensor, r: Tensor, s: Tensor, above: Tensor) -> tuple[Tensor, Tensor]:
    """``a`` and ``b``, times ``ρ² - ρ + 1``; one for what vanishes at the nearer bound."""
    least = torch.finfo(r.dtype).tiny ** 0.4  # of which derivatives are finite still
    a = torch.where(above, 1, (rho - 1) * r + s).clamp_min(least)
    return a, torch.where(above, r - rho * s, 1).clamp_min(least)


def _bracket(r: Tensor, s: Tensor, t: Tensor, positive: Tensor, above: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the unknown is between, and a guess: if the term that vanishes at the bound is alone, that it is ``t``."""
    info = torch.finfo(r.dtype)
    low = torch.where(r > 0, 1 - s / torch.where(r > 0, r, 1), -info.max)
    high = torch.where(s > 0, r / torch.where(s > 0, s, 1), info.max)
    most = (high / 2 - low / 2).clamp(info.tiny, info.max / 4).log() + math.log(2)
    bound = torch.where(above, low, high)
    scale = torch.where(above, r, s).clamp_min(info.tiny)
    target = (t.abs().clamp_min(info.tiny) / scale).log() + (bound * (bound - 1) + 1).log()
    target = torch.where(above, target - bound, target + bound)
    guess = torch.where(above == positive, torch.minimum(target, target.clamp_min(1).log()), 0)
    least = 2 * math.log(info.tiny) - bound.abs()
    return least, most, torch.minimum(torch.maximum(guess, least), most - 0.1)
