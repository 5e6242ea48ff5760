"""Methods for stiff problems."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from difflayers._problem import Form
from difflayers.ode._explicit import AdaptiveSolver
from difflayers.ode._kvaerno import Esdirk, kvaerno5
from difflayers.ode._problem import InitialValueProblem
from difflayers.ode._rodas5p import RODAS5P
from difflayers.ode._tableaus import Tableau


@dataclass(frozen=True)
class ImplicitSolver(AdaptiveSolver):
    """What methods share that factor a matrix for every sample: states are rows, with one Jacobian each."""

    serves: ClassVar[frozenset[Form]] = frozenset({"ode", "dae"})
    explicit: ClassVar[bool] = False

    def layout(self, problem: InitialValueProblem) -> torch.Size:
        return torch.Size((problem.samples, sum(problem.state.sizes)))


@dataclass(frozen=True)
class Rodas(ImplicitSolver):
    """For stiff problems: order 5 with an embedded 4, L-stable (Steinebach 2023, Rodas5P); interpolant of order 4.

    A Rosenbrock method: every step takes eight evaluations, the Jacobian of ``fn`` by as many vector-Jacobian products
    as a sample has numbers, one LU factorization of that size for every sample, and no iteration. So it is for samples
    of few numbers; with ``batch_dims=0`` the whole state is one sample. ``fn`` must be differentiable in ``y``, and in
    ``t`` where it uses it; for gradients, twice. With more than two output times, one evaluation more a step estimates
    the error of outputs inside.

    Further options are those of :class:`AdaptiveSolver`.
    """

    tableau: ClassVar[Tableau] = RODAS5P


@dataclass(frozen=True)
class Kvaerno5(ImplicitSolver):
    """For stiff problems: order 5 with an embedded 4, L-stable (Kværnø 2004); interpolant of order 4.

    A diagonally implicit Runge–Kutta method with an explicit first stage: every step takes the Jacobian of ``fn`` and
    one LU factorization like :class:`Rodas`, and six equations, each of which Newton's method solves in a few
    evaluations. A sample whose iteration doesn't converge makes a shorter step. Unlike Rodas it asks ``fn`` for first
    derivatives only, also for gradients, which come from the implicit function theorem at every stage: a piecewise
    linear ``fn`` is fine, and a Jacobian that is a little wrong costs iterations, not accuracy. Stages lie up to 1.23
    steps ahead, also beyond the last output time. Derivatives have at most order four.

    Args:
        newton: the part of the tolerance that may be left of the equations of a stage.

    Further options are those of :class:`AdaptiveSolver`.
    """

    newton: float = 0.03

    @property
    def tableau(self) -> Esdirk:  # type: ignore[override]
        return kvaerno5(self.rtol, self.atol, self.newton)
