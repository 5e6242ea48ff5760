"""The stages of a linearly implicit step, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from difflayers._autodiff import in_functorch, push
from difflayers.linear._direct import lu_factor
from difflayers.ode._rodas5p import Rosenbrock, couplings
from difflayers.ode._stages import Evaluate, Stages, Time, TracedStages, mixed, stage_time, weights_at
from difflayers.ode._tableaus import Tableau, coefficients


@dataclass(frozen=True)
class Linearization:
    """The right-hand side around the start of a step.

    Attributes:
        slope: its value, ``(samples, n)``.
        jacobian: ``∂f/∂y``, ``(samples, n, n)``; samples are independent.
        drift: ``∂f/∂t``, ``(samples, n)``; None if time isn't used.
    """

    slope: Tensor
    jacobian: Tensor
    drift: Tensor | None

    def detached(self) -> Linearization:
        """The same off the graph."""
        drift = None if self.drift is None else self.drift.detach()
        return Linearization(self.slope.detach(), self.jacobian.detach(), drift)

    def part(self, chosen: Tensor) -> Linearization:
        """That of some samples."""
        drift = None if self.drift is None else self.drift[chosen]
        return Linearization(self.slope[chosen], self.jacobian[chosen], drift)


def linearized(evaluate: Evaluate, t: Time, y: Tensor) -> Linearization:
    """By one vector-Jacobian product for every number of a sample; on the graph where gradients are on."""
    time = stage_time(t, 0.0, 0.0, y)
    if in_functorch():
        # Each in a level of its own: a pullback that outlives its level breaks under forward mode around it.
        rows = [torch.func.grad(lambda y, unit=unit: (evaluate(time, y) * unit).sum())(y) for unit in _units(y)]
        moving = push(lambda time: evaluate(time, y), [time], [torch.ones_like(time)])
        return _usable(evaluate(time, y), torch.stack(rows, dim=-2), moving)
    # Whether the answer is on anybody's graph, only a look without leaves tells.
    track = torch.is_grad_enabled() and (y.requires_grad or evaluate(time, y).requires_grad)
    with torch.inference_mode(False), torch.enable_grad():
        leaf = y.view_as(y) if track and y.requires_grad else _leaf(y)
        clock = _after(time, y) if track and y.requires_grad else _leaf(time)
        slope = evaluate(clock, leaf)
        drift = _drift(slope, clock, track)
        jacobian = _jacobian(slope, leaf, track)
    return _usable(slope if track else slope.detach(), jacobian, drift)


def _usable(slope: Tensor, jacobian: Tensor, drift: Tensor | None) -> Linearization:
    """A Jacobian that isn't finite fails the step by its slope instead, so that derivatives can pass it by."""
    finite = jacobian.detach().sum((-2, -1)).isfinite()
    slope = torch.where(finite[..., None], slope, torch.nan)
    return Linearization(slope, torch.where(finite[..., None, None], jacobian, 0), drift)


def _leaf(tensor: Tensor) -> Tensor:
    own = tensor.clone() if tensor.is_inference() else tensor.detach()
    return own.requires_grad_()


def _after(time: Tensor, y: Tensor) -> Tensor:
    """The time, on the graph after ``y``: to reach a leaf, every product would visit all steps before this one."""
    anchor = y[..., :1] if time.dim() else y.reshape(-1)[:1].sum()
    return torch.where(torch.ones_like(time, dtype=torch.bool), time, anchor)


def _units(y: Tensor) -> Tensor:
    return torch.eye(y.shape[-1], dtype=y.dtype, device=y.device)


def _jacobian(slope: Tensor, leaf: Tensor, track: bool) -> Tensor:
    if not slope.requires_grad or not leaf.numel():
        return leaf.new_zeros(*leaf.shape, leaf.shape[-1])
    rows = [
        torch.autograd.grad(
            slope, leaf, unit.expand_as(leaf), retain_graph=True, create_graph=track, materialize_grads=True
        )[0]
        for unit in _units(leaf)
    ]
    return torch.stack(rows, dim=-2)


def _drift(slope: Tensor, clock: Tensor, track: bool) -> Tensor | None:
    """As the derivative of a pullback, which is linear in its cotangent: all samples may share one time."""
    if not slope.requires_grad:
        return None
    cotangent = torch.zeros_like(slope).requires_grad_()
    (pulled,) = torch.autograd.grad(slope, clock, cotangent, create_graph=True, allow_unused=True)
    if pulled is None or not pulled.requires_grad:
        return None
    drift: Tensor = torch.autograd.grad(pulled.sum(), cotangent, create_graph=track, materialize_grads=True)[0]
    return drift


