"""Projection on the exponential cone, by one scalar equation per cone."""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from difflayers._autodiff import primal
from difflayers.qp._scalar_root import STEPS, untracked

Array = np.ndarray[Any, np.dtype[Any]]
SMALLEST, LARGEST = float(np.finfo(np.float64).tiny), float(np.finfo(np.float64).max)
# Up to how many numbers the last projection is kept.
REMEMBERED = 2**16
_last = threading.local()


def exponential_cone(x: Tensor) -> Tensor:
    """The nearest point ``(r, s, t)`` with ``s exp(r/s) ≤ t``, ``s > 0``, or with ``r ≤ 0, s = 0, t ≥ 0``.

    Elsewhere than in the cone, its polar and over that face, the point is ``a (ρ, 1, exp ρ)`` and the rest of ``x`` is
    ``b (1, 1 - ρ, -exp -ρ)``, for the one ``ρ`` where both add up to ``t`` and are positive (Friberg 2023, "Projection
    onto the exponential cone: a univariate root-finding problem", Optimization Methods and Software 38).

    Args:
        x: finite, ``(*batch, 3)``.
    """
    if untracked(x):
        return _nearest(x)
    point: Tensor = _Nearest.apply(x)  # type: ignore[no-untyped-call]
    return point


def spectrum(x: Tensor, point: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``(*batch, 3)``, and eigenvectors as columns, of the derivative at ``x`` with the nearest ``point``.

    Along the boundary the cone is straight in the direction of the point itself and curved in the one orthogonal to
    that and to the normal. With ``u`` that one and ``w = u₀ - ρ u₁``, the eigenvalue there is ``a/(a + b w²)``.
    """
    inside, polar, face = (_divided if untracked(x) else _divided_outside_dynamo)(x)
    plain = (inside | polar | face).unsqueeze(-1)
    safe = torch.ones_like(x[..., 0])
    near = torch.where(plain, torch.stack([0 * safe, safe, safe], dim=-1), point)
    rest = torch.where(plain, torch.stack([safe, safe, -safe], dim=-1), x - point)
    rho = _exponent(near, rest)
    small, large = rho.clamp_max(0).exp(), (-rho).clamp_max(0).exp()
    along = _unit(torch.stack([rho * large, large, small], dim=-1))
    outward = torch.stack([small, (1 - rho) * small, -large], dim=-1)
    normal = _unit(outward)
    across = torch.linalg.cross(normal, along)
    s, b = near[..., 1], small * (rest * outward).sum(-1) / outward.square().sum(-1)
    bend = b * (across[..., 0] - rho * across[..., 1]).square()
    ones = torch.ones_like(rho)
    values = torch.stack([ones, s / torch.where(s + bend > 0, s + bend, 1), 0 * ones], dim=-1)
    over = torch.stack([ones, 0 * ones, (x.detach()[..., 2] > 0).to(x)], dim=-1)
    flat = torch.where(face.unsqueeze(-1), over, inside.unsqueeze(-1).to(x))
    vectors = torch.stack([along, across, normal], dim=-1)
    eye = torch.eye(3, dtype=x.dtype, device=x.device)
    return torch.where(plain, flat, values), torch.where(plain.unsqueeze(-1), eye, vectors)


def _divided(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`_regions` of a tensor, which may be a dual number or wrapped."""
    r, s, t = x.detach().unbind(-1)
    exponent = torch.where(s > 0, r / torch.where(s > 0, s, 1), 0)
    inside = ((s > 0) & (s * exponent.exp() <= t)) | ((s == 0) & (r <= 0) & (t >= 0))
    exponent = torch.where(r > 0, s / torch.where(r > 0, r, 1) - 1, 0)
    polar = ((r > 0) & (r * exponent.exp() <= -t)) | ((r == 0) & (s <= 0) & (t <= 0))
    return inside, polar & ~inside, (r <= 0) & (s <= 0) & ~inside & ~polar


_divided_outside_dynamo = _disable_dynamo(_divided)


def _exponent(point: Tensor, rest: Tensor) -> Tensor:
    """``ρ`` from the longer one of ``a (ρ, 1, exp ρ)`` and ``b (1, 1 - ρ, -exp -ρ)``, of which one may be lost."""
    near = point.detach()[..., 1] >= rest.detach()[..., 0]
    below = torch.where(near, point[..., 1], rest[..., 0])
    above = torch.where(near, point[..., 0], rest[..., 0] - rest[..., 1])
    most = torch.finfo(point.dtype).max ** 0.3  # so that its square is a number
    edge = torch.where(near, -1, 1).to(point) * most
    return torch.where(below > 0, above / torch.where(below > 0, below, 1), edge).clamp(-most, most)


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.square().sum(-1, keepdim=True).sqrt()


def _moved(x: Tensor, direction: Tensor) -> Tensor:
    """The derivative, which is symmetric, times a direction."""
    values, vectors = spectrum(x, exponential_cone(x))
    turned = (vectors * direction.unsqueeze(-1)).sum(-2)
    return (vectors * (values * turned).unsqueeze(-2)).sum(-1)


class _Nearest(torch.autograd.Function):
    """The projection, whose derivative is made of projections: so it has every order."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _nearest_outside_dynamo(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return _moved(x, cotangent)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        # Torch switches forward mode off in here; an enclosing transform would lose its own tangents.
        with torch.autograd.forward_ad._set_fwd_grad_enabled(True):
            (x,) = ctx.saved_tensors
            return _moved(primal(x), tangent)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int], x: Tensor) -> tuple[Tensor, int]:
        return _Nearest.apply(x.movedim(in_dims[0], 0)), 0  # type: ignore[no-untyped-call]


def _nearest(x: Tensor) -> Tensor:
    """On the host; asked again for the last points, as polishing, duals and derivatives do, it remembers them."""
    points = x.detach().cpu().double().numpy()
    known = getattr(_last, "pair", None)
    if known is None or not np.array_equal(known[0], points):
        with np.errstate(all="ignore"):
            known = points.copy(), _by_rows(points.reshape(-1, 3)).reshape(points.shape)
        _last.pair = known if points.size <= REMEMBERED else None
    return torch.from_numpy(known[1].copy()).to(x)


_nearest_outside_dynamo = _disable_dynamo(_nearest)


def _by_rows(x: Array) -> Array:
    inside, polar, face = _regions(x)
    point = np.where(inside[:, None], x, 0)
    point[face, 0], point[face, 2] = x[face, 0], np.maximum(x[face, 2], 0)
    general = np.flatnonzero(~(inside | polar | face))
    if len(general):
        point[general] = _general(*x[general].T)
    return point


def _regions(x: Array) -> tuple[Array, Array, Array]:
    """Which are in the cone, which in its polar, which over the face ``s = 0``."""
    r, s, t = np.moveaxis(x, -1, 0)
    with np.errstate(all="ignore"):
        inside = ((s > 0) & (s * np.exp(r / s) <= t)) | ((s == 0) & (r <= 0) & (t >= 0))
        # The polar: r > 0 and r exp(s/r - 1) <= -t, or its limit.
        polar = ((r > 0) & (r * np.exp(s / r - 1) <= -t)) | ((r == 0) & (s <= 0) & (t <= 0))
    return inside, polar & ~inside, (r <= 0) & (s <= 0) & ~inside & ~polar


def _general(r: Array, s: Array, t: Array) -> Array:
    """The points ``a (ρ, 1, exp ρ)``.

    ``ρ`` is above ``1 - s/r``, where ``a`` is zero, and below ``r/s``, where ``b`` is. The equation is
    ``log(a exp ρ) = log(t + b exp -ρ)``, or for negative ``t`` ``log(a exp ρ - t) = log(b exp -ρ)``. The unknown is the
    logarithm of how far ``ρ`` is from the nearer bound: where an exponential is large, that is far less than what
    rounding leaves of ``ρ`` itself.
    """
    cone = _Rows(r, s, t, np.ones_like(r, dtype=bool))
    above = cone.in_lower_half()
    cone = _Rows(r, s, t, above)
    unknown = _bracketed(cone, *cone.bracket())
    rho, size, up, down = cone.parts(unknown)
    a = np.where(above, r * np.exp(unknown), (rho - 1) * r + s) / size
    # The side of the equation without a term that may be zero times infinity.
    last = np.where(t >= 0, t + np.exp(np.where(t >= 0, down, 0)), np.exp(np.where(t >= 0, 0, up)))
    return np.stack([a * rho, a, last], axis=-1)


class _Rows:
    """One equation per point ``(r, s, t)``; ``above``: whether the unknown is the distance from the lower bound."""

    def __init__(self, r: Array, s: Array, t: Array, above: Array) -> None:
        self.r, self.s, self.t, self.above, self.positive = r, s, t, above, t >= 0
        self.scale = np.maximum(np.where(above, r, s), SMALLEST)
        self.log_scale, self.log_t = np.log(self.scale), np.log(np.maximum(np.abs(t), SMALLEST))
        self.low, self.high = np.where(r > 0, 1 - s / r, -LARGEST), np.where(s > 0, r / s, LARGEST)

    def __getitem__(self, kept: Array) -> _Rows:
        return _Rows(self.r[kept], self.s[kept], self.t[kept], self.above[kept])

    def in_lower_half(self) -> Array:
        """Whether ``ρ`` is nearer to its lower bound, if it has both; else whether it has that one."""
        both = (self.r > 0) & (self.s > 0)
        half = np.where(both, (self.r / self.s - 1 + self.s / self.r) / 2, 1)
        found: Array = np.where(both, self.equation(np.log(half))[0] >= 0, self.r > 0)
        return found

    def bracket(self) -> tuple[Array, Array, Array]:
        """What the unknown is between, and a guess: if what vanishes at the bound is alone, that it is ``t``."""
        most = np.log(np.clip(self.high / 2 - self.low / 2, SMALLEST, LARGEST / 4)) + math.log(2)
        bound = np.where(self.above, self.low, self.high)
        target = self.log_t - self.log_scale + np.log(bound * (bound - 1) + 1)
        target = np.where(self.above, target - bound, target + bound)
        alone = self.above == self.positive
        guess = np.where(alone, np.minimum(target, np.log(np.maximum(target, 1))), 0)
        least = 2 * math.log(SMALLEST) - np.abs(bound)
        return least, most, np.minimum(np.maximum(guess, least), most - 0.1)

    def parts(self, unknown: Array) -> tuple[Array, Array, Array, Array]:
        """``ρ``, ``ρ² - ρ + 1``, and the logarithms of ``a exp ρ`` and ``b exp -ρ``."""
        distance = np.exp(unknown)
        rho = np.where(self.above, self.low + distance, self.high - distance)
        size = rho * (rho - 1) + 1
        near, far = self.log_scale + unknown, np.log(self.other(rho))
        up, down = np.where(self.above, near, far), np.where(self.above, far, near)
        log_size = np.log(size)
        return rho, size, up - log_size + rho, down - log_size - rho

    def other(self, rho: Array) -> Array:
        """Of ``a`` and ``b``, times ``ρ² - ρ + 1``, the one that doesn't vanish at the nearer bound."""
        found: Array = np.maximum(np.where(self.above, self.r - rho * self.s, (rho - 1) * self.r + self.s), SMALLEST)
        return found

    def equation(self, unknown: Array) -> tuple[Array, Array]:
        """What is to vanish, and its slope."""
        rho, size, up, down = self.parts(unknown)
        distance, bend, other = np.exp(unknown), (2 * rho - 1) / size, self.other(rho)
        ratio = distance * np.where(self.above, self.s, self.r) / other
        in_up = np.where(self.above, 1, ratio) + distance * (1 - bend)
        in_down = np.where(self.above, -ratio, -1) - distance * (1 + bend)
        # The side with two terms, and the share of the one that changes.
        one = np.where(self.positive, down, up)
        both = np.logaddexp(self.log_t, one)
        share = np.exp(one - both)
        value = np.where(self.positive, up - both, both - down)
        slope = np.where(self.positive, in_up - share * in_down, share * in_up - in_down)
        return np.where(self.above, value, -value), slope


def _bracketed(cone: _Rows, low: Array, high: Array, root: Array) -> Array:
    """Newton's method; bisection where a step leaves the bracket, or the last one wasn't half of the one before."""
    eps, found, places = 4 * np.finfo(np.float64).eps, root.copy(), np.arange(len(root))
    before = np.full_like(root, np.inf)
    for _ in range(STEPS):
        value, slope = cone.equation(root)
        low, high = np.where(value <= 0, root, low), np.where(value >= 0, root, high)
        newton = root - value / slope
        step = np.abs(newton - root)
        done = ((step <= eps * np.maximum(np.abs(root), 1)) & np.isfinite(slope)) | (np.abs(value) <= eps)
        good = (newton >= low) & (newton <= high) & (step <= before / 2)
        following = np.where(done, root, np.where(good, newton, (low + high) / 2))
        before, root = np.abs(following - root), following
        found[places] = root
        if done.all():
            break
        if 2 * done.sum() > len(done):
            left = ~done
            low, high, root, before, places = (part[left] for part in (low, high, root, before, places))
            cone = cone[left]
    return found
