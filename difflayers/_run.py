"""The bookkeeping of a batched iteration: tolerances, masks, best iterates, status, and who is still on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from difflayers._arrays import default_tolerance, sample_norm, widen
from difflayers._monitor import tracer
from difflayers._problem import Problem, Residual
from difflayers._progress import shown
from difflayers._solution import Solution, Status

if TYPE_CHECKING:
    from difflayers._solver import IterativeSolver

_PER_SAMPLE = (
    "z",
    "error",
    "first",
    "best",
    "best_error",
    "best_merit",
    "best_step",
    "steps",
    "status",
    "active",
    "evaluations",
)


class Run:
    """One solve of an :class:`~difflayers.IterativeSolver`, in as few small operations as it takes.

    Samples that are done stand still. Once a quarter of them are, the others go on alone, where the problem can be
    divided: a sample that needs a hundred times the steps then costs its own steps, not everybody's.
    """

    halvings = 10
    crowded = 0.75

    def __init__(self, solver: IterativeSolver, problem: Problem, params: Sequence[Any], init: Tensor) -> None:
        self.solver, self.problem, self.params, self.z = solver, problem, params, init
        self.residual = problem.bind(*params)
        self.floor = default_tolerance(problem.precision or init.dtype)
        self.rtol = self.floor if solver.rtol is None else solver.rtol
        self.atol = self.floor if solver.atol is None else solver.atol
        self.relative = "fixed_point" in problem.properties
        self.error = self.first = solver.error(self.residual, init)
        finite = self.error < torch.inf
        self.best, self.best_error = init, torch.where(finite, self.error, torch.inf)
        merit = solver.merit(self.residual, init, self.error)
        self.best_merit = self.best_error if merit is self.error else torch.where(finite, merit, torch.inf)
        self.status = torch.where(finite, int(Status.MAX_STEPS), int(Status.NONFINITE))
        self.steps = self.best_step = self.evaluations = torch.zeros_like(self.status)
        self.count = self.evaluated = 0
        self.active, self.going = finite, int(finite.sum())
        self.rows: Tensor | None = None  # of the whole batch, where only a part is left
        self.whole: dict[str, Tensor] = {}
        self.state: Any = None
        self.divided = False
        self.tracer = tracer(solver)
        if self.tracer is not None:
            self.tracer.add(self.error, None)
        self.bar = shown()
        self.divisible = solver.divisible and problem.batch_dims == 1 and not torch.is_grad_enabled()
        self._end(finite & (self.error <= self.tolerance()), Status.SUCCESS)

    @property
    def all_going(self) -> bool:
        return self.going == self.status.numel()

    def scale(self) -> Tensor:
        return sample_norm(self.z.detach(), self.problem.batch_dims) if self.relative else self.first

    def tolerance(self) -> Tensor:
        return self.atol + self.rtol * self.scale()

    def advance(self, proposal: Tensor, failure: Tensor | None) -> None:
        """Move to what the step proposes, as far as the residual there is finite, and see who is done."""
        self.count += 1
        if failure is not None:
            self._end(self.active & (failure != Status.SUCCESS), failure.to(self.status.dtype))
        moved = (
            proposal if self.all_going or self.solver.masked else torch.where(self._wide(self.active), proposal, self.z)
        )
        error = self.solver.error(self.residual, moved)
        finite = error < torch.inf
        if not bool((finite | ~self.active).all()):
            moved, error, finite = self._settle(moved, error)
            self._end(self.active & ~finite, Status.NONFINITE)
        self._keep_best(moved, error)
        self.steps = torch.where(self.active, self.count, self.steps)
        self.z, self.error = moved, error if self.all_going else torch.where(self.active, error, self.error)
        if self.tracer is not None:
            self.tracer.add(self.error, self.rows)
        self._end(self.active & (self.error <= self.tolerance()), Status.SUCCESS)
        if self.count >= self.solver.patience:
            self._end(self.active & (self.count - self.best_step >= self.solver.patience), Status.STALLED)
        if self.bar is not None:
            self.bar.show(self._report, steady=False)

    def shrink(self, state: Any) -> Any:
        """Leave behind who is done, if that is enough of them; the solver's state for those who stay."""
        if not self.divisible or self.going > self.crowded * self.status.numel():
            return state
        rows = self.active.nonzero().squeeze(1)
        everywhere = rows if self.rows is None else self.rows[rows]
        part = self._part(rows, everywhere)
        if part is None:
            self.divisible = False
            return state
        self._store(state)
        if self.rows is None:  # it will be written to, and the caller's init may be a part of it
            self.state = pytree.tree_map_only(Tensor, torch.clone, state)
        self.evaluated += self.residual.evaluations
        self.residual, self.rows, self.divided = part, everywhere, True
        for name in _PER_SAMPLE:
            setattr(self, name, getattr(self, name)[rows])
        self.residual.move(self.z)
        return pytree.tree_map_only(Tensor, lambda tensor: tensor[rows], state)

    def solution(self, state: Any) -> Solution:
        """The answers of the whole batch, and what the solver learnt of the Jacobian."""
        self._store(state)
        for name, tensor in self.whole.items():
            setattr(self, name, tensor)
        if self.tracer is not None:
            self.tracer.finish(self.tolerance())
        unconverged = (self.status == Status.MAX_STEPS) | (self.status == Status.STALLED)
        value, error = self.z, self.error
        if bool(unconverged.any()):
            value = torch.where(self._wide(unconverged), self.best, self.z)
            error = torch.where(unconverged, self.best_error, self.error)
        scale = self.scale()
        stats = {
            "steps": self.steps,
            "evaluations": self.evaluations,
            "residual": error,
            "relative_residual": torch.where(scale > 0, error / scale.clamp_min(torch.finfo(scale.dtype).tiny), error),
        }
        return Solution(value, self.status.to(torch.int8), stats, self.solver.inverse(self.residual, value, self.state))

    def _report(self) -> tuple[float, str]:
        limit, samples = self.solver.max_steps, self.status.numel() if self.rows is None else self.samples
        residual = float(torch.where(self.active, self.error, 0).max())
        left = f"{self.going:,}/{samples:,} samples left"
        return self.count / limit, f"step {self.count:,}/{limit:,}, {left}, residual {residual:.1e}"

    def _end(self, samples: Tensor, status: Tensor | Status) -> None:
        if bool(samples.any()):
            self.status = torch.where(samples, status, self.status)
            self.active = self.status == Status.MAX_STEPS
            self.going = int(self.active.sum())

    def _keep_best(self, moved: Tensor, error: Tensor) -> None:
        merit = self.solver.merit(self.residual, moved, error)
        better = merit < self.best_merit
        if merit is not error:  # as good to rounding, and nearer to where it leads
            level = self.best_merit + self.floor * self.best_merit.abs()
            better = better | ((merit <= level) & (error < self.best_error))
        if not self.all_going:
            better = better & self.active
        if bool(better.all()):
            self.best, self.best_error, self.best_merit = moved, error, merit
            self.best_step = torch.full_like(self.steps, self.count)
        else:
            self.best = torch.where(self._wide(better), moved, self.best)
            self.best_error = torch.where(better, error, self.best_error)
            self.best_merit = self.best_error if merit is error else torch.where(better, merit, self.best_merit)
            self.best_step = torch.where(better, self.count, self.best_step)

    def _settle(self, moved: Tensor, error: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A trial point where F isn't finite goes halfway back, a few times; then back to where it came from."""
        finite = (error < torch.inf) | ~self.active
        for _ in range(self.halvings):
            # From finite to non-finite z the midpoint isn't finite either: then the start is the only safe place.
            middle = torch.nan_to_num(self.z + (moved - self.z) / 2, nan=torch.nan, posinf=torch.nan, neginf=torch.nan)
            moved = torch.where(self._wide(finite), moved, torch.where(middle.isfinite(), middle, self.z))
            error = self.solver.error(self.residual, moved)
            finite = (error < torch.inf) | ~self.active
            if bool(finite.all()):
                return moved, error, finite
        return torch.where(self._wide(finite), moved, self.z), torch.where(finite, error, self.error), finite

    def _part(self, rows: Tensor, everywhere: Tensor) -> Residual | None:
        """The residual of some rows alone, if it is there what it is here.

        Which arguments go with the samples is the callable's secret, and shapes only suggest it. So nothing is believed
        that an evaluation of both doesn't show.
        """
        part = self.problem.part(self.params, everywhere, self.status.numel() if self.rows is None else self.samples)
        if part is None:
            return None
        z, here = self.z[rows], self.residual(self.z)[rows]
        if self.divided and len(rows) > 1:  # shown once it holds for fewer, down to one, where shapes are squeezed
            return part.remember(z, here)
        try:
            there = part(z)
        except Exception:  # whatever a callable does with batch sizes that it wasn't written for
            return None
        allowed = self.floor * (sample_norm(z, 1) + sample_norm(here, 1))
        same = there.shape == here.shape and bool((sample_norm(there - here, 1) <= allowed).all())
        return part if same else None

    @property
    def samples(self) -> int:
        """How many there were in the beginning."""
        return self.whole["status"].numel()

    def _store(self, state: Any) -> None:
        self.evaluations = torch.full_like(self.steps, self.evaluated + self.residual.evaluations)
        rows = self.rows
        if rows is None:
            self.whole = {name: getattr(self, name) for name in _PER_SAMPLE}
            self.state = state
        else:
            self.whole = {name: old.index_copy(0, rows, getattr(self, name)) for name, old in self.whole.items()}
            # In place: it may be large, and is nobody else's.
            self.state = pytree.tree_map(
                lambda new, old: old.index_copy_(0, rows, new) if isinstance(new, Tensor) else new, state, self.state
            )

    def _wide(self, mask: Tensor) -> Tensor:
        return widen(mask, self.z)
