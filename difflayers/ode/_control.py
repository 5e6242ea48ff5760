"""How long the next step is: error norms, the PI controller, and the first step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from difflayers.ode._linearization import flow
from difflayers.ode._mass import mass_of
from difflayers.ode._methods import AnyStages
from difflayers.ode._stages import Time, stage_time

if TYPE_CHECKING:
    from difflayers.ode._explicit import OneStepSolver


class Controller:
    """The PI controller of Hairer, Wanner 1996, "Solving Ordinary Differential Equations II", section IV.2.

    A step is accepted where the root mean square, over all numbers of the state, of estimated error over
    ``atol + rtol · max(|y|, |y₁|)`` is at most 1.
    """

    safety, least, most = 0.9, 0.2, 10.0

    def __init__(self, solver: OneStepSolver, y: Tensor, rows: torch.Size) -> None:
        order = solver.tableau.error_order
        self.order = order
        beta = 0.1 / order
        self._alpha, self._beta = 1 / order - 0.75 * beta, beta
        self.rtol, atol = tolerances(solver.rtol, solver.atol, y)
        self._atol = torch.tensor(atol, dtype=y.dtype, device=y.device)
        if atol > solver.atol:
            # What a huge sample can't resolve, the others can.
            own = torch.nan_to_num(y.detach().reshape(rows).abs().amax(1), nan=0.0, posinf=0.0)
            floors = (own * torch.finfo(y.dtype).eps).clamp_min(solver.atol)
            self._atol = floors.repeat_interleave(rows[1])
        self._size = y.detach().reshape(-1).abs()
        self._next_size = self._size
        self._shape = rows
        self._previous, self._rejected, self._last = 1.0, False, 0.0
        self._ratio: Tensor | None = None
        self._root = math.sqrt(max(y.numel(), 1))

    def scale(self, y: Tensor) -> Tensor:
        return torch.add(self._atol, y.reshape(-1).abs(), alpha=self.rtol)

    def norm(self, rows: Tensor, scale: Tensor) -> float:
        return float(torch.linalg.vector_norm(rows.detach().reshape(-1) / scale)) / self._root

    def error(self, estimates: list[Tensor], y: Tensor, h: float, alive: Tensor | None) -> float:
        """The error of a trial step in units of the tolerance; NaN where something isn't finite."""
        self._next_size = y.detach().reshape(-1).abs()
        scale = torch.add(self._atol, torch.maximum(self._size, self._next_size), alpha=self.rtol)
        ratios = [estimate.div_(scale) for estimate in estimates]
        self._ratio, self._h = ratios[0], h
        root = self._root
        if alive is not None:
            ratios = [torch.where(alive, r.view(self._shape), 0).view(-1) for r in ratios]
            root = math.sqrt(max(float(alive.sum()) * self._shape[1], 1))
        norms = [float(torch.linalg.vector_norm(r)) for r in ratios]
        if len(norms) == 2 and norms[0] > 0:
            # DOP853's: the estimate of lower order damps that of higher order.
            norms[0] *= norms[0] / math.sqrt(norms[0] ** 2 + 0.01 * norms[1] ** 2)
        return abs(h) * norms[0] / root

    @property
    def rows(self) -> Tensor:
        """The error of the last trial by sample, ``(samples,)``, without regard to the second estimate."""
        if self._ratio is None:
            raise RuntimeError("no step has been tried yet")
        norms: Tensor = torch.linalg.vector_norm(self._ratio.view(self._shape), dim=1)
        scaled: Tensor = norms * abs(self._h) / math.sqrt(max(self._shape[1], 1))
        return scaled

    def moved(self) -> None:
        """The last trial was accepted."""
        self._size = self._next_size

    def grown(self, h: float, error: float) -> float:
        """The step after an accepted one."""
        self._last = h
        error = max(error, 1e-10)
        factor = self.safety * math.pow(error, -self._alpha) * math.pow(self._previous, self._beta)
        factor = min(self.most, max(self.least, factor))
        if self._rejected:
            factor = min(factor, 1.0)
        self._previous, self._rejected = max(error, 1e-4), False
        return h * factor

    def shrunk(self, h: float, error: float) -> float:
        """The step after a rejected one."""
        self._rejected = True
        if not error < math.inf:
            return h * self.least
        return h * max(self.least, self.safety * math.pow(error, -1 / self.order))

    def recovered(self, remaining: float) -> float:
        """The step for those who stay, after the one that held them up is gone: the last one that was good."""
        self._rejected = False
        return self._last or remaining * 1e-3


