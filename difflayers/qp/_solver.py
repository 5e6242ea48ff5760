"""What every QP solver does around its backend: bad samples out, warm starts, exact answers, status."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from difflayers._problem import Form, Problem
from difflayers._solution import Solution, Status
from difflayers._solver import Solver
from difflayers.qp._data import Data
from difflayers.qp._jacobian import Inverse
from difflayers.qp._polish import Polished, polished
from difflayers.qp._problem import QPProblem


class Answers(NamedTuple):
    """What a backend found, samples first."""

    x: Tensor
    y: Tensor
    z: Tensor  # multipliers of [G; -I; I], not negative, (samples, rows)
    status: Tensor
    steps: Tensor


@dataclass(frozen=True)
class QPSolver(Solver):
    """Solves a batch of QPs to machine precision: the backend's active set is verified, corrected and solved for.

    ``SUCCESS`` means that the optimality conditions hold, whatever the backend said. ``stats``: ``steps`` of the backend
    (0 where a warm start was right), ``residual`` (largest violation of a condition), ``margin`` (strict
    complementarity: the least, over inequalities, of the larger of multiplier and slack; where it is zero, the derivative
    is one of several), ``degenerate`` (rows that depend on each other, or a solution that isn't unique: multipliers and
    derivatives are then those of least norm), ``certificate`` (for infeasible and unbounded samples).
    """

    serves: ClassVar[frozenset[Form]] = frozenset({"qp"})
    tolerance_of_conditions: ClassVar[float] = 1e-7

    @abstractmethod
    def answers(self, data: Data, count: int) -> Answers:
        """What the backend finds for ``count`` samples of finite data in float64."""

    def solve(self, problem: Problem, params: Sequence[Any], init: Tensor) -> Solution:
        if not isinstance(problem, QPProblem):
            raise TypeError(f"expected a QPProblem, got {type(problem).__name__}")
        batch = init.shape[: problem.batch_dims]
        with torch.no_grad():
            data = problem.known or problem.data(params).map(lambda block: block.detach().double()).flattened(batch)
            guess = init.detach().double().reshape(batch.numel(), -1) if problem.warm else None
            work = _Work(self, data, batch.numel(), guess)
            work.run()
            return work.solution(init, problem.batch_dims)


class _Work:
    """One solve; everything is per sample, and samples that are broken or done are left out of what follows."""

    def __init__(self, solver: QPSolver, data: Data, samples: int, guess: Tensor | None) -> None:
        self.solver, self.data, self.guess, self.samples = solver, data, guess, samples
        layout, like = data.layout, data.q
        self.x, self.y = like.new_zeros(samples, layout.n), like.new_zeros(samples, layout.p)
        self.z = like.new_zeros(samples, layout.inequalities)
        self.active = torch.zeros_like(self.z, dtype=torch.bool)
        self.status = torch.full((samples,), int(Status.SUCCESS), device=like.device)
        self.steps = torch.zeros_like(self.status)
        self.degenerate = torch.zeros_like(self.status, dtype=torch.bool)
        self.inverse: Polished | None = None

    def run(self) -> None:
        finite = self.data.finite(self.samples)
        consistent = self.data.consistent(self.samples)
        self.status[~finite] = int(Status.NONFINITE)
        self.status[finite & ~consistent] = int(Status.INFEASIBLE)
        going = finite & consistent
        if self.guess is not None:
            going = going & ~self._warm(going)
        if bool(going.any()):
            self._cold(going)

    def _warm(self, going: Tensor) -> Tensor:
        """Which samples the guess was right for, after a few corrections."""
        layout = self.data.layout
        active = (self.guess[going, layout.n + layout.p :] > 0) & self.data.limits.expand_as(self.z)[going].isfinite()
        return self._take(going, polished(self._part(going), active, rounds=3))

    def _cold(self, going: Tensor) -> None:
        part = self._part(going)
        answers = (
            self.solver.answers(part, int(going.sum()))
            if part.layout.inequalities
            else _no_inequalities(part, int(going.sum()))
        )
        self.steps[going] = answers.steps.to(self.steps.dtype)
        self.status[going] = answers.status.to(self.status.dtype)
        solved = going.clone()
        solved[going] = answers.status <= int(Status.STALLED)
        if not bool(solved.any()):
            return
        found = answers.status <= int(Status.STALLED)
        x, y, z = (t if bool(found.all()) else t[found] for t in answers[:3])
        self.x[solved], self.y[solved], self.z[solved] = x, y, z
        part = self._part(solved)
        active = z > part.limits.expand_as(z) - part.products(x)
        self.active[solved] = active
        self.status[solved] = int(Status.SUCCESS)  # until the conditions say otherwise
        self._take(solved, polished(part, active))

    def _take(self, samples: Tensor, exact: Polished) -> Tensor:
        """Take over what was verified; which samples that are."""
        right = samples.clone()
        right[samples] = exact.verified
        every = bool(right.all())
        self.inverse = exact if every else None
        for name in ("x", "y", "z", "active"):
            new = getattr(exact, name)
            if every:
                setattr(self, name, new)
            else:
                getattr(self, name)[right] = new[exact.verified]
        self.degenerate[right] = exact.reduced.degenerate[exact.verified]
        return right

    def _part(self, samples: Tensor) -> Data:
        return self.data if bool(samples.all()) else self.data.rows(samples)

    def solution(self, init: Tensor, batch_dims: int) -> Solution:
        limits = self.data.limits.expand_as(self.z)
        slack = limits - self.data.products(self.x)
        residual = self.data.violation(self.x, self.y, self.z, slack)
        scale = 1 + self.data.magnitude
        wrong = (self.status == int(Status.SUCCESS)) & ~(residual <= self.solver.tolerance_of_conditions * scale)
        self.status = torch.where(wrong, int(Status.STALLED), self.status)
        margin = torch.maximum(self.z, slack).amin(-1) if self.z.shape[-1] else torch.full_like(residual, torch.inf)
        batch = init.shape[:batch_dims]
        stats = {"steps": self.steps, "residual": residual, "margin": margin, "degenerate": self.degenerate}
        value = _packed(self, slack, init)
        state = None
        if self.inverse is not None and self.inverse.reduced is not None:
            state = Inverse(self.inverse.reduced, value, batch_dims)
        return Solution(
            value, self.status.to(torch.int8).reshape(batch), {k: v.reshape(batch) for k, v in stats.items()}, state
        )


def _packed(work: _Work, slack: Tensor, init: Tensor) -> Tensor:
    """The unknown: multiplier minus slack, whose sign is the active set even where both are zero."""
    tiny = torch.finfo(init.dtype).tiny
    unbounded = slack.isinf()
    v = torch.where(work.active, work.z.clamp_min(tiny), -torch.where(unbounded, 1, slack).clamp_min(0))
    return torch.cat([work.x, work.y, v], dim=-1).to(init.dtype).reshape(init.shape)


def _no_inequalities(data: Data, samples: int) -> Answers:
    """Equations alone are one factorization, which polishing does."""
    layout = data.layout
    zeros = data.q.new_zeros(samples, layout.n)
    counts = torch.zeros(samples, dtype=torch.int64, device=zeros.device)
    return Answers(zeros, zeros.new_zeros(samples, layout.p), zeros.new_zeros(samples, 0), counts, counts)
