"""The blocks of a quadratic program and the unknowns of its optimality conditions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from difflayers._arrays import finite
from difflayers.qp._sparse import Sparse

NAMES = ("P", "q", "G", "h", "A", "b", "lb", "ub")
MATRICES = frozenset({"P", "G", "A"})
Matrix: TypeAlias = Any  # a tensor, or Sparse
# A pivot below this share of its diagonal says that a row depends on the others, or that there is no curvature.
DEPENDENT = 1e-12


class Point(NamedTuple):
    """The unknowns of a QP: ``x``, then one number per row of ``A``, of ``G``, per lower and per upper bound."""

    x: Tensor
    y: Tensor
    v: Tensor
    low: Tensor
    high: Tensor


@dataclass(frozen=True)
class Layout:
    """How many unknowns of each kind there are."""

    n: int
    p: int = 0
    m: int = 0
    low: int = 0
    high: int = 0

    @cached_property
    def sizes(self) -> tuple[int, int, int, int, int]:
        return self.n, self.p, self.m, self.low, self.high

    @cached_property
    def inequalities(self) -> int:
        """Rows of ``G`` and bounds."""
        return self.m + self.low + self.high

    @cached_property
    def unknowns(self) -> int:
        return sum(self.sizes)

    def split(self, packed: Tensor) -> Point:
        """The parts of ``(*batch, n + p + m + low + high)``."""
        return Point(*packed.split_with_sizes(self.sizes, dim=-1))


@dataclass(frozen=True, eq=False)
class Data:
    """The blocks of a QP, None where there is none; ``(*batch, ...)``, or without a batch where samples share it."""

    P: Matrix | None
    q: Tensor
    G: Matrix | None = None
    h: Tensor | None = None
    A: Matrix | None = None
    b: Tensor | None = None
    lb: Tensor | None = None
    ub: Tensor | None = None

    @classmethod
    def of(cls, blocks: Mapping[str, Matrix]) -> Data:
        """From the blocks that there are, by name."""
        return cls(*[blocks.get(name) for name in NAMES])  # type: ignore[arg-type]

    @property
    def blocks(self) -> tuple[Matrix | None, ...]:
        """In the order of :data:`NAMES`."""
        return tuple(getattr(self, name) for name in NAMES)

    @cached_property
    def sparse(self) -> bool:
        """Whether a matrix is."""
        return any(isinstance(block, Sparse) for block in (self.P, self.G, self.A))

    def dense(self) -> Data:
        """The same without sparse matrices."""
        dense = {name: block.dense() for name in MATRICES if isinstance(block := getattr(self, name), Sparse)}
        return replace(self, **dense) if dense else self

    def all_sparse(self) -> Data:
        """The same without dense matrices; a ``P`` that isn't there is empty."""
        n = self.q.shape[-1]
        P = Sparse.empty(self.q, (n, n)) if self.P is None else self.P
        matrices = [Sparse.of(m) if isinstance(m, Tensor) else m for m in (P, self.G, self.A)]
        return replace(self, P=matrices[0], G=matrices[1], A=matrices[2])

    @cached_property
    def curvature(self) -> tuple[Tensor, Tensor] | None:
        """The Cholesky factor of a dense ``P``, and which samples' is definite by more than rounding."""
        return None if self.P is None or isinstance(self.P, Sparse) else cholesky(self.P)

    @cached_property
    def curved(self) -> bool:
        """Whether ``P`` is dense, and definite in every sample."""
        return self.curvature is not None and bool(self.curvature[1].all())

    @cached_property
    def layout(self) -> Layout:
        n = self.q.shape[-1]
        rows = [0 if block is None else block.shape[-1] for block in (self.b, self.h, self.lb, self.ub)]
        return Layout(n, *rows)

    def map(self, fn: Callable[[Tensor], Tensor]) -> Data:
        """``fn`` of every tensor: of a sparse matrix, the values."""
        return self._each(lambda _, block: block.map(fn) if isinstance(block, Sparse) else fn(block))

    def _each(self, fn: Callable[[str, Matrix], Matrix]) -> Data:
        return Data.of({name: fn(name, block) for name in NAMES if (block := getattr(self, name)) is not None})

    def flattened(self, batch: torch.Size) -> Data:
        """The batch dimensions as one; what is shared stays shared."""
        if len(batch) == 1:
            return self
        return self._each(lambda name, block: flattened(block, batch, 2 if name in MATRICES else 1))

    def products(self, x: Tensor) -> Tensor:
        """``[G; -I; I] x`` for the inequalities that there are."""
        return self._with_bounds([] if self.G is None else [times(self.G, x)], x)

    def reached(self, x: Tensor) -> Tensor:
        """``[A; G; -I; I] x``."""
        matrices = (self.A, self.G) if self.sparse else (self.matrix,)
        return self._with_bounds([times(matrix, x) for matrix in matrices if matrix is not None], x)

    def _with_bounds(self, parts: list[Tensor], x: Tensor) -> Tensor:
        parts += [] if self.lb is None else [-x]
        parts += [] if self.ub is None else [x]
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts, dim=-1) if parts else x[..., :0]

    def within_bounds(self, x: Tensor, active: Tensor) -> Tensor:
        """``x``, moved to bounds that are active or that it is beyond."""
        _, low, high = active.split((self.layout.m, self.layout.low, self.layout.high), dim=-1)
        x = x if self.lb is None else torch.where(low | (x < self.lb), self.lb, x)
        return x if self.ub is None else torch.where(high | (x > self.ub), self.ub, x)

    def pulled(self, z: Tensor) -> Tensor:
        """``[G; -I; I]ᵀ z``."""
        return self._pulled([self.G], z)

    def drawn(self, w: Tensor) -> Tensor:
        """``[A; G; -I; I]ᵀ w``."""
        return self._pulled([self.A, self.G] if self.sparse else [self.matrix], w)

    def _pulled(self, matrices: list[Matrix | None], w: Tensor) -> Tensor:
        layout, total, start = self.layout, None, 0
        for matrix in matrices:
            if matrix is not None:
                end = start + matrix.shape[-2]
                part = transposed(matrix, w if end == w.shape[-1] and not start else w[..., start:end])
                total, start = part if total is None else total + part, end
        total = w.new_zeros(*w.shape[:-1], layout.n) if total is None else total
        total = total if self.lb is None else total - w[..., start : start + layout.low]
        return total if self.ub is None else total + w[..., start + layout.low :]

    @cached_property
    def matrix(self) -> Tensor:
        """``[A; G]`` of a dense problem."""
        parts = [matrix for matrix in (self.A, self.G) if matrix is not None]
        return joined(parts, dim=-2) if parts else self.q.new_zeros(0, self.layout.n)

    @cached_property
    def limits(self) -> Tensor:
        """The right-hand sides of :meth:`products`, infinite where there is no bound."""
        parts = [] if self.h is None else [self.h]
        parts += [] if self.lb is None else [-self.lb]
        parts += [] if self.ub is None else [self.ub]
        return joined(parts, dim=-1) if parts else self.q.new_zeros(0)

    @cached_property
    def extents(self) -> Tensor:
        """One and the size of each limit that there is: what slacks are small beside."""
        return 1 + finite(self.limits).abs()

    @cached_property
    def sides(self) -> Tensor:
        """The right-hand sides of :meth:`reached`."""
        return self.limits if self.b is None else joined([self.b, self.limits], dim=-1)

    def rows(self, samples: Tensor) -> Data:
        """The data of some samples, by mask or index; what is shared stays shared."""
        data = self._each(
            lambda name, block: block if block.dim() == (2 if name in MATRICES else 1) else block[samples]
        )
        if "curvature" in self.__dict__ and self.P is not None and self.P.dim() > 2:
            data.__dict__["curvature"] = tuple(part[samples] for part in self.curvature or ())
        return data

    def finite(self, samples: int) -> Tensor:
        """Which samples have data that can be solved for, ``(samples,)``; bounds may be infinite on their own side."""
        total = self.q.new_zeros(samples)  # a sum shows what isn't finite in any of its terms
        for name, block in zip(NAMES, self.blocks, strict=True):
            if block is not None and name not in ("lb", "ub"):
                total = total + block.sum((-2, -1) if name in MATRICES else -1)
        fine = total.isfinite()
        fine = fine if self.lb is None else fine & (self.lb < torch.inf).all(-1)
        return fine if self.ub is None else fine & (self.ub > -torch.inf).all(-1)

    def consistent(self, samples: int) -> Tensor:
        """Which samples have no lower bound above its upper one."""
        if self.lb is None or self.ub is None:
            return torch.ones(samples, dtype=torch.bool, device=self.q.device)
        return (self.lb <= self.ub).all(-1).expand(samples)

    def violation(self, x: Tensor, y: Tensor, z: Tensor, slack: Tensor) -> Tensor:
        """The largest violation of a condition, ``(samples,)``: stationarity, feasibility, complementarity, signs."""
        gradient = times(self.P, x) + self.q + self.pulled(z)
        if self.A is not None:
            gradient = gradient + transposed(self.A, y)
        parts = [gradient.abs()]
        if self.A is not None and self.b is not None:
            parts.append((times(self.A, x) - self.b).abs())
        # min(z, slack) = 0 says all three of an inequality.
        parts.append(torch.minimum(z, slack).abs())
        return torch.cat(parts, dim=-1).amax(-1)

    @cached_property
    def magnitude(self) -> Tensor:
        """The largest entry of ``q``, ``b`` and ``h``, ``(samples,)`` or shared."""
        blocks = [block for block in (self.q, self.b, self.h) if block is not None]
        return joined(blocks, dim=-1).abs().amax(-1)


