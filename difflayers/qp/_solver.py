"""What every QP solver does around its backend: bad samples out, warm starts, exact answers, status."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from difflayers._problem import Form, Problem
from difflayers._progress import enter
from difflayers._solution import Solution, Status, has_answer, in_shape
from difflayers._solver import Solver, empty_solution, narrowed
from difflayers.qp._certificates import certified
from difflayers.qp._data import Data
from difflayers.qp._jacobian import Inverse
from difflayers.qp._polish import Polished, polished
from difflayers.qp._problem import QPProblem
from difflayers.qp._scaling import Scaling, misleading, ordinary
from difflayers.qp._sparse_reduced import reduced

_TOUCHING = 1e-11  # the slack of a row that passes through the solution, beside its limit

# What a Work finds of every sample: of which length, by the layout, if it isn't one number; and dtypes but the data's.
_FOUND = {
    "x": "n", "y": "p", "z": "inequalities", "active": "inequalities", "slack": "inequalities", "proofs": "unknowns",
    "status": None, "steps": None, "degenerate": None, "exact": None, "residual": None,
}  # fmt: skip
_DTYPES = {"status": torch.int64, "steps": torch.int64} | dict.fromkeys(("active", "degenerate", "exact"), torch.bool)


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

    ``SUCCESS`` means that the optimality conditions hold, whatever the backend said, and ``INFEASIBLE`` and
    ``UNBOUNDED`` that there is a proof. Among ``stats``, per sample:

    - ``steps`` of the backend; 0 where the active set of a warm start was right;
    - ``residual``, the largest violation of a condition;
    - ``margin``, the strict complementarity: the least, over inequalities, of the larger of multiplier and slack. Where
      it is zero a constraint is weakly active, and the derivative is one of several;
    - ``degenerate``: active rows that depend on each other, or a solution that isn't unique. Multipliers and
      derivatives are then those of least norm;
    - ``certificate``, if any sample is infeasible or unbounded: the proof, ``(*batch, n + p + rows)``.
    """

    serves: ClassVar[frozenset[Form]] = frozenset({"qp"})
    accuracy: ClassVar[float] = 1e-8
    sparse: ClassVar[bool] = False  # whether its backend takes sparse matrices; the others get dense ones

    @abstractmethod
    def answers(self, data: Data, count: int) -> Answers:
        """What the backend finds for ``count`` samples of finite data in float64."""

    def choices(self, data: Data) -> Sequence[QPSolver]:
        """Whose answers are asked for, in this order: each gets the samples that those before it left open."""
        return (self,)

    def apart(self, data: Data) -> Tensor | None:
        """Samples for which the choice is another than for the rest, ``(samples,)``, or None."""
        return None

    def solve(self, problem: Problem, params: Sequence[Any], init: Tensor) -> Solution:
        if not isinstance(problem, QPProblem):
            raise TypeError(f"expected a QPProblem, got {type(problem).__name__}")
        if init.numel() == 0:
            return empty_solution(init, problem.batch_dims)
        batch = init.shape[: problem.batch_dims]
        with torch.no_grad():
            data = problem.known or problem.data(params).map(lambda block: block.detach().double())
            work = Work(self, data.flattened(batch), batch.numel())
            work.run(init.detach().double().reshape(batch.numel(), -1) if problem.warm else None)
            return work.solution(init, problem.batch_dims)


