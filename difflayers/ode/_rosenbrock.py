"""The stages of a linearly implicit step, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from difflayers.ode._implicit import ImplicitStages, pulled_back, shared, summed_products, weighted
from difflayers.ode._linearization import Factors, Linearization, linearized
from difflayers.ode._mass import Evaluate, mass_of, times
from difflayers.ode._rodas5p import Rosenbrock, couplings
from difflayers.ode._stages import Time, mixed, stage_time
from difflayers.ode._tableaus import coefficients


class RosenbrockStages(ImplicitStages):
    """Stages that take one linear system each, all with one matrix."""

    tableau: Rosenbrock
    _known: Factors | None = None

    def restart(self, around: Linearization, factors: Factors) -> None:
        """Start a step with what somebody knows, who also knows its length."""
        self._around, self._known = around, factors

    def advanced(self, t: Time, y: Tensor, h: Time) -> Tensor:
        around, tableau = self.around, self.tableau
        factors = self.factors = self._known or Factors.of_step(tableau.gamma, h, around.jacobian, self.mass)
        length = h.to(y.dtype) if isinstance(h, Tensor) else h
        slopes: list[Tensor] = []
        self._slopes = slopes
        for i in range(tableau.stages):
            value = around.slope
            if i:
                point = mixed(y, slopes, tableau.rows[i - 1], h)
                value = self._coupled(i, self.evaluate(stage_time(t, tableau.c[i], h, y), point))
            if around.drift is not None and tableau.drifts[i]:
                value = value + length * tableau.drifts[i] * around.drift
            slopes.append(factors.solve(value))
        self.evaluations += tableau.stages - 1
        return mixed(y, slopes, tableau.b, h)

    def _coupled(self, i: int, value: Tensor) -> Tensor:
        row = self.tableau.couplings[i - 1]
        if self.mass is None:
            return mixed(value, self._slopes, row, 1.0)
        return value + times(self.mass, mixed(torch.zeros_like(value), self._slopes, row, 1.0))


def swept_rosenbrock(
    tableau: Rosenbrock,
    evaluate: Evaluate,
    t: Time,
    h: Time,
    y: Tensor,
    direct: Tensor,
    wanted: Sequence[Tensor],
    gradients: list[Tensor | None],
) -> Tensor:
    """What the stages of a step give to its start, for the cotangents that they have from outside, ``direct``.

    Factors serve the transposed systems too. The cotangent of the Jacobian is a sum of products ``h ρᵢkᵢᵀ``, pulled
    through the products that made it.
    """
    known, coupled = coefficients(tableau, y.dtype, y.device), couplings(tableau, y.dtype, y.device)
    length = h.to(y.dtype) if isinstance(h, Tensor) else h
    leaf = y.detach().requires_grad_()
    with torch.enable_grad():
        around = linearized(evaluate, t, leaf)
        mass = mass_of(evaluate)
    factors = Factors.of_step(tableau.gamma, h, around.jacobian.detach(), None if mass is None else mass.detach())
    tapes, slopes = _tapes(tableau, evaluate, t, h, y, around, factors)
    back, solved = torch.zeros_like(direct), torch.zeros_like(direct)
    for i in range(tableau.stages - 1, -1, -1):
        through = weighted(known.columns[i], back[i + 1 :])
        coupling = weighted(coupled.columns[i], solved[i + 1 :])
        total = direct[i] + length * through + (coupling if mass is None else times(mass.detach().mT, coupling))
        solved[i] = factors.solve(total, transposed=True)
        if i:
            back[i] = pulled_back(*tapes[i - 1], [solved[i]], wanted, gradients)
    jacobian = summed_products(solved, slopes) * (length[..., None] if isinstance(length, Tensor) else length)
    drift = length * weighted(solved.new_tensor(list(tableau.drifts)), solved)
    roots, cotangents = [around.slope, around.jacobian], [solved[0], jacobian]
    if around.drift is not None:
        roots, cotangents = [*roots, around.drift], [*cotangents, drift]
    if mass is not None:
        before = torch.stack([weighted(row, slopes[: len(row)]) for row in coupled.rows])
        products = summed_products(solved, before - slopes / tableau.gamma)
        roots, cotangents = [*roots, mass], [*cotangents, shared(products, mass)]
    return back.sum(0) + pulled_back(leaf, roots, cotangents, wanted, gradients)


def _tapes(
    tableau: Rosenbrock, evaluate: Evaluate, t: Time, h: Time, y: Tensor, around: Linearization, factors: Factors
) -> tuple[list[tuple[Tensor, list[Tensor]]], Tensor]:
    """Points of the later stages with the right-hand side as a function of them, and all slopes."""
    stages, tapes = RosenbrockStages(tableau, evaluate, y), []

    def taped(time: Tensor, point: Tensor) -> Tensor:
        leaf = point.detach().requires_grad_()
        with torch.enable_grad():
            value = evaluate(time, leaf)
        tapes.append((leaf, [value]))
        return value.detach()

    with torch.no_grad():
        stages.evaluate = taped
        stages.restart(around.detached(), factors)
        stages.advanced(t, y, h)
    return tapes, stages.slopes
