"""The stages of one step of an explicit Runge–Kutta method: in buffers for numbers, on the graph for derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from difflayers.ode._tableaus import Tableau, coefficients

Evaluate = Callable[[Tensor, Tensor], Tensor]
Time = float | Tensor


def stage_time(t: Time, c: float, h: Time, like: Tensor) -> Tensor:
    """``t + ch`` as the callable gets it: in the precision of the state."""
    if isinstance(t, Tensor) or isinstance(h, Tensor):
        return torch.as_tensor(t + c * h).to(like.dtype)
    return torch.scalar_tensor(t + c * h, dtype=like.dtype, device=like.device)


def combined(y: Tensor, slopes: Tensor, weights: Tensor, h: Time) -> Tensor:
    """``y + h Σ weightsⱼ slopesⱼ`` for slopes in rows ``(stages, samples · n)``."""
    if isinstance(h, Tensor):
        return torch.addcmul(y, torch.mv(slopes.t(), weights).view_as(y), h.to(y.dtype))
    return torch.addmv(y.reshape(-1), slopes.t(), weights, alpha=h).view_as(y)


class Stages:
    """Buffers for the stages of a step, used again by the next one.

    Attributes:
        evaluations: how often the right-hand side was evaluated.
    """

    def __init__(self, tableau: Tableau, evaluate: Evaluate, like: Tensor) -> None:
        self.tableau, self.evaluate, self.evaluations = tableau, evaluate, 0
        self.slopes = torch.zeros(tableau.total, *like.shape, dtype=like.dtype, device=like.device)
        self._shape, self._made = like.shape, 0
        known = coefficients(tableau, like.dtype, like.device)
        self._errors = known.error
        self._interpolant = coefficients(tableau, torch.float64, like.device).interpolant
        # Views cost as much as small products; they are made once.
        self._slots = list(self.slopes)
        self._flat = self.slopes.view(tableau.total, -1)
        before = [self._flat[:i].t() for i in range(tableau.total)]
        self._plan = list(zip(self._slots, before, known.rows, tableau.c, strict=True))
        self._places = known.places
        self._known = self._flat[: tableau.stages + 1].t()

    def start(self, t: Time, y: Tensor, slope: Tensor | None = None) -> Tensor:
        """The slope at the start of a step; evaluated unless somebody knows it."""
        if slope is None:
            slope = self.evaluate(stage_time(t, 0.0, 0.0, y), y)
        self.evaluations += 1
        slope = slope.reshape(self._shape)
        self._slots[0].copy_(slope)
        return slope

    def attempt(self, t: Time, y: Tensor, h: Time) -> Tensor:
        """The state after a step; its stages stay here. The first one must be here already."""
        last = self.tableau.stages
        end = self._fill(t, y, h, 1, last + 1 if self.tableau.error else last)
        self._made = last + 1 if self.tableau.error else last
        return end if self.tableau.error else self._point(y, last, h)

    def estimates(self) -> list[Tensor]:
        """Estimates of the local error, not yet times ``h``, flat."""
        if self._errors is None:
            return []
        return [torch.mv(self._known, row) for row in self._errors]

    def near_end(self, y: Tensor, h: Time) -> tuple[Tensor, Tensor, Tensor]:
        """The point of the last stage before the end, the slope there, and the slope at the end."""
        last = self.tableau.stages
        return self._point(y, last - 1, h), self._slots[last - 1], self._slots[last]

    def inside(self, t: Time, y: Tensor, h: Time, s: float) -> Tensor:
        """The state at ``t + sh`` of the last step."""
        self.complete(t, y, h)
        return combined(y, self._flat, self._weights(s).to(y), h)

    def _weights(self, s: float) -> Tensor:
        powers = [s]
        for _ in range(self._interpolant.shape[1] - 1):
            powers.append(powers[-1] * s)
        return torch.mv(self._interpolant, self._interpolant.new_tensor(powers))

    @property
    def first(self) -> Tensor:
        """The slope at the start of the step."""
        slope: Tensor = self._slots[0]
        return slope

    def advance(self, t: Time, y: Tensor) -> None:
        """The last slope becomes the first one of the next step, from ``y`` at ``t``."""
        self._slots[0].copy_(self._slots[self.tableau.stages])

    def advance_where(self, moved: Tensor, t: Tensor, y: Tensor) -> None:
        """The same for the samples that moved, a column."""
        torch.where(moved, self._slots[self.tableau.stages], self._slots[0], out=self._slots[0])

    def complete(self, t: Time, y: Tensor, h: Time) -> Tensor:
        """All slopes of the last step, with those for outputs inside."""
        self._fill(t, y, h, self._made, self.tableau.total)
        self._made = self.tableau.total
        return self.slopes

    def divided(self, evaluate: Evaluate, chosen: Tensor) -> Stages:
        """Buffers for some of the samples, with their first slopes."""
        slope = self.first[chosen]
        part = Stages(self.tableau, evaluate, slope)
        part._slots[0].copy_(slope)
        part.evaluations = self.evaluations
        return part

    def _point(self, y: Tensor, i: int, h: Time) -> Tensor:
        _, before, weights, _ = self._plan[i]
        if isinstance(h, Tensor):
            return torch.addcmul(y, torch.mv(before, weights).view_as(y), h.to(y.dtype))
        return torch.addmv(y.reshape(-1), before, weights, alpha=h).view_as(y)

    def _fill(self, t: Time, y: Tensor, h: Time, first: int, end: int) -> Tensor:
        """Evaluate some stages; the point of the last one."""
        if isinstance(h, Tensor) or isinstance(t, Tensor):
            return self._fill_rows(t, y, h, first, end)
        flat, dtype, device, evaluate = y.reshape(-1), y.dtype, y.device, self.evaluate
        point, addmv, scalar = y, torch.addmv, torch.scalar_tensor
        for slot, before, weights, c in self._plan[first:end]:
            # view_as: a shape would have to be read first, which takes as long as the product.
            point = addmv(flat, before, weights, alpha=h).view_as(y)
            slot.copy_(evaluate(scalar(t + c * h, dtype=dtype, device=device), point))
        self.evaluations += max(0, end - first)
        return point

    def _fill_rows(self, t: Time, y: Tensor, h: Time, first: int, end: int) -> Tensor:
        if end <= first:
            return y
        times = (t + self._places[first:end] * h).to(y.dtype).unbind(0)
        # Rows that a column would be spread over are short, and the loop over them is slow.
        wide = torch.as_tensor(h, dtype=y.dtype, device=y.device).expand_as(y).contiguous()
        point, addcmul, mv = y, torch.addcmul, torch.mv
        for (slot, before, weights, _), time in zip(self._plan[first:end], times, strict=True):
            point = addcmul(y, mv(before, weights).view_as(y), wide)
            slot.copy_(self.evaluate(time, point))
        self.evaluations += end - first
        return point


class TracedStages:
    """The same on the graph: every slope a tensor of its own."""

    def __init__(self, tableau: Tableau, evaluate: Evaluate, like: Tensor) -> None:
        self.tableau, self.evaluate, self.evaluations = tableau, evaluate, 0
        self.coefficients = coefficients(tableau, like.dtype, like.device)
        self.evaluates: list[Tensor] = []

    @property
    def slopes(self) -> Tensor:
        return torch.stack(self.evaluates)

    def start(self, t: Time, y: Tensor, slope: Tensor | None = None) -> Tensor:
        """The slope at the start of a step; evaluated here, so that it is on the graph."""
        self.evaluates = [self.evaluate(stage_time(t, 0.0, 0.0, y), y)]
        self.evaluations += 1
        return self.evaluates[0]

    def attempt(self, t: Time, y: Tensor, h: Time) -> Tensor:
        """The state after a step. The first slope must be here already."""
        del self.evaluates[1:]
        end = self.advanced(t, y, h)
        if self.tableau.error:
            self.evaluates.append(self.evaluate(stage_time(t, 1.0, h, y), end))
            self.evaluations += 1
        return end

    def advanced(self, t: Time, y: Tensor, h: Time) -> Tensor:
        """The same without the slope at the end."""
        self._fill(t, y, h, self.tableau.stages)
        return mixed(y, self.evaluates, self.tableau.b, h)

    def complete(self, t: Time, y: Tensor, h: Time) -> list[Tensor]:
        """All slopes of the step, with those for outputs inside."""
        self._fill(t, y, h, self.tableau.total)
        return self.evaluates

    def estimates(self) -> list[Tensor]:
        """Estimates of the local error, off the graph."""
        errors = self.coefficients.error
        if errors is None:
            return []
        known = torch.stack([slope.detach() for slope in self.evaluates]).flatten(1)
        return [torch.mv(known.t(), row) for row in errors]

    def near_end(self, y: Tensor, h: Time) -> tuple[Tensor, Tensor, Tensor]:
        """The point of the last stage before the end, the slope there, and the slope at the end; off the graph."""
        last = self.tableau.stages
        slopes = [slope.detach() for slope in self.evaluates[: last + 1]]
        return mixed(y.detach(), slopes, self.tableau.rows[last - 2], h), slopes[last - 1], slopes[last]

    def inside(self, t: Time, y: Tensor, h: Time, s: float) -> Tensor:
        """The state at ``t + sh`` of the last step."""
        self.complete(t, y, h)
        return mixed(y, self.evaluates, list(self.tableau.weights(s)), h)

    def advance(self, t: Time, y: Tensor) -> None:
        """The last slope becomes the first one of the next step, from ``y`` at ``t``."""
        self.evaluates = [self.evaluates[self.tableau.stages]]

    def _fill(self, t: Time, y: Tensor, h: Time, end: int) -> None:
        for i in range(len(self.evaluates), end):
            point = mixed(y, self.evaluates, self.tableau.rows[i - 1], h)
            self.evaluates.append(self.evaluate(stage_time(t, self.tableau.c[i], h, y), point))
            self.evaluations += 1


def mixed(y: Tensor, slopes: Sequence[Tensor], weights: Sequence[float], h: Time) -> Tensor:
    """``y + h Σ weightsⱼ slopesⱼ``, in operations that torch differentiates."""
    terms = [(k, w) for k, w in zip(slopes, weights, strict=False) if w]
    if not isinstance(h, Tensor):
        for k, w in terms:
            y = torch.add(y, k, alpha=h * w)
        return y
    if not terms:
        return y
    total = terms[0][0] * terms[0][1]
    for k, w in terms[1:]:
        total = torch.add(total, k, alpha=w)
    return y + h.to(y.dtype) * total


def weights_at(tableau: Tableau, s: Tensor, like: Tensor) -> Tensor:
    """``bⱼ(s)`` for many places at once, ``(places, stages)``."""
    interpolant = coefficients(tableau, torch.float64, like.device).interpolant
    powers = s.double()[:, None].expand(-1, interpolant.shape[1]).cumprod(1)
    return (powers @ interpolant.t()).to(like.dtype)
