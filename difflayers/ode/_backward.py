"""State, adjoint and integrals of the continuous adjoint, solved from output time to output time, backward."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from difflayers._solution import Status
from difflayers.ode._along import by_row, in_rows
from difflayers.ode._control import Controller
from difflayers.ode._explicit import Dopri5, OneStepSolver
from difflayers.ode._joint import JointRun
from difflayers.ode._mesh import Mesh
from difflayers.ode._problem import InitialValueProblem


class SemiController(Controller):
    """The controller that reads only the first numbers of the state."""

    def __init__(self, numbers: int, solver: OneStepSolver, y: Tensor, rows: torch.Size) -> None:
        super().__init__(solver, y, rows)
        scale = torch.full_like(y, torch.inf).reshape(-1)
        scale[:numbers] = self._atol.expand(y.numel())[:numbers]
        self._atol, self._root = scale, math.sqrt(max(numbers, 1))


class Backward:
    """One backward solve: ``dλ/dt = -(∂f/∂y)ᵀλ`` and ``dL/dθ = ∫ (∂f/∂θ)ᵀλ dt`` along ``dy/dt = f``.

    Every interval is mapped to one from 0 to 1, which serves samples with their own times as well; samples that have no
    part in it stand still.

    Args:
        problem: what was solved.
        options: ``rtol``, ``atol`` and ``max_steps`` of the backward solve, and whether integrals have no say.
        value: the outputs ``(samples, T, n)``, and
        outputs: how many of them a sample has.
        params: ``(y0, t, *tensors)``.
        wanted: which of them a gradient is wanted of.
    """

    def __init__(
        self,
        problem: InitialValueProblem,
        options: tuple[float, float, int, bool],
        value: Tensor,
        outputs: Tensor,
        params: Sequence[Tensor],
        wanted: Sequence[int],
    ) -> None:
        rtol, atol, max_steps, self.seminorm = options
        self.engine = Dopri5(rtol=rtol, atol=atol, max_steps=max_steps)
        self.problem, self.value, self.outputs, self.params, self.wanted = problem, value, outputs, params, wanted
        self.times = params[1].detach().double()
        self.followed = [params[i] for i in wanted if i > 1]
        self.sizes = [p.numel() for p in self.followed]
        self.evaluate = problem.evaluator(params[2:])
        # Where samples that have no part in an interval stand still.
        self.start = torch.where(value[:, 0].isfinite(), value[:, 0], 0)
        self.differences = torch.zeros_like(value)
        self.broken = torch.zeros_like(outputs, dtype=torch.bool)
        self.integrals = value.new_zeros(sum(self.sizes))
        self.stats = {name: torch.zeros_like(outputs) for name in ("steps", "evaluations")}

    def run(self, cotangent: Tensor) -> list[Tensor]:
        """The gradients of what is wanted."""
        g = by_row(cotangent)
        there = torch.arange(g.shape[1], device=g.device) < self.outputs[:, None]
        g = torch.where(there[..., None], g, 0)
        adjoint = torch.zeros_like(g[:, 0])
        for i in range(g.shape[1] - 1, 0, -1):
            adjoint = self._interval(i, adjoint + g[:, i])
        times = self._time_gradient(g, adjoint) if 1 in self.wanted else None
        parts = self.integrals.split(self.sizes) if self.sizes else ()
        others = iter([part.view_as(p) for part, p in zip(parts, self.followed, strict=True)])
        found = []
        for i in self.wanted:
            gradient = (adjoint + g[:, 0]) if i == 0 else times if i == 1 else next(others)
            found.append(gradient.reshape(self.params[i].shape).to(self.params[i].dtype))  # type: ignore[union-attr]
        return found

    def gap(self, rtol: float, atol: float) -> Tensor:
        """How far the trajectories parted in units of these tolerances, the largest of all outputs, ``(samples,)``."""
        scale = atol + rtol * self.value.abs().amax(-1, keepdim=True)
        norms = (self.differences / scale).square().mean(-1).sqrt()
        largest = torch.where(norms.isnan(), 0, norms).amax(-1) if norms.shape[-1] else norms.new_zeros(len(norms))
        return torch.where(self.broken, torch.inf, largest)

    def _interval(self, i: int, adjoint: Tensor) -> Tensor:
        """The adjoint at output ``i - 1`` from that at output ``i``."""
        moving = (self.outputs > i) & (adjoint != 0).any(1)
        t = self.times
        moving = moving & (t[..., i] != t[..., i - 1])
        if not bool(moving.any()):
            return adjoint
        live = moving[:, None]
        y = torch.where(live, self.value[:, i], self.start)
        count = y.numel()
        head = [y.reshape(-1), torch.where(live, adjoint, 0).reshape(-1)]
        mesh = Mesh(states=0)
        state = torch.cat([*head, self.integrals])
        run = JointRun(self.engine, functools.partial(self._slope, i, live), [0.0, 1.0], state, 1, mesh)
        if self.seminorm:
            run.control = functools.partial(SemiController, 2 * count)
        solution = run.run(None)
        for name, total in self.stats.items():
            total += solution.stats[name]
        if bool(solution.status[0] != Status.SUCCESS):
            self.broken = self.broken | moving
        end = solution.value[0, -1]
        y, moved = end[:count].view_as(y), end[count : 2 * count].view_as(adjoint)
        self.integrals = end[2 * count :]
        self.differences[:, i - 1] = torch.where(live, y - self.value[:, i - 1], 0)
        return torch.where(live, moved, adjoint)

    def _slope(self, i: int, live: Tensor, s: Tensor, state: Tensor) -> Tensor:
        count = self.start.numel()
        shape = self.start.shape if self.times.dim() > 1 else self.problem.native
        start = self.times[..., i]
        length = self.times[..., i - 1] - start
        time = (start + s.double() * length).to(state.dtype)
        length = torch.where(live, length.reshape(-1, 1), 0).to(state.dtype)
        cotangent = (state[count : 2 * count].view_as(self.start) * length).reshape(shape)
        with torch.enable_grad():
            y = state[:count].detach().reshape(shape).requires_grad_()
            f = self.evaluate(time.reshape(-1, 1) if time.dim() else time, y)
            leaves = [y, *self.followed]
            if f.requires_grad:
                pulled = torch.autograd.grad(f, leaves, cotangent, materialize_grads=True)
            else:
                pulled = tuple(map(torch.zeros_like, leaves))
        ahead = torch.where(live, f.detach().reshape(self.start.shape) * length, 0)
        back = torch.where(live, pulled[0].reshape(self.start.shape), 0)
        return torch.cat([ahead.reshape(-1), -back.reshape(-1), *[-p.reshape(-1) for p in pulled[1:]]])

    def _time_gradient(self, g: Tensor, adjoint: Tensor) -> Tensor:
        """An output moves along the flow with its time, and against it with that of the start."""
        times = in_rows(self.times, torch.Size((len(g),)))
        parts = []
        with torch.no_grad():
            for i in range(g.shape[1]):
                y = self.value[:, i].contiguous()
                if self.times.dim() > 1:
                    slope = self.evaluate(times[:, [i]].to(y.dtype), y)
                else:
                    slope = self.evaluate(self.times[i].to(y.dtype), y.reshape(self.problem.native)).reshape(y.shape)
                parts.append((slope * (g[:, i] if i else -adjoint)).nan_to_num(nan=0.0).sum(1))
        found = torch.stack(parts, dim=1)
        return found if self.times.dim() > 1 else found.sum(0)
