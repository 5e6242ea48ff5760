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
# A pivot on the diagonal that is at least this large, beside the largest of its column, saves fill-in.
PIVOT = 1e-3
# A test problem's solution that is off by more than this says that there are several.
UNDETERMINED = 1e-6


class SparseFactor(ConeFactor):
    """LU factorizations by SuperLU of ``[[P + δI, CᵀD], [C, D - (1 + ε)I]]``.

    With ``D = B + U diag(w) Uᵀ``, where the second part is what long second-order cones add to a multiple of the
    identity, ``r = Uᵀv`` are unknowns too, so that they aren't dense blocks (Domahidi, Chu, Boyd 2013, "ECOS: an SOCP
    solver for embedded systems").
    What that leaves, refinement ends, as in the proximal method of multipliers; so for singular systems too, if they
    have a solution. ``degenerate`` are the samples where a test problem isn't solved.
    """

    def __init__(self, data: Data, cones: Cones, rotation: Rotation) -> None:
        self.n, samples = data.layout.n, len(rotation.values)
        whole, D = data.all_sparse(), cones.derivative(rotation)
        if whole.P is None or whole.G is None:
            raise TypeError("expected sparse blocks")
        weights = D.weights.detach().cpu().numpy()
        blocks = (matrix.csr(samples) for matrix in (whole.P, whole.G, D.blocks, D.vectors))
        self._systems = [_System(*own) for own in zip(*blocks, weights, strict=True)]
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

    def __init__(self, P: Any, C: Any, B: Any, U: Any, w: Array) -> None:
        from scipy.sparse import bmat, diags, identity

        n, (m, k) = P.shape[0], U.shape
        weighted = U @ diags(w)
        exact = bmat(
            [[P, C.T @ B, C.T @ weighted], [C, B - identity(m), weighted], [None, U.T, -identity(k)]], format="csc"
        )
        size = abs(exact.data).max(initial=1.0)
        shift = np.concatenate([np.full(n, REGULARIZATION), np.full(m, -REGULARIZATION), np.zeros(k)]) * size
        self._lu, self._extra = _lu(exact + diags(shift, format="csc")), np.zeros(k)

        def product(w: Array) -> Array:
            with_r: Array = exact @ np.concatenate([w, U.T @ w[n:]])
            return with_r[: n + m]

        test = np.random.default_rng(0).uniform(0.5, 1, n + m)
        rhs = product(test)
        found = self.solve(rhs, "N")
        found = found + self.solve(rhs - product(found), "N")
        self.degenerate = not np.abs(found - test).max(initial=0) <= UNDETERMINED

    def solve(self, rhs: Array, side: str) -> Array:
        if self._lu is None:
            return np.zeros_like(rhs)
        found: Array = self._lu.solve(np.concatenate([rhs, self._extra]), side)[: len(rhs)]
        return found if np.isfinite(found).all() else np.zeros_like(rhs)


def _lu(matrix: Any) -> Any:
    from scipy.sparse.linalg import splu

    try:
        # The pattern is symmetric: an ordering for that, and pivots on the diagonal unless they are tiny.
        return splu(matrix, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=PIVOT, options={"SymmetricMode": True})
    except RuntimeError:  # exactly singular
        return None
