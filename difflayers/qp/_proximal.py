"""Exact answers of sparse problems whose active rows depend on each other, or can't be told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from difflayers.qp._data import Data
from difflayers.qp._quasidefinite import Quasidefinite
from difflayers.qp._sparse import Array
from difflayers.qp._sparse_reduced import constraints, samples_of

LEAST, MOST = 1e-9, 1e-2  # regularization of the scaled system


def proximal(data: Data, x: Tensor, y: Tensor, z: Tensor, rounds: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The solution near ``(x, y, z)``, and the active rows, by the proximal method of multipliers.

    Each of its problems, ``min f(x) + δ/2‖x - x₀‖² + 1/(2ε)‖(Cx - d + εz₀)⁺‖²``, is solved by Newton's method with an
    exact line search; from a good guess that is one step (Hermans, Themelis, Patrinos 2022, Math. Prog. Comp. 14(3)).
    Multipliers stay near those of the start and never are negative, whatever depends on what.
    """
    count = len(x)
    x_, y_, z_ = (t.cpu().numpy().copy() for t in (x, y, z))
    b = y.new_zeros(count, data.layout.p) if data.b is None else data.b
    q, b_, limits = (side.expand(count, -1).cpu().numpy() for side in (data.q, b, data.limits))
    for i, (P, A, G) in enumerate(samples_of(data, count)):
        finite = np.flatnonzero(np.isfinite(limits[i]))
        C, d = constraints(A, G, finite, data), np.concatenate([b_[i], limits[i, finite]])
        problem = _Problem(P, C, q[i], d, data.layout.p)
        x_[i], multipliers = problem.solve(rounds, x_[i], np.concatenate([y_[i], z_[i, finite]]))
        y_[i], z_[i] = multipliers[: data.layout.p], 0
        z_[i, finite] = multipliers[data.layout.p :]
    x, y, z = (torch.from_numpy(part).to(x) for part in (x_, y_, z_))
    return x, y, z, z > 0


