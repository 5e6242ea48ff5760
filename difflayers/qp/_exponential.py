"""Projection on the exponential cone, by one scalar equation per cone."""

from __future__ import annotations

import math
import threading
from typing import Any, NamedTuple

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
# How many Newton steps may be of any length.
FREE = 10
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
    """Eigenvalues ``(*batch, 3)`` and eigenvectors, as columns, of the derivative at ``x``, where it is ``point``."""
    if untracked(x):
        with np.errstate(all="ignore"):
            points = _on_host(x)
            values, vectors = _spectrum(points, _on_host(point), _regions(points, np), np.eye(3), np)
        return torch.from_numpy(values).to(x), torch.from_numpy(vectors).to(x)
    eye = torch.eye(3, dtype=x.dtype, device=x.device)
    found: tuple[Tensor, Tensor] = _spectrum(x, point, _regions_outside_dynamo(x.detach(), torch), eye, torch)
    return found


def _spectrum(x: Any, point: Any, regions: tuple[Any, Any, Any], eye: Any, module: Any) -> tuple[Any, Any]:
    """:func:`spectrum` of arrays or of tensors.

    Along the boundary the cone is straight in the direction of the point itself and curved in the one orthogonal to
    that and to the normal. With ``u`` that one and ``w = u₀ - ρ u₁``, the eigenvalue there is ``a/(a + b w²)``.
    """
    where, stack = module.where, module.stack
    inside, polar, face = regions
    plain = (inside | polar | face)[..., None]
    one = module.ones_like(x[..., 0])
    near = where(plain, stack([0 * one, one, one], axis=-1), point)
    rest = where(plain, stack([one, one, -one], axis=-1), x - point)
    rho = _exponent(near, rest, module)
    small, large = module.exp(where(rho > 0, 0, rho)), module.exp(where(rho > 0, -rho, 0))
    along = _unit(stack([rho * large, large, small], axis=-1))
    outward = stack([small, (1 - rho) * small, -large], axis=-1)
    normal = _unit(outward)
    across = _cross(normal, along, stack)
    a, b = near[..., 1], small * (rest * outward).sum(-1) / (outward * outward).sum(-1)
    w = across[..., 0] - rho * across[..., 1]
    below = a + b * w * w
    values = stack([one, a / where(below > 0, below, 1), 0 * one], axis=-1)
    flat = where(face[..., None], stack([one, 0 * one, one * (x[..., 2] > 0)], axis=-1), (one * inside)[..., None])
    vectors = stack([along, across, normal], axis=-1)
    return where(plain, flat, values), where(plain[..., None], eye, vectors)


def _regions(x: Any, module: Any) -> tuple[Any, Any, Any]:
    """Which are in the cone, which in its polar, which over the face ``s = 0``; of arrays or of tensors."""
    r, s, t = x[..., 0], x[..., 1], x[..., 2]
    exponent = r / module.where(s > 0, s, 1)
    inside = ((s > 0) & (s * module.exp(exponent) <= t)) | ((s == 0) & (r <= 0) & (t >= 0))
    exponent = s / module.where(r > 0, r, 1) - 1
    polar = ((r > 0) & (r * module.exp(exponent) <= -t)) | ((r == 0) & (s <= 0) & (t <= 0))
    return inside, polar & ~inside, (r <= 0) & (s <= 0) & ~inside & ~polar


_regions_outside_dynamo = _disable_dynamo(_regions)


def _exponent(point: Any, rest: Any, module: Any) -> Any:
    """``ρ`` from the longer one of ``a (ρ, 1, exp ρ)`` and ``b (1, 1 - ρ, -exp -ρ)``, of which one may be lost."""
    where = module.where
    near = point[..., 1] >= rest[..., 0]
    below = where(near, point[..., 1], rest[..., 0])
    above = where(near, point[..., 0], rest[..., 0] - rest[..., 1])
    most = module.finfo(point.dtype).max ** 0.3  # so that its square is a number
    edge = module.full_like(below, most)
    return module.clip(where(below > 0, above / where(below > 0, below, 1), where(near, -edge, edge)), -most, most)