class Work:
    """One solve; samples that are broken or done are left out of what follows."""

    proofs: Tensor
    unclear: Tensor  # whether the data's units may mislead

    def __init__(self, solver: QPSolver, data: Data, samples: int) -> None:
        self.solver, self.data, self.samples = solver, data, samples
        self.whole: Polished | None = None  # of all samples, if all were verified at once

    def __getattr__(self, name: str) -> Tensor:
        """What nobody has found yet: zeros."""
        if name not in _FOUND:
            raise AttributeError(name)
        columns, like = _FOUND[name], self.data.q
        shape = (self.samples,) if columns is None else (self.samples, getattr(self.data.layout, columns))
        found = torch.zeros(shape, dtype=_DTYPES.get(name, like.dtype), device=like.device)
        setattr(self, name, found)
        return found

    @property
    def limits(self) -> Tensor:
        """The right-hand sides of inequalities."""
        return self.data.limits.expand(self.samples, -1)

    def run(self, guess: Tensor | None) -> None:
        some = self.solver.apart(self.data)
        if some is None:
            self._run(guess)
            return
        for part in (some, ~some):
            work = Work(self.solver, self.data.rows(part), int(part.sum()))
            work.run(None if guess is None else guess[part])
            for name in _FOUND:
                getattr(self, name)[part] = getattr(work, name)

    def _run(self, guess: Tensor | None) -> None:
        going = None if ordinary(self.data) else self._sound()  # None: all
        left = going if guess is None else self._warm(going, guess)
        backend, *others = self.solver.choices(self.data)
        if self.whole is None and (left is None or bool(left.any())):
            self._cold(left, backend)
        if going is None and self.whole is not None:
            self._measure()  # by far the most common case
            return
        if going is None:
            going, self.unclear = torch.ones_like(self.exact), torch.zeros_like(self.exact)
        self._judge()
        if bool(self._open(going).any()):
            self._ask([backend, *others], going)

    def _sound(self) -> Tensor:
        """Which samples can be solved for; the others get their status."""
        finite, consistent = self.data.finite(self.samples), self.data.consistent(self.samples)
        self.status[~consistent] = int(Status.INFEASIBLE)
        self.status[~finite] = int(Status.NONFINITE)
        going = finite & consistent
        self.unclear = going & misleading(self.data, self.samples)
        return going

    def _warm(self, going: Tensor | None, guess: Tensor) -> Tensor:
        """Which samples are left: the guess wasn't right for them, even after a few corrections."""
        part, layout = self._part(going), self.data.layout
        x, y, v = _some(guess, going).split_with_sizes((layout.n, layout.p, layout.inequalities), dim=-1)
        active = v > 0
        if layout.low or layout.high:
            active = active & part.limits.isfinite()
        self._take(going, polished(part, active, (x, y, v.clamp_min(0)), rounds=3))
        return self.exact.logical_not() if going is None else going & ~self.exact

    def _cold(self, going: Tensor | None, backend: QPSolver) -> None:
        part, count = self._part(going), self.samples if going is None else int(going.sum())
        if part.layout.inequalities:
            found = backend.answers(part if backend.sparse else part.dense(), count)
        else:
            found = _equations_only(part, count)
        answered = has_answer(found.status)
        if going is None and bool(answered.all()):
            self.steps = found.steps
        else:
            going = self._mask(going)
            self.steps[going], self.status[going] = found.steps, found.status.to(self.status.dtype)
            going = going & has_answer(self.status)
            if not bool(going.any()):
                return
            found, part = Answers(*[each[answered] for each in found]), self._part(going)
        enter("exact answers")
        active = found.z > (part.sides - part.reached(found.x))[:, part.layout.p :]
        exact = polished(part, active, found[:3])
        self._take(going, exact)
        if self.whole is None:
            left, wrong = self._mask(going) & ~self.exact, ~exact.verified
            self.status[left] = found.status[wrong].to(self.status.dtype)
            self.x[left], self.y[left], self.active[left] = found.x[wrong], found.y[wrong], active[wrong]
            self.z[left] = torch.where(active, found.z, 0)[wrong]

    def _take(self, samples: Tensor | None, exact: Polished) -> None:
        """Take over what was verified."""
        if exact.verified.shape[0] == self.samples and bool(exact.verified.all()):
            self.whole = exact
            self.x, self.y, self.z, self.active = exact[:4]
            self.degenerate, self.exact = exact.reduced.degenerate, exact.verified
            return
        samples = self._mask(samples)
        right = samples.index_put((samples.clone(),), exact.verified)
        for name in ("x", "y", "z", "active"):
            getattr(self, name)[right] = getattr(exact, name)[exact.verified]
        self.degenerate[right], self.exact[right] = exact.reduced.degenerate[exact.verified], True

    def _mask(self, samples: Tensor | None) -> Tensor:
        return torch.ones_like(self.exact) if samples is None else samples

    def _part(self, samples: Tensor | None) -> Data:
        return self.data if samples is None or bool(samples.all()) else self.data.rows(samples)

    def _ask(self, backends: Sequence[QPSolver], going: Tensor) -> None:
        """Ask the first backend again where bad scaling may have misled it, then the others, about what is open."""
        self.whole = None
        left = self._open(going)
        odd = left & self.unclear
        odd[left] |= Scaling(self._part(left), int(left.sum())).severe
        # In these units a small residual says little.
        self.status[odd & (self.status == int(Status.SUCCESS))] = int(Status.STALLED)
        for asked, backend in enumerate(backends):
            left = self._open(going) & (odd | (asked > 0))
            if bool(left.any()):
                self._adopt(left, backend)
        self._measure()
        self.status[(self.status == int(Status.SUCCESS)) & ~self._right()] = int(Status.STALLED)

    def _adopt(self, left: Tensor, backend: QPSolver) -> None:
        """Take over what another backend settles of the scaled problem, and what it solves if nobody did."""
        part, count = self._part(left), int(left.sum())
        scaling = Scaling(part, count)
        work = Work(backend, scaling.data, count)
        work.run(None)
        solved = self.status[left] == int(Status.SUCCESS)
        better = ~work._open(torch.ones_like(solved)) | ((work.status == int(Status.SUCCESS)) & ~solved)
        work.x = scaling.point(work.x)
        work.y, work.z = scaling.multipliers(work.y, work.z)
        work.proofs = scaling.proof(work.proofs)
        here = left.index_put((left.clone(),), better)
        for name in _FOUND:
            getattr(self, name)[here] = getattr(work, name)[better]

    def _open(self, going: Tensor) -> Tensor:
        """Which of these samples are neither solved exactly nor proved to have no solution."""
        return going & ~self.exact & ~self._proved()

    def _measure(self) -> None:
        if self.whole is not None:
            self.slack, self.residual = self.whole.slack, self.whole.violation
        else:
            self.slack = self.limits - self.data.products(self.x)
            self.residual = self.data.violation(self.x, self.y, self.z, self.slack)

    def _judge(self) -> None:
        """The statuses that the conditions, and proofs that there is no solution, allow."""
        self._measure()
        right = self._right()
        answered, success = has_answer(self.status), self.status == int(Status.SUCCESS)
        self.status[answered & right] = int(Status.SUCCESS)
        misled = self.unclear & ~right
        self.status[(success & ~right) | misled], self.exact = int(Status.STALLED), self.exact & ~misled
        doubtful = (self.status != int(Status.SUCCESS)) & (self.status != int(Status.NONFINITE)) & ~misled
        if bool(doubtful.any()):
            self.status[doubtful], self.proofs[doubtful] = certified(self._part(doubtful), self.status[doubtful])

    def _right(self) -> Tensor:
        """Where the conditions hold, in units of about one too if these may mislead."""
        right = self.residual <= self.solver.accuracy * (1 + self.data.magnitude)
        if bool(self.unclear.any()):
            unclear = self.unclear
            scaling = Scaling(self._part(unclear), int(unclear.sum()))
            violation = scaling.violation(self.x[unclear], self.y[unclear], self.z[unclear])
            right[unclear] &= violation <= self.solver.accuracy * (1 + scaling.data.magnitude)
        return right

    def _proved(self) -> Tensor:
        return (self.status == int(Status.INFEASIBLE)) | (self.status == int(Status.UNBOUNDED))

    def solution(self, init: Tensor, batch_dims: int) -> Solution:
        margin = self._margin()
        stats = {
            "steps": self.steps,
            "residual": self.residual,
            "margin": margin,
            "degenerate": self._dependent(margin),
        }
        if bool(self.status.any()) and bool(self._proved().any()):
            stats["certificate"] = self.proofs
        value, status = narrowed(self._point(init.dtype), self.status, init.dtype)
        value, batch = value.reshape(init.shape), init.shape[:batch_dims]
        state = None if self.whole is None else Inverse(self.whole.reduced, value, batch_dims)
        return in_shape(Solution(value, status.to(torch.int8), stats, state), batch)

    def _margin(self) -> Tensor:
        if self.slack.shape[-1] == 0:
            return self.slack.new_full((self.samples,), torch.inf)
        return torch.maximum(self.z, self.slack).amin(-1)

    def _dependent(self, margin: Tensor) -> Tensor:
        """Where active rows depend on each other, or on rows that are idle without any slack."""
        weak = self.exact & (margin <= _TOUCHING)
        if not bool(weak.any()):
            return self.degenerate
        touching = (self.active | (self.slack <= _TOUCHING * self.data.extents))[weak]
        return self.degenerate.index_put((weak,), reduced(self._part(weak), touching).degenerate)

    def _point(self, dtype: torch.dtype) -> Tensor:
        """The unknown: multiplier minus slack, whose sign tells the active set even where both are zero."""
        bounds, x, slack = self.data.layout.low or self.data.layout.high, self.x, self.slack
        if bounds:
            slack = torch.where(slack.isinf(), 1, slack)
            x = self.data.within_bounds(x, self.active & self.exact[:, None])
        v = torch.where(self.active, self.z.clamp_min(torch.finfo(dtype).tiny), -slack.clamp_min(0))
        return torch.cat([x, self.y, v], dim=-1)


def _some(tensor: Tensor, samples: Tensor | None) -> Tensor:
    return tensor if samples is None else tensor[samples]


def _equations_only(data: Data, samples: int) -> Answers:
    """Equations alone are one factorization, which polishing does."""
    layout, like = data.layout, data.q
    counts = torch.zeros(samples, dtype=torch.int64, device=like.device)
    x, y, z = (like.new_zeros(samples, size) for size in (layout.n, layout.p, 0))
    return Answers(x, y, z, counts, counts)
