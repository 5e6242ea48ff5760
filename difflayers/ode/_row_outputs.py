"""Outputs of samples with steps of their own: noted in every step, and made for many steps at once."""

from __future__ import annotations

import torch
from torch import Tensor

from difflayers.ode._mesh import RowMesh, RowStep
from difflayers.ode._methods import AnyStages
from difflayers.ode._stages import weights_at
from difflayers.ode._tableaus import Tableau


class RowOutputs:
    """The outputs of one solve.

    Args:
        tableau: the method.
        mesh: what is told of which outputs a step makes; its output times are known.
        y: the states at the start, which is what outputs are that nobody makes.

    Attributes:
        values: the outputs, ``(samples, T, n)``; complete after :meth:`make`.
    """

    enough = 2**18  # numbers that may wait

    def __init__(self, tableau: Tableau, mesh: RowMesh, y: Tensor) -> None:
        self.tableau, self.mesh = tableau, mesh
        self.values = y.unsqueeze(1).repeat(1, mesh.times.shape[1], 1)
        self._waiting: list[tuple[RowStep, Tensor, Tensor, Tensor]] = []
        self._numbers = 0

    def note(self, step: RowStep, stages: AnyStages, here: Tensor, columns: list[Tensor]) -> None:
        """Samples ``here`` of a step have outputs.

        ``columns`` are the first and the one after the last of them, where the step ends, and the states at its start
        and end.
        """
        sample, t, h = step.rows[:, None], step.t, step.h
        known = torch.cat([sample, t, h, *columns], dim=1).index_select(0, here)
        slopes = stages.slopes.index_select(1, here)
        self._waiting.append((step, here, known, slopes))
        self._numbers += slopes.numel()
        if self._numbers > self.enough:
            self.make()

    def make(self) -> None:
        """Make those that wait."""
        if not self._waiting:
            return
        steps, here, known, slopes = zip(*self._waiting, strict=True)
        self._waiting, self._numbers = [], 0
        head, states = torch.cat(known).split([6, 2 * self.values.shape[2]], dim=1)
        first, after = head[:, 3].long(), head[:, 4].long()
        count = after - first
        each = torch.arange(len(head), device=head.device).repeat_interleave(count)
        # Those of one sample in one step follow each other.
        index = torch.arange(len(each), device=head.device) - (count.cumsum(0) - after)[each]
        sample, t, h, _, _, end = head[each].unbind(1)
        row = sample.long()
        time = self.mesh.times[row, index]
        at_end = (time == end) | (h == 0)
        s = torch.where(at_end, 1.0, (time - t) / h)
        start, value = states[each].to(self.values.dtype).chunk(2, dim=1)
        if not bool(at_end.all()):
            self.mesh.inside = True
            weights = weights_at(self.tableau, s, value)
            own = torch.bmm(weights.unsqueeze(1), torch.cat(slopes, 1)[:, each].transpose(0, 1)).squeeze(1)
            between = torch.addcmul(start, h[:, None].to(start.dtype), own)
            value = torch.where(at_end[:, None], value, between)
        self.values[row, index] = value
        sizes = [int(one.sum()) for one in count.split([len(rows) for rows in here])]
        parts = [x.split(sizes) for x in (torch.cat(here)[each], index, s)]
        for step, *own_outputs in zip(steps, *parts, strict=True):
            step.row, step.index, step.s = own_outputs