class Factors:
    """``I/γ - hJ``, factored."""

    def __init__(self, gamma: float, h: Time, jacobian: Tensor) -> None:
        scaled = jacobian * (h.to(jacobian.dtype)[..., None] if isinstance(h, Tensor) else h)
        diagonal = torch.eye(jacobian.shape[-1], dtype=jacobian.dtype, device=jacobian.device) / gamma
        # A singular matrix makes a step that isn't finite, which is tried again shorter.
        self._factors, self._pivots = lu_factor(diagonal - scaled)

    def solve(self, rows: Tensor, transposed: bool = False) -> Tensor:
        solution: Tensor = torch.linalg.lu_solve(self._factors, self._pivots, rows.unsqueeze(-1), adjoint=transposed)
        return solution[..., 0]


class RosenbrockStages:
    """The stages of a step for states ``(samples, n)``, on the graph where gradients are on.

    Where ``inner`` outputs may come, their error is estimated too: stiffness damps that at the end of a step, not that
    inside. It is what the interpolant lacks, half way, to satisfy the equation, through the matrix of the stages.

    Attributes:
        evaluations: how often the right-hand side was evaluated.
    """

    def __init__(self, tableau: Rosenbrock, evaluate: Evaluate, like: Tensor, inner: bool = False) -> None:
        self.tableau, self.evaluate, self.inner, self.evaluations = tableau, evaluate, inner, 0
        self._defect: Tensor | None = None
        self._slopes: list[Tensor] = []
        self._around: Linearization | None = None
        self._known: Factors | None = None

    @property
    def slopes(self) -> Tensor:
        return torch.stack(self._slopes)

    @property
    def around(self) -> Linearization:
        if self._around is None:
            raise RuntimeError("a step starts first")
        return self._around

    @property
    def first(self) -> Tensor:
        """The slope at the start of the step."""
        return self.around.slope

    def start(self, t: Time, y: Tensor, slope: Tensor | None = None) -> Tensor:
        """The slope at the start of a step, which is linearized here."""
        self._around = linearized(self.evaluate, t, y)
        self.evaluations += 1
        return self._around.slope

    def restart(self, around: Linearization, factors: Factors) -> None:
        """Start a step with what somebody knows, who also knows its length."""
        self._around, self._known = around, factors

    def attempt(self, t: Time, y: Tensor, h: Time) -> Tensor:
        """The state after a step, which must have started; its stages stay here."""
        end = self.advanced(t, y, h)
        if self.inner:
            with torch.no_grad():
                self._defect = self._filtered_defect(t, y, h)
        return end

    def _filtered_defect(self, t: Time, y: Tensor, h: Time) -> Tensor:
        point = self.inside(t, y, h, 0.5)
        speed = mixed(torch.zeros_like(y), self._slopes, self.tableau.speeds(0.5).tolist(), 1.0)
        self.evaluations += 1
        return self.factors.solve(self.evaluate(stage_time(t, 0.5, h, y), point) - speed)

    def advanced(self, t: Time, y: Tensor, h: Time) -> Tensor:
        """The same without a look at what is inside."""
        around, tableau = self.around, self.tableau
        factors = self.factors = self._known or Factors(tableau.gamma, h, around.jacobian)
        length = h.to(y.dtype) if isinstance(h, Tensor) else h
        slopes: list[Tensor] = []
        self._slopes = slopes
        for i in range(tableau.stages):
            value = around.slope
            if i:
                point = mixed(y, slopes, tableau.rows[i - 1], h)
                value = self.evaluate(stage_time(t, tableau.c[i], h, y), point)
                value = mixed(value, slopes, tableau.couplings[i - 1], 1.0)
            if around.drift is not None and tableau.drifts[i]:
                value = value + length * tableau.drifts[i] * around.drift
            slopes.append(factors.solve(value))
        self.evaluations += tableau.stages - 1
        return mixed(y, slopes, tableau.b, h)

    def complete(self, t: Time, y: Tensor, h: Time) -> list[Tensor]:
        """All stages of the step, which outputs inside need."""
        return self._slopes

    def estimates(self) -> list[Tensor]:
        """Estimates of the local error, not yet times ``h``, flat, off the graph."""
        zero = torch.zeros_like(self._slopes[0])
        found = mixed(zero, self._slopes, self.tableau.error[0], 1.0).detach()
        if self._defect is not None:
            found = torch.maximum(found.abs(), self._defect.abs())
        return [found.reshape(-1)]

    def inside(self, t: Time, y: Tensor, h: Time, s: float) -> Tensor:
        """The state at ``t + sh`` of the last step."""
        return mixed(y, self._slopes, self.tableau.weights(s).tolist(), h)

    def between(self, t: Tensor, y: Tensor, h: Tensor, row: Tensor, s: Tensor) -> Tensor:
        """States inside the last step: of samples ``row``, at ``t + sh``."""
        weights = weights_at(self.tableau, s, y)
        own = torch.bmm(weights.unsqueeze(1), self.slopes[:, row].transpose(0, 1)).squeeze(1)
        return torch.addcmul(y[row], h[row].to(y.dtype), own)

    def advance(self, t: Time, y: Tensor) -> None:
        """The next step starts here."""
        self.start(t, y)

    def advance_where(self, moved: Tensor, t: Tensor, y: Tensor) -> None:
        """The same for the samples that moved, a column; to the others it is where they are already."""
        self.start(t, y)

    def divided(self, evaluate: Evaluate, chosen: Tensor) -> RosenbrockStages:
        """The stages of some of the samples."""
        part = RosenbrockStages(self.tableau, evaluate, self.around.slope, self.inner)
        part._around, part.evaluations = self.around.part(chosen), self.evaluations
        return part


