"""The right-hand side around a point, and the matrices that implicit steps factor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from difflayers._autodiff import in_functorch, is_tracked, push
from difflayers.linear._direct import lu_factor
from difflayers.ode._mass import Evaluate, constraint_of, mass_of, times
from difflayers.ode._stages import Time, stage_time


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


def linearized(evaluate: Evaluate, t: Time, y: Tensor, moving: bool = True) -> Linearization:
    """By one vector-Jacobian product for every number of a sample; on the graph where gradients are on.

    ``moving`` asks for ``∂f/∂t`` too.
    """
    time = stage_time(t, 0.0, 0.0, y)
    if in_functorch():
        # Each in a level of its own: a pullback that outlives its level breaks under forward mode around it.
        rows = [torch.func.grad(lambda y, unit=unit: (evaluate(time, y) * unit).sum())(y) for unit in _units(y)]
        drift = push(lambda time: evaluate(time, y), [time], [torch.ones_like(time)]) if moving else None
        return _usable(evaluate(time, y), torch.stack(rows, dim=-2), drift)
    # Whether the answer is on anybody's graph, only a look without leaves tells.
    track = torch.is_grad_enabled() and (y.requires_grad or evaluate(time, y).requires_grad)
    with torch.inference_mode(False), torch.enable_grad():
        leaf = y.view_as(y) if track and y.requires_grad else _leaf(y)
        clock = _clock(time, y, track) if moving else time
        slope = evaluate(clock, leaf)
        drift = _drift(slope, clock, track) if moving else None
        jacobian = jacobian_of(slope, leaf, track)
    return _usable(slope if track else slope.detach(), jacobian, drift)


def _usable(slope: Tensor, jacobian: Tensor, drift: Tensor | None) -> Linearization:
    """A Jacobian that isn't finite fails the step by its slope instead, so that derivatives can pass it by."""
    finite = jacobian.detach().sum((-2, -1)).isfinite()
    slope = torch.where(finite[..., None], slope, torch.nan)
    return Linearization(slope, finite_or_zero(jacobian), drift)


def finite_or_zero(matrices: Tensor) -> Tensor:
    """Zero in place of every matrix that isn't finite."""
    return torch.where(matrices.detach().sum((-2, -1)).isfinite()[..., None, None], matrices, 0)


def _leaf(tensor: Tensor) -> Tensor:
    own = tensor.clone() if tensor.is_inference() else tensor.detach()
    return own.requires_grad_()


def _clock(time: Tensor, y: Tensor, track: bool) -> Tensor:
    if track and y.requires_grad:
        return _after(time, y)
    return time.view_as(time) if track and is_tracked(time) else _leaf(time)


def _after(time: Tensor, y: Tensor) -> Tensor:
    """The time, on the graph after ``y``: to reach a leaf, every product would visit all steps before this one."""
    anchor = y[..., :1] if time.dim() else y.reshape(-1)[:1].sum()
    return torch.where(torch.ones_like(time, dtype=torch.bool), time, anchor)


def _units(y: Tensor) -> Tensor:
    return torch.eye(y.shape[-1], dtype=y.dtype, device=y.device)


def jacobian_of(slope: Tensor, leaf: Tensor, track: bool = False) -> Tensor:
    """``∂slope/∂leaf`` by sample, ``(samples, n, n)``; the tape stays."""
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
    """A matrix for every sample, factored. A singular one gives what isn't finite."""

    def __init__(self, matrix: Tensor) -> None:
        self._factors, self._pivots = lu_factor(matrix)

    @classmethod
    def of_step(cls, gamma: float, h: Time, jacobian: Tensor, mass: Tensor | None) -> Factors:
        """``M/γ - hJ``; a singular one makes a step that isn't finite, which is tried again shorter."""
        if mass is None:
            mass = torch.eye(jacobian.shape[-1], dtype=jacobian.dtype, device=jacobian.device)
        elif isinstance(h, Tensor):
            # Where somebody stands still, an algebraic equation would be lost.
            h = torch.where(h == 0, 1e-6, h)
        scaled = jacobian * (h.to(jacobian.dtype)[..., None] if isinstance(h, Tensor) else h)
        return cls(mass / gamma - scaled)

    def solve(self, rows: Tensor, transposed: bool = False) -> Tensor:
        solution: Tensor = torch.linalg.lu_solve(self._factors, self._pivots, rows.unsqueeze(-1), adjoint=transposed)
        return solution[..., 0]


def flow(evaluate: Evaluate) -> Evaluate:
    """``dy/dt`` as a function of ``(t, y)``, which is ``f`` itself but for a mass.

    Where ``M`` is singular, ``P`` projects on what it maps nothing to. There ``Pf(t, y) = 0``, whose derivative in time
    says the rest of what ``M dy/dt = f`` doesn't: ``(M + PJ) dy/dt = f - P ∂f/∂t``, if the index is 1.
    """
    mass, constraint = mass_of(evaluate), constraint_of(evaluate)
    if mass is None:
        return evaluate

    def velocity(t: Tensor, y: Tensor) -> Tensor:
        if constraint is None:
            value = evaluate(t, y)
            return Factors(mass.expand(*value.shape, -1)).solve(value)
        around = linearized(evaluate, t, y)
        return constrained(around, mass, constraint)

    return velocity


def constrained(around: Linearization, mass: Tensor, constraint: Tensor) -> Tensor:
    """The ``dy/dt`` of :func:`flow` where ``M`` is singular."""
    value = around.slope
    if around.drift is not None:
        value = value - times(constraint, around.drift)
    return Factors(mass + constraint @ around.jacobian).solve(value)