class RowController:
    """The same for every sample by itself: what is a number there is a column here."""

    def __init__(self, solver: OneStepSolver, y: Tensor) -> None:
        order = solver.tableau.error_order
        self.order = order
        self._beta = 0.1 / order
        self._alpha = 1 / order - 0.75 * self._beta
        eps = torch.finfo(y.dtype).eps
        # Of ratios to a scale that is so much longer, the Euclidean norm is the root mean square.
        root = math.sqrt(max(y.shape[1], 1))
        self._rtol = max(solver.rtol, 16 * eps) * root
        largest = torch.nan_to_num(y.abs().amax(1, keepdim=True), nan=0.0, posinf=0.0)
        self._atol = ((largest * eps).clamp_min(solver.atol) * root).expand_as(y).contiguous()
        # Factors of steps are sums of logarithms.
        self._safety = y.new_tensor(math.log(Controller.safety), dtype=torch.float64)
        self._least = self._safety.new_tensor(math.log(Controller.least))
        self._past = self._safety.repeat(len(y), 1)  # with what the error of the last accepted step adds
        self._accepted = torch.ones_like(self._past, dtype=torch.bool)

    def norm(self, rows: Tensor, scale: Tensor) -> Tensor:
        """Root mean squares, a column."""
        norms: Tensor = torch.linalg.vector_norm(rows / scale, dim=1, keepdim=True)
        return norms.double()

    def scale(self, y: Tensor) -> Tensor:
        return torch.add(self._atol, y.abs(), alpha=self._rtol)

    def error(self, estimates: list[Tensor], y: Tensor, end: Tensor, length: Tensor) -> Tensor:
        """The error of a trial step in units of the tolerance, a column; NaN where something isn't finite."""
        scale = torch.add(self._atol, torch.maximum(y.abs(), end.abs()), alpha=self._rtol)
        norms = [self.norm(estimate.view_as(y), scale) for estimate in estimates]
        if len(norms) == 2:
            damped = norms[0] * norms[0] / (norms[0] ** 2 + 0.01 * norms[1] ** 2).sqrt()
            norms[0] = torch.where(norms[0] > 0, damped, norms[0])
        return norms[0] * length

    def adapted(self, length: Tensor, error: Tensor, good: Tensor) -> Tensor:
        """How long the next steps are, after accepted and rejected ones."""
        known = error.log().clamp_min(math.log(1e-10))
        grown = torch.add(self._past, known, alpha=-self._alpha)
        shrunk = torch.add(self._safety, known, alpha=-1 / self.order)
        most = (good & self._accepted).double().mul_(math.log(Controller.most))
        # fmax: an error that is no number shrinks as much as any.
        factor = torch.minimum(torch.fmax(torch.where(good, grown, shrunk), self._least), most)
        past = torch.add(self._safety, known.clamp_min(math.log(1e-4)), alpha=self._beta)
        self._past, self._accepted = torch.where(good, past, self._past), good
        return length * factor.exp_()

    def divide(self, chosen: Tensor) -> None:
        """Only these samples go on."""
        self._atol, self._past, self._accepted = self._atol[chosen], self._past[chosen], self._accepted[chosen]


def tolerances(rtol: float, atol: float, y: Tensor) -> tuple[float, float]:
    """``rtol`` and ``atol`` as far as rounding in the dtype of the state lets an error be estimated."""
    eps = torch.finfo(y.dtype).eps
    largest = torch.nan_to_num(y.detach().abs().max(), nan=0.0, posinf=0.0) if y.numel() else 0.0
    return max(rtol, 16 * eps), max(atol, float(largest) * eps)


def _speed(stages: AnyStages, t: Time, y: Tensor, slope: Tensor) -> Tensor:
    """``dy/dt`` at the start, off the graph: with a mass it isn't the right-hand side."""
    if mass_of(stages.evaluate) is None:
        return slope.detach()
    stages.evaluations += 1
    with torch.no_grad():
        return flow(stages.evaluate)(stage_time(t, 0.0, 0.0, y), y.detach())


def first_step(control: Controller, stages: AnyStages, t: float, y: Tensor, slope: Tensor, span: float) -> float:
    """The first step by Hairer, Nørsett, Wanner 1993, section II.4: one more evaluation; signed like ``span``."""
    y, slope = y.detach(), _speed(stages, t, y, slope)
    scale = control.scale(y)
    size, speed = control.norm(y, scale), control.norm(slope, scale)
    if not speed < math.inf:
        return span * 1e-3
    h = 1e-6 if min(size, speed) < 1e-5 else 0.01 * size / speed
    h = min(h, abs(span))
    sign = math.copysign(1.0, span)
    with torch.no_grad():
        ahead = flow(stages.evaluate)(stage_time(t, sign, h, y), y + sign * h * slope)
    stages.evaluations += 1
    bend = control.norm(ahead - slope, scale) / h
    if not bend < math.inf:
        return sign * h * 0.1
    largest = max(speed, bend)
    best = max(1e-6, h * 1e-3) if largest <= 1e-15 else (0.01 / largest) ** (1 / control.order)
    return sign * min(100 * h, best, abs(span))


def first_steps(control: RowController, stages: AnyStages, t: Tensor, y: Tensor, slope: Tensor, span: Tensor) -> Tensor:
    """:func:`first_step` of every sample, a column."""
    slope = _speed(stages, t, y, slope)
    scale = control.scale(y)
    size, speed = control.norm(y, scale), control.norm(slope, scale)
    h = torch.where((size < 1e-5) | (speed < 1e-5), 1e-6, 0.01 * size / speed)
    h = torch.minimum(torch.nan_to_num(h, nan=0.0), span.abs())
    signed = torch.copysign(h, span)
    ahead = flow(stages.evaluate)(stage_time(t, 1.0, signed, y), torch.addcmul(y, signed.to(y.dtype), slope))
    stages.evaluations += 1
    bend = control.norm(ahead - slope, scale) / h
    largest = torch.maximum(speed, bend)
    best = torch.where(largest <= 1e-15, (h * 1e-3).clamp_min(1e-6), (0.01 / largest) ** (1 / control.order))
    best = torch.where(bend < torch.inf, best, h * 0.1)
    best = torch.where(speed < torch.inf, torch.minimum(100 * h, best), span.abs() * 1e-3)
    return torch.copysign(torch.minimum(best, span.abs()), span)
