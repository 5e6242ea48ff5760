"""What every solver of cone programs does around its backend: bad samples out, exact answers, status, proofs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from difflayers._problem import Form, Problem
from difflayers._progress import enter
from difflayers._solution import Solution, Status, has_answer
from difflayers._solver import Solver, empty_solution, narrowed
from difflayers.qp._certificates import unseen
from difflayers.qp._cone_factor import ConeFactor, constraints
from difflayers.qp._cone_factors import Patched, factored, refactored, start
from difflayers.qp._cone_jacobian import ConeInverse
from difflayers.qp._cone_problem import ConeProblem, cone_optimality, sizes_of_terms
from difflayers.qp._cones import Cones
from difflayers.qp._data import Data, times, transposed

CERTIFIED = 1e-6
# A residual this small, relative to the data, can't be improved, or hardly; from one this small on, a factorization
# serves the next point too.
EXACT, ROUNDED, NEAR = 1e-15, 4e-15, 1e-11
# And one this small says that an answer is the exact one, wherever Newton's method started.
POLISHED = 1e-10
# From this one on a residual may be large next to the terms of its own equation.
CLEAR = 1e-12
# The first steps of Newton's method may make the residual larger.
UNCHECKED = 2


class ConeAnswers(NamedTuple):
    """What a backend found, samples first; of what has no solution, the proof is in ``y`` or in ``x``."""

    x: Tensor
    y: Tensor
    s: Tensor
    status: Tensor
    steps: Tensor


@dataclass(frozen=True)
class ConeSolver(Solver):
    """Solves a batch of cone programs: a backend comes near, Newton's method on the optimality conditions ends it.

    ``SUCCESS`` means that the optimality conditions hold, whatever the backend said, and ``INFEASIBLE`` and
    ``UNBOUNDED`` that its proof was checked. Among ``stats``, per sample:

    - ``steps`` of the backend; 0 where a warm start was near enough for Newton's method;
    - ``residual``, the largest violation of a condition, in units in which the data are about one;
    - ``degenerate``: the conditions have a singular derivative, as where multipliers or solution aren't unique.
      Derivatives are then those of least squares;
    - ``certificate``, if any sample is infeasible or unbounded: the proof, ``(*batch, n + m)``.
    """

    serves: ClassVar[frozenset[Form]] = frozenset({"cone"})
    accuracy: ClassVar[float] = 1e-6
    rounds: ClassVar[int] = 12

    @abstractmethod
    def answers(self, data: Data, cones: Cones, count: int) -> ConeAnswers:
        """What the backend finds for ``count`` samples of finite data in float64."""

    def rough(self) -> ConeSolver | None:
        """The same with less accuracy: enough for Newton's method to end most samples, in less time."""
        return None

    def fine(self) -> ConeSolver | None:
        """The same with all the accuracy that it has, for problems of small numbers."""
        return None

    def solve(self, problem: Problem, params: Sequence[Any], init: Tensor) -> Solution:
        if not isinstance(problem, ConeProblem):
            raise TypeError(f"expected a ConeProblem, got {type(problem).__name__}")
        if init.numel() == 0:
            return empty_solution(init, problem.batch_dims)
        batch = init.shape[: problem.batch_dims]
        with torch.no_grad():
            data = problem.known or problem.data(params).map(lambda block: block.detach().double())
            work = ConeWork(self, data.flattened(batch), problem.cones, batch.numel())
            work.run(init.detach().double().reshape(batch.numel(), -1) if problem.warm else None)
            return work.solution(init, problem.batch_dims)


