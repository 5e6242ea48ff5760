"""NumPy in, NumPy out; dtype, device and batch-shape checks; one tensor out of a tree of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from difflayers.errors import ProblemError


def default_tolerance(dtype: torch.dtype) -> float:
    """What a solve can reach in ``dtype`` with some room: eps^(2/3), 4e-11 in float64 and 2e-5 in float32."""
    return float(torch.finfo(dtype).eps ** (2 / 3))


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision as float32, since LAPACK knows no halves; others as they are."""
    return tensor.float() if torch.finfo(tensor.dtype).bits < 32 else tensor


def uses_numpy(init: Any, params: Any) -> bool:
    """Whether the answer goes back to NumPy: the unknown came as an array.

    Raises:
        ProblemError: a parameter is a tensor that wants gradients, which a NumPy answer would lose.
    """
    if not any(isinstance(leaf, np.ndarray | np.generic) for leaf in pytree.tree_leaves(init)):
        return False
    if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in pytree.tree_leaves(params)):
        raise ProblemError("init is a NumPy array, but a parameter requires grad; pass init as a tensor")
    return True


def to_tensors(tree: Any, like: Tensor | None = None) -> Any:
    """The tree with every array as a tensor; floating arrays take the dtype and device of ``like``."""

    def convert(leaf: Any) -> Any:
        if not isinstance(leaf, np.ndarray | np.generic):
            return leaf
        tensor = torch.as_tensor(np.array(leaf))  # a copy: the caller's memory is never ours to write
        if like is None:
            return tensor
        return tensor.to(like.device, like.dtype if tensor.is_floating_point() else None)

    return pytree.tree_map(convert, tree)


def check_unknown(leaves: list[Any], batch_dims: int) -> None:
    """Raise unless the unknown is made of real floating-point tensors of one dtype, device and batch shape."""
    if not leaves:
        raise ProblemError("init holds no tensor; pass the starting point of the solve")
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise ProblemError(f"init must be made of tensors or arrays, got {type(leaf).__name__}")
        if not leaf.is_floating_point():
            raise ProblemError(f"init has dtype {leaf.dtype}, but a solve needs real floating point; try init.double()")
        if leaf.dim() < batch_dims:
            raise ProblemError(f"init has shape {tuple(leaf.shape)}, which has no {batch_dims} batch dimensions")
    first = leaves[0]
    for leaf in leaves[1:]:
        if (leaf.dtype, leaf.device) != (first.dtype, first.device):
            raise ProblemError(
                f"init mixes {first.dtype} on {first.device} and {leaf.dtype} on {leaf.device}; use one of them"
            )
        if leaf.shape[:batch_dims] != first.shape[:batch_dims]:
            raise ProblemError(
                f"init mixes batch shapes {tuple(first.shape[:batch_dims])} and {tuple(leaf.shape[:batch_dims])}"
            )


def check_devices(leaves: list[Tensor], unknown: Tensor) -> None:
    """Raise unless every parameter is where the unknown is; zero-dimensional CPU tensors go anywhere, as in torch."""
    for index, leaf in enumerate(leaves):
        if leaf.device != unknown.device and not (leaf.dim() == 0 and leaf.device.type == "cpu"):
            raise ProblemError(
                f"parameter {index} of shape {tuple(leaf.shape)} is on {leaf.device}, but init is on {unknown.device}; "
                f"move one with .to({str(unknown.device)!r})"
            )


@dataclass(frozen=True)
class Packing:
    """How a tree of tensors ``(*batch, ...)`` lies in one tensor ``(*batch, n)``; a lone tensor stays as it is."""

    structure: pytree.TreeSpec
    shapes: tuple[torch.Size, ...]
    batch_dims: int

    @classmethod
    def of(cls, tree: Any, batch_dims: int) -> Packing:
        leaves, structure = pytree.tree_flatten(tree)
        check_unknown(leaves, batch_dims)
        return cls(structure, tuple(leaf.shape[batch_dims:] for leaf in leaves), batch_dims)

    def pack(self, tree: Any) -> Tensor:
        leaves = pytree.tree_leaves(tree)
        if self.structure.is_leaf():
            return leaves[0]  # type: ignore[no-any-return]
        return torch.cat([leaf.flatten(self.batch_dims) if leaf.dim() > self.batch_dims else leaf[..., None]
                          for leaf in leaves], dim=-1)  # fmt: skip

    def unpack(self, packed: Tensor) -> Any:
        if self.structure.is_leaf():
            return packed
        parts = packed.split([shape.numel() for shape in self.shapes], dim=-1)
        leaves = [part.reshape(part.shape[:-1] + shape) for part, shape in zip(parts, self.shapes, strict=True)]
        return pytree.tree_unflatten(leaves, self.structure)


def sample_norm(tensor: Tensor, batch_dims: int) -> Tensor:
    """The Euclidean norm of every sample, ``(*batch,)``."""
    return (
        torch.linalg.vector_norm(tensor, dim=tuple(range(batch_dims, tensor.dim())))
        if tensor.dim() > batch_dims
        else tensor.abs()
    )


def finite(tensor: Tensor) -> Tensor:
    """The tensor with zero in place of what isn't finite; whole numbers and flags as they are."""
    return torch.where(tensor.isfinite(), tensor, 0) if tensor.is_floating_point() or tensor.is_complex() else tensor


def widen(mask: Tensor, like: Tensor) -> Tensor:
    """A per-sample mask, broadcastable over ``like``."""
    return mask.reshape(mask.shape + (1,) * (like.dim() - mask.dim()))
