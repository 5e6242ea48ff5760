"""The Jacobian of a large cone program: one sparse factorization per sample."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from difflayers.qp._cone_factor import ConeFactor
from difflayers.qp._cones import Cones, Rotation
from difflayers.qp._data import Data
from difflayers.qp._sparse import Array

# What is added to P and to I, relative to the largest entries, and left to refinement.
REGULARIZATION = 1e-9
# A test problem's solution that is off by more than this says that there are several.
UNDETERMINED = 1e-6


class SparseFactor(ConeFactor):
    """LU factorizations by SuperLU of ``[[P + δI, CᵀD], [C, D - (1 + ε)I]]``.

    What that leaves, refinement ends, as in the proximal method of multipliers; so for singular systems too, if they
    have a solution. ``degenerate`` are the samples where a test problem isn't solved.
    """

    def __init__(self, data: Data, cones: Cones, rotation: Rotation) -> None:
        self.n, samples = data.layout.n, len(rotation.values)
        whole, D = data.all_sparse(), cones.derivative(rotation)
        if whole.P is None or whole.G is None:
            raise TypeError("expected sparse blocks")
        systems = zip(whole.P.csr(samples), whole.G.csr(samples), D.csr(samples), strict=True)
        self._systems = [_System(*blocks) for blocks in systems]
        flags = [system.degenerate for system in self._systems]
        self.degenerate = torch.tensor(flags, dtype=torch.bool, device=data.q.device)

    def solve(self, first: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self._solve(first, rows, "N")

    def solve_transposed(self, first: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self._solve(first, rows, "T")

    def _solve(self, first: Tensor, rows: Tensor, side: str) -> tuple[Tensor, Tensor]:
        sides = torch.cat([first, rows], dim=-1).detach().cpu().numpy()
        found = np.stack([system.solve(own, side) for system, own in zip(self._systems, sides, strict=True)])
        x, v = torch.from_numpy(found).to(first).split((self.n, rows.shape[-1]), dim=-1)
        return x, v


class _System:
    """That of one sample."""

    def __init__(self, P: Any, C: Any, D: Any) -> None:
        from scipy.sparse import bmat, diags, identity

        n, m = P.shape[0], C.shape[0]
        exact = bmat([[P, C.T @ D], [C, D - identity(m)]], format="csc")
        size = abs(exact.data).max(initial=1.0)
        shift = np.concatenate([np.full(n, REGULARIZATION), np.full(m, -REGULARIZATION)]) * size
        self._lu = _lu(exact + diags(shift, format="csc"))
        test = np.random.default_rng(0).uniform(0.5, 1, n + m)
        rhs = exact @ test
        found = self.solve(rhs, "N")
        found = found + self.solve(rhs - exact @ found, "N")
        self.degenerate = not np.abs(found - test).max(initial=0) <= UNDETERMINED

    def solve(self, rhs: Array, side: str) -> Array:
        if self._lu is None:
            return np.zeros_like(rhs)
        found: Array = self._lu.solve(rhs, side)
        return found if np.isfinite(found).all() else np.zeros_like(rhs)


def _lu(matrix: Any) -> Any:
    from scipy.sparse.linalg import splu

    try:
        return splu(matrix)
    except RuntimeError:  # exactly singular
        return None
