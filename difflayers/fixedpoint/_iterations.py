"""Batched iterations for fixed points and roots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from difflayers._mixing import History, mix
from difflayers._problem import Form, Residual
from difflayers._solver import IterativeSolver


@dataclass(frozen=True)
class Picard(IterativeSolver):
    """Fixed-point iteration with damping: ``z <- z + damping · (f(z) - z)``.

    Converges linearly where the spectral radius of ``∂f/∂z`` is below one. For a root problem it follows ``F``
    itself, ``z <- z + damping · F(z)``.

    Args:
        damping: below one for shorter steps, where the iteration oscillates.

    Further options are those of :class:`~difflayers.IterativeSolver`.
    """

    damping: float = 1.0
    serves: ClassVar[frozenset[Form]] = frozenset({"root", "fixed_point"})
    divisible = True

    def init(self, residual: Residual, z: Tensor) -> None:
        return None

    def step(self, residual: Residual, z: Tensor, state: None) -> tuple[Tensor, None]:
        return torch.add(z, residual(z), alpha=self.damping), None


@dataclass(frozen=True)
class Anderson(IterativeSolver):
    """Anderson acceleration (type II): the combination of the last ``memory`` iterates with the least residual.

    On linear maps it is GMRES in disguise (Walker and Ni 2011). Memory: ``2 · memory`` states, whatever ``max_steps``.

    Args:
        memory: how many iterates are combined.
        damping: of the combined residual that is added to the combined iterate.

    Further options are those of :class:`~difflayers.IterativeSolver`.
    """

    memory: int = 8
    damping: float = 1.0
    serves: ClassVar[frozenset[Form]] = frozenset({"root", "fixed_point"})
    divisible = True

    def init(self, residual: Residual, z: Tensor) -> History:
        return History.empty(residual.rows(z), self.memory)

    def step(self, residual: Residual, z: Tensor, state: History) -> tuple[Tensor, History]:
        rows = state.iterates.shape[0]
        mixed, state = mix(state, z.reshape(rows, -1), residual(z).reshape(rows, -1), self.damping)
        return mixed.reshape(z.shape), state
