"""A linearly implicit method for stiff problems."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from difflayers.ode._explicit import AdaptiveSolver
from difflayers.ode._problem import InitialValueProblem
from difflayers.ode._rodas5p import RODAS5P
from difflayers.ode._tableaus import Tableau


@dataclass(frozen=True)
class Rodas(AdaptiveSolver):
    """For stiff problems: order 5 with an embedded 4, L-stable (Steinebach 2023, Rodas5P); interpolant of order 4.

    A Rosenbrock method: every step takes eight evaluations, the Jacobian of ``fn`` by as many vector-Jacobian products
    as a sample has numbers, one LU factorization of that size for every sample, and no iteration. So it is for samples
    of few numbers; with ``batch_dims=0`` the whole state is one sample. ``fn`` must be differentiable in ``y``, and in
    ``t`` where it uses it; for gradients, twice. With more than two output times, one evaluation more a step estimates
    the error of outputs inside.
    """

    tableau: ClassVar[Tableau] = RODAS5P
    explicit: ClassVar[bool] = False

    def layout(self, problem: InitialValueProblem) -> torch.Size:
        return torch.Size((problem.samples, sum(problem.state.sizes)))
