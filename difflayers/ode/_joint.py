"""One step size for all samples: times and steps are numbers, and one number a step is read back."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from difflayers._progress import shown
from difflayers._solution import Solution, Status
from difflayers.ode._control import Controller, first_step
from difflayers.ode._mesh import Mesh, Step
from difflayers.ode._methods import stages_of, traced_stages_of
from difflayers.ode._problem import Evaluate
from difflayers.ode._stability import EVERY, at_border, tells

if TYPE_CHECKING:
    from difflayers.ode._explicit import OneStepSolver


class JointRun:
    """One solve; what fails is left where it is, and the others go on."""

    window = 500  # trials after which progress is judged
    hopeless = 100.0  # times max_steps that it would take at that rate
    control: Callable[[OneStepSolver, Tensor, torch.Size], Controller] = Controller

    def __init__(
        self, solver: OneStepSolver, evaluate: Evaluate, times: list[float], y: Tensor, samples: int, mesh: Mesh
    ) -> None:
        self.solver, self.times, self.mesh = solver, times, mesh
        self.y = y
        mesh.times = times
        traced = torch.is_grad_enabled()
        self.stages = (traced_stages_of if traced else stages_of)(solver.tableau, evaluate, y, len(times) > 2)
        self.tells = solver.adaptive and tells(self.stages)
        self.t, self.end = times[0], times[-1]
        self.span = self.end - self.t
        self.values = [y]
        self.trials = self.accepted = self.rejected = 0
        self.controller: Controller | None = None
        self.smallest = 1e-15 * abs(self.span)
        self.rows = torch.Size((samples, y.numel() // max(samples, 1)))
        # What differs between samples matters only once one of them has failed.
        self.alive: Tensor | None = None
        self.status = torch.zeros(samples, dtype=torch.int8, device=y.device)
        self.counts = torch.zeros(4, samples, dtype=torch.int64, device=y.device)
        self.stiff = torch.zeros(samples, dtype=torch.int64, device=y.device)
        self.reached = torch.zeros(samples, dtype=torch.int64, device=y.device)
        self.time = torch.full((samples,), self.t, dtype=torch.float64, device=y.device)
        self.bar = shown()

    def run(self, slope: Tensor | None) -> Solution:
        """Step to the end, or to where no sample gets further."""
        while len(self.values) < len(self.times) and (self.times[len(self.values)] == self.t or not self.y.numel()):
            self.values.append(self.y)
        if len(self.values) < len(self.times):
            slope = self.stages.start(self.t, self.y, slope)
            if self.solver.adaptive:
                self._adaptive(slope)
            else:
                self._fixed()
        self._finish(self._still(), Status.SUCCESS)
        return self._solution()

    def _fixed(self) -> None:
        for start, end in zip(self.times, self.times[1:], strict=False):
            steps = self.solver.steps_between(abs(end - start)) if end != start else 0
            for index in range(steps):
                if self.trials >= self.solver.max_steps:
                    return self._finish(self._still(), Status.MAX_STEPS)
                self._fixed_step((end - start) / steps, end, index == steps - 1)
                if self._done() or len(self.values) == len(self.times):
                    return None
                self.stages.start(self.t, self.y)
        return None

    def _fixed_step(self, h: float, end: float, last: bool) -> None:
        y = self.stages.attempt(self.t, self.y, h)
        self.trials += 1
        self.accepted += 1
        self._drop_nonfinite(y)
        made = range(len(self.values), len(self.values) + self.times[len(self.values) :].count(end) if last else 0)
        ended = self._look(h, y)
        self._record(h, tuple((index, 1.0) for index in made))
        self._leave(ended)
        self._move(end if last else self.t + h, y)
        self.values += [self.y] * len(made)

    def _adaptive(self, slope: Tensor) -> None:
        solver = self.solver
        control = self.controller = self.control(solver, self.y, self.rows)
        h = first_step(control, self.stages, self.t, self.y, slope, self.span)
        mark = self.t
        while True:
            if self.trials >= solver.max_steps:
                return self._finish(self._still(), Status.MAX_STEPS)
            if self.trials % self.window == 0 and self.trials:
                needed = abs(self.end - self.t) * self.window
                if needed > abs(self.t - mark) * self.hopeless * solver.max_steps:
                    self._give_up(stuck=True)
                    if self._done():
                        return None
                mark = self.t
            remaining = self.end - self.t
            final = abs(h) * 1.01 >= abs(remaining)
            h = remaining if final else h
            y = self.stages.attempt(self.t, self.y, h)
            self.trials += 1
            error = control.error(self.stages.estimates(), y, h, self.alive)
            if error <= 1:
                self.accepted += 1
                done = self._accept(h, y, final)
                if done:
                    return None
                h = control.grown(h, error)
            else:
                self.rejected += 1
                h = control.shrunk(h, error)
                if abs(h) <= max(self.smallest, 4e-16 * abs(self.t)):
                    self._give_up(stuck=False)
                    if self._done():
                        return None
                    h = control.recovered(remaining)

    def _accept(self, h: float, y: Tensor, final: bool) -> bool:
        """Take the step and its outputs; whether it was the last one."""
        end = self.end if final else self.t + h
        direction = 1.0 if h > 0 else -1.0
        outputs = []
        while len(self.values) < len(self.times) and (self.times[len(self.values)] - end) * direction <= 0:
            s = 1.0 if self.times[len(self.values)] == end else (self.times[len(self.values)] - self.t) / h
            outputs.append((len(self.values), s))
            # A dead sample's output is never read.
            self.values.append(y if s == 1 else self.stages.inside(self.t, self.y, h, s))
        if self.tells and self.accepted % EVERY == 0:
            self.stiff = self.stiff + EVERY * (at_border(self.stages, self.t, self.y, y, h, self.rows) & self._still())
        ended = self._look(h, y)
        self._record(h, tuple(outputs))
        self._leave(ended)
        self._move(end, y)
        if len(self.values) == len(self.times) or self._done():
            return True
        if self.controller is not None:
            self.controller.moved()
        self.stages.advance(self.t, self.y)
        return False

    def _record(self, h: float, outputs: tuple[tuple[int, float], ...]) -> None:
        stages = self.stages.slopes.clone() if self.mesh.keep_stages else None
        self.mesh.add(Step(self.t, h, outputs, self.y, self.alive, stages))

    def _look(self, h: float, y: Tensor) -> Tensor | None:
        """Which samples end in the step that was accepted."""
        watch = self.mesh.watch
        return None if watch is None else watch(self.stages, self.t, h, self.y, y, None, self.alive)

    def _leave(self, ended: Tensor | None) -> None:
        if ended is not None:
            self._finish(ended & self._still(), Status.SUCCESS)
            self.alive = (self._still() & ~ended)[:, None]

    def _move(self, t: float, y: Tensor) -> None:
        if self.alive is not None:
            y = torch.where(self.alive, y.reshape(self.rows), self.y.reshape(self.rows)).view(y.shape)
        self.y = y
        self.t = t
        if self.bar is not None:
            self.bar.show(self._report)

    def _report(self) -> tuple[float, str]:
        done = 1 - abs((self.end - self.t) / self.span) if self.span else 1.0
        return done, f"{self.accepted:,} steps accepted, {self.rejected:,} rejected"

    def _still(self) -> Tensor:
        return torch.ones_like(self.status, dtype=torch.bool) if self.alive is None else self.alive.squeeze(1)

    def _done(self) -> bool:
        return self.alive is not None and not bool(self.alive.any())

    def _give_up(self, stuck: bool) -> None:
        """End the samples that hold up the others, after this attempt."""
        if self.controller is None:
            return
        rows = self.controller.rows
        broken = ~rows.isfinite() & self._still()
        if bool(broken.any()):
            self._finish(broken, Status.NONFINITE)
        else:
            held = torch.where(self._still(), rows, -1)
            self._finish(held >= (0.5 * held.max() if stuck else held.max().clamp_max(1.0)), Status.STALLED)

    def _drop_nonfinite(self, y: Tensor) -> None:
        if not math.isfinite(float(y.detach().sum())):
            broken = ~y.detach().view(self.rows).isfinite().all(1) & self._still()
            if bool(broken.any()):
                self._finish(broken, Status.NONFINITE)

    def _finish(self, samples: Tensor, status: Status) -> None:
        """These samples end here."""
        self.status = torch.where(samples, int(status), self.status).to(torch.int8)
        evaluations = self.stages.evaluations
        now = torch.tensor([self.trials, self.accepted, self.rejected, evaluations], device=self.y.device)
        self.counts = torch.where(samples, now[:, None], self.counts)
        self.reached = torch.where(samples, len(self.values), self.reached)
        self.time = torch.where(samples, self.t, self.time)
        if status is not Status.SUCCESS:
            self.alive = (self._still() & ~samples)[:, None]

    def _solution(self) -> Solution:
        missing = len(self.times) - len(self.values)
        value = torch.stack([*self.values, *[self.values[0].detach()] * missing])
        value = value.view(len(self.times), *self.rows).transpose(0, 1)
        if bool((self.status != Status.SUCCESS).any()):
            there = torch.arange(len(self.times), device=value.device) < self.reached[:, None]
            value = torch.where(there[:, :, None], value, torch.nan)
        names = ("steps", "accepted", "rejected", "evaluations")
        stats = dict(zip(names, self.counts, strict=True))
        stats |= {"stiff": self.stiff, "time": self.time, "outputs": self.reached}
        return Solution(value, self.status, stats)