def _unit(rows: Any) -> Any:
    return rows / ((rows * rows).sum(-1) ** 0.5)[..., None]


def _cross(left: Any, right: Any, stack: Any) -> Any:
    (a, b, c), (d, e, f) = (tuple(rows[..., i] for i in range(3)) for rows in (left, right))
    return stack([b * f - c * e, c * d - a * f, a * e - b * d], axis=-1)


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
    points = _on_host(x)
    known = getattr(_last, "pair", None)
    if known is None or not np.array_equal(known[0], points):
        with np.errstate(all="ignore"):
            known = points.copy(), _by_rows(points.reshape(-1, 3)).reshape(points.shape)
        _last.pair = known if points.size <= REMEMBERED else None
    return torch.from_numpy(known[1].copy()).to(x)


_nearest_outside_dynamo = _disable_dynamo(_nearest)


def _on_host(x: Tensor) -> Array:
    array: Array = x.detach().cpu().double().numpy()
    return array


def _by_rows(x: Array) -> Array:
    inside, polar, face = _regions(x, np)
    point = np.where(inside[:, None], x, 0)
    point[face, 0], point[face, 2] = x[face, 0], np.maximum(x[face, 2], 0)
    general = np.flatnonzero(~(inside | polar | face))
    if len(general):
        point[general] = _general(*x[general].T)
    return point


def _general(r: Array, s: Array, t: Array) -> Array:
    """The points ``a (ρ, 1, exp ρ)``.

    ``ρ`` is above ``1 - s/r``, where ``a`` is zero, and below ``r/s``, where ``b`` is. The equation is
    ``log(a exp ρ) = log(t + b exp -ρ)``, or for negative ``t`` ``log(a exp ρ - t) = log(b exp -ρ)``. The unknown is the
    logarithm of how far ``ρ`` is from the nearer bound: where an exponential is large, that is far less than what
    rounding leaves of ``ρ`` itself.
    """
    cone = _Rows(r, s, t, _above(r, s, t))
    sides = cone.sides(_bracketed(cone, *cone.bracket()))
    a = np.where(cone.above, r * sides.distance, sides.other) / sides.size
    down = np.where(cone.above, sides.far, sides.near)
    up = np.where(cone.above, sides.near, sides.far)
    # The side of the equation without a term that may be zero times infinity.
    last = np.where(t >= 0, t + np.exp(np.where(t >= 0, down, 0)), np.exp(np.where(t >= 0, 0, up)))
    return np.stack([a * sides.rho, a, last], axis=-1)


def _above(r: Array, s: Array, t: Array) -> Array:
    """Whether ``ρ`` is nearer to its lower bound, if it has both; else whether it has that one."""
    both = (r > 0) & (s > 0)
    half = (r / s - 1 + s / r) / 2
    rho = r / s - half
    # Halfway, a and b are r and s times the same number.
    share = 1 / (rho / half * (rho - 1) + 1 / half)
    found: Array = np.where(both, (r * np.exp(rho) - s * np.exp(-rho)) * share >= t, r > 0)
    return found


class _Sides(NamedTuple):
    """``ρ``, its distance from the bound, ``ρ² - ρ + 1``, and of ``a exp ρ`` and ``b exp -ρ`` the logarithms.

    ``near`` is that of the one that vanishes at the bound, ``far`` the other, and ``other`` the number ``a`` or ``b``
    in that one, times ``ρ² - ρ + 1``.
    """

    distance: Array
    rho: Array
    size: Array
    other: Array
    near: Array
    far: Array


