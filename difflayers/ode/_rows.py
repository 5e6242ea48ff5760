"""A step size for every sample: times and steps are columns, finished samples are left behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from difflayers._autodiff import numbers
from difflayers._progress import shown
from difflayers._solution import Solution, Status
from difflayers.ode._control import RowController, first_steps
from difflayers.ode._mesh import RowMesh, RowStep
from difflayers.ode._methods import stages_of
from difflayers.ode._problem import Evaluate
from difflayers.ode._row_outputs import RowOutputs
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
        self.forward = torch.where(self.span >= 0, 1.0, -1.0).to(times.dtype)
        self.outputs = RowOutputs(solver.tableau, mesh, y)
        # Output times forward, with one after them that nobody gets to, and the first output that isn't made yet.
        self.marks = torch.nn.functional.pad(times * self.forward, (0, 1), value=torch.inf)
        self.next = self._following(self.t)
        self.going = self.next < self.count
        self.further = solver.tableau.total > solver.tableau.stages + bool(solver.tableau.error)
        self.tally = torch.zeros(3, self.samples, 1, dtype=torch.int64, device=y.device)  # tried, accepted, stiff
        self.trials, self.divided = 0, False
        self.spent = [0]  # evaluations after every trial
        self.kept: Tensor | None = None
        self.bar = shown()
        # Of the whole batch, as of when a sample was left behind.
        self.status = torch.full((self.samples,), int(Status.SUCCESS), dtype=torch.int8, device=y.device)
        self.counts = torch.zeros(3, self.samples, dtype=torch.int64, device=y.device)
        self.made, self.time = self.next.squeeze(1).clone(), self.t.squeeze(1).clone()

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
                h = torch.where(self.going, length / steps, 0)
                y = self.stages.attempt(self.t, self.y, h)
                last = number == steps - 1
                end = torch.where(self.going, self.times[:, index : index + 1] if last else self.t + h, self.t)
                broken = self.going & ~y.isfinite().all(1, keepdim=True)
                self.tally[:2] += self.going
                self._take(self.going & ~broken, h, y, end, self._following(end))
                self._end(broken, Status.NONFINITE)
                self.going = self.going & (self.next < self.count)
                self.stages.start(self.t, self.y)
        return None

    def _adaptive(self, slope: Tensor) -> None:
        control = RowController(self.solver, self.y)
        length = first_steps(control, self.stages, self.t, self.y, slope, self.span).abs()
        smallest, mark, still_going = 1e-15 * self.span.abs(), self.t, True
        while still_going:
            if self.trials >= self.solver.max_steps:
                return self._end(self.going, Status.MAX_STEPS)
            if self.trials % self.window == 0 and self.trials:
                needed = (self.end - self.t).abs() * self.window
                stuck = needed > (self.t - mark).abs() * self.hopeless * self.solver.max_steps
                self._end(self.going & stuck, Status.STALLED)
                mark = self.t
            # Nothing is left to those who have ended: they try a step of no length.
            left = (self.end - self.t) * self.forward
            final = length * 1.01 >= left
            length = torch.where(final, left, length)
            h = length * self.forward
            y = self.stages.attempt(self.t, self.y, h)
            error = control.error(self.stages.estimates(), self.y, y, length)
            good = (error <= 1) & self.going
            step = torch.where(good, h, 0)
            if self.tells and (self.trials + 1) % EVERY == 0:
                border = at_border(self.stages, self.t, self.y, y, step, self.y.shape)
                self.tally[2] += EVERY * (border[:, None] & good)
            through = good & final
            end = torch.where(through, self.end, self.t + step)
            length = control.adapted(length, error, good)
            tiny = (length <= torch.maximum(smallest, self.t.abs() * 4e-16)) & self.going & ~good
            following = self._following(end)
            masks = torch.stack([self.going, good, self.going & ~through, tiny, following > self.next])
            self.tally[:2] += masks[:2]
            # Everything that the loop must know, read back at once.
            _, _, going, stuck, reaching = numbers(masks.sum((1, 2)))
            self.going = masks[2]
            ended = self._take(good, step, y, end, following, reaching > 0)
            if stuck:
                broken = ~error.isfinite()
                self._end(tiny & broken, Status.NONFINITE)
                self._end(tiny & ~broken, Status.STALLED)
            if stuck or ended:
                going = int(self.going.sum())
            still_going = going > 0
            if still_going and going <= self.crowded * len(self.rows):
                chosen = self._divide()
                if chosen is not None:
                    length, smallest, mark = length[chosen], smallest[chosen], mark[chosen]
                    control.divide(chosen)
        return None

    def _following(self, end: Tensor) -> Tensor:
        """The first output after these times, a column."""
        found: Tensor = torch.searchsorted(self.marks, end * self.forward, right=True)
        return found

    def _take(self, good: Tensor, h: Tensor, y: Tensor, end: Tensor, following: Tensor, reaching: bool = True) -> bool:
        """Move the samples whose step is good, and note the outputs that it reaches; whether an event ends anybody."""
        kept, self.kept = self.kept, None
        step = RowStep(self.t, h, self.y, self.rows, kept, self.rows[:0], self.rows[:0], self.t[:0, 0])
        if reaching:
            here = (following > self.next).squeeze(1).nonzero().squeeze(1)
            if self.further and bool((self.marks.gather(1, self.next) < end * self.forward)[here].any()):
                self.stages.complete(self.t, self.y, h)
            self.outputs.note(step, self.stages, here, [self.next, following, end, self.y, y])
            self.next = following
        watch = self.mesh.watch
        ended = None if watch is None else watch(self.stages, self.t, h, self.y, y, self.rows, good)
        self.mesh.add(step)
        wide = good.expand_as(y).contiguous()
        self.y, self.t = torch.where(wide, y, self.y), end
        self.stages.advance_where(wide, self.t, self.y)
        self.trials += 1
        self.spent.append(self.stages.evaluations)
        if ended is not None:
            self._end(ended[:, None] & self.going, Status.SUCCESS)
        if self.bar is not None:
            self.bar.show(self._report)
        return ended is not None

    def _report(self) -> tuple[float, str]:
        """How far the slowest sample is."""
        left = torch.where(self.going & (self.span != 0), ((self.end - self.t) / self.span).abs(), 0)
        samples = f"{int(self.going.sum()):,}/{self.samples:,} samples left"
        tried, accepted = self.tally[:2, :, 0]
        accepted, rejected = int(accepted.max()), int((tried - accepted).max())
        return 1 - float(left.max()), f"{samples}, {accepted:,} steps accepted, {rejected:,} rejected"

    def _end(self, samples: Tensor, status: Status) -> None:
        """These, a column, stay where they are."""
        if status is not Status.SUCCESS:
            self.status[self.rows] = torch.where(samples.squeeze(1), int(status), self.status[self.rows]).to(torch.int8)
        self.going = self.going & ~samples
        self.end = torch.where(samples, self.t, self.end)

    def _note(self) -> None:
        """What is known of the present samples, in the places of the whole batch."""
        self.counts[:, self.rows] = self.tally.squeeze(2)
        self.made[self.rows], self.time[self.rows] = self.next.squeeze(1), self.t.squeeze(1)

    def _divide(self) -> Tensor | None:
        """Leave behind who is done; which of the present samples stay, or None if nobody knows how to divide."""
        chosen = self.going.squeeze(1).nonzero().squeeze(1)
        rows = self.rows[chosen]
        evaluate = self.part(rows)
        if evaluate is None:
            return None
        slope, y, t = self.stages.first[chosen], self.y[chosen], self.t[chosen]
        if not self.divided and not agrees(evaluate, t, y, slope):
            self.part = _indivisible
            return None
        self._note()
        self.divided = self.mesh.divisible = True
        self.stages = self.stages.divided(evaluate, chosen)
        self.kept = chosen if self.kept is None else self.kept[chosen]
        self.rows, self.y, self.t, self.next, self.going = rows, y, t, self.next[chosen], self.going[chosen]
        self.times, self.end, self.span = self.times[chosen], self.end[chosen], self.span[chosen]
        self.forward, self.marks, self.tally = self.forward[chosen], self.marks[chosen], self.tally[:, chosen]
        return chosen

    def _solution(self) -> Solution:
        self._note()
        self.outputs.make()
        value = self.outputs.values
        if bool((self.made < self.count).any()):
            there = torch.arange(self.count, device=value.device) < self.made[:, None]
            value = torch.where(there[:, :, None], value, torch.nan)
        tried, accepted, stiff = self.counts
        spent = torch.tensor(self.spent, device=value.device)[tried]
        stats = {"steps": tried, "accepted": accepted, "rejected": tried - accepted, "evaluations": spent}
        return Solution(value, self.status, stats | {"stiff": stiff, "time": self.time, "outputs": self.made})


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
