"""The default: backends chosen by device, curvature and size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from difflayers.qp._clarabel import Clarabel
from difflayers.qp._daqp import DAQP
from difflayers.qp._data import Data, Layout
from difflayers.qp._interior_point import InteriorPoint
from difflayers.qp._piqp import PIQP
from difflayers.qp._solver import Answers, QPSolver
from difflayers.qp._sparse_reduced import width

_SMALL, _OTHERS = DAQP(), (PIQP(), Clarabel())


@dataclass(frozen=True)
class Auto(QPSolver):
    """A backend chosen by device, curvature and size; what it leaves open goes to others, before it is reported.

    On a GPU InteriorPoint; otherwise DAQP where every ``P`` is dense and positive definite and there are few unknowns
    and inequalities, and PIQP where not. PIQP and then Clarabel get the samples that are neither solved nor proved to
    have no solution; of sparse problems that factorizations fill in, Clarabel first, whose own are by dense pieces.
    Equations alone need no backend.

    Args:
        unknowns: up to how many there are few.
        inequalities: up to how many there are few; a bound counts twice, since PIQP makes less of them.
        front: up to which width of a search through the graph of a sparse problem it is PIQP's.
    """

    unknowns: int = 150
    inequalities: int = 300
    front: int = 1300

    def choices(self, data: Data) -> Sequence[QPSolver]:
        if not data.layout.inequalities:
            return (self,)
        if data.sparse:
            return _OTHERS[::-1] if width(data) > self.front else _OTHERS
        if data.q.device.type != "cpu":
            return (InteriorPoint(), *_OTHERS)
        return (_SMALL, *_OTHERS) if self._is_small(data.layout) and data.curved else _OTHERS

    def apart(self, data: Data) -> Tensor | None:
        # By sample: one without curvature, or without an answer, mustn't choose for the others.
        if data.curved or data.curvature is None or data.curvature[1].dim() == 0:
            return None
        curved = data.curvature[1]
        mixed = bool(curved.any())
        return curved if mixed and data.layout.inequalities and self._is_small(data.layout) else None

    def answers(self, data: Data, count: int) -> Answers:
        return self.choices(data)[0].answers(data, count)

    def _is_small(self, layout: Layout) -> bool:
        rows = layout.m + 2 * (layout.low + layout.high)
        return layout.n <= self.unknowns and rows <= self.inequalities