class _Rows:
    """One equation per point ``(r, s, t)``; ``above``: whether the unknown is the distance from the lower bound."""

    def __init__(self, r: Array, s: Array, t: Array, above: Array) -> None:
        self.r, self.s, self.t, self.above = r, s, t, above
        self.sign = np.where(above, 1.0, -1.0)
        self.bound = np.where(above, 1 - s / r, r / s)
        self.log_scale = np.log(np.maximum(np.where(above, r, s), SMALLEST))
        self.log_t = np.log(np.maximum(np.abs(t), SMALLEST))
        self.other, self.steep = np.where(above, r, s - r), np.where(above, -s, r)
        # Whether the side that vanishes at the bound has no other term.
        self.alone = above == (t >= 0)
        self.way = np.where(self.alone, 1.0, -1.0)

    def __getitem__(self, kept: Array) -> _Rows:
        return _Rows(self.r[kept], self.s[kept], self.t[kept], self.above[kept])

    def bracket(self) -> tuple[Array, Array, Array]:
        """What the unknown is between, and a guess: the equation with the exponentials that it has at the bound."""
        low, high = np.where(self.r > 0, 1 - self.s / self.r, -LARGEST), np.where(self.s > 0, self.r / self.s, LARGEST)
        most = np.log(np.clip(high / 2 - low / 2, SMALLEST, LARGEST / 4))
        least = 2 * math.log(SMALLEST) - np.abs(self.bound)
        *_, near, far = self.sides(np.full_like(least, 2 * math.log(SMALLEST)))
        less = far + np.log1p(-np.exp(self.log_t - far))
        target = np.where(self.alone, np.logaddexp(self.log_t, far), less) - near + 2 * math.log(SMALLEST)
        guess = np.minimum(target, np.log(np.maximum(target, 1)))
        # The nearer bound is at most half as far as they are apart.
        return least, most + 1, np.minimum(np.maximum(np.where(np.isfinite(guess), guess, 0), least), most)

    def sides(self, unknown: Array) -> _Sides:
        distance = np.exp(unknown)
        rho = self.bound + self.sign * distance
        size, lean = rho * (rho - 1) + 1, self.sign * rho
        other = np.maximum(self.other + self.steep * rho, SMALLEST)
        log_size = np.log(np.minimum(size, LARGEST))
        near, far = self.log_scale + unknown - log_size + lean, np.log(other) - log_size - lean
        return _Sides(distance, rho, size, other, near, far)

    def equation(self, unknown: Array) -> tuple[Array, Array]:
        """What is to vanish, and its slope."""
        distance, rho, size, other, near, far = self.sides(unknown)
        bend = self.sign * (2 * rho - 1) / size
        in_near = 1 + distance * (1 - bend)
        in_far = distance * (self.sign * self.steep / other - 1 - bend)
        # The side with two terms, and the share of the one that changes.
        one, in_one = np.where(self.alone, far, near), np.where(self.alone, in_far, in_near)
        single, in_single = np.where(self.alone, near, far), np.where(self.alone, in_near, in_far)
        both = np.logaddexp(self.log_t, one)
        return self.way * (single - both), self.way * (in_single - np.exp(one - both) * in_one)


def _bracketed(cone: _Rows, low: Array, high: Array, root: Array) -> Array:
    """Newton's method; bisection where a step leaves the bracket or, after some, wasn't half of the one before."""
    eps, found, places = 4 * np.finfo(np.float64).eps, root.copy(), np.arange(len(root))
    before, newtonian = np.full_like(root, np.inf), np.zeros_like(root, dtype=bool)
    for count in range(STEPS):
        value, slope = cone.equation(root)
        low, high = np.where(value <= 0, root, low), np.where(value >= 0, root, high)
        newton = root + np.where(cone.alone, -value / slope, np.log1p(-value / slope))
        step, rounding = np.abs(newton - root), eps * np.maximum(np.abs(root), 1)
        done = ((step <= rounding) & np.isfinite(slope)) | (np.abs(value) <= eps)
        good = (newton >= low) & (newton <= high) & ((count < FREE) | (step <= before / 2))
        following = np.where(done, root, np.where(good, newton, (low + high) / 2))
        # Steps that square their error show what the next one would be.
        done |= good & newtonian & (step * (step / before) ** 2 <= rounding / 16)
        before, newtonian, root = np.abs(following - root), good, following
        found[places] = root
        if done.all():
            break
        if 2 * done.sum() > len(done):
            left = ~done
            low, high, root, before, newtonian = (part[left] for part in (low, high, root, before, newtonian))
            cone, places = cone[left], places[left]
    return found
