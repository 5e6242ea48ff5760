"""Trust-region methods for systems of equations and least squares."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from difflayers._arrays import at_least_float32, widen
from difflayers._problem import Form, Residual
from difflayers._solution import Status
from difflayers._solver import IterativeSolver
from difflayers.fixedpoint._least_squares import SumOfSquares


class Region(NamedTuple):
    """What a trust-region method remembers of every sample."""

    scale: Tensor  # (samples, n): the largest norm that each column of the Jacobian has had
    radius: Tensor  # (samples,): of the region, in scaled unknowns; infinite before the first step
    status: Tensor  # (*batch,)


class Model(NamedTuple):
    """``‖r + J s‖²`` in scaled unknowns ``s``, one per sample, and a triangle that says the same of ``s``."""

    value: Tensor  # r, (samples, m)
    jacobian: Tensor  # J, (samples, m, n)
    gradient: Tensor  # Jᵀr, (samples, n)
    core: Tensor  # R of J = QR, (samples, n, n); J itself where it has fewer rows than columns
    offset: Tensor  # Qᵀr, or r

    @classmethod
    def of(cls, value: Tensor, jacobian: Tensor) -> Model:
        gradient = _product(jacobian.mT, value)
        if jacobian.shape[1] < jacobian.shape[2]:
            return cls(value, jacobian, gradient, jacobian, value)
        q, r = torch.linalg.qr(jacobian)
        return cls(value, jacobian, gradient, r, _product(q.mT, value))

    def gauss_newton(self) -> Tensor:
        """The least ``s`` among the minimizers."""
        if self.core.shape[1] < self.core.shape[2]:
            return -_product(_pseudoinverse(self.core), self.offset)
        step = torch.linalg.solve_triangular(self.core, -self.offset.unsqueeze(-1), upper=True).squeeze(-1)
        pivots = self.core.diagonal(dim1=-2, dim2=-1).abs()
        eps = torch.finfo(pivots.dtype).eps
        deficient = (pivots.amin(-1) <= pivots.shape[-1] * eps * pivots.amax(-1)) | ~step.isfinite().all(-1)
        if not bool(deficient.any()):
            return step  # type: ignore[no-any-return]
        least = -_product(_pseudoinverse(self.core[deficient]), self.offset[deficient])
        return step.index_put((deficient,), least)  # type: ignore[no-any-return]

    def damped(self, damping: Tensor) -> tuple[Tensor, Tensor]:
        """The minimizer of ``‖r + J s‖² + damping ‖s‖²`` and the triangle ``R`` with ``RᵀR = JᵀJ + damping``."""
        n = self.core.shape[2]
        ridge = damping.sqrt()[:, None, None] * torch.eye(n, dtype=damping.dtype, device=damping.device)
        q, r = torch.linalg.qr(torch.cat([self.core, ridge], dim=1))
        right = _product(q[:, : self.core.shape[1]].mT, self.offset)
        return torch.linalg.solve_triangular(r, -right.unsqueeze(-1), upper=True).squeeze(-1), r

    def steepest(self) -> Tensor:
        """The minimizer along the gradient."""
        along = _product(self.jacobian, self.gradient).square().sum(-1)
        return -self.gradient * (self.gradient.square().sum(-1) / along.clamp_min(_tiny(along)))[:, None]

    def agreement(self, step: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        """The decrease of ``‖r‖²`` relative to that of the model, and whether the model's is nothing but rounding.

        Near that, ``‖r‖²`` can't judge any more, and a step that keeps it is as good as predicted. Residuals are
        differences, of numbers that may be much larger than they are; hence the thousand.
        """
        before = self.value.detach().square().sum(-1)
        gained = before - after.detach().square().sum(-1)
        # Of the model without subtracting one square from the other, which would cancel.
        expected = -(2 * self.gradient * step).sum(-1).detach() - _product(self.jacobian, step).detach().square().sum(
            -1
        )
        rounding = torch.finfo(before.dtype).eps * before
        noise = 1e3 * rounding
        kept = torch.where(gained >= -noise, 1.0, -1.0)
        ratio = torch.where(expected <= noise, kept, gained / expected.clamp_min(_tiny(before)))
        return ratio.nan_to_num(nan=-1.0), expected <= 4 * rounding


@dataclass(frozen=True)
class TrustRegion(IterativeSolver):
    """Steps that minimize a linear model ``‖r + J s‖`` within a radius, which follows how well the model predicts.

    Unknowns are scaled by the largest norms that the columns of ``J`` have had, so that the units they are measured in
    make no difference (Moré 1978). Only steps that decrease ``‖r‖`` are taken; one that doesn't, or where ``r`` isn't
    finite, makes the radius shrink. A sample at a local minimum of ``‖F‖`` that is no root ends as ``STALLED``.

    Args:
        factor: the first radius, relative to the scaled norm of the start.
    """

    max_steps: int = 100
    factor: float = 1.0
    serves: ClassVar[frozenset[Form]] = frozenset({"root", "fixed_point", "least_squares"})
    divisible: ClassVar[bool] = True
    masked: ClassVar[bool] = True
    traceable: ClassVar[bool] = False  # radii and damping come from searches
    # Shares of the predicted decrease: below the first a step isn't taken; between the others the radius stays.
    sufficient: ClassVar[float] = 1e-4
    poor: ClassVar[float] = 0.25
    good: ClassVar[float] = 0.75
    trials: ClassVar[int] = 10

    @abstractmethod
    def propose(self, model: Model, radius: Tensor) -> Tensor:
        """The step ``(samples, n)`` that (nearly) minimizes the model within the radius."""

    def init(self, residual: Residual, z: Tensor) -> Region:
        rows = at_least_float32(residual.rows(z.detach()))
        status = torch.zeros(z.shape[: residual.problem.batch_dims], dtype=torch.int64, device=z.device)
        return Region(torch.zeros_like(rows), torch.full_like(rows[:, 0], torch.inf), status)

    def error(self, residual: Residual, z: Tensor) -> Tensor:
        if not isinstance(residual, SumOfSquares):
            return super().error(residual, z)
        # The next step wants the Jacobian anyway.
        value, jacobian = residual.linearization(z)
        return _product(jacobian.mT, value).detach().norm(dim=-1).reshape(z.shape[: residual.problem.batch_dims])  # type: ignore[no-any-return]

    def merit(self, residual: Residual, z: Tensor, error: Tensor) -> Tensor:
        return residual.objective(z).detach() if isinstance(residual, SumOfSquares) else error

    def failure(self, state: Region) -> Tensor:
        return state.status

    def step(self, residual: Residual, z: Tensor, state: Region) -> tuple[Tensor, Region]:
        value, jacobian = (at_least_float32(t) for t in residual.linearization(z))
        before = None if isinstance(residual, SumOfSquares) else residual(z)
        broken = ~jacobian.isfinite().all(-1).all(-1)
        active = ~broken if residual.active is None else residual.active.reshape(-1) & ~broken
        jacobian = torch.where(active[:, None, None], jacobian, torch.eye(*jacobian.shape[1:]).to(jacobian))
        scale = torch.maximum(state.scale, jacobian.detach().norm(dim=1))
        scale = torch.where(scale > 0, scale, 1)
        model, start = Model.of(value, jacobian / scale[:, None]), residual.rows(z.detach())
        radius = self._radius(state, model, scale * start)
        move = torch.where(active[:, None], self.propose(model, radius), 0)
        trial = z + (move / scale).to(z.dtype).reshape(z.shape)
        agreement, flat = model.agreement(move, at_least_float32(residual.equations(trial)))
        radius = self._next_radius(radius, agreement, move, first=state.radius.isinf())
        stuck = radius <= torch.finfo(radius.dtype).eps * (scale * start).norm(dim=-1)
        stuck = stuck if before is None else stuck | flat
        status = torch.where(broken, int(Status.NONFINITE), torch.where(stuck, int(Status.STALLED), 0))
        taken = active & (agreement >= self.sufficient) & ~stuck
        return _moved(residual, z, trial, taken, before), Region(scale, radius, status.reshape(state.status.shape))

    def _radius(self, state: Region, model: Model, start: Tensor) -> Tensor:
        # With columns of length one, scaled unknowns have the unit of the residual; so one of the two is no small size.
        size = torch.maximum(start.norm(dim=-1), model.value.norm(dim=-1)).detach()
        return torch.where(state.radius.isinf(), self.factor * size, state.radius)

    def _next_radius(self, radius: Tensor, agreement: Tensor, move: Tensor, first: Tensor) -> Tensor:
        length = move.detach().norm(dim=-1)
        shorter = torch.minimum(radius, length)
        radius = torch.where(first, shorter, radius)
        wider = torch.where(agreement > self.good, torch.maximum(radius, 2 * length), radius)
        return torch.where(agreement < self.poor, shorter / 4, wider)


@dataclass(frozen=True)
class Dogleg(TrustRegion):
    """Powell's hybrid method: along the steepest descent first, then toward the Gauss-Newton step (Powell 1970).

    One QR factorization per step and no inner iteration. The first choice for systems of up to a few hundred unknowns
    from rough starts; near a root with regular Jacobian it is Newton's method.

    Args:
        factor: the first radius, relative to the scaled norm of the start.

    Further options are those of :class:`~difflayers.IterativeSolver`.
    """

    def propose(self, model: Model, radius: Tensor) -> Tensor:
        newton = model.gauss_newton()
        steepest = model.steepest()
        shorter = steepest * (radius / steepest.norm(dim=-1).clamp_min(_tiny(radius))).clamp_max(1)[:, None]
        rest = newton - shorter
        # |shorter + share * rest| = radius, by the root formula that doesn't cancel.
        a, b = rest.square().sum(-1), (shorter * rest).sum(-1)
        c = (radius.square() - shorter.square().sum(-1)).clamp_min(0)
        root = (b.square() + a * c).sqrt()
        share = torch.where(b > 0, c / (b + root).clamp_min(_tiny(a)), (root - b) / a.clamp_min(_tiny(a)))
        bent = shorter + share.clamp(0, 1)[:, None] * rest
        return torch.where((newton.norm(dim=-1) <= radius)[:, None], newton, bent)


@dataclass(frozen=True)
class LevenbergMarquardt(TrustRegion):
    """Damped Gauss-Newton steps, ``(JᵀJ + λD²) s = -Jᵀr`` with the ``λ`` that gives ``s`` the length of the radius.

    As in MINPACK (Moré 1978, The Levenberg-Marquardt algorithm), with QR factorizations of the Jacobian, not of its
    square. The first choice for least squares.

    Args:
        factor: the first radius, relative to the scaled norm of the start.

    Further options are those of :class:`~difflayers.IterativeSolver`.
    """

    def propose(self, model: Model, radius: Tensor) -> Tensor:
        step = model.gauss_newton()
        length = step.norm(dim=-1)
        searching = length > 1.1 * radius
        lower, upper = torch.zeros_like(radius), model.gradient.norm(dim=-1) / radius.clamp_min(_tiny(radius))
        damping = torch.where(searching, model.gradient.norm(dim=-1) / length.clamp_min(_tiny(length)), 1.0)
        for _ in range(self.trials):
            if not bool(searching.any()):
                break
            damping = torch.where(damping < upper, damping, torch.maximum(upper / 1000, (lower * upper).sqrt()))
            damped, triangle = model.damped(damping.clamp_min(_tiny(damping)))
            step = torch.where(searching[:, None], damped, step)
            length = damped.norm(dim=-1)
            gap = length - radius
            searching = searching & (gap.abs() > 0.1 * radius)
            lower, upper = torch.where(gap > 0, damping, lower), torch.where(gap > 0, upper, damping)
            # Newton's method on 1/length, which is almost linear in the damping (Hebden 1973).
            slope = torch.linalg.solve_triangular(triangle.mT, (damped / length[:, None]).unsqueeze(-1), upper=False)
            damping = torch.maximum(lower, damping + gap / radius / slope.square().sum((-2, -1)))
        return step


def _moved(residual: Residual, z: Tensor, trial: Tensor, taken: Tensor, before: Tensor | None) -> Tensor:
    """``trial`` where it is taken and ``z`` elsewhere; the residual there follows from those at both."""
    if bool(taken.all()):
        return trial
    taken = widen(taken.reshape(z.shape[: residual.problem.batch_dims]), z)
    moved = torch.where(taken, trial, z) if bool(taken.any()) else z
    if before is not None:
        residual.remember(moved, torch.where(taken, residual(trial), before))
    return moved


def _product(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def _pseudoinverse(matrix: Tensor) -> Tensor:
    inverse: Tensor = torch.linalg.pinv(torch.where(matrix.isfinite(), matrix, 0))
    return inverse


def _tiny(like: Tensor) -> float:
    return torch.finfo(like.dtype).tiny