class ConeWork:
    """One solve; samples that are broken or done are left out of what follows."""

    def __init__(self, solver: ConeSolver, data: Data, cones: Cones, samples: int) -> None:
        self.solver, self.data, self.cones, self.samples = solver, data, cones, samples
        like = data.q
        self.w = like.new_zeros(samples, data.layout.n + data.layout.m)
        self.status = torch.zeros(samples, dtype=torch.int64, device=like.device)
        self.steps = torch.zeros_like(self.status)
        self.residual = like.new_full((samples,), torch.inf)
        self.degenerate = torch.zeros_like(self.status, dtype=torch.bool)
        self.proofs = torch.zeros_like(self.w)
        self.factor: ConeFactor | None = None  # of all samples, if all were polished at once
        self.magnitude = (1 + data.magnitude).expand(samples)

    def run(self, guess: Tensor | None) -> None:
        finite = self.data.finite(self.samples)
        self.status[~finite] = int(Status.NONFINITE)
        going = finite.expand(self.samples)
        if guess is None and bool(going.all()):
            guess = self._start()
        if guess is not None:
            going = going & ~self._warm(going & guess.isfinite().all(-1), guess)
        if bool(going.any()):
            self._cold(going)
            self._unseen(going & (self.status != int(Status.SUCCESS)) & (self.status != int(Status.INFEASIBLE)))

    def _start(self) -> Tensor | None:
        """Where there is a point near enough for Newton's method: some steps of it, unchecked."""
        w, n = start(self.data, self.cones, self.samples), self.data.layout.n
        if w is None:
            return None
        for _ in range(UNCHECKED):
            y = self.cones.project(w[:, n:])
            F = cone_optimality(w, self.data, self.cones, y)
            moved = w - torch.cat(factored(self.data, self.cones, w[:, n:], y).solve(F[:, :n], F[:, n:]), dim=-1)
            w = torch.where(moved.isfinite().all(-1, keepdim=True), moved, w)
        return w

    def _warm(self, going: Tensor, guess: Tensor) -> Tensor:
        """Which samples Newton's method solved from the guess."""
        self._polish(going, guess[going])
        return going & self._holds(POLISHED)

    def _cold(self, going: Tensor) -> None:
        """Ask the backend, first for less accuracy where Newton's method may do the rest in less time."""
        rough = self.solver.rough()
        if rough is not None:
            self._ask(rough, going)
            going = going & ~self._settled()
        if bool(going.any()):
            self._ask(self.solver, going)
            fine = self.solver.fine()
            small = (self.residual <= POLISHED * self.magnitude) & ~self._holds(POLISHED)
            doubtful = going & has_answer(self.status) & (small | ~self._holds(self.solver.accuracy))
            if fine is not None and bool(doubtful.any()):
                self._better(doubtful, lambda: self._ask(fine, doubtful))

    def _settled(self) -> Tensor:
        solved = (self.status == int(Status.SUCCESS)) & self._holds(POLISHED)
        return solved | (self.status == int(Status.INFEASIBLE)) | (self.status == int(Status.UNBOUNDED))

    def _ask(self, solver: ConeSolver, going: Tensor) -> None:
        count = int(going.sum())
        found = solver.answers(self._part(going), self.cones, count)
        self.steps[going] += found.steps
        self.status[going] = found.status
        answered = has_answer(found.status)
        solved = going.index_put((going.clone(),), answered)
        w = torch.cat([found.x, found.y - found.s], dim=-1)
        self.w[going] = torch.where(w.isfinite(), w, 0)
        if bool(answered.any()):
            self._polish(solved, self.w[solved])
            left = solved & ~self._holds(POLISHED)
            if self.cones.nonnegative and bool(left.any()):
                self._again(left, found.x[left[going]], found.y[left[going]], found.s[left[going]])
            self._judge(solved)
        self._prove(going & ~has_answer(self.status), going, found)

    def _again(self, unsettled: Tensor, x: Tensor, y: Tensor, s: Tensor) -> None:
        """Newton's method from where each inequality has the one of multiplier and slack that is large for its kind."""
        rows = slice(self.cones.zero, self.cones.linear)
        held, slack = y[:, rows].clamp_min(0), s[:, rows].clamp_min(0)
        holds = held * slack.amax(-1, keepdim=True) > slack * held.amax(-1, keepdim=True)
        v = y - s
        v[:, rows] = torch.where(holds, held, -slack)
        w = torch.cat([x, v], dim=-1)
        self._better(unsettled, lambda: self._polish(unsettled, w))

    def _better(self, which: Tensor, attempt: Callable[[], None]) -> None:
        """Attempt to improve on some samples; those that it didn't stay what they were."""
        names = ("w", "residual", "degenerate", "status")
        before = {name: getattr(self, name).clone() for name in names}
        attempt()
        worse = which & ~(self.residual < before["residual"])
        if bool(worse.any()):
            for name in names:
                getattr(self, name)[worse] = before[name][worse]
            if self.factor is not None:
                v = self.w[:, self.data.layout.n :]
                self.factor = refactored(self.factor, worse, self.data, self.cones, v, self.cones.project(v))

    def _polish(self, which: Tensor, w: Tensor) -> None:
        """Newton steps, each taken where it makes the residual smaller; factored again where that isn't small yet."""
        enter("Newton's method")
        data, n, size = self._part(which), self.data.layout.n, self.magnitude[which]
        y = self.cones.project(w[:, n:])
        F = cone_optimality(w, data, self.cones, y)
        error = _largest_entry(F)
        factor, stuck = factored(data, self.cones, w[:, n:], y), torch.zeros_like(error, dtype=torch.bool)
        made = error  # what it was where the factorization is from
        for _ in range(self.solver.rounds):
            if bool(((error <= ROUNDED * size) | stuck).all()):
                break
            trial = w - torch.cat(factor.solve(F[:, :n], F[:, n:]), dim=-1)
            multiplier = self.cones.project(trial[:, n:])
            moved = cone_optimality(trial, data, self.cones, multiplier)
            smaller = _largest_entry(moved)
            better = smaller < error
            w, F, y = (torch.where(better[:, None], a, b) for a, b in ((trial, w), (moved, F), (multiplier, y)))
            # The error after the next step is about the product of two.
            far = (smaller * made > EXACT * size.square()) | (smaller > error / 8)
            again = better & far & (smaller > NEAR * size)
            stuck = stuck | ~(smaller < error / 2)
            error = torch.minimum(smaller, error)
            if bool(again.any()):
                made = torch.where(again, error, made)
                factor = refactored(factor, again, data, self.cones, w[:, n:], y)
        self.w[which], self.residual[which], self.degenerate[which] = w, error, factor.degenerate
        if bool(which.all()):
            self.factor = factor
        elif self.factor is not None:
            self.factor = Patched(self.factor, which, factor)

    def _judge(self, solved: Tensor) -> None:
        right = self._holds(self.solver.accuracy)
        self.status[solved & right] = int(Status.SUCCESS)
        wrong = solved & ~right & (self.status == int(Status.SUCCESS))
        self.status[wrong] = int(Status.STALLED)

    def _holds(self, accuracy: float) -> Tensor:
        """Where all conditions hold, each by its own size too if that may be small."""
        clear = self.residual <= CLEAR * self.magnitude
        if bool(clear.all()):
            return clear
        right = self.residual <= accuracy * self.magnitude
        unclear = right & ~clear
        if bool(unclear.any()):
            part, w = self._part(unclear), self.w[unclear]
            y = self.cones.project(w[:, self.data.layout.n :])
            sizes = self.cones.widened(sizes_of_terms(w, part, y), self.data.layout.n)
            error = cone_optimality(w, part, self.cones, y).abs()
            least = accuracy * sizes + EXACT * self.magnitude[unclear, None]
            right = right.index_put((unclear,), (error <= least).all(-1))
        return right

    def _prove(self, claimed: Tensor, going: Tensor, found: ConeAnswers) -> None:
        """Keep claims that there is no solution where the proof holds; the others are ``BACKEND_ERROR``."""
        if not bool(claimed.any()):
            return
        here = claimed[going]
        data, n = self._part(claimed), self.data.layout.n
        proofs = torch.zeros_like(self.w[claimed])
        infeasible = self.status[claimed] == int(Status.INFEASIBLE)
        y, x = (_unit(t[here]) for t in (found.y, found.x))
        proofs[:, n:] = torch.where(infeasible.unsqueeze(-1), y, 0)
        proofs[:, :n] = torch.where(infeasible.unsqueeze(-1), 0, x)
        holds = torch.where(infeasible, farkas(data, self.cones, y), ray(data, self.cones, x))
        known = infeasible | (self.status[claimed] == int(Status.UNBOUNDED))
        self.status[claimed] = torch.where(known & holds, self.status[claimed], int(Status.BACKEND_ERROR))
        self.proofs[claimed] = torch.where((known & holds).unsqueeze(-1), proofs, 0)

    def _unseen(self, left: Tensor) -> None:
        """Prove that the objective has no lower bound where it falls, be it slowly, and nothing is in the way."""
        if not bool(left.any()):
            return
        rays = unseen(self._part(left), int(left.sum()))
        found = left.index_put((left.clone(),), rays.any(-1))
        self.status[found], self.proofs[found] = int(Status.UNBOUNDED), 0
        self.proofs[found, : self.data.layout.n] = rays[rays.any(-1)]

    def _part(self, samples: Tensor) -> Data:
        return self.data if bool(samples.all()) else self.data.rows(samples)

    def solution(self, init: Tensor, batch_dims: int) -> Solution:
        batch = init.shape[:batch_dims]
        stats = {"steps": self.steps, "residual": self.residual, "degenerate": self.degenerate}
        if bool((self.proofs != 0).any()):
            stats["certificate"] = self.proofs
        value, status = narrowed(self.w, self.status, init.dtype)
        value = value.reshape(init.shape)
        state = None if self.factor is None else ConeInverse(self.factor, value, batch_dims)
        stats = {name: stat.reshape(*batch, *stat.shape[1:]) for name, stat in stats.items()}
        return Solution(value, status.to(torch.int8).reshape(batch), stats, state)


