"""Stages in parallel where every sample has its own steps: pairs of step and sample, a chunk of them at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from difflayers.ode._mesh import RowMesh, RowStep
from difflayers.ode._problem import InitialValueProblem
from difflayers.ode._propagators import jacobians, product, propagators
from difflayers.ode._replay import tapes_of
from difflayers.ode._stages import weights_at
from difflayers.ode._tableaus import Tableau, coefficients


class Pairs:
    """Accepted ``(step, sample)`` pairs of some steps, in their order.

    Attributes:
        t: where they start, and
        h: how long they are, columns.
        y: states at their starts.
        sample: whose they are.
        parts: how many pairs every step has.
        output: for every output that they make, of which pair,
        index: which one, and
        s: where inside.
    """

    def __init__(self, steps: Sequence[RowStep]) -> None:
        chosen, output, first = [], [], 0
        for step in steps:
            here = step.h[:, 0] != 0
            here[step.row] = True  # at times equal to those before there are outputs without a step
            place = here.cumsum(0) - 1 + first
            output.append(place[step.row])
            chosen.append(here.nonzero().squeeze(1))
            first += len(chosen[-1])
        self.parts = [len(rows) for rows in chosen]

        def gathered(tensors: Sequence[Tensor]) -> Tensor:
            return torch.cat([tensor[rows] for tensor, rows in zip(tensors, chosen, strict=True)])

        self.t, self.h = gathered([step.t for step in steps]), gathered([step.h for step in steps])
        self.y = gathered([step.y for step in steps if step.y is not None])
        self.sample = gathered([step.rows for step in steps])
        self.output = torch.cat(output)
        self.index, self.s = torch.cat([step.index for step in steps]), torch.cat([step.s for step in steps])


class ParallelRows:
    """The gradient of first order by chunks of pairs; see :func:`~difflayers.ode._parallel.parallel_gradient`."""

    most = 16_384  # pairs at once, which bounds the memory

    def __init__(
        self, problem: InitialValueProblem, tableau: Tableau, tensors: Sequence[Tensor], followed: Sequence[int]
    ) -> None:
        self.problem, self.tableau, self.tensors, self.followed = problem, tableau, tensors, followed
        self.gradients: list[Tensor | None] = [None] * len(followed)

    def run(self, mesh: RowMesh, cotangent: Tensor) -> Tensor:
        """The cotangent of the start, for those of all outputs ``(samples, T, n)`` that steps have made."""
        adjoint = torch.zeros_like(cotangent[:, 0])
        for steps in self._chunks(mesh.steps):
            adjoint = self._pull(Pairs(steps), adjoint, cotangent)
        return adjoint

    def _chunks(self, steps: Sequence[RowStep]) -> Iterator[list[RowStep]]:
        chunk: list[RowStep] = []
        total = 0
        for step in reversed(steps):
            if chunk and total + len(step.rows) > self.most:
                yield chunk[::-1]
                chunk, total = [], 0
            chunk.append(step)
            total += len(step.rows)
        if chunk:
            yield chunk[::-1]

    def _pull(self, pairs: Pairs, adjoint: Tensor, cotangent: Tensor) -> Tensor:
        n, y = cotangent.shape[2], pairs.y
        known, h = coefficients(self.tableau, y.dtype, y.device), pairs.h.to(y.dtype)
        inside = bool((pairs.s != 1).any())
        stages = self.tableau.total if inside else self.tableau.stages
        own, divided = self._divided(pairs.sample)
        tapes = tapes_of(self.problem.evaluator(own), known, self.tableau.c[:stages], pairs.t, h, y)
        given, length = cotangent[pairs.sample[pairs.output], pairs.index].t(), h.squeeze(1)
        weights = weights_at(self.tableau, pairs.s, y) if inside else known.b.expand(len(pairs.s), -1)
        outside = y.new_zeros(stages, n, len(y)).index_add_(2, pairs.output, weights.t().unsqueeze(1) * given)
        each, start = propagators(self.tableau, known, lambda i: jacobians(*tapes[i]), outside.mul_(length), length)
        start[:, n].index_add_(1, pairs.output, given)
        after, adjoint = self._chain(pairs, start, adjoint)
        kappas = [product(stage[:, :n], after, stage[:, n:]).squeeze(1).t() for stage in each]
        self._collect([slope for _, slope in tapes], kappas, own, divided, pairs.sample)
        return adjoint

    def _chain(self, pairs: Pairs, start: Tensor, adjoint: Tensor) -> tuple[Tensor, Tensor]:
        """The cotangent at the end of every pair, ``(n, 1, pairs)``, and that at the start of the first ones."""
        adjoint, ends = adjoint.t().unsqueeze(1).contiguous(), []
        n = len(adjoint)
        parts = start[:, :n].split(pairs.parts, 2), start[:, n:].split(pairs.parts, 2), pairs.sample.split(pairs.parts)
        for matrix, offset, sample in reversed(list(zip(*parts, strict=True))):
            ends.append(adjoint.index_select(2, sample))
            adjoint.index_copy_(2, sample, product(matrix, ends[-1], offset))
        return torch.cat(ends[::-1], dim=2), adjoint.squeeze(1).t()

    def _divided(self, sample: Tensor) -> tuple[list[Tensor], list[bool]]:
        found = self.problem.divided(self.tensors, sample)
        if found is None:
            raise RuntimeError("a solve that was divided has parts")
        own, divided = found
        for i in self.followed:
            if divided[i]:
                own[i] = own[i].detach().requires_grad_()
        return own, divided

    def _collect(
        self,
        slopes: Sequence[Tensor],
        kappas: Sequence[Tensor],
        own: Sequence[Tensor],
        divided: Sequence[bool],
        sample: Tensor,
    ) -> None:
        live = [(slope, kappa.contiguous()) for slope, kappa in zip(slopes, kappas, strict=True) if slope.requires_grad]
        if not live or not self.followed:
            return
        wanted = [own[i] for i in self.followed]
        roots, cotangents = zip(*live, strict=True)
        found: Sequence[Tensor | None] = torch.autograd.grad(roots, wanted, cotangents, allow_unused=True)
        for k, (i, gradient) in enumerate(zip(self.followed, found, strict=True)):
            if gradient is None:
                continue
            total = self.gradients[k]
            if total is None:
                total = torch.zeros_like(self.tensors[i])
            self.gradients[k] = total.index_add_(0, sample, gradient) if divided[i] else total.add_(gradient)
