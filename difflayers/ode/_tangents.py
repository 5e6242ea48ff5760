"""Forward mode: a tangent runs along the accepted steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from difflayers._autodiff import is_tracked, push
from difflayers.ode._call import Call
from difflayers.ode._mesh import Mesh
from difflayers.ode._replay import moved, retraced


class Tangents:
    """A tangent runs along the accepted steps, with the memory of one of them."""

    def __init__(
        self, call: Call, params: Sequence[Tensor], followed: Sequence[int], directions: Sequence[Tensor]
    ) -> None:
        self.call, self.params, self.followed, self.directions = call, params, followed, directions
        self.tableau = call.solver.tableau
        if not isinstance(call.mesh, Mesh):
            raise TypeError("tangents run step by step where all samples step together")
        self.mesh = call.mesh

    def run(self, start: Tensor | None, times: Tensor | None) -> Tensor:
        mesh, y, t = self.mesh, self.params[0], self.params[1]
        # A transform around this one may follow the times.
        moves = times is not None or is_tracked(t)
        times = torch.zeros_like(t) if times is None else times
        first = w = torch.zeros_like(y) if start is None else start
        if moves:
            w, y = self._moved(0, y, w, times[0]), moved(self._evaluate(()), mesh.times[0], y, t[0], start=True)
        values = {i: (y, w) for i, time in enumerate(mesh.times) if time == mesh.times[0]}
        for step in mesh.steps:

            def one(y: Tensor, *tensors: Tensor, step: Any = step) -> Tensor:
                end, made = retraced(self.tableau, self._evaluate(tensors), step, y)
                return torch.stack([end, *made])

            tensors = [self.params[i] for i in self.followed]
            points = one(y, *tensors)
            slopes = push(one, [y, *tensors], [w, *self.directions])
            values |= {i: (points[k], slopes[k]) for k, (i, _) in enumerate(step.outputs, 1)}
            y, w = points[0], slopes[0]
        tangents = []
        for i in range(len(mesh.times)):
            point, tangent = values.get(i, (y, torch.zeros_like(y)))
            if moves and i in values and i:
                tangent = self._moved(i, point, tangent, times[i])
            tangents.append(first if i == 0 else tangent)
        return torch.stack(tangents, dim=-2)

    def _moved(self, index: int, y: Tensor, w: Tensor, direction: Tensor) -> Tensor:
        def one(y: Tensor, time: Tensor, *tensors: Tensor) -> Tensor:
            return moved(self._evaluate(tensors), self.mesh.times[index], y, time, start=index == 0)

        tensors = [self.params[i] for i in self.followed]
        return push(one, [y, self.params[1][index], *tensors], [w, direction, *self.directions])

    def _evaluate(self, tensors: Sequence[Tensor]) -> Any:
        everything = list(self.params)
        for i, tensor in zip(self.followed, tensors, strict=False):
            everything[i] = tensor
        return self.call.problem.evaluator(everything[2:])