def _largest_entry(F: Tensor) -> Tensor:
    error = F.abs().amax(-1)
    return torch.where(error.isfinite(), error, torch.inf)


def farkas(data: Data, cones: Cones, y: Tensor) -> Tensor:
    """Which ``y`` prove that no ``x`` is feasible: ``Cᵀy = 0``, ``dᵀy < 0`` and ``y`` in the dual cone."""
    C, d = constraints(data)
    apart = (cones.project(y) - y).abs().amax(-1)
    pulled = transposed(C, y).abs().amax(-1)
    value = (d * y).sum(-1)
    return (torch.maximum(apart, pulled) <= CERTIFIED * _largest(data)) & (value < -CERTIFIED)


def ray(data: Data, cones: Cones, x: Tensor) -> Tensor:
    """Which ``x`` prove that the objective has no lower bound: ``Px = 0``, ``qᵀx < 0`` and ``-Cx`` in the cone."""
    moved = times(constraints(data)[0], x)
    # s is in the cone where the projection of -s on the dual one is zero.
    apart = cones.project(moved).abs().amax(-1)
    flat = times(data.P, x).abs().amax(-1)
    flat = torch.zeros_like(flat) if data.P is None else flat
    return (torch.maximum(apart, flat) <= CERTIFIED * _largest(data)) & ((data.q * x).sum(-1) < -CERTIFIED)


def _unit(rows: Tensor) -> Tensor:
    size = rows.abs().amax(-1, keepdim=True)
    return torch.where(size.isfinite() & (size > 0), rows / torch.where(size > 0, size, 1), 0)


def _largest(data: Data) -> Tensor:
    """Of the entries of the matrices, at least one, per sample."""
    C, _ = constraints(data)
    entries = C.flatten(-2) if isinstance(C, Tensor) else C.values
    return 1 + entries.abs().amax(-1)
