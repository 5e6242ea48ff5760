"""Sparse matrices whose values are data and whose patterns aren't."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from difflayers.errors import ProblemError

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, eq=False)
class Pattern:
    """Where the entries of a ``(k, n)`` matrix are: row by row, no place twice."""

    rows: Tensor
    columns: Tensor
    shape: tuple[int, int]

    @cached_property
    def pointers(self) -> Array:
        """Where each row begins, as CSR has it."""
        counts = np.bincount(self.rows.cpu().numpy(), minlength=self.shape[0])
        return np.concatenate([[0], counts.cumsum()]).astype(np.int32)

    @cached_property
    def host_columns(self) -> Array:
        return self.columns.cpu().numpy().astype(np.int32)

    def csr(self, values: Array) -> Any:
        """The SciPy matrix; the pattern is shared, so it must not be changed in place."""
        from scipy.sparse import csr_matrix

        return csr_matrix((values, self.host_columns, self.pointers), shape=self.shape, copy=False)


class Sparse:
    """A sparse matrix for a QP, or a batch of them with one pattern; differentiable in its values.

    Args:
        indices: row and column of every entry, ``(2, nnz)``, in any order; entries at one place add up.
        values: ``(*batch, nnz)``.
        size: of the matrix, ``(rows, columns)``.
    """

    def __init__(self, indices: Tensor, values: Tensor, size: tuple[int, int]) -> None:
        rows, columns = indices
        keys = rows * size[1] + columns
        order = torch.arange(len(keys), device=keys.device)
        if bool((keys[1:] <= keys[:-1]).any()):
            keys, order = torch.unique(keys, return_inverse=True)
            values = values.new_zeros(*values.shape[:-1], len(keys)).index_add(-1, order, values)
            rows, columns = keys // size[1], keys % size[1]
        self.pattern, self.values = Pattern(rows, columns, (int(size[0]), int(size[1]))), values

    @classmethod
    def on(cls, pattern: Pattern, values: Tensor) -> Sparse:
        """The matrix with these values."""
        made = cls.__new__(cls)
        made.pattern, made.values = pattern, values
        return made

    @classmethod
    def of(cls, matrix: Tensor) -> Sparse:
        """A dense matrix, or a batch, on the places where any of them isn't zero."""
        present = (matrix != 0).flatten(0, -3).any(0) if matrix.dim() > 2 else matrix != 0
        rows, columns = present.nonzero(as_tuple=True)
        return cls.on(Pattern(rows, columns, (matrix.shape[-2], matrix.shape[-1])), matrix[..., rows, columns])

    @classmethod
    def empty(cls, like: Tensor, size: tuple[int, int]) -> Sparse:
        """Zero, with the dtype and device of ``like``."""
        return cls(torch.zeros(2, 0, dtype=torch.int64, device=like.device), like.new_zeros(0), size)

    def __getitem__(self, samples: Tensor) -> Sparse:
        """Some of the samples."""
        return Sparse.on(self.pattern, self.values[samples])

    def sum(self, dim: tuple[int, int]) -> Tensor:
        """Of all entries, ``(*batch,)``."""
        return self.values.sum(-1)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={tuple(self.shape)}, nnz={self.values.shape[-1]})"

    @property
    def shape(self) -> torch.Size:
        """Like that of a dense tensor, ``(*batch, rows, columns)``."""
        return torch.Size((*self.values.shape[:-1], *self.pattern.shape))

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    def dim(self) -> int:
        return self.values.dim() + 1

    def numel(self) -> int:
        return self.values.numel()

    def is_floating_point(self) -> bool:
        return self.values.is_floating_point()

    def map(self, fn: Callable[[Tensor], Tensor]) -> Sparse:
        """The same with ``fn`` of the values."""
        return Sparse.on(self.pattern, fn(self.values))

    def times(self, x: Tensor) -> Tensor:
        """``M x`` for every sample."""
        return _scattered(self.values, x, self.pattern.columns, self.pattern.rows, self.pattern.shape[0])

    def transposed_times(self, y: Tensor) -> Tensor:
        """``Mᵀ y`` for every sample."""
        return _scattered(self.values, y, self.pattern.rows, self.pattern.columns, self.pattern.shape[1])

    def dense(self) -> Tensor:
        """``(*batch, rows, columns)``."""
        flat = self.pattern.rows * self.pattern.shape[1] + self.pattern.columns
        full = self.values.new_zeros(*self.values.shape[:-1], self.pattern.shape[0] * self.pattern.shape[1])
        return full.index_copy(-1, flat, self.values).reshape(self.shape)

    def csr(self, count: int) -> list[Any]:
        """One SciPy matrix per sample, the same one where samples share it."""
        values = self.values.detach().cpu().numpy()
        if values.ndim == 1:
            return [self.pattern.csr(values)] * count
        return [self.pattern.csr(own) for own in np.broadcast_to(values, (count, values.shape[-1]))]


def _scattered(values: Tensor, x: Tensor, source: Tensor, target: Tensor, size: int) -> Tensor:
    products = values * x.index_select(-1, source)
    return products.new_zeros(*products.shape[:-1], size).index_add(-1, target, products)


def as_sparse(block: Any, name: str, like: Tensor | None) -> Any:
    """A sparse tensor or SciPy matrix as :class:`Sparse`, on the graph of its values; anything else as it is.

    Raises:
        ProblemError: a layout that has no pattern in common for all samples.
    """
    if isinstance(block, Tensor) and block.layout != torch.strided:
        return _from_torch(block, name)
    if type(block).__module__.startswith("scipy.sparse"):
        return _from_scipy(block, like)
    return block


def _from_torch(block: Tensor, name: str) -> Sparse:
    if block.layout == torch.sparse_csr and block.dim() == 2:
        pointers, columns = block.crow_indices(), block.col_indices()
        rows = torch.arange(block.shape[0], device=block.device).repeat_interleave(pointers.diff())
        return Sparse(torch.stack([rows, columns]), block.values(), (block.shape[0], block.shape[1]))
    if block.layout == torch.sparse_coo and block.sparse_dim() == block.dim() == 2:
        entries = block.coalesce()
        rows, columns = entries.indices()
        return Sparse.on(Pattern(rows, columns, (block.shape[0], block.shape[1])), entries.values())
    raise ProblemError(
        f"{name} is a {block.dim()}-dimensional tensor of layout {block.layout}, but must be one sparse matrix, "
        "COO or CSR; for a batch of matrices pass Sparse(indices, values, size) with values (*batch, nnz)"
    )


def _from_scipy(block: Any, like: Tensor | None) -> Sparse:
    rows = block.tocsr().sorted_indices()
    rows.sum_duplicates()
    dtype, device = (torch.float64, torch.device("cpu")) if like is None else (like.dtype, like.device)
    counts = torch.from_numpy(np.diff(rows.indptr).astype(np.int64))
    index = torch.arange(rows.shape[0]).repeat_interleave(counts).to(device)
    columns = torch.from_numpy(rows.indices.astype(np.int64)).to(device)
    return Sparse.on(Pattern(index, columns, rows.shape), torch.as_tensor(rows.data.copy()).to(device, dtype))
