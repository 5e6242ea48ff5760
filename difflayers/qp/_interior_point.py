"""An interior-point method for batches of quadratic programs, in torch on any device."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from difflayers._progress import shown
from difflayers._solution import Status
from difflayers.qp._data import Data
from difflayers.qp._newton import TINY, Newton, Program, Workspace
from difflayers.qp._solver import Answers, QPSolver

# Of the way to the boundary: at least, and at most, near the solution.
REACH, NEARLY = 0.99, 0.9999
# The target for the products of slack and multiplier, of their mean, where the last step brought no progress.
CENTERED = 0.3
# Added to a unit diagonal; by how much more where the linear solve was too rough, and up to where.
REGULARIZATION, MORE, MOST = 1e-12, 100, 1e-6
# In the start's least squares, so that unknowns without curvature or rows stay small.
SHRINKAGE = 1e-3
# A step's residual differs from what it should be by less than this share of the error before it.
ROUGH = 0.3
# Steps between two looks for certificates.
PERIOD = 4
# Samples that are left go on alone once they are so few.
CROWDED = 0.75


@dataclass(frozen=True)
class InteriorPoint(QPSolver):
    """Mehrotra's predictor-corrector method: one factorization a step for the whole batch, on the data's device.

    For any convex QP, LPs included. References: Mehrotra 1992, SIAM J. Optim. 2(4); Nocedal and Wright 2006, "Numerical
    Optimization", chapters 14 and 16; Vandenberghe 2010, "The CVXOPT linear and quadratic cone program solvers";
    Friedlander and Orban 2012, Math. Program. Comput. 4 (regularization as a proximal step from where the iteration
    stands, which moves no solution and makes redundant rows harmless).

    Samples that are done stand still, and leave once they are a quarter. A sample is ``INFEASIBLE`` or ``UNBOUNDED``
    when an iterate or a step proves it: multipliers that are a Farkas certificate, or a direction of endless descent.

    Args:
        tol: of residuals and gap, relative to the equilibrated data; the answer is polished afterwards.
        max_steps: iterations before a sample is ``MAX_STEPS``.
    """

    tol: float = 1e-8
    max_steps: int = 60

    def answers(self, data: Data, count: int) -> Answers:
        return _Run(self, Program.of(data, count)).answers()


class _Run:
    """One solve, of the samples that are left; what became of the others is in ``whole``."""

    def __init__(self, solver: InteriorPoint, program: Program) -> None:
        self.solver, self.program, layout = solver, program, program.data.layout
        self.sizes = (layout.n, layout.p, layout.inequalities, layout.inequalities)
        self.room = Workspace(program)
        self.point = self.best = self.previous = _start(program, self.room)
        self.error = torch.full_like(self.point[:, 0], torch.inf)
        self.residual = program.residual(*self._split(self.point))
        self.expected, self.before = self.residual.parts, self.error
        self.regularization = torch.full_like(self.point[:, :1], REGULARIZATION)
        self.status = torch.full_like(self.error, int(Status.MAX_STEPS), dtype=torch.int64)
        self.steps = torch.zeros_like(self.status)
        self.rows = torch.arange(len(self.point), device=self.point.device)
        self.whole = self._outcome()

    def answers(self) -> Answers:
        bar = shown()
        for count in range(self.solver.max_steps):
            self._judge()
            rough = self._rough()
            going, again = torch.stack((self.going.sum(), rough.sum())).tolist()
            if bar is not None:
                bar.show(functools.partial(self._report, count, going), steady=False)
            if going == 0:
                break
            if again:
                self._retreat(rough)
            if going <= CROWDED * len(self.point):
                self._shrink()
            self._step(certify=count % PERIOD == PERIOD - 1)
        self._judge()
        self._store()
        best, status, steps = self.whole
        x, y, _, z = self._split(best)
        return Answers(x, y, torch.where(z > TINY, z, 0), status, steps)

    def _report(self, count: int, going: int) -> tuple[float, str]:
        limit, samples = self.solver.max_steps, len(self.whole[1])
        return count / limit, f"step {count}/{limit}, {going:,}/{samples:,} samples left"

    @property
    def going(self) -> Tensor:
        return self.status == int(Status.MAX_STEPS)

    def _split(self, point: Tensor) -> tuple[Tensor, ...]:
        parts: tuple[Tensor, ...] = point.split(self.sizes, dim=-1)
        return parts

    def _judge(self) -> None:
        """See which samples are done, and remember the best point of the others."""
        error = self.residual.norm()
        better = self.going & (error < self.error)
        self.best = torch.where(better.unsqueeze(-1), self.point, self.best)
        self.error = torch.where(better, error, self.error)
        self._end(better & (error <= self.solver.tol), Status.SUCCESS)

    def _end(self, samples: Tensor, status: Status) -> None:
        self.status = torch.where(samples, int(status), self.status)

    def _rough(self) -> Tensor:
        """Samples whose last step was solved for so roughly that it did harm."""
        fine = self.residual.far_from(self.expected) <= ROUGH * self.before + self.solver.tol
        return self.going & ~fine & (self.regularization[:, 0] < MOST)

    def _retreat(self, rough: Tensor) -> None:
        """Back to before the last step, to take it with more regularization."""
        rough = rough.unsqueeze(-1)
        self.point = torch.where(rough, self.previous, self.point)
        self.regularization = torch.where(rough, MORE * self.regularization, self.regularization)
        self.residual = self.program.residual(*self._split(self.point))

    def _shrink(self) -> None:
        """Leave behind who is done."""
        self._store()
        left = self.going.nonzero().squeeze(-1)
        self.program, self.residual = self.program.part(left), self.residual.part(left)
        for name in ("point", "best", "error", "regularization", "status", "steps", "rows"):
            setattr(self, name, getattr(self, name)[left])

    def _store(self) -> None:
        self.whole = tuple(
            whole.index_copy(0, self.rows, part) for whole, part in zip(self.whole, self._outcome(), strict=True)
        )

    def _outcome(self) -> tuple[Tensor, ...]:
        return self.best, self.status, self.steps

    def _step(self, *, certify: bool) -> None:
        _, _, s, z = self._split(self.point)
        regularization = self.regularization * self.program.unit
        newton = Newton(self.program, s, z, regularization, self.room)
        affine = newton.direction(self.residual.parts, s * z)
        move = newton.direction(self.residual.parts, self._centered(s, z, affine))
        if certify:
            self._certify(move)
            self._certify(self.point)
        self._move(move, regularization)

    def _centered(self, s: Tensor, z: Tensor, affine: Tensor) -> Tensor:
        """The products of slack and multiplier to take off, by Mehrotra's rule."""
        _, _, ds, dz = self._split(affine)
        length = 1 / self._reach(affine).clamp_min(1)
        gap = (s * z).sum(-1, keepdim=True)
        left = ((s + length * ds) * (z + length * dz)).sum(-1, keepdim=True)
        mean = gap / self.program.there.sum(-1, keepdim=True).clamp_min(1)
        # Without that the method can cycle (Salahi, Peng, Terlaky 2007, SIAM J. Optim. 18(4)).
        slow = (self.residual.norm() > self.error).unsqueeze(-1)
        share = torch.where(slow, CENTERED, (left / gap) ** 3)
        return s * z + torch.where(slow, 0, ds * dz) - share * mean

    def _reach(self, move: Tensor) -> Tensor:
        """The inverse of the length at which a slack or a multiplier becomes zero."""
        inside = 2 * self.sizes[-1]
        return (-move[:, -inside:] / self.point[:, -inside:]).amax(-1, keepdim=True)

    def _move(self, move: Tensor, regularization: Tensor) -> None:
        finite = move.isfinite().all(-1, keepdim=True)
        self._end(self.going & ~finite[:, 0] & (self.regularization[:, 0] >= MOST), Status.STALLED)
        self.steps = self.steps + self.going
        # All at one length: with curvature, x is in the dual residual too.
        error = self.residual.norm()
        reach = (1 - 0.1 * error).clamp(REACH, NEARLY).unsqueeze(-1)
        length = reach / torch.maximum(self._reach(move), reach)
        change = torch.where(finite & self.going.unsqueeze(-1), length * move, 0)
        self.previous, self.before = self.point, error
        self.point = self.point + change
        x, y, _, z = self._split(change)
        kept = torch.where(finite & self.going.unsqueeze(-1), 1 - length, 1)
        self.expected = kept * self.residual.parts + regularization * torch.cat([-x, y, z], dim=-1)
        self.regularization = torch.where(finite, self.regularization, MORE * self.regularization)
        self.residual = self.program.residual(*self._split(self.point))

    def _certify(self, point: Tensor) -> None:
        """End the samples that a point or a move proves to have no solution."""
        x, y, s, z = self._split(point)
        z = self.program.there * torch.relu(z)
        size = torch.cat([x, y, z], dim=-1).abs().amax(-1, keepdim=True)
        for proven, status in (
            (self.program.infeasible(y, z), Status.INFEASIBLE),
            (self.program.unbounded(x), Status.UNBOUNDED),
        ):
            proven = proven & self.going
            self.best = torch.where(proven.unsqueeze(-1), torch.cat([x, y, s, z], dim=-1) / size, self.best)
            self._end(proven, status)


def _start(program: Program, room: Workspace) -> Tensor:
    """Least squares for slacks and multipliers at once, moved inside (Vandenberghe, section 5.3)."""
    columns, equations, rows = program.split(program.unit)
    _, _, scales = program.split(program.scales)
    s, z = program.extent / scales, program.cost * scales  # both one, scaled
    soft = torch.cat([SHRINKAGE * columns, REGULARIZATION * equations, torch.zeros_like(rows)], dim=-1)
    newton = Newton(program, s, z, soft, room)
    origin = torch.cat([program.q, -program.b, -program.d], dim=-1)
    found = newton.direction(origin, torch.zeros_like(s))
    relative = found[:, -rows.shape[-1] :] / z
    s = torch.where(program.there > 0, s * _inside(-relative), 1)
    z = torch.where(program.there > 0, z * _inside(relative), TINY)
    return torch.cat([found[:, : -2 * rows.shape[-1]], s, z], dim=-1)


def _inside(v: Tensor) -> Tensor:
    """``v``; where an entry isn't positive, all of the sample's are raised until that is one."""
    low = -v.amin(-1, keepdim=True)
    return torch.where(low < 0, v, v + (1 + low))
