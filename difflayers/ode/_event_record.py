"""What a solve with events has found, as a solve with output times where they happen: what derivatives run along."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from difflayers._autodiff import push
from difflayers._solution import Solution
from difflayers.ode._along import in_rows
from difflayers.ode._event_watch import Found, Lookout
from difflayers.ode._events import Signals
from difflayers.ode._explicit import OneStepSolver
from difflayers.ode._linearization import flow
from difflayers.ode._mesh import Mesh, RowMesh, RowStep, Step
from difflayers.ode._problem import Evaluate, InitialValueProblem
from difflayers.ode._rows import agrees
from difflayers.ode._stages import stage_time


@dataclass
class Record:
    """One solve with events, samples as rows; output times are followed by slots, one for every time of an event.

    Attributes:
        solution: its value holds the outputs and the states in the slots, ``(samples, T + S, n)``, in the order of
            time; NaN behind them where a slot is empty or an output lies after the end.
        mesh: the steps that made them; every sample's own, unless there is only one.
        slots: of which event every slot is.
        time: of every slot, ``(samples, S)``; NaN where it is empty.
        slope: how fast the event's function changes there.
        order: for every output of the solution, which one in the row of outputs and slots it is; the last one that is
            there stands in for those that aren't.
        rank: the other way round, where outputs and slots are in the solution.
        ended: the number of the event that ended a sample, -1 if none did.
        grazing: whether a sample meets an event so flatly that the tolerance decides whether it does.
    """

    solution: Solution
    mesh: Mesh | RowMesh
    slots: list[int]
    time: Tensor
    slope: Tensor
    order: Tensor
    rank: Tensor
    ended: Tensor
    grazing: Tensor


@dataclass(frozen=True)
class Keep:
    """What a rule for derivatives needs to know.

    Attributes:
        states: how many states, None for all.
        stages: whether those of every step too, where samples step together.
        together: whether steps of the only sample are to be those of all.
        rows: whether some steps may be evaluated at once.
    """

    states: int | None = 0
    stages: bool = False
    together: bool = False
    rows: bool = False


def search(
    solver: OneStepSolver, problem: InitialValueProblem, signals: Signals, params: Sequence[Tensor], keep: Keep
) -> Record:
    """Solve, and look for events; ``params`` are those of the problem, then those of the events."""
    y0, t, *tensors = params
    shared = tensors[: problem.count]
    own = [y0, t, *shared]
    times = in_rows(t.detach().double(), y0.shape[:-1])
    rows = y0.reshape(-1, y0.shape[-1])
    mesh = solver.mesh(t, keep.states, keep.stages and keep.together)
    start, span = times[:, :1], times[:, -1:] - times[:, :1]
    look = Lookout(signals.events, signals.evaluator(tensors), solver.tableau, start, span, rows)
    mesh.watch = look
    solution = solver.march(problem, own, mesh)
    mesh.watch = None
    flat = Solution(
        solution.value.reshape(len(rows), times.shape[1], rows.shape[1]), solution.status.reshape(-1),
        {name: stat.reshape(-1) for name, stat in solution.stats.items()},
    )  # fmt: skip
    record = _Recorder(solver, look, times, flat, problem.evaluator(shared)).record(mesh)
    if not isinstance(record.mesh, RowMesh):
        return record
    if isinstance(mesh, Mesh) and keep.together:
        return replace(record, mesh=_together(mesh, record.mesh))
    if keep.rows and not record.mesh.divisible:
        record.mesh.divisible = _repeats(problem, shared, start, rows)
    return record


class _Recorder:
    def __init__(
        self, solver: OneStepSolver, look: Lookout, times: Tensor, solution: Solution, evaluate: Evaluate
    ) -> None:
        self.look, self.times, self.solution, self.flow = look, times, solution, flow(evaluate)
        self.samples, self.count = times.shape
        self.sign = torch.where(times[:, -1:] >= times[:, :1], 1.0, -1.0)
        # How well signals are known in relation to their size.
        self.sharp = max(solver.rtol, 16 * torch.finfo(solution.value.dtype).eps)
        self.found = look.locate()

    def record(self, mesh: Mesh | RowMesh) -> Record:
        end, ended = self._ends()
        slots = self._slots(end)
        outputs = torch.arange(self.count, device=end.device) < self.solution.stats["outputs"][:, None]
        outputs &= self.times * self.sign <= end
        there = torch.cat([outputs, slots.there], 1)
        key = torch.where(there, torch.cat([self.times, slots.time], 1) * self.sign, torch.inf)
        order = key.argsort(dim=1, stable=True)
        count = there.sum(1)
        value = torch.cat([self.solution.value, slots.y], 1)
        value = torch.where(there[..., None], value, torch.nan).gather(1, order[..., None].expand_as(value))
        kept = torch.arange(there.shape[1], device=end.device) < count[:, None]
        filled = torch.where(kept, order, order.gather(1, (count - 1).clamp_min(0)[:, None]))
        time = torch.where(ended >= 0, (end * self.sign)[:, 0], self.solution.stats["time"])
        stats = {**self.solution.stats, "time": time, "outputs": count}
        return Record(
            replace(self.solution, value=value, stats=stats),
            self._mesh(mesh, slots, there, order, filled),
            slots.event,
            slots.time,
            slots.slope,
            filled,
            order.argsort(1),
            ended,
            slots.grazing.any(1),
        )

    def _ends(self) -> tuple[Tensor, Tensor]:
        """When the first terminal event ends every sample, a column in the direction of integration, and which."""
        end = torch.full((self.samples, 1), torch.inf, dtype=torch.float64, device=self.times.device)
        ended = torch.full((self.samples,), -1, device=end.device)
        for one in self.found:
            if self.look.events[one.event].terminal:
                sample = one.brackets.sample
                time = one.t * self.sign[sample]
                first = time < end[sample]
                ended[sample] = torch.where(first[:, 0], one.event, ended[sample])
                end[sample] = torch.where(first, time, end[sample])
        return end, ended

    def _slots(self, end: Tensor) -> _Slots:
        """One for every terminal event, as many for another as the sample has times that meets it most often."""
        slots = _Slots(self)
        for event, kind in enumerate(self.look.events):
            for number, one in enumerate(one for one in self.found if one.event == event):
                sample = one.brackets.sample
                before = (one.t * self.sign[sample] <= end[sample])[:, 0]
                if bool(before.any()) and not (kind.terminal and number):
                    slots.add(event, one, before)
            if kind.terminal and event not in slots.event:
                slots.add(event)
        return slots

    def _mesh(self, mesh: Mesh | RowMesh, slots: _Slots, there: Tensor, order: Tensor, filled: Tensor) -> RowMesh:
        """The steps, with outputs in the order of the record."""
        rows = mesh if isinstance(mesh, RowMesh) else _by_rows(mesh, self.samples, self.times)
        made = torch.full_like(self.times, -1, dtype=torch.int64)
        place = torch.ones_like(self.times)
        for number, step in enumerate(rows.steps):
            if len(step.row):
                made[step.rows[step.row], step.index] = number
                place[step.rows[step.row], step.index] = step.s
        made = torch.where(there, torch.cat([made, slots.step], 1), -1).gather(1, order)
        place = torch.cat([place, slots.s], 1).gather(1, order)
        result = RowMesh(rows.states)
        result.times = torch.cat([self.times, slots.time], 1).gather(1, filled)
        result.inside, result.divisible = bool(((place != 1) & (made >= 0)).any()), rows.divisible
        sample, index = (made >= 0).nonzero(as_tuple=True)
        by_step = made[sample, index].argsort(stable=True)
        sample, index = sample[by_step], index[by_step]
        counts = torch.bincount(made[sample, index], minlength=len(rows.steps)).tolist() if rows.steps else []
        nothing = sample[:0], sample[:0], place[0, :0] if len(place) else place.flatten()
        for step, who, which in zip(rows.steps, sample.split(counts), index.split(counts), strict=True):
            made_here = (torch.searchsorted(step.rows, who), which, place[who, which]) if len(who) else nothing
            result.steps.append(RowStep(step.t, step.h, step.y, step.rows, step.kept, *made_here))
        return result


class _Slots:
    """The times of events as columns ``(samples, S)``; NaN, and no step, where one is empty."""

    def __init__(self, recorder: _Recorder) -> None:
        times, value = recorder.times[:, :0], recorder.solution.value[:, :0]
        self._recorder = recorder
        self.event: list[int] = []
        self.time, self.y, self.s, self.slope = times, value, times, times
        self.step, self.there, self.grazing = times.long(), times.bool(), times.bool()

    def add(self, event: int, one: Found | None = None, chosen: Tensor | None = None) -> None:
        """A slot, of those who are ``chosen`` among the found ones."""
        self.event.append(event)
        for name, nothing in (("time", torch.nan), ("y", torch.nan), ("s", 1), ("slope", 1), ("step", -1),
                              ("there", False), ("grazing", False)):  # fmt: skip
            columns: Tensor = getattr(self, name)
            column = columns.new_full((len(columns), 1, *columns.shape[2:]), nothing)
            setattr(self, name, torch.cat([columns, column], 1))
        if one is None or chosen is None:
            return
        own, brackets, slope = one.brackets.sample[chosen], one.brackets[chosen], self._slope(event, one)
        self.time[own, -1] = self._after_start(own, one.t[chosen, 0])
        self.y[own, -1], self.s[own, -1], self.step[own, -1] = one.y[chosen], one.s[chosen], brackets.step
        self.there[own, -1], self.slope[own, -1] = True, slope[own]
        change = (slope[own] * brackets.h[:, 0]).abs()
        self.grazing[own, -1] = change < 2 * self._recorder.sharp**0.5 * brackets.scale

    def _after_start(self, sample: Tensor, t: Tensor) -> Tensor:
        """The times, but not the start itself: an output there is the start."""
        start, sign = self._recorder.times[sample, 0], self._recorder.sign[sample, 0]
        first = torch.nextafter(start, sign * torch.inf)
        return torch.maximum(t * sign, first * sign) * sign

    def _slope(self, event: int, one: Found) -> Tensor:
        """``dg/dt`` along the solution for every sample."""
        look, flow = self._recorder.look, self._recorder.flow
        t, y = look.everywhere(one.brackets.sample, one.t, one.y)
        speed = flow(stage_time(t, 0.0, 0.0, y), y)
        time = t.to(y.dtype)
        slopes = push(look.evaluate, [time, y], [torch.ones_like(time), speed])
        return slopes[:, event].double()


def _by_rows(mesh: Mesh, samples: int, times: Tensor) -> RowMesh:
    """Steps that all samples take together as if everyone took its own."""
    result = RowMesh(mesh.states)
    result.times = times
    everybody = torch.arange(samples, device=times.device)
    nothing = everybody[:0], everybody[:0], times.new_zeros(0)
    for step in mesh.steps:
        column = times.new_full((samples, 1), float(step.t))
        h = torch.full_like(column, float(step.h))
        h = h if step.alive is None else torch.where(step.alive, h, 0)
        y = None if step.y is None else step.y.reshape(samples, -1)
        made = _outputs(step, everybody, times) if step.outputs else nothing
        result.steps.append(RowStep(column, h, y, everybody, None, *made))
    return result


def _outputs(step: Step, everybody: Tensor, times: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of whom, which and where the outputs of a step are that all take together."""
    index = torch.tensor([index for index, _ in step.outputs], dtype=torch.int64, device=times.device)
    s = torch.tensor([s for _, s in step.outputs], dtype=torch.float64, device=times.device)
    return everybody.repeat_interleave(len(index)), index.repeat(len(everybody)), s.repeat(len(everybody))


