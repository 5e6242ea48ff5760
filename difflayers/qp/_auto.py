"""The default: backends chosen by device, curvature and size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from difflayers.qp._clarabel import Clarabel
from difflayers.qp._daqp import DAQP
from difflayers.qp._data import Data
from difflayers.qp._piqp import PIQP
from difflayers.qp._solver import Answers, QPSolver


@dataclass(frozen=True)
class Auto(QPSolver):
    """DAQP for small strictly convex problems, PIQP for others; what they leave open goes to the next, Clarabel last.

    Args:
        small: up to how many unknowns a problem is small.
    """

    small: int = 150

    def choices(self, data: Data) -> Sequence[QPSolver]:
        others = (PIQP(), Clarabel())
        return (DAQP(), *others) if self._is_small_and_curved(data) else others

    def answers(self, data: Data, count: int) -> Answers:
        return self.choices(data)[0].answers(data, count)

    def _is_small_and_curved(self, data: Data) -> bool:
        curvature = data.curvature
        return curvature is not None and data.layout.n <= self.small and bool(curvature[1].all())
