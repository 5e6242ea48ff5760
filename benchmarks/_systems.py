"""The square systems of Moré, Garbow and Hillstrom that MINPACK's ``hybrd`` was tested on, batched.

J. J. Moré, B. S. Garbow, K. E. Hillstrom: Testing unconstrained optimization software. ACM TOMS 7(1), 1981. A function
takes ``(batch, n)`` and gives what must vanish, in the same shape; numbers in brackets are the paper's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class System:
    """``fn(x) = 0`` from the standard starting point."""

    name: str
    fn: Callable[[Tensor], Tensor]
    start: np.ndarray


def rosenbrock(x: Tensor) -> Tensor:  # (1)
    a, b = x.unbind(-1)
    return torch.stack([1 - a, 10 * (b - a**2)], -1)


def powell_singular(x: Tensor) -> Tensor:  # (13)
    a, b, c, d = x.unbind(-1)
    return torch.stack([a + 10 * b, 5**0.5 * (c - d), (b - 2 * c) ** 2, 10**0.5 * (a - d) ** 2], -1)


def powell_badly_scaled(x: Tensor) -> Tensor:  # (3)
    a, b = x.unbind(-1)
    return torch.stack([1e4 * a * b - 1, torch.exp(-a) + torch.exp(-b) - 1.0001], -1)


def wood(x: Tensor) -> Tensor:  # the gradient of (14), as in MINPACK
    a, b, c, d = x.unbind(-1)
    s, t = b - a**2, d - c**2
    first = [-200 * a * s - (1 - a), 200 * s + 20.2 * (b - 1) + 19.8 * (d - 1)]
    return torch.stack([*first, -180 * c * t - (1 - c), 180 * t + 20.2 * (d - 1) + 19.8 * (b - 1)], -1)


def helical_valley(x: Tensor) -> Tensor:  # (7)
    a, b, c = x.unbind(-1)
    turn = torch.arctan2(b, a) / (2 * math.pi)
    return torch.stack([10 * (c - 10 * turn), 10 * (torch.sqrt(a**2 + b**2) - 1), c], -1)


def chebyquad(x: Tensor) -> Tensor:  # (35)
    before, now = torch.ones_like(x), 2 * x - 1
    step, means = 2 * now, []
    for degree in range(1, x.shape[-1] + 1):
        means.append(now.mean(-1) + (1 / (degree**2 - 1) if degree % 2 == 0 else 0.0))
        before, now = now, step * now - before
    return torch.stack(means, -1)


def brown_almost_linear(x: Tensor) -> Tensor:  # (27)
    first = x[..., :-1] + x.sum(-1, keepdim=True) - (x.shape[-1] + 1)
    return torch.cat([first, x.prod(-1, keepdim=True) - 1], -1)


def discrete_boundary_value(x: Tensor) -> Tensor:  # (28)
    h, t = _grid(x)
    return 2 * x - _before(x) - _after(x) + h**2 * (x + t + 1) ** 3 / 2


def discrete_integral_equation(x: Tensor) -> Tensor:  # (29)
    h, t = _grid(x)
    cubes = (x + t + 1) ** 3
    until = (t * cubes).cumsum(-1)
    rest = (1 - t) * cubes
    after = rest.sum(-1, keepdim=True) - rest.cumsum(-1)
    return x + h * ((1 - t) * until + t * after) / 2


def trigonometric(x: Tensor) -> Tensor:  # (26)
    n, i = x.shape[-1], _numbers(x)
    return n - torch.cos(x).sum(-1, keepdim=True) + i * (1 - torch.cos(x)) - torch.sin(x)


def variably_dimensioned(x: Tensor) -> Tensor:  # the gradient of (25), as in MINPACK
    i = _numbers(x)
    total = (i * (x - 1)).sum(-1, keepdim=True)
    return x - 1 + i * total * (1 + 2 * total**2)


def broyden_tridiagonal(x: Tensor) -> Tensor:  # (30)
    return (3 - 2 * x) * x - _before(x) - 2 * _after(x) + 1


def broyden_banded(x: Tensor) -> Tensor:  # (31)
    terms = x * (1 + x)
    n = x.shape[-1]
    padded = pad(terms, (5, 1))
    band = sum(padded[..., k : k + n] for k in (0, 1, 2, 3, 4, 6))
    return x * (2 + 5 * x**2) + 1 - band


def systems() -> list[System]:
    """All of them, in the sizes that MINPACK used."""
    t = np.arange(1, 11) * (1 / 11)
    return [
        System("Rosenbrock", rosenbrock, np.array([-1.2, 1])),
        System("Powell singular", powell_singular, np.array([3.0, -1, 0, 1])),
        System("Powell badly scaled", powell_badly_scaled, np.array([0.0, 1])),
        System("Wood", wood, np.array([-3.0, -1, -3, -1])),
        System("helical valley", helical_valley, np.array([-1.0, 0, 0])),
        System("Chebyquad 7", chebyquad, np.arange(1, 8) / 8),
        System("Chebyquad 9", chebyquad, np.arange(1, 10) / 10),
        System("Brown almost linear", brown_almost_linear, np.full(10, 0.5)),
        System("discrete boundary value", discrete_boundary_value, t * (t - 1)),
        System("discrete integral equation", discrete_integral_equation, t * (t - 1)),
        System("trigonometric", trigonometric, np.full(10, 0.1)),
        System("variably dimensioned", variably_dimensioned, 1 - np.arange(1, 11) / 10),
        System("Broyden tridiagonal", broyden_tridiagonal, np.full(10, -1.0)),
        System("Broyden banded", broyden_banded, np.full(10, -1.0)),
    ]


def starts(count: int = 32) -> list[np.ndarray]:
    """For every system the standard start and others near it, ``(count, n)``; the same ones in every run."""
    generator = np.random.default_rng(0)
    return [_starts(system.start, count, generator) for system in systems()]


def _starts(start: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    noise = generator.standard_normal((count, len(start)))
    points = start + 0.1 * noise * np.maximum(1, np.abs(start))
    points[0] = start
    return points


def _grid(x: Tensor) -> tuple[float, Tensor]:
    h = 1 / (x.shape[-1] + 1)
    return h, _numbers(x) * h


def _numbers(x: Tensor) -> Tensor:
    return torch.arange(1, x.shape[-1] + 1, dtype=x.dtype)


def _before(x: Tensor) -> Tensor:
    return pad(x[..., :-1], (1, 0))


def _after(x: Tensor) -> Tensor:
    return pad(x[..., 1:], (0, 1))
