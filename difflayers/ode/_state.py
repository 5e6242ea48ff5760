"""How a state, a tree of real or complex tensors, lies in rows of real numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from difflayers.errors import ProblemError


@dataclass(frozen=True)
class State:
    """Leaves ``(*batch, ...)``, and rows ``(samples, n)``, one for every sample, complex numbers as two reals."""

    structure: pytree.TreeSpec
    shapes: tuple[torch.Size, ...]
    complex: tuple[bool, ...]
    batch: torch.Size

    @classmethod
    def of(cls, tree: Any, batch_dims: int) -> State:
        """The layout of states like ``tree``.

        Raises:
            ProblemError: it isn't made of floating-point or complex tensors of one precision, device and batch shape.
        """
        leaves, structure = pytree.tree_flatten(tree)
        _check(leaves, batch_dims)
        shapes = tuple(leaf.shape[batch_dims:] for leaf in leaves)
        return cls(structure, shapes, tuple(leaf.is_complex() for leaf in leaves), leaves[0].shape[:batch_dims])

    @property
    def samples(self) -> int:
        return self.batch.numel()

    @property
    def plain(self) -> bool:
        """Whether it is a lone real tensor."""
        return self.structure.is_leaf() and not self.complex[0]

    @property
    def sizes(self) -> list[int]:
        """Real numbers per sample of every leaf."""
        return [shape.numel() * (1 + z) for shape, z in zip(self.shapes, self.complex, strict=True)]

    def pack(self, tree: Any, samples: int | None = None) -> Tensor:
        """The rows of a tree; ``samples`` where it isn't that of the whole batch."""
        rows = self.samples if samples is None else samples
        parts = [
            (_pairs(leaf, len(self.shapes) == 1) if z else leaf).reshape(rows, size)
            for leaf, z, size in zip(pytree.tree_leaves(tree), self.complex, self.sizes, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def unpack(self, rows: Tensor, lead: torch.Size | None = None) -> Any:
        """The tree, its leaves ``(*lead, ...)``; None is the batch, or the number of rows if these are a part of it."""
        if lead is None:
            lead = self.batch if rows.shape[0] == self.samples else rows.shape[:1]
        parts = [rows] if len(self.shapes) == 1 else rows.split(self.sizes, dim=-1)
        leaves = [
            _complex(part.reshape(lead + shape + (2,))) if z else part.reshape(lead + shape)
            for part, shape, z in zip(parts, self.shapes, self.complex, strict=True)
        ]
        return pytree.tree_unflatten(leaves, self.structure)

    def own_times(self, t: Tensor) -> Tensor:
        """Times ``(rows, 1)`` shaped to broadcast over the first leaf."""
        lead = self.batch if t.shape[0] == self.samples else t.shape[:1]
        return t.reshape(lead + (1,) * len(self.shapes[0]))


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision of a complex number, or of a real one."""
    return torch.empty(0, dtype=dtype).real.dtype if dtype.is_complex else dtype


def _pairs(leaf: Tensor, alone: bool) -> Tensor:
    # The gradient of a view would be one that starts at odd places, too.
    return torch.view_as_real(leaf.resolve_conj()) if alone else torch.stack([leaf.real, leaf.imag], dim=-1)


def _complex(pairs: Tensor) -> Tensor:
    # Behind another leaf, pairs can start at odd places, which a view doesn't allow.
    aligned = pairs.stride()[-1] == 1 and not any(s % 2 for s in (pairs.storage_offset(), *pairs.stride()[:-1]))
    return torch.view_as_complex(pairs) if aligned else torch.complex(*pairs.unbind(-1))


def _check(leaves: list[Any], batch_dims: int) -> None:
    if not leaves:
        raise ProblemError("y0 holds no tensor; pass the state to start from")
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise ProblemError(f"y0 must be made of tensors or arrays, got {type(leaf).__name__}")
        if not (leaf.is_floating_point() or leaf.is_complex()):
            raise ProblemError(f"y0 has dtype {leaf.dtype}, but a solve needs floating point; try y0.double()")
        if leaf.dim() < batch_dims:
            raise ProblemError(f"y0 has shape {tuple(leaf.shape)}, which has no {batch_dims} batch dimensions")
    first = leaves[0]
    for leaf in leaves[1:]:
        if (real_dtype(leaf.dtype), leaf.device) != (real_dtype(first.dtype), first.device):
            raise ProblemError(
                f"y0 mixes {first.dtype} on {first.device} and {leaf.dtype} on {leaf.device}; use one precision"
            )
        if leaf.shape[:batch_dims] != first.shape[:batch_dims]:
            raise ProblemError(
                f"y0 mixes batch shapes {tuple(first.shape[:batch_dims])} and {tuple(leaf.shape[:batch_dims])}"
            )
