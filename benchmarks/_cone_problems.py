"""Cone programs as CVXPY problems with values for many samples, and what is true of their gradients.

Differences of the fourth order along random directions, of solutions to rounding, say what gradients must be. No part
of the package is involved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import _cone_solutions as solutions
import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]
# Samples that are compared with differences, directions for each, and the step, for parameters of about 1.
CHECKED, DIRECTIONS, STEP = 32, 2, 1e-3
# Two steps that differ by more than this have a kink between them.
SMOOTH = 1e-5


@dataclass(frozen=True, eq=False)
class Case:
    """A problem, and values of its parameters, samples first.

    Attributes:
        solution: of one sample, to rounding: from the values of the parameters to those of the variables.
        without_bounds: the same problem for Moreau. CVXPY 1.9.3 takes ``x ≥ 0`` for a bound there, apart from the
            constraints, and cvxpylayers 1.2 doesn't pass bounds on, but returns an answer.
    """

    name: str
    problem: cp.Problem
    parameters: tuple[Any, ...]
    variables: tuple[Any, ...]
    values: tuple[Tensor, ...]
    solution: Callable[..., Sequence[Array]]
    gp: bool = False
    without_bounds: cp.Problem | None = None

    @property
    def samples(self) -> int:
        return len(self.values[0])

    @cached_property
    def cotangents(self) -> tuple[Tensor, ...]:
        random = np.random.default_rng(1)
        shapes = [(CHECKED, *variable.shape) for variable in self.variables]
        made = [torch.from_numpy(random.standard_normal(shape)) for shape in shapes]
        # The same for every sample of a number, so that fewer samples have the same.
        return tuple(c[torch.arange(self.samples) % CHECKED] for c in made)

    @cached_property
    def directions(self) -> tuple[Tensor, ...]:
        """Of unit length for each sample, ``(directions, samples, ...)``; symmetric where the parameter is."""
        random = np.random.default_rng(2)
        count = min(self.samples, CHECKED)
        made = []
        for parameter in self.parameters:
            d = torch.from_numpy(random.standard_normal((DIRECTIONS, CHECKED, *parameter.shape)))
            made.append(d + d.mT if parameter.attributes["symmetric"] else d)
        size = torch.cat([d.reshape(DIRECTIONS, CHECKED, -1) for d in made], dim=-1).norm(dim=-1)
        return tuple((d / size.reshape(*size.shape, *[1] * (d.dim() - 2)))[:, :count] for d in made)

    @cached_property
    def reference(self) -> Reference:
        return _reference(self)


@dataclass(frozen=True)
class Reference:
    """What is true of a case.

    Attributes:
        variables: of the samples that are checked.
        slopes: of the loss along every direction, ``(directions, samples)``.
        regular: the samples without a kink nearby.
        uncertainty: how far apart the slopes of two steps are, relatively.
    """

    variables: tuple[Array, ...]
    slopes: Array
    regular: Array
    uncertainty: float

    def variable_error(self, found: Sequence[Tensor]) -> float:
        """The worst of the variables', relative, over regular samples."""
        pairs = zip(found, self.variables, strict=True)
        count, kept = len(self.regular), self.regular
        return max(_relative(got.detach().numpy()[:count][kept], true[kept]) for got, true in pairs)

    def gradient_error(self, case: Case, gradients: Sequence[Tensor | None]) -> float:
        """Relative, of all slopes together that the gradients give, over regular samples."""
        count = len(self.regular)
        slopes = np.zeros_like(self.slopes)
        for direction, gradient in zip(case.directions, gradients, strict=True):
            if gradient is not None:
                product = direction * gradient[:count].detach().double()
                slopes += product.reshape(*slopes.shape, -1).sum(-1).numpy()
        return _relative(slopes[:, self.regular], self.slopes[:, self.regular])


def _relative(got: Array, true: Array) -> float:
    return float(np.linalg.norm(got - true) / np.linalg.norm(true))


def _reference(case: Case) -> Reference:
    count = min(case.samples, CHECKED)
    slopes, fine = np.zeros((2, DIRECTIONS, count))
    for k in range(DIRECTIONS):
        for i in range(count):
            step = [direction[k, i].numpy() for direction in case.directions]
            loss = {t: _loss(case, i, step, t * STEP) for t in (-2, -1, -0.5, 0.5, 1, 2)}
            slopes[k, i], fine[k, i] = (
                (8 * (loss[t] - loss[-t]) - (loss[2 * t] - loss[-2 * t])) / (12 * t * STEP) for t in (1, 0.5)
            )
    regular = (np.abs(slopes - fine) <= SMOOTH * (np.abs(slopes) + np.abs(slopes).mean())).all(0)
    samples = [case.solution(*[value[i].numpy() for value in case.values]) for i in range(count)]
    variables = tuple(map(np.stack, zip(*samples, strict=True)))
    return Reference(variables, slopes, regular, _relative(fine[:, regular], slopes[:, regular]))


def _loss(case: Case, sample: int, direction: Sequence[Array], step: float) -> float:
    values = [value[sample].numpy() + step * d for value, d in zip(case.values, direction, strict=True)]
    found = zip(case.cotangents, case.solution(*values), strict=True)
    return float(sum(np.vdot(c[sample].numpy(), value) for c, value in found))