def flattened(block: Matrix, batch: torch.Size, event: int) -> Matrix:
    """The batch dimensions before ``event`` others as one; what has none stays without."""
    if isinstance(block, Sparse):
        return block.map(lambda values: flattened(values, batch, 1))
    if block.dim() == event:
        return block
    shape = block.shape[block.dim() - event :]
    if len(batch) == 1 and block.shape == batch + shape:
        return block
    return block.expand(*batch, *shape).reshape(batch.numel(), *shape)


def joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """One after the other along ``dim``, which is negative; what is shared gets the batch dimensions of the others."""
    if len(parts) == 1:
        return parts[0]
    batches = {part.shape[:dim] for part in parts}
    if len(batches) > 1:
        batch = torch.broadcast_shapes(*batches)
        parts = [part.expand(*batch, *part.shape[dim:]) for part in parts]
    return torch.cat(parts, dim=dim)  # type: ignore[arg-type]


def times(matrix: Tensor | Sparse | None, x: Tensor) -> Tensor:
    """``M x`` for every sample; ``M`` is ``(*batch, k, n)`` or ``(k, n)``, zero if None."""
    if matrix is None:
        return torch.zeros_like(x)
    if isinstance(matrix, Sparse):
        return matrix.times(x)
    if matrix.dim() == 2:
        return x @ matrix.mT
    if _traced(matrix):
        return (matrix * x.unsqueeze(-2)).sum(-1)
    # (1, n) times (n, k), not (k, n) times (n, 1): several times faster in batched BLAS.
    return _product(x.unsqueeze(-2), matrix.mT).squeeze(-2)


def transposed(matrix: Tensor | Sparse, y: Tensor) -> Tensor:
    """``Mᵀ y`` for every sample."""
    if isinstance(matrix, Sparse):
        return matrix.transposed_times(y)
    if matrix.dim() == 2:
        return y @ matrix
    if _traced(matrix):
        return (matrix * y.unsqueeze(-1)).sum(-2)
    return _product(y.unsqueeze(-2), matrix).squeeze(-2)


def _traced(matrix: Tensor) -> bool:
    # The gradient of a product is an outer one, for which batched BLAS takes five times as long as multiplication.
    return torch.is_grad_enabled() and matrix.requires_grad


def _product(left: Tensor, right: Tensor) -> Tensor:
    # The same as matmul, for the common case in a third of the calls.
    same = left.dim() == right.dim() == 3 and left.shape[0] == right.shape[0]
    return torch.bmm(left, right) if same else left @ right


def cholesky(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The factor, and whether each matrix is definite by more than rounding."""
    lower, info = torch.linalg.cholesky_ex(matrix)
    pivots, diagonal = (m.diagonal(dim1=-2, dim2=-1) for m in (lower, matrix))
    return lower, info.logical_not() & (pivots.square() > DEPENDENT * diagonal).all(-1)
