"""The stages of a diagonally implicit step: Newton's method forward, the implicit function theorem backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from difflayers._autodiff import batch_levels, in_functorch
from difflayers.ode._implicit import ImplicitStages, pulled_back, shared, summed_products, weighted
from difflayers.ode._kvaerno import Esdirk
from difflayers.ode._linearization import Factors, constrained, finite_or_zero, flow, jacobian_of, linearized
from difflayers.ode._mass import Evaluate, constraint_of, mass_of, times
from difflayers.ode._orders import limited
from difflayers.ode._stages import Time, mixed, stage_time
from difflayers.ode._tableaus import coefficients

_ORDERS = 4  # of derivatives that stages on the graph have


@dataclass(frozen=True)
class _Equation:
    """``M k = f(t, base + reach · k)``, what a stage solves, for a step of length ``h``."""

    evaluate: Evaluate
    time: Tensor
    base: Tensor
    reach: float | Tensor
    gamma: float
    h: Time

    def point(self, k: Tensor) -> Tensor:
        return self.base + self.reach * k

    def residual(self, k: Tensor) -> Tensor:
        mass, value = mass_of(self.evaluate), self.evaluate(self.time, self.point(k))
        return value - (k if mass is None else times(mass, k))

    def newton(self, k: Tensor, factors: Factors) -> Tensor:
        """The next iterate minus this one, with factors of ``M/γ - hJ``."""
        return factors.solve(self.residual(k)) / self.gamma

    def factors(self, k: Tensor) -> Factors:
        """Those of the Jacobian at ``k``, off the graph."""
        with torch.no_grad():
            point, mass = self.point(k).detach(), mass_of(self.evaluate)
            jacobian = linearized(self.evaluate, self.time, point, moving=False).jacobian.detach()
            return Factors.of_step(self.gamma, self.h, jacobian, None if mass is None else mass.detach())

    def attached(self, k: Tensor) -> Tensor:
        """A solution on the graph of everything: each Newton step makes one more order of derivatives exact."""
        factors = self.factors(k)
        for _ in range(_ORDERS):
            k = k + self.newton(k, factors)
        return limited(k, _ORDERS, "steps of Kvaerno5")

    def blind(self, k: Tensor) -> Tensor:
        """The solution where no number can be read, by Newton's method proper; what follows is Newton steps too."""
        for _ in range(3):
            k = (k + self.newton(k, self.factors(k))).detach()
        return k


class EsdirkStages(ImplicitStages):
    """Stages that Newton's method finds, with the Jacobian of the start of the step in all of them.

    A sample whose iteration has converged stands still; one whose iteration doesn't converge gets an error estimate
    that makes its next step shorter. On the graph a stage is found off it, and then attached.
    """

    tableau: Esdirk
    limit = 10  # iterations
    hopeless = 1e30  # an error estimate

    failed: Tensor
    _rate: Tensor

    def start(self, t: Time, y: Tensor, slope: Tensor | None = None) -> Tensor:
        moving = constraint_of(self.evaluate) is not None
        with torch.no_grad():
            self._around = linearized(self.evaluate, t, y.detach(), moving)
        self.evaluations += 1
        return self._around.slope

    def advanced(self, t: Time, y: Tensor, h: Time) -> Tensor:
        tableau, traced = self.tableau, torch.is_grad_enabled() or in_functorch()
        self._slopes = [flow(self.evaluate)(stage_time(t, 0.0, 0.0, y), y) if traced else self._velocity()]
        self._prepare(y.detach(), h)
        length = h.to(y.dtype) if isinstance(h, Tensor) else h
        for i in range(1, tableau.stages):
            base = mixed(y, self._slopes, tableau.rows[i - 1], h)
            time, reach = stage_time(t, tableau.c[i], h, y), length * tableau.gamma
            equation = _Equation(self.evaluate, time, base, reach, tableau.gamma, h)
            guess = mixed(torch.zeros_like(y), self._slopes, tableau.guesses[i - 1], 1.0).detach()
            with torch.no_grad():
                k = self._solved(equation, guess)
            self._slopes.append(equation.attached(k) if traced else k)
        end = mixed(y, self._slopes, tableau.b, h)
        # Of a sample that has failed, this mustn't be what its error is compared with.
        return torch.where(self.failed.unsqueeze(-1) & end.isfinite(), y, end)

    def _velocity(self) -> Tensor:
        around, constraint = self.around, constraint_of(self.evaluate)
        if self.mass is None:
            return around.slope
        if constraint is None:
            return Factors(self.mass.expand(*around.slope.shape, -1)).solve(around.slope)
        return constrained(around, self.mass, constraint)

    def _prepare(self, y: Tensor, h: Time) -> None:
        """What all stages of a step need: factors, and what may be left of every number."""
        tableau, eps = self.tableau, torch.finfo(y.dtype).eps
        mass = None if self.mass is None else self.mass.detach()
        with torch.no_grad():
            self.factors = Factors.of_step(tableau.gamma, h, self.around.jacobian, mass)
        size = y.abs()
        allowed = tableau.newton * (tableau.atol + max(tableau.rtol, 16 * eps) * size)
        length = h.abs() if isinstance(h, Tensor) else abs(h)
        self._scale = tableau.gamma * length / (allowed + 8 * eps * size.amax(-1, keepdim=True)) / y.shape[-1] ** 0.5
        self.failed = torch.zeros(y.shape[:-1], dtype=torch.bool, device=y.device)
        self._rate = torch.full(y.shape[:-1], 0.5, dtype=y.dtype, device=y.device)
        # Where somebody stands still, there is no telling of an algebraic equation.
        still = mass is not None and isinstance(h, Tensor)
        self._moving = (h != 0).squeeze(-1).expand_as(self.failed) if still else ~self.failed  # type: ignore[union-attr]

    def _solved(self, equation: _Equation, k: Tensor) -> Tensor:
        """The slope that solves the equation, off the graph; who isn't there in the end has failed."""
        if in_functorch() and batch_levels(equation.residual(k)):
            return equation.blind(k)
        going, before, rate = self._moving & ~self.failed, None, self._rate.clamp_min(0.1)
        for _ in range(self.limit):
            step = equation.newton(k, self.factors).detach()
            self.evaluations += 1
            k = torch.where(going.unsqueeze(-1), k + step, k)
            size = torch.linalg.vector_norm(step * self._scale, dim=-1)
            if before is not None:
                rate = self._rate = torch.where(going, size / before, self._rate)
            # A step of this size at this rate is followed by a rest of that.
            done = (size <= 0.3) | ((rate < 1) & (size * rate / (1 - rate) <= 1))
            lost = ~(size < torch.inf) | (rate > 2)
            self.failed = self.failed | (going & lost)
            going, before = going & ~(done | lost), size
            if not bool(going.any()):
                return k
        self.failed = self.failed | going
        return k

    def estimates(self) -> list[Tensor]:
        (found,) = super().estimates()
        found = found.view(self._slopes[0].shape)
        hopeless = self.failed.unsqueeze(-1) & found.isfinite()
        return [torch.where(hopeless, self.hopeless, found).reshape(-1)]


