"""Random quadratic programs, and what is true of them: solutions and gradients by solves on the active set.

No part of the package is involved: an interior-point run to 1e-12 says which rows are active, one linear system in
float64 gives the point and its multipliers, signs are checked, and the same system gives the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from scipy.linalg import lu_factor, lu_solve
from scipy.sparse.linalg import splu
from torch import Tensor

NAMES = ("P", "q", "G", "h", "A", "b")
Array = np.ndarray[Any, Any]
# Where a row is neither clearly active nor clearly not, the gradient isn't unique to rounding.
MARGIN = 1e-6


@dataclass(frozen=True)
class Case:
    """Some QPs and the cotangent of their solutions.

    Attributes:
        blocks: ``P, q, G, h, A, b``, samples first; sparse cases have one sample, and SciPy's matrices.
    """

    name: str
    blocks: tuple[Any, ...]
    cotangent: Tensor

    @property
    def samples(self) -> int:
        return len(self.cotangent)

    @property
    def size(self) -> tuple[int, int, int, int]:
        """Samples, unknowns, inequalities, equations."""
        _, q, _, h, _, b = self.blocks
        return self.samples, q.shape[-1], h.shape[-1], b.shape[-1]

    @property
    def is_sparse(self) -> bool:
        return sp.issparse(self.blocks[0])

    def moved(self, share: float = 0.01) -> Case:
        """The case a training step later: each ``q`` has moved by this share of its length."""
        q = self.blocks[1]
        step = torch.from_numpy(np.random.default_rng(1).standard_normal(q.shape))
        step = step / step.norm(dim=-1, keepdim=True) * q.norm(dim=-1, keepdim=True)
        return replace(self, blocks=(self.blocks[0], q + share * step, *self.blocks[2:]))

    def in_float32(self) -> Case:
        blocks = tuple(block.float() for block in self.blocks)
        return replace(self, name=f"{self.name}, float32", blocks=blocks, cotangent=self.cotangent.float())

    @cached_property
    def reference(self) -> Reference:
        """The solution and the gradients."""
        return reference(self)


def dense(samples: int, n: int, inequalities: int, equations: int, seed: int = 0) -> Case:
    """Strictly convex and feasible, all dense and different in each sample; eigenvalues of ``P`` from 0.1 to 4."""
    random = np.random.default_rng(seed)
    root = random.standard_normal((samples, n, n))
    P = root @ root.transpose(0, 2, 1) / n + 0.1 * np.eye(n)
    q = random.standard_normal((samples, n))
    G = random.standard_normal((samples, inequalities, n))
    A = random.standard_normal((samples, equations, n))
    inside = random.standard_normal((samples, n, 1))
    h = (G @ inside)[..., 0] + random.uniform(0, 1, (samples, inequalities))
    b = (A @ inside)[..., 0]
    cotangent = torch.from_numpy(random.standard_normal((samples, n)))
    name = ", ".join(map(str, (samples, n, inequalities, equations)))
    return Case(name, tuple(map(torch.from_numpy, (P, q, G, h, A, b))), cotangent)


def sparse(kind: str, n: int = 5000, inequalities: int = 5000, equations: int = 1000) -> Case:
    """One QP with a tridiagonal ``P`` and few nonzeros in a row: ``"random"`` columns, or ``"banded"`` ones."""
    random = np.random.default_rng(0)
    side = sp.diags([random.uniform(-0.4, 0.4, n - 1)], [1])
    P = (sp.diags(random.uniform(1, 2, n)) + side + side.T).tocsr()
    G, A = (_few_entries(random, rows, n, kind) for rows in (inequalities, equations))
    q, inside = random.standard_normal((2, n))
    h, b = G @ inside + random.uniform(0, 1, inequalities), A @ inside
    q, h, b = (torch.from_numpy(vector)[None] for vector in (q, h, b))
    cotangent = torch.from_numpy(random.standard_normal((1, n)))
    return Case(f"sparse {n}, {kind}", (P, q, G, h, A, b), cotangent)


def _few_entries(random: np.random.Generator, rows: int, n: int, kind: str) -> sp.csr_matrix:
    count, reach = {"random": (3, 0), "banded": (5, 20)}[kind]
    row = np.repeat(np.arange(rows), count)
    if reach:
        column = (row * n // rows + random.integers(-reach, reach + 1, len(row))) % n
    else:
        column = random.integers(0, n, len(row))
    return sp.csr_matrix((random.standard_normal(len(row)), (row, column)), shape=(rows, n))


@dataclass(frozen=True)
class Reference:
    """What is true of a case.

    Attributes:
        x: ``(samples, n)``.
        gradients: of ``sum(cotangent * x)`` in the order of ``NAMES``; of a sparse matrix, at its entries, row by row.
        active: which inequalities are, ``(samples, m)``.
        margin: per sample, the least over rows of the larger of multiplier and slack.
    """

    x: Array
    gradients: tuple[Array, ...]
    active: Array
    margin: Array

    @property
    def regular(self) -> Array:
        """The samples whose gradient is well defined beyond rounding."""
        return self.margin > MARGIN

    def x_error(self, x: Array) -> float:
        return _relative(x, self.x)

    def gradient_error(self, gradients: Sequence[Array | None]) -> float:
        """The worst of the blocks', over regular samples; that of ``P`` is symmetrized. None doesn't count."""
        errors = []
        for got, true in zip(gradients, self.gradients, strict=True):
            if got is not None:
                errors.append(_relative(got[self.regular], true[self.regular]))
        return max(errors)


def _relative(got: Array, true: Array) -> float:
    return float(np.linalg.norm(got - true) / np.linalg.norm(true))


def reference(case: Case) -> Reference:
    """Sample by sample.

    Raises:
        RuntimeError: the active set isn't that of the solution.
    """
    blocks = [[block] if sp.issparse(block) else block.double().numpy() for block in case.blocks]
    samples = zip(*blocks, case.cotangent.double().numpy(), strict=True)
    x, gradients, active, margin = zip(*[_on_active_set(*sample) for sample in samples], strict=True)
    return Reference(
        np.stack(x), tuple(map(np.stack, zip(*gradients, strict=True))), np.stack(active), np.array(margin)
    )


def _on_active_set(
    P: Any, q: Array, G: Any, h: Array, A: Any, b: Array, cotangent: Array
) -> tuple[Array, list[Array], Array, float]:
    n, p = len(q), len(b)
    active = _active(P, q, G, h, A, b)
    stack = sp.vstack if sp.issparse(P) else np.vstack
    solve = _factored(P, stack([A, G[active]]))
    x, y, picked = np.split(solve(np.concatenate([-q, b, h[active]])), [n, n + p])
    z = _spread(picked, active)
    slack = h - G @ x
    if z.min() < -1e-9 or slack.min() < -1e-9:
        raise RuntimeError(f"reference: multiplier {z.min():.0e}, slack {slack.min():.0e}")
    ux, uy, uz = np.split(solve(np.concatenate([cotangent, np.zeros(p + active.sum())])), [n, n + p])
    uz = _spread(uz, active)
    gradients = [
        -(_outer(ux, x, P) + _outer(x, ux, P)) / 2,
        -ux,
        -(_outer(z, ux, G) + _outer(uz, x, G)),
        uz,
        -(_outer(y, ux, A) + _outer(uy, x, A)),
        uy,
    ]
    return x, gradients, active, float(np.maximum(z, slack).min())


def _active(P: Any, q: Array, G: Any, h: Array, A: Any, b: Array) -> Array:
    import piqp

    solver = piqp.SparseSolver() if sp.issparse(P) else piqp.DenseSolver()
    settings = solver.settings
    settings.eps_abs, settings.eps_rel = 1e-12, 0.0
    settings.check_duality_gap = True
    settings.eps_duality_gap_abs, settings.eps_duality_gap_rel = 1e-12, 0.0
    blocks = [block.tocsc() if sp.issparse(block) else block for block in (P, q, A, b, G)]
    solver.setup(*blocks, None, h, None, None)
    solver.solve()
    active: Array = np.array(solver.result.z_u)[: len(h)] > h - G @ solver.result.x
    return active


def _factored(P: Any, rows: Any) -> Callable[[Array], Array]:
    """Solves with ``[[P, rowsᵀ], [rows, 0]]``, refined twice."""
    if sp.issparse(P):
        system = sp.bmat([[P, rows.T], [rows, None]]).tocsc()
        solve = splu(system, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.01, options={"SymmetricMode": True}).solve
    else:
        system = np.block([[P, rows.T], [rows, np.zeros((len(rows), len(rows)))]])
        factor = lu_factor(system)

        def solve(right: Array) -> Array:
            return lu_solve(factor, right)

    def refined(right: Array) -> Array:
        solution = solve(right)
        for _ in range(2):
            solution = solution + solve(right - system @ solution)
        return solution

    return refined


def _spread(picked: Array, active: Array) -> Array:
    everywhere = np.zeros(len(active))
    everywhere[active] = picked
    return everywhere


def _outer(left: Array, right: Array, like: Any) -> Array:
    """``left rightᵀ``, at the entries of ``like`` if that is sparse."""
    if not sp.issparse(like):
        return np.outer(left, right)
    entries = like.tocoo()
    return left[entries.row] * right[entries.col]
