"""Zeros of many functions of one variable at once, each between two points where its sign differs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_MOST = 100


def bracketed_root(
    fn: Callable[[Tensor], Tensor], low: Tensor, high: Tensor, at_low: Tensor, at_high: Tensor, eps: float
) -> Tensor:
    """A zero of every component of ``fn`` in ``[low, high]``, to some ``eps`` of its size.

    By the method of Chandrupatla 1997, "A new hybrid quadratic/bisection algorithm for finding the zero of a nonlinear
    function without using derivatives", Adv. Eng. Softw. 28: inverse quadratic interpolation where it is safe,
    bisection elsewhere. ``at_low`` and ``at_high`` are the values at the ends, of which only the latter may be zero.
    """
    a, b, fa, fb = low, high, at_low, at_high
    t = torch.full_like(low, 0.5)
    best = torch.where(fb == 0, b, a)
    done = fb == 0
    for _ in range(_MOST):
        if bool(done.all()):
            break
        x = a + t * (b - a)
        fx = fn(x).to(fa.dtype)
        same = fx.sign() == fa.sign()
        c, fc = torch.where(same, a, b), torch.where(same, fa, fb)
        b, fb = torch.where(same, b, a), torch.where(same, fb, fa)
        a, fa = x, fx
        nearest = torch.where(fa.abs() < fb.abs(), a, b)
        best = torch.where(done, best, nearest)
        least = eps * nearest.abs() / (b - a).abs().clamp_min(torch.finfo(a.dtype).tiny)
        done = done | (least > 0.5) | (fa == 0) | (fb == 0) | ~fx.isfinite()
        t = torch.minimum(torch.maximum(_fraction(a, b, c, fa, fb, fc), least), 1 - least)
    return best


def _fraction(a: Tensor, b: Tensor, c: Tensor, fa: Tensor, fb: Tensor, fc: Tensor) -> Tensor:
    """Where between ``a`` and ``b`` to look next."""
    xi, phi = (a - b) / (c - b), (fa - fb) / (fc - fb)
    safe = (phi * phi < xi) & ((1 - phi) ** 2 < 1 - xi)
    guess = fa / (fb - fa) * fc / (fb - fc) + (c - a) / (b - a) * fa / (fc - fa) * fb / (fc - fb)
    return torch.where(safe & guess.isfinite(), guess, 0.5)
