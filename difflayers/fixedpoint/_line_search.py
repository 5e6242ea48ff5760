"""Steps along a direction that decrease an objective enough, for a batch of them at once."""

from __future__ import annotations

import torch
from torch import Tensor

from difflayers._arrays import default_tolerance
from difflayers.fixedpoint._minimize import Gradient

DECREASE, CURVATURE, APPROXIMATE = 1e-4, 0.9, 0.8
TRIALS = 40


class LineSearch:
    """The weak Wolfe conditions by bracketing (Lewis and Overton 2013), with secant steps inside of brackets.

    ``L(z + t d) <= L(z) + 1e-4 t g·d`` and ``∇L(z + t d)·d >= 0.9 g·d``. Where differences of ``L`` are lost in
    rounding the first is taken as ``|∇L(z + t d)·d| <= 0.8 |g·d|`` (Hager and Zhang 2005). A point where something
    isn't finite is too far. Every sample has a ``t`` of its own; one evaluation serves all that are still searching.

    Args:
        residual: the gradient.
        z: where all start, ``(*batch, *event)``.
        direction: ``(samples, n)``; zero for samples that stay.
        level: the size of objectives, ``(samples,)``, of which rounding is a part.

    Attributes:
        point: where the search ended; for samples that found nothing, the start.
        found: which samples did.
        value: the objective at ``point``, ``(samples,)``.
        bottomless: which samples never came to an end of the descent, in steps ten times as long each.
    """

    def __init__(self, residual: Gradient, z: Tensor, direction: Tensor, step: Tensor, level: Tensor) -> None:
        self.residual, self.z, self.direction = residual, z, direction
        self.noise = default_tolerance(z.dtype) * level
        self.start, self.slope = self._at(z)
        self.step, self.low, self.high = step, torch.zeros_like(step), torch.full_like(step, torch.inf)
        self.low_slope, self.high_slope = self.slope, torch.full_like(step, torch.nan)
        self.searching = (direction != 0).any(-1)
        self.point, self.value = z, self.start
        for _ in range(TRIALS):
            if not bool(self.searching.any()):
                break
            self._try()
        self.bottomless = (self.searching & self.high.isinf()) | (self.value == -torch.inf)
        self._settle()

    def _try(self) -> None:
        self.point = self._along(self.step)
        self.value, slope = self._at(self.point)
        low = self.value <= self.start + DECREASE * self.step * self.slope
        same = (self.value <= self.start + self.noise) & (slope.abs() <= APPROXIMATE * self.slope.abs())
        long = ~(low | same) | ~(slope.isfinite() & self.value.isfinite())
        short = ~long & (slope < CURVATURE * self.slope)
        self.searching = self.searching & (long | short) & (self.value > -torch.inf)
        long, short = long & self.searching, short & self.searching
        self.low, self.low_slope = torch.where(short, self.step, self.low), torch.where(short, slope, self.low_slope)
        self.high, self.high_slope = torch.where(long, self.step, self.high), torch.where(long, slope, self.high_slope)
        self.step = torch.where(self.searching, self._next(), self.step)

    def _next(self) -> Tensor:
        width = self.high - self.low
        # Where the slope changes sign, its root by a secant; elsewhere the middle, and steps ten times as long while
        # there is no upper end.
        share = (self.low_slope / (self.low_slope - self.high_slope)).nan_to_num(nan=0.5)
        share = torch.where(self.high_slope > 0, share.clamp(0.1, 0.9), 0.5)
        return torch.where(width.isinf(), 10 * self.step, self.low + share * width)

    def _settle(self) -> None:
        """Who is still searching takes the longest step that was short, if there was one."""
        self.found = ~self.searching & (self.direction != 0).any(-1)
        if bool(self.searching.any()):
            self.step = torch.where(self.searching, self.low, self.step)
            self.found = self.found | (self.searching & (self.low > 0))
            self.point = self._along(self.step)
            self.value, _ = self._at(self.point)

    def _along(self, step: Tensor) -> Tensor:
        return self.z + (step[:, None] * self.direction).to(self.z.dtype).reshape(self.z.shape)

    def _at(self, z: Tensor) -> tuple[Tensor, Tensor]:
        gradient = self.residual(z).detach().reshape(self.direction.shape)
        value = self.residual.objective(z).detach().reshape(-1)
        return value, (gradient * self.direction.detach()).sum(-1)
