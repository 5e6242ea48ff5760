"""Right-hand sides with a matrix before the derivative: ``M dy/dt = f(t, y)``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from difflayers._autodiff import in_functorch

Evaluate = Callable[[Tensor, Tensor], Tensor]


class Massive:
    """``f``, which knows its ``M``.

    Attributes:
        mass: ``(n, n)`` or ``(samples, n, n)``, on the graph.
    """

    def __init__(self, evaluate: Evaluate, mass: Tensor) -> None:
        self.mass, self._evaluate = mass, evaluate
        self._constraint: tuple[Tensor | None] | None = None

    def __call__(self, t: Tensor, rows: Tensor) -> Tensor:
        return self._evaluate(t, rows)

    @property
    def constraint(self) -> Tensor | None:
        """The projection on what ``M`` maps nothing to, where ``f`` must vanish; a constant. None if that is nothing.

        Singular values below rounding of the largest one count as zero.
        """
        if self._constraint is None:
            self._constraint = (_complement(self.mass.detach()),)
        return self._constraint[0]


def mass_of(evaluate: Evaluate) -> Tensor | None:
    """The ``M`` of a right-hand side, None for the identity."""
    return evaluate.mass if isinstance(evaluate, Massive) else None


def constraint_of(evaluate: Evaluate) -> Tensor | None:
    """Its :attr:`Massive.constraint`."""
    return evaluate.constraint if isinstance(evaluate, Massive) else None


def times(matrix: Tensor, rows: Tensor) -> Tensor:
    """One matrix for all rows, or one for each."""
    return (matrix @ rows.unsqueeze(-1)).squeeze(-1)


def _complement(mass: Tensor) -> Tensor | None:
    left, values, _ = torch.linalg.svd(mass)
    cut = mass.shape[-1] * torch.finfo(mass.dtype).eps * values.amax(-1, keepdim=True)
    zero = values <= cut
    if not in_functorch() and not bool(zero.any()):
        return None
    null = left * zero.unsqueeze(-2)
    projection: Tensor = null @ null.mT
    return projection