def _together(mesh: Mesh, rows: RowMesh) -> Mesh:
    """The steps of the only sample, with the outputs of its own."""
    result = Mesh(mesh.states, mesh.keep_stages)
    result.times = rows.times.flatten().tolist()
    for step, row in zip(mesh.steps, rows.steps, strict=True):
        made = tuple(zip(row.index.tolist(), row.s.tolist(), strict=True))
        result.steps.append(replace(step, outputs=made))
    return result


def _repeats(problem: InitialValueProblem, tensors: Sequence[Tensor], t: Tensor, y: Tensor) -> bool:
    """Whether the right-hand side of all samples twice is twice what it is: shapes only suggest what goes with them."""
    rows = torch.arange(len(y), device=y.device).repeat(2)
    found = problem.divided(tensors, rows) if len(y) else None
    if found is None:
        return False
    return agrees(problem.evaluator(found[0]), t[rows], y[rows], problem.evaluator(tensors)(t.to(y.dtype), y)[rows])


class Recorded(OneStepSolver):
    """A solver that hands on what was recorded, to whichever rule wants to differentiate it."""

    watched: ClassVar[bool] = True

    def __init__(self, solver: OneStepSolver, records: Sequence[Record]) -> None:
        self.solver, self.records = solver, records
        self.rtol, self.atol, self.max_steps = solver.rtol, solver.atol, solver.max_steps
        self.tableau, self.adaptive, self.explicit = solver.tableau, solver.adaptive, solver.explicit  # type: ignore[misc]

    def __repr__(self) -> str:
        return repr(self.solver)

    def mesh(self, t: Tensor, states: int | None, keep_stages: bool = False) -> Mesh | RowMesh:
        return self.records[-1].mesh

    def layout(self, problem: InitialValueProblem) -> torch.Size:
        return self.solver.layout(problem)

    def march(
        self, problem: InitialValueProblem, params: Sequence[Tensor], mesh: Mesh | RowMesh, slope: Tensor | None = None
    ) -> Solution:
        solution, batch = self.records[-1].solution, params[0].shape[:-1]
        return Solution(
            solution.value.reshape(batch + solution.value.shape[1:]),
            solution.status.reshape(batch),
            {name: stat.reshape(batch) for name, stat in solution.stats.items()},
        )
