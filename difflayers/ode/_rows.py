"""A step size for every sample: times and steps are columns, finished samples are left behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from difflayers._progress import shown
from difflayers._solution import Solution, Status
from difflayers.ode._control import RowController, first_steps
from difflayers.ode._mesh import RowMesh, RowStep
from difflayers.ode._methods import stages_of
from difflayers.ode._problem import Evaluate
from difflayers.ode._stability import EVERY, at_border, tells

if TYPE_CHECKING:
    from difflayers.ode._explicit import OneStepSolver

Part = Callable[[Tensor], Evaluate | None]


class RowRun:
    """One solve in which every sample has its own steps, tolerance and status.

    Samples that are done stand still, and once a tenth of them are, the others go on alone.
    """

    crowded = 0.9
    window = 500  # trials after which progress is judged
    hopeless = 100.0  # times max_steps that it would take at that rate

    def __init__(
        self, solver: OneStepSolver, evaluate: Evaluate, part: Part, times: Tensor, y: Tensor, mesh: RowMesh
    ) -> None:
        self.solver, self.part, self.mesh, self.y = solver, part, mesh, y
        self.samples, self.count = times.shape
        self.times, self.rows = times, torch.arange(self.samples, device=y.device)
        mesh.times = times
        self.stages = stages_of(solver.tableau, evaluate, y, self.count > 2)
        self.tells = tells(self.stages)
        self.t, self.end = times[:, :1], times[:, -1:]
        self.span = self.end - self.t
        self.values = y.unsqueeze(1).repeat(1, self.count, 1)
        self.next = (times == self.t).long().cumprod(1).sum(1)  # the first output that isn't made yet
        self.going = self.next < self.count
        self.made = self.next.clone()  # of the whole batch, as everything from here on
        self.status = torch.full((self.samples,), int(Status.SUCCESS), dtype=torch.int8, device=y.device)
        self.counts = torch.zeros(5, self.samples, dtype=torch.int64, device=y.device)
        self.time = self.t.squeeze(1).clone()
        self.trials, self.divided = 0, False
        self.kept: Tensor | None = None
        self.bar = shown()

    def run(self, slope: Tensor | None) -> Solution:
        """Step until every sample has ended."""
        if bool(self.going.any()) and self.y.numel():
            slope = self.stages.start(self.t, self.y, slope)
            if self.solver.adaptive:
                self._adaptive(slope)
            else:
                self._fixed()
        return self._solution()

    def _fixed(self) -> None:
        h = torch.zeros_like(self.t)
        for index in range(1, self.count):
            length = self.times[:, index : index + 1] - self.times[:, index - 1 : index]
            longest = float(length.abs().max())
            steps = self.solver.steps_between(longest) if longest else 0
            for number in range(steps):
                if self.trials >= self.solver.max_steps:
                    return self._end(self.going, Status.MAX_STEPS)
                h = torch.where(self.going[:, None], length / steps, 0)
                y = self.stages.attempt(self.t, self.y, h)
                last = number == steps - 1
                end = self.times[:, index : index + 1] if last else self.t + h
                broken = self.going & ~y.isfinite().all(1)
                self.trials += 1
                tried = self.going
                self._take(tried & ~broken, h, y, torch.where(tried[:, None], end, self.t))
                self._count(tried, tried)
                self._end(broken, Status.NONFINITE)
                self.stages.start(self.t, self.y)
            if not steps:
                self._pass_equal_times()
        return None

    def _pass_equal_times(self) -> None:
        """Outputs at the time where everybody is already."""
        self._take(self.going, torch.zeros_like(self.t), self.y, self.t)

    def _adaptive(self, slope: Tensor) -> None:
        control = RowController(self.solver, self.y)
        h = first_steps(control, self.stages, self.t, self.y, slope, self.span)
        smallest, mark, still_going = 1e-15 * self.span.abs(), self.t, True
        while still_going:
            if self.trials >= self.solver.max_steps:
                return self._end(self.going, Status.MAX_STEPS)
            if self.trials % self.window == 0 and self.trials:
                needed = (self.end - self.t).abs() * self.window
                stuck = needed > (self.t - mark).abs() * self.hopeless * self.solver.max_steps
                self._end(self.going & stuck.squeeze(1), Status.STALLED)
                mark = self.t
            remaining = self.end - self.t
            final = h.abs() * 1.01 >= remaining.abs()
            h = torch.where(final, remaining, h)
            h = torch.where(self.going[:, None], h, 0)
            y = self.stages.attempt(self.t, self.y, h)
            self.trials += 1
            error = control.error(self.stages.estimates(), y, h)
            tried = self.going
            good = tried & (error <= 1)
            step = torch.where(good[:, None], h, 0)
            if self.tells and self.trials % EVERY == 0:
                border = at_border(self.stages, self.t, self.y, y, step, self.y.shape)
                self.counts[4, self.rows] += EVERY * (border & good)
            self._take(good, step, y, torch.where(final, self.end, self.t + h))
            self._count(tried, good)
            h = control.adapted(h, error, good)
            tiny = (h.abs() <= torch.maximum(smallest, 4e-16 * self.t.abs())).squeeze(1) & self.going & ~good
            still_going, any_tiny, crowd = self._survey(tiny)
            if any_tiny:
                broken = ~error.isfinite()
                self._end(tiny & broken, Status.NONFINITE)
                self._end(tiny & ~broken, Status.STALLED)
                still_going = bool(self.going.any())
            if still_going and crowd <= self.crowded * len(self.rows):
                chosen = self._divide()
                if chosen is not None:
                    h, smallest, mark = h[chosen], smallest[chosen], mark[chosen]
                    control.divide(chosen)
        return None

    def _survey(self, tiny: Tensor) -> tuple[bool, bool, int]:
        """Everything that the loop must know, read back at once."""
        going, stuck = torch.stack([self.going.sum(), tiny.sum()]).tolist()
        return going > 0, stuck > 0, going

    def _take(self, good: Tensor, h: Tensor, y: Tensor, end: Tensor) -> None:
        """Move the samples whose step is good, and make the outputs that it reaches."""
        wide = good[:, None]
        due = (torch.arange(self.count, device=y.device) >= self.next[:, None]) & wide
        forward = torch.where(self.span >= 0, 1.0, -1.0)
        due &= (self.times - end) * forward <= 0
        row, index = due.nonzero(as_tuple=True)
        s = torch.empty(0, dtype=torch.float64, device=y.device)
        if len(row):
            s = self._make(row, index, h, y, end)
            self.next = self.next + due.sum(1)
        kept, self.kept = self.kept, None
        watch = self.mesh.watch
        ended = None if watch is None else watch(self.stages, self.t, h, self.y, y, self.rows, good)
        self.mesh.add(RowStep(self.t, h, self.y, self.rows, kept, row, index, s))
        self.y = torch.where(wide, y, self.y)
        self.t = torch.where(wide, end, self.t)
        self.stages.advance_where(wide, self.t, self.y)
        self.going = self.going & (self.next < self.count)
        if ended is not None:
            self.going = self.going & ~ended
        self.made[self.rows] = self.next
        self.time[self.rows] = self.t.squeeze(1)
        if self.bar is not None:
            self.bar.show(self._report)

    def _report(self) -> tuple[float, str]:
        """How far the slowest sample is."""
        left = torch.where(self.going[:, None] & (self.span != 0), ((self.end - self.t) / self.span).abs(), 0)
        samples = f"{int(self.going.sum()):,}/{self.samples:,} samples left"
        accepted, rejected = self.counts[1:3].amax(1).tolist()
        return 1 - float(left.max()), f"{samples}, {accepted:,} steps accepted, {rejected:,} rejected"

    def _make(self, row: Tensor, index: Tensor, h: Tensor, y: Tensor, end: Tensor) -> Tensor:
        """Outputs ``index`` of the samples ``row``; where they are inside the step."""
        time, length = self.times[row, index], h[row, 0]
        at_end = (time == end[row, 0]) | (length == 0)
        s = torch.where(at_end, 1.0, (time - self.t[row, 0]) / torch.where(length == 0, 1.0, length))
        value = y[row]
        if not bool(at_end.all()):
            self.mesh.inside = True
            between = self.stages.between(self.t, self.y, h, row, s)
            value = torch.where(at_end[:, None], value, between)
        self.values[self.rows[row], index] = value
        return s

    def _count(self, tried: Tensor, good: Tensor) -> None:
        columns = torch.stack([tried, good, tried & ~good]).long()
        self.counts[:3, self.rows] += columns
        self.counts[3, self.rows] = torch.where(tried, self.stages.evaluations, self.counts[3, self.rows])

    def _end(self, samples: Tensor, status: Status) -> None:
        self.status[self.rows] = torch.where(samples, int(status), self.status[self.rows]).to(torch.int8)
        self.going = self.going & ~samples

    def _divide(self) -> Tensor | None:
        """Leave behind who is done; which of the present samples stay, or None if nobody knows how to divide."""
        chosen = self.going.nonzero().squeeze(1)
        rows = self.rows[chosen]
        evaluate = self.part(rows)
        if evaluate is None:
            return None
        slope, y, t = self.stages.first[chosen], self.y[chosen], self.t[chosen]
        if not self.divided and not agrees(evaluate, t, y, slope):
            self.part = _indivisible
            return None
        self.divided = self.mesh.divisible = True
        self.stages = self.stages.divided(evaluate, chosen)
        self.kept = chosen if self.kept is None else self.kept[chosen]
        self.rows, self.y, self.t, self.next, self.going = rows, y, t, self.next[chosen], self.going[chosen]
        self.times, self.end, self.span = self.times[chosen], self.end[chosen], self.span[chosen]
        return chosen

    def _solution(self) -> Solution:
        value = self.values
        if bool((self.made < self.count).any()):
            there = torch.arange(self.count, device=value.device) < self.made[:, None]
            value = torch.where(there[:, :, None], value, torch.nan)
        names = ("steps", "accepted", "rejected", "evaluations", "stiff")
        stats = dict(zip(names, self.counts, strict=True))
        return Solution(value, self.status, stats | {"time": self.time, "outputs": self.made})


def _indivisible(rows: Tensor) -> None:
    return None


def agrees(evaluate: Evaluate, t: Tensor, y: Tensor, slope: Tensor) -> bool:
    """Whether a part is there what it is here: which arguments go with the samples, shapes only suggest."""
    try:
        there = evaluate(t.to(y.dtype), y)
    except Exception:  # whatever a callable does with batch sizes that it wasn't written for
        return False
    allowed = torch.finfo(y.dtype).eps ** (2 / 3) * (1 + slope.abs().amax(1))
    return bool(((there - slope).abs().amax(1) <= allowed).all())
