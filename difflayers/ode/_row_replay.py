"""Accepted steps once more, where every sample has its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from difflayers.ode._linearization import flow
from difflayers.ode._mesh import RowMesh, RowStep
from difflayers.ode._methods import traced_stages_of
from difflayers.ode._problem import InitialValueProblem
from difflayers.ode._replay import moved, swept
from difflayers.ode._stages import Evaluate, stage_time, weights_at
from difflayers.ode._tableaus import Tableau, coefficients


def replay_rows(
    tableau: Tableau, evaluate: Evaluate, columns: Sequence[Tensor], inside: bool, y0: Tensor, t: Tensor | None
) -> Tensor:
    """The outputs ``(samples, T, n)`` for rows ``y0``; what the solve didn't get to is the start.

    Args:
        tableau: the method.
        evaluate: the right-hand side.
        columns: see :meth:`RowMesh.columns`.
        inside: whether any output lies inside a step.
        y0: the start.
        t: output times that move, or None.
    """
    begin, h, made, place, times = columns
    y = start = y0 if t is None else moved(evaluate, times[:, :1], y0, t[:, :1], start=True)
    starts, ends, slopes = [], [], []
    for k in range(begin.shape[1]):
        stages = traced_stages_of(tableau, evaluate, y)
        own, length = begin[:, k : k + 1], h[:, k : k + 1]
        stages.start(own, y)
        end = stages.advanced(own, y, length)
        if inside:
            slopes.append(torch.stack(stages.complete(own, y, length), dim=1))
        starts.append(y)
        ends.append(end)
        y = end
    steps = made.clamp_min(0)
    index = steps[..., None].expand(-1, -1, y0.shape[1])
    value = torch.stack(ends, 1).gather(1, index)
    if inside:
        weights = weights_at(tableau, place.reshape(-1), y0).reshape(*place.shape, -1, 1)
        each = index.unsqueeze(2).expand(-1, -1, tableau.total, -1)
        own = (weights * torch.stack(slopes, 1).gather(1, each)).sum(2)
        between = torch.stack(starts, 1).gather(1, index) + h.gather(1, steps)[..., None].to(y0.dtype) * own
        value = torch.where((place == 1)[..., None], value, between)
    value = torch.where((made >= 0)[..., None], value, start.unsqueeze(1))
    found = list(value.unbind(1))
    if t is not None:
        found = [moved(evaluate, times[:, [i]], one, t[:, [i]]) for i, one in enumerate(found)]
    return torch.stack([y0, *found[1:]], dim=1)


class RowGradient:
    """The gradient of first order, step by step backward, with the memory of one step."""

    def __init__(
        self, problem: InitialValueProblem, tableau: Tableau, mesh: RowMesh, tensors: Sequence[Tensor],
        followed: Sequence[int],
    ) -> None:  # fmt: skip
        self.problem, self.tableau, self.mesh, self.tensors = problem, tableau, mesh, tensors
        self.followed = followed
        self.gradients: list[Tensor | None] = [None] * len(followed)
        self._rows: Tensor | None = None
        self._own: list[Tensor] = list(tensors)
        self._split: list[bool] = [False] * len(tensors)
        self._evaluate = problem.evaluator(tensors)

    def run(self, cotangent: Tensor) -> Tensor:
        """The cotangent of the start, for those of all outputs ``(samples, T, n)`` that steps have made."""
        adjoint = torch.zeros_like(cotangent[:, 0])
        for segment in reversed(self.mesh.segments):
            for step, y in reversed(list(self._states(segment))):
                self._choose(step.rows)
                own = adjoint if self._rows is None else adjoint[step.rows]
                pulled = self._pull(step, y, own, cotangent)
                adjoint = pulled if self._rows is None else adjoint.index_copy(0, step.rows, pulled)
        return adjoint

    def _states(self, segment: Sequence[RowStep]) -> Iterator[tuple[RowStep, Tensor]]:
        y = segment[0].y
        if y is None:
            raise RuntimeError("the first step of a segment keeps its state")
        with torch.no_grad():
            for number, step in enumerate(segment):
                if number and step.kept is not None:
                    y = y[step.kept]
                yield step, y
                if step is not segment[-1]:
                    self._choose(step.rows)
                    stages = traced_stages_of(self.tableau, self._evaluate, y)
                    stages.start(step.t, y)
                    y = stages.advanced(step.t, y, step.h)

    def _choose(self, rows: Tensor) -> None:
        """Turn to these samples."""
        everybody = len(rows) == self.problem.samples
        if (everybody and self._rows is None) or rows is self._rows:
            return
        self._rows = None if everybody else rows
        self._own, self._split = list(self.tensors), [False] * len(self.tensors)
        if not everybody:
            part = self.problem.divided(self.tensors, rows)
            if part is None:
                raise RuntimeError("a solve that was divided has parts")
            self._own, self._split = part
            for i in self.followed:
                if self._split[i]:
                    self._own[i] = self._own[i].detach().requires_grad_()
        self._evaluate = self.problem.evaluator(self._own)

    def _pull(self, step: RowStep, y: Tensor, adjoint: Tensor, cotangent: Tensor) -> Tensor:
        at_end = step.s == 1
        g = cotangent[step.rows[step.row], step.index]
        adjoint = adjoint.index_add(0, step.row[at_end], g[at_end])
        between = len(step.row) > 0 and not bool(at_end.all())
        stages = self.tableau.total if between else self.tableau.stages
        known, h = coefficients(self.tableau, y.dtype, y.device), step.h.to(y.dtype)
        direct = y.new_zeros(stages, *y.shape)
        direct[: self.tableau.stages] = known.b[:, None, None] * (h * adjoint)
        if between:
            row, g = step.row[~at_end], g[~at_end]
            weights = weights_at(self.tableau, step.s[~at_end], y)
            direct.index_add_(1, row, weights.t()[:, :, None] * (h[row] * g))
            adjoint = adjoint.index_add(0, row, g)
        wanted = [self._own[i] for i in self.followed]
        found: list[Tensor | None] = [None] * len(wanted)
        adjoint = adjoint + swept(self.tableau, self._evaluate, step.t, h, y, direct, wanted, found)
        for k, gradient in enumerate(found):
            self._add(k, gradient)
        return adjoint

    def _add(self, k: int, gradient: Tensor | None) -> None:
        if gradient is None:
            return
        total, i = self.gradients[k], self.followed[k]
        if self._split[i]:
            if total is None:
                total = torch.zeros_like(self.tensors[i])
            self.gradients[k] = total.index_add(0, self._rows, gradient)  # type: ignore[arg-type]
        else:
            self.gradients[k] = gradient if total is None else total.add_(gradient)


def row_time_gradient(evaluate: Evaluate, mesh: RowMesh, value: Tensor, cotangent: Tensor, adjoint: Tensor) -> Tensor:
    """The gradient of every output time, ``(samples, T)``: an output moves along the flow, the start against it."""

    def along(index: int, g: Tensor) -> Tensor:
        y = value[:, index].contiguous()
        speed = flow(evaluate)(stage_time(mesh.times[:, [index]], 0.0, 0.0, y), y)
        return (speed * g).nan_to_num(nan=0.0).sum(1)

    return torch.stack([-along(0, adjoint), *[along(i, cotangent[:, i]) for i in range(1, value.shape[1])]], dim=1)