def l1(samples: int = 128) -> Case:
    """From the README of cvxpylayers: least absolute deviations, nonnegative."""
    x, A, b = cp.Variable(2), cp.Parameter((3, 2)), cp.Parameter(3)
    objective = cp.Minimize(0.5 * cp.pnorm(A @ x - b, p=1))
    values = _normal((samples, 3, 2), (samples, 3))
    return _linear(f"README ℓ1, {samples}", objective, [], x, (A, b), (x,), values)


def dual(samples: int = 128) -> Case:
    """From the README of cvxpylayers: a linear program and its multiplier."""
    x, c, b = cp.Variable(2), cp.Parameter(2), cp.Parameter()
    total = cp.sum(x) == b
    cost, size = _normal((samples, 2), (samples,))
    variables = x, total.dual_variables[0]
    values = cost, size.abs() + 0.5
    return _linear(f"README dual LP, {samples}", cp.Minimize(c @ x), [total], x, (c, b), variables, values)


def _linear(
    name: str,
    objective: cp.Minimize,
    equations: list[Any],
    x: cp.Variable,
    parameters: Any,
    variables: Any,
    values: tuple[Tensor, ...],
) -> Case:
    """With ``x ≥ 0``."""
    problem = cp.Problem(objective, [*equations, x >= 0])

    def solution(*values: Array) -> Sequence[Array]:
        found: Sequence[Array] = solutions.by_clarabel(problem, parameters, variables, values)
        return found

    other = cp.Problem(objective, [*equations, 2 * x >= 0])
    return Case(name, problem, parameters, variables, values, solution, without_bounds=other)


def geometric(samples: int = 128) -> Case:
    """From the README of cvxpylayers: a log-log convex program."""
    x, y, z = (cp.Variable(pos=True) for _ in range(3))
    a, b, c = cp.Parameter(pos=True), cp.Parameter(pos=True), cp.Parameter()
    problem = cp.Problem(cp.Minimize(1 / (x * y * z)), [a * (x * y + x * z + y * z) <= b, x >= y**c])
    u, v, w = _normal((samples,), (samples,), (samples,))
    values = 2 * (0.2 * u).exp(), (0.2 * v).exp(), 0.5 + 0.1 * w
    return Case(f"README GP, {samples}", problem, (a, b, c), (x, y, z), values, solutions.geometric, gp=True)


def lasso(samples: int = 128, n: int = 50) -> Case:
    """Square-root lasso (Belloni, Chernozhukov, Wang 2011): a cone of ``n + 1``, and ``2n`` inequalities."""
    x, A, b, weight = cp.Variable(n), cp.Parameter((n, n)), cp.Parameter(n), cp.Parameter(nonneg=True)
    problem = cp.Problem(cp.Minimize(cp.norm(A @ x - b) + weight * cp.norm1(x)))
    data, true, noise = _normal((samples, n, n), (samples, n), (samples, n))
    few = torch.arange(n) < n // 5
    seen = (data @ (true * few).unsqueeze(-1)).squeeze(-1) + 0.5 * noise
    values = data, seen, torch.full((samples,), 1.5, dtype=torch.float64)

    def solution(*values: Array) -> Sequence[Array]:
        (near,) = solutions.by_clarabel(problem, (A, b, weight), (x,), values)
        return solutions.lasso(*values, near)

    return Case(f"second-order lasso, n = {n}, {samples}", problem, (A, b, weight), (x,), values, solution)


def correlation(samples: int = 32, n: int = 20) -> Case:
    """The nearest correlation matrix (Higham 2002) to a noisy one."""
    X, C = cp.Variable((n, n), PSD=True), cp.Parameter((n, n), symmetric=True)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(X - C)), [cp.diag(X) == 1])
    factors, noise = _normal((samples, n, 3), (samples, n, n))
    true = factors @ factors.mT + torch.eye(n, dtype=torch.float64)
    scale = true.diagonal(dim1=-2, dim2=-1).rsqrt()
    noisy = scale.unsqueeze(-1) * true * scale.unsqueeze(-2) + 0.1 * (noise + noise.mT)
    return Case(f"nearest correlation matrix {n}×{n}, {samples}", problem, (C,), (X,), (noisy,), solutions.correlation)


def logistic(samples: int = 32, n: int = 10, rows: int = 20) -> Case:
    """Logistic regression whose weights are probabilities, with their entropy: ``2 rows + n`` exponential cones."""
    w, A, weight = cp.Variable(n), cp.Parameter((rows, n)), cp.Parameter(nonneg=True)
    loss = cp.sum(cp.logistic(-A @ w)) / rows - weight * cp.sum(cp.entr(w))
    problem = cp.Problem(cp.Minimize(loss), [cp.sum(w) == 1])
    (data,) = _normal((samples, rows, n))
    data[..., : n // 3] += 0.5
    values = data, torch.full((samples,), 0.1, dtype=torch.float64)
    return Case(f"entropy-regularized logistic fit, {samples}", problem, (A, weight), (w,), values, solutions.logistic)


def _normal(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    random = np.random.default_rng(0)
    return tuple(torch.from_numpy(random.standard_normal(shape)) for shape in shapes)