@dataclass
class _Problem:
    """``min ½xᵀPx + qᵀx`` with ``Cx = d`` for the first ``p`` rows and ``Cx ≤ d`` for the others."""

    P: Any
    C: Any
    q: Array
    d: Array
    p: int

    def __post_init__(self) -> None:
        whole = Quasidefinite(self.P, self.C)
        n = len(self.q)
        self.scale, self._unit = whole.scale, np.split(1 / whole.scale**2, [n])
        self.free = np.arange(len(self.d)) < self.p
        self._left = 0

    def solve(self, rounds: int, x: Array, multipliers: Array) -> tuple[Array, Array]:
        """The answer after at most so many factorizations."""
        best, answer, self._left = self._error(x, multipliers), (x, multipliers), rounds
        stalls = 0
        while self._left > 0 and stalls < 3 and best > 1e-16:
            self._regularize(np.sqrt(best) * 0.1**stalls, *answer)
            x, multipliers = self._nearest(*answer)
            error = self._error(x, multipliers)
            stalls = stalls + 1 if error > 0.5 * best else 0
            if error < best:
                best, answer = error, (x, multipliers)
        return answer

    def _regularize(self, size: float, x: Array, multipliers: Array) -> None:
        """Such that a residual, divided by it, is small beside the unknown that it moves."""
        of_x, of_multipliers = self._sizes(x, multipliers)
        ratio = of_multipliers / of_x
        self._sides = float(np.clip(size * ratio, LEAST, MOST)), float(np.clip(size / ratio, LEAST, MOST))
        self.delta, self.epsilon = (side * part for side, part in zip(self._sides, self._unit, strict=True))
        self._last: tuple[bytes, Any] | None = None

    def _sizes(self, x: Array, multipliers: Array) -> tuple[float, float]:
        """The largest scaled unknown of each kind, or what of the data has its unit."""
        d, n = self.scale, len(x)
        of_x = max(np.abs(x / d[:n]).max(), np.abs(d[n:] * self.d).max(initial=0), 1e-30)
        return of_x, max(np.abs(multipliers / d[n:]).max(initial=0), np.abs(d[:n] * self.q).max(), 1e-30)

    def _nearest(self, center: Array, multipliers: Array) -> tuple[Array, Array]:
        """The minimizer of one problem, and its multipliers."""
        x = center
        value = self._values(x, multipliers)
        for _ in range(self._left):
            active = self.free | (value > 0)
            solve = self._solver(active)
            if solve is None:
                break
            gradient = self._curved(x) + self.q + self.delta * (x - center)
            rhs = np.concatenate([-gradient, -self.epsilon[active] * value[active]])
            step = solve(rhs)[: len(x)]
            change = self.C @ step / self.epsilon
            ahead = value + change
            if bool(((ahead > 0) | self.free)[active].all()) and not bool((ahead > 0)[~active].any()):
                return x + step, np.where(active, ahead, 0)
            slope, curvature = float(gradient @ step), float(step @ (self._curved(step) + self.delta * step))
            t = _line_minimum(slope, curvature, self.epsilon, value, change, self.free)
            x, value = x + t * step, value + t * change
            if t * np.abs(step).max() <= 1e-15 * np.abs(x).max():
                break
        return x, np.where(self.free | (value > 0), value, 0)

    def _values(self, x: Array, multipliers: Array) -> Array:
        values: Array = multipliers + (self.C @ x - self.d) / self.epsilon
        return values

    def _curved(self, x: Array) -> Array:
        product: Array = np.zeros_like(x) if self.P is None else self.P @ x
        return product

    def _solver(self, active: Array) -> Callable[[Array], Array] | None:
        """Solves the regularized system of these rows; None where its factorization breaks down."""
        key, n = active.tobytes(), len(self.q)
        if self._last is None or self._last[0] != key:
            self._left -= 1
            matrix = Quasidefinite(self.P, self.C[active], np.concatenate([self.scale[:n], self.scale[n:][active]]))
            ldl = matrix.factor(*self._sides)
            self._last = key, None if ldl is None else partial(_solved, matrix, ldl, *self._sides)
        return self._last[1]

    def _error(self, x: Array, multipliers: Array) -> float:
        """The largest violation of a condition, beside the scaled unknown of its unit."""
        of_x, of_multipliers = self._sizes(x, multipliers)
        d, n = self.scale, len(x)
        stationary = d[:n] * (self._curved(x) + self.q + self.C.T @ multipliers) / of_multipliers
        slack = d[n:] * (self.d - self.C @ x) / of_x
        rows = np.where(self.free, slack, np.minimum(slack, multipliers / d[n:] / of_multipliers))
        return float(max(np.abs(stationary).max(), np.abs(rows).max(initial=0)))


def _solved(matrix: Quasidefinite, ldl: Any, delta: float, epsilon: float, rhs: Array) -> Array:
    """The solution of the regularized system, refined."""
    sides = np.full(matrix.size, delta)
    sides[matrix.n :] = -epsilon
    scaled = matrix.scale * rhs
    w = ldl.solve(scaled)
    for _ in range(2):
        w += ldl.solve(scaled - matrix.scaled_times(w) - sides * w)
    solution: Array = matrix.scale * w
    return solution


def _line_minimum(slope: float, curvature: float, weights: Array, value: Array, change: Array, free: Array) -> float:
    """The ``t > 0`` that minimizes ``slope·t + ½curvature·t² + ½Σ weights·((value + t·change)⁺)²``."""
    with np.errstate(divide="ignore", invalid="ignore"):
        kinks = np.where(free | (change == 0), np.inf, -value / change)
    order = np.argsort(kinks)
    order = order[(kinks[order] > 0) & (kinks[order] < np.inf)]
    on = free | (value > 0) | ((value == 0) & (change > 0))
    slope += float((weights * value * change)[on].sum())
    curvature += float((weights * change * change)[on].sum())
    # After a kink a row joins where its value rises, and leaves where it falls.
    sign = np.where(change[order] > 0, 1.0, -1.0)
    slopes = slope + np.concatenate([[0], np.cumsum(sign * (weights * value * change)[order])])
    curvatures = curvature + np.concatenate([[0], np.cumsum(sign * (weights * change * change)[order])])
    ends = np.concatenate([kinks[order], [np.inf]])
    with np.errstate(divide="ignore", invalid="ignore"):
        minima = -slopes / curvatures
    reached = np.flatnonzero(minima <= ends)
    t = float(minima[reached[0]]) if len(reached) else 1.0
    return t if 0 < t < np.inf else 1.0