def swept_esdirk(
    tableau: Esdirk,
    evaluate: Evaluate,
    t: Time,
    h: Time,
    y: Tensor,
    direct: Tensor,
    wanted: Sequence[Tensor],
    gradients: list[Tensor | None],
) -> Tensor:
    """What the stages of a step give to its start, for the cotangents that they have from outside, ``direct``.

    A stage hands on ``Jᵀu`` with ``(M - hγJ)ᵀ u`` its own cotangent, by its own Jacobian: how Newton's method found it
    doesn't matter.
    """
    slopes = _slopes(tableau, evaluate, t, h, y)
    known, length = coefficients(tableau, y.dtype, y.device), h.to(y.dtype) if isinstance(h, Tensor) else h
    mass = mass_of(evaluate)
    fixed = None if mass is None else mass.detach()
    back, solved = torch.zeros_like(direct), torch.zeros_like(direct)
    for i in range(tableau.stages - 1, 0, -1):
        leaf = mixed(y, list(slopes), [*tableau.rows[i - 1], tableau.gamma], h).detach().requires_grad_()
        with torch.enable_grad():
            value = evaluate(stage_time(t, tableau.c[i], h, y), leaf)
        factors = Factors.of_step(tableau.gamma, h, finite_or_zero(jacobian_of(value, leaf)), fixed)
        total = direct[i] + length * weighted(known.columns[i], back[i + 1 :])
        solved[i] = factors.solve(total, transposed=True) / tableau.gamma
        back[i] = pulled_back(leaf, [value], [solved[i]], wanted, gradients)
    leaf = y.detach().requires_grad_()
    with torch.enable_grad():
        roots = [flow(evaluate)(stage_time(t, 0.0, 0.0, y), leaf)]
    cotangents = [direct[0] + length * weighted(known.columns[0], back[1:])]
    if mass is not None:
        roots, cotangents = [*roots, mass], [*cotangents, shared(summed_products(-solved, slopes), mass)]
    return back.sum(0) + pulled_back(leaf, roots, cotangents, wanted, gradients)


def _slopes(tableau: Esdirk, evaluate: Evaluate, t: Time, h: Time, y: Tensor) -> Tensor:
    """Those of the step once more; zero where it failed, which nobody asks about."""
    stages = EsdirkStages(tableau, evaluate, y)
    with torch.no_grad():
        stages.start(t, y)
        stages.advanced(t, y, h)
        slopes = stages.slopes
        return torch.where(slopes.isfinite(), slopes, 0)
