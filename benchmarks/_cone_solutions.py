"""Solutions of the benchmark's cone programs to rounding, one sample at a time, by means of their own.

Interior points stop at about 1e-9 of the solution, too far for differences. Newton's method on the problem itself, or
on what is left of it when its active set is known, doesn't. Each function takes the values of the parameters and gives
those of the variables.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import cvxpy as cp
import numpy as np
from scipy.linalg import solve
from scipy.optimize import brentq
from scipy.special import expit

Array = np.ndarray[Any, Any]
TIGHT = {"tol_gap_abs": 1e-12, "tol_gap_rel": 1e-12, "tol_feas": 1e-12}


def by_clarabel(problem: cp.Problem, parameters: Sequence[Any], variables: Sequence[Any], values: Sequence[Any]) -> Any:
    """To 1e-12, as far as Clarabel gets, which for linear programs is to rounding."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.value = value
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Solution may be inaccurate")  # than 1e-12
        problem.solve(solver=cp.CLARABEL, **TIGHT)
    return [np.asarray(variable.value) for variable in variables]


def geometric(a: float, b: float, c: float) -> list[Array]:
    """The cube, if its edge is at least 1; otherwise ``x = yᶜ``, with one unknown left, ``log y``."""
    edge = np.sqrt(b / (3 * a))
    if edge >= edge**c:
        return [np.array(edge)] * 3

    def slope(t: float) -> float:
        """Of ``log xyz``, with ``z`` from the other constraint."""
        x, y = np.exp(c * t), np.exp(t)
        return 1 + c - (1 + c) * x * y / (b / a - x * y) - (c * x + y) / (x + y)

    end = np.log(b / a) / (1 + c)
    t = brentq(slope, end - 20, end - 1e-12, xtol=1e-16, rtol=8.9e-16)
    x, y = np.exp(c * t), np.exp(t)
    return [np.array(value) for value in (x, y, (b / a - x * y) / (x + y))]


def lasso(A: Array, b: Array, weight: float, near: Array) -> list[Array]:
    """On the support and with the signs of a point nearby.

    Raises:
        RuntimeError: they aren't those of the solution.
    """
    support, x = np.abs(near) > 1e-5, near.copy()
    signs, columns = np.sign(near[support]), A[:, support]

    def slope_and_curvature(z: Array) -> tuple[Array, Array]:
        r = columns @ z - b
        size = np.linalg.norm(r)
        along = columns.T @ r / size
        return along + weight * signs, (columns.T @ columns - np.outer(along, along)) / size

    x[support], x[~support] = _newton(slope_and_curvature, near[support]), 0
    r = A @ x - b
    dual = A.T @ r / np.linalg.norm(r)
    if np.abs(dual[~support]).max() >= weight or (np.sign(x[support]) != signs).any():
        raise RuntimeError("reference: the support isn't that of the solution")
    return [x]


def correlation(C: Array) -> list[Array]:
    """The dual, ``min ½‖(C + diag y)₊‖² - Σy`` (Qi, Sun 2006, SIAM J. Matrix Anal. Appl. 28)."""

    def positive(y: Array) -> tuple[Array, Array]:
        values, Q = np.linalg.eigh(C + np.diag(y))
        high = np.maximum(values, 0)
        gaps = values[:, None] - values
        flat = np.abs(gaps) < 1e-12
        slopes = np.where(flat, (values > 0)[:, None], (high[:, None] - high) / np.where(flat, 1, gaps))
        pairs = Q[:, :, None] * Q[:, None, :]
        curvature = np.einsum("iab,ab,jab->ij", pairs, slopes, pairs)
        return (Q * high) @ Q.T, curvature

    def slope_and_curvature(y: Array) -> tuple[Array, Array]:
        X, curvature = positive(y)
        return np.diag(X) - 1, curvature

    return [positive(_newton(slope_and_curvature, 1 - np.diag(C)))[0]]


def logistic(A: Array, weight: float) -> list[Array]:
    """Over logarithms of the probabilities, and the multiplier of their sum."""
    rows, n = A.shape

    def slope_and_curvature(u: Array) -> tuple[Array, Array]:
        w, multiplier = np.exp(u[:n]), u[n]
        odds = expit(-A @ w)
        first = -A.T @ odds / rows + weight * (u[:n] + 1) + multiplier
        second = (A.T * (odds * (1 - odds))) @ A / rows * w + weight * np.eye(n)
        return np.append(first, w.sum() - 1), np.block([[second, np.ones((n, 1))], [w, np.zeros((1, 1))]])

    return [np.exp(_newton(slope_and_curvature, np.append(np.full(n, -np.log(n)), 0.0))[:n])]


def _newton(slope_and_curvature: Callable[[Array], tuple[Array, Array]], start: Array) -> Array:
    """Halving steps until the slope falls; to the end of float64.

    Raises:
        RuntimeError: it doesn't get there.
    """
    z = start
    slope, curvature = slope_and_curvature(z)
    for _ in range(60):
        step = solve(curvature, -slope)
        for _ in range(30):
            after = slope_and_curvature(z + step)
            if np.linalg.norm(after[0]) < np.linalg.norm(slope):
                break
            step = step / 2
        else:
            break
        z, (slope, curvature) = z + step, after
    if np.linalg.norm(slope) > 1e-12:
        raise RuntimeError(f"reference: Newton's method ended with a slope of {np.linalg.norm(slope):.0e}")
    return z
