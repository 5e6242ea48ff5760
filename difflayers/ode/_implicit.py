"""What stages share that linearize the right-hand side at the start of a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from difflayers.ode._linearization import Factors, Linearization, linearized
from difflayers.ode._mass import Evaluate, mass_of, times
from difflayers.ode._stages import Time, mixed, stage_time
from difflayers.ode._tableaus import ImplicitTableau


class ImplicitStages(ABC):
    """The stages of a step for states ``(samples, n)``, on the graph where gradients are on.

    Where ``inner`` outputs may come, their error is estimated too: stiffness damps that at the end of a step, not that
    inside. It is what the interpolant lacks, half way, to satisfy the equation, through the matrix of the stages.

    Attributes:
        evaluations: how often the right-hand side was evaluated.
        factors: those of the last step.
    """

    factors: Factors

    def __init__(self, tableau: ImplicitTableau, evaluate: Evaluate, like: Tensor, inner: bool = False) -> None:
        self.tableau, self.evaluate, self.inner, self.evaluations = tableau, evaluate, inner, 0
        self.mass = mass_of(evaluate)
        self._defect: Tensor | None = None
        self._slopes: list[Tensor] = []
        self._around: Linearization | None = None

    @property
    def slopes(self) -> Tensor:
        return torch.stack(self._slopes)

    @property
    def around(self) -> Linearization:
        if self._around is None:
            raise RuntimeError("a step starts first")
        return self._around

    @property
    def first(self) -> Tensor:
        """The right-hand side at the start of the step."""
        return self.around.slope

    def start(self, t: Time, y: Tensor, slope: Tensor | None = None) -> Tensor:
        """The right-hand side at the start of a step, which is linearized here."""
        self._around = linearized(self.evaluate, t, y)
        self.evaluations += 1
        return self._around.slope

    def attempt(self, t: Time, y: Tensor, h: Time) -> Tensor:
        """The state after a step, which must have started; its stages stay here."""
        end = self.advanced(t, y, h)
        if self.inner:
            with torch.no_grad():
                self._defect = self._filtered_defect(t, y, h)
        return end

    @abstractmethod
    def advanced(self, t: Time, y: Tensor, h: Time) -> Tensor:
        """The same without a look at what is inside."""

    def weighed(self, rows: Tensor) -> Tensor:
        """``M`` times rows."""
        return rows if self.mass is None else times(self.mass, rows)

    def _filtered_defect(self, t: Time, y: Tensor, h: Time) -> Tensor:
        point = self.inside(t, y, h, 0.5)
        speed = mixed(torch.zeros_like(y), self._slopes, self.tableau.speeds(0.5).tolist(), 1.0)
        self.evaluations += 1
        return self.factors.solve(self.evaluate(stage_time(t, 0.5, h, y), point) - self.weighed(speed))

    def complete(self, t: Time, y: Tensor, h: Time) -> list[Tensor]:
        """All stages of the step, which outputs inside need."""
        return self._slopes

    def estimates(self) -> list[Tensor]:
        """Estimates of the local error, not yet times ``h``, flat, off the graph."""
        zero = torch.zeros_like(self._slopes[0])
        found = mixed(zero, self._slopes, self.tableau.error[0], 1.0).detach()
        if self._defect is not None:
            found = torch.maximum(found.abs(), self._defect.abs())
        return [found.reshape(-1)]

    def inside(self, t: Time, y: Tensor, h: Time, s: float) -> Tensor:
        """The state at ``t + sh`` of the last step."""
        return mixed(y, self._slopes, self.tableau.weights(s).tolist(), h)

    def advance(self, t: Time, y: Tensor) -> None:
        """The next step starts here."""
        self.start(t, y)

    def advance_where(self, moved: Tensor, t: Tensor, y: Tensor) -> None:
        """The same for the samples that moved, a column; to the others it is where they are already."""
        self.start(t, y)

    def divided(self, evaluate: Evaluate, chosen: Tensor) -> ImplicitStages:
        """The stages of some of the samples."""
        part = type(self)(self.tableau, evaluate, self.around.slope, self.inner)
        part._around, part.evaluations = self.around.part(chosen), self.evaluations
        return part


def pulled_back(
    leaf: Tensor,
    roots: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    wanted: Sequence[Tensor],
    gradients: list[Tensor | None],
) -> Tensor:
    """The cotangent of ``leaf`` for those of ``roots``; ``gradients`` of what is ``wanted`` are added to."""
    live = [(root, cotangent) for root, cotangent in zip(roots, cotangents, strict=True) if root.requires_grad]
    if not live:
        return torch.zeros_like(leaf)
    first, *others = torch.autograd.grad(
        [root for root, _ in live], [leaf, *wanted], [cotangent for _, cotangent in live], allow_unused=True
    )
    for index, gradient in enumerate(others):
        if gradient is not None:
            total = gradients[index]
            # The first one may be anybody's memory, such as an expanded cotangent's.
            gradients[index] = gradient.clone() if total is None else total.add_(gradient)
    return torch.zeros_like(leaf) if first is None else first


def summed_products(left: Tensor, right: Tensor) -> Tensor:
    """``Σ leftᵢ rightᵢᵀ`` over stages ``i``, for every sample."""
    # The slopes of a sample that has failed aren't finite, and nobody asks for their derivatives.
    return torch.einsum("i...a,i...b->...ab", left, torch.where(right.isfinite(), right, 0))


def shared(matrices: Tensor, like: Tensor) -> Tensor:
    """One matrix for every sample, or their sum where ``like`` is everybody's."""
    return matrices.sum(0) if matrices.dim() > like.dim() else matrices


def weighted(weights: Tensor, rows: Tensor) -> Tensor:
    """``Σ weightsᵢ rowsᵢ``."""
    return torch.mv(rows.flatten(1).t(), weights).view(rows.shape[1:])