AnyStages = Stages | TracedStages | RosenbrockStages


def stages_of(tableau: Tableau, evaluate: Evaluate, like: Tensor, inner: bool) -> Stages | RosenbrockStages:
    """The stages of a method, for numbers; ``inner`` outputs may come."""
    if isinstance(tableau, Rosenbrock):
        return RosenbrockStages(tableau, evaluate, like, inner)
    return Stages(tableau, evaluate, like)


def traced_stages_of(
    tableau: Tableau, evaluate: Evaluate, like: Tensor, inner: bool = False
) -> TracedStages | RosenbrockStages:
    """The stages of a method, on the graph."""
    if isinstance(tableau, Rosenbrock):
        return RosenbrockStages(tableau, evaluate, like, inner)
    return TracedStages(tableau, evaluate, like)


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
    factors = Factors(tableau.gamma, h, around.jacobian.detach())
    tapes, slopes = _tapes(tableau, evaluate, t, h, y, around, factors)
    back, solved = torch.zeros_like(direct), torch.zeros_like(direct)
    for i in range(tableau.stages - 1, -1, -1):
        through = _weighted(known.columns[i], back[i + 1 :])
        total = direct[i] + length * through + _weighted(coupled.columns[i], solved[i + 1 :])
        solved[i] = factors.solve(total, transposed=True)
        if i:
            back[i] = _pulled(*tapes[i - 1], [solved[i]], wanted, gradients)
    # The slopes of a sample that has failed aren't finite, and nobody asks for their derivatives.
    products = torch.einsum("i...a,i...b->...ab", solved, torch.where(slopes.isfinite(), slopes, 0))
    jacobian = products * (length[..., None] if isinstance(length, Tensor) else length)
    drift = length * _weighted(solved.new_tensor(list(tableau.drifts)), solved)
    roots, cotangents = [around.slope, around.jacobian], [solved[0], jacobian]
    if around.drift is not None:
        roots, cotangents = [*roots, around.drift], [*cotangents, drift]
    return back.sum(0) + _pulled(leaf, roots, cotangents, wanted, gradients)


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


def _weighted(weights: Tensor, rows: Tensor) -> Tensor:
    return torch.mv(rows.flatten(1).t(), weights).view(rows.shape[1:])


def _pulled(
    leaf: Tensor,
    roots: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    wanted: Sequence[Tensor],
    gradients: list[Tensor | None],
) -> Tensor:
    live = [(root, cotangent) for root, cotangent in zip(roots, cotangents, strict=True) if root.requires_grad]
    if not live:
        return torch.zeros_like(leaf)
    first, *others = torch.autograd.grad(
        [root for root, _ in live], [leaf, *wanted], [cotangent for _, cotangent in live], allow_unused=True
    )
    for index, gradient in enumerate(others):
        if gradient is not None:
            total = gradients[index]
            # The first one may be anybody's memory, such as an expanded cotangent's.
            gradients[index] = gradient.clone() if total is None else total.add_(gradient)
    return torch.zeros_like(leaf) if first is None else first
