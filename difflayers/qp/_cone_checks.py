"""What a wrong call of a cone program gets: errors that name the block, the sizes, and what to try."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from difflayers.errors import ProblemError
from difflayers.qp._cones import Cones
from difflayers.qp._sparse import Sparse

EVENTS = {"P": 2, "q": 1, "C": 2, "d": 1}


def check_cone_blocks(blocks: Mapping[str, Any], cones: Cones) -> None:
    """Raise unless the blocks are floating tensors of one dtype and device whose sizes fit the cones."""
    for name, block in blocks.items():
        if block is None and name != "P":
            raise ProblemError(f"{name} is missing; only P may be None")
        if block is not None and not isinstance(block, Tensor | Sparse):
            raise ProblemError(f"{name} must be a tensor, an array or a sparse matrix, got {type(block).__name__}")
    q = blocks["q"]
    for name, block in sorted(blocks.items(), key=lambda item: item[0] != "q"):
        if block is not None:
            _check_kind(name, block, q)
    _check_sizes(blocks, cones)


def _check_kind(name: str, block: Any, q: Tensor) -> None:
    if not block.is_floating_point():
        raise ProblemError(f"{name} has dtype {block.dtype}, but must be real floating point; try .double()")
    if (block.dtype, block.device) != (q.dtype, q.device):
        raise ProblemError(
            f"{name} is {block.dtype} on {block.device}, but q is {q.dtype} on {q.device}; convert one with .to()"
        )
    if block.dim() < EVENTS[name]:
        shape = "matrices (*batch, rows, n)" if EVENTS[name] == 2 else "vectors (*batch, entries)"
        raise ProblemError(f"{name} has shape {tuple(block.shape)}, but must hold {shape}")


def _check_sizes(blocks: Mapping[str, Any], cones: Cones) -> None:
    n, m = blocks["q"].shape[-1], blocks["d"].shape[-1]
    for name in ("P", "C"):
        if blocks[name] is not None and blocks[name].shape[-1] != n:
            raise ProblemError(f"{name} has {blocks[name].shape[-1]} columns but q has {n} entries")
    if blocks["P"] is not None and blocks["P"].shape[-2] != n:
        raise ProblemError(f"P has {blocks['P'].shape[-2]} rows but q has {n} entries")
    if blocks["C"].shape[-2] != m:
        raise ProblemError(f"C has {blocks['C'].shape[-2]} rows but d has {m} entries")
    if cones.rows != m:
        raise ProblemError(f"the cones have {cones.rows} rows but d has {m} entries: {cones}")
