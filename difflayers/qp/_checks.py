"""What a wrong call gets: errors that name the block, the sizes, and what to try."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from difflayers.errors import ProblemError
from difflayers.qp._data import MATRICES, Data
from difflayers.qp._quasidefinite import least_eigenvalue, negative_curvature
from difflayers.qp._sparse import Sparse

_PARTNERS = (("G", "h"), ("A", "b"))


def check_blocks(blocks: Mapping[str, Any]) -> None:
    """Raise unless the blocks are floating tensors of one dtype and device whose sizes fit."""
    for name, block in blocks.items():
        if block is not None and not isinstance(block, Tensor | Sparse):
            raise ProblemError(f"{name} must be a tensor, an array or a sparse matrix, got {type(block).__name__}")
    given = {name: block for name, block in blocks.items() if block is not None}
    if "q" not in given:
        raise ProblemError("q is missing; for an objective without linear term pass zeros")
    for one, other in _PARTNERS:
        for have, lack in ((one, other), (other, one)):
            if have in given and lack not in given:
                raise ProblemError(f"{have} comes without {lack}; pass both, or neither")
    q = given["q"]
    for name, block in given.items():
        if not block.is_floating_point():
            raise ProblemError(f"{name} has dtype {block.dtype}, but a QP needs real floating point; try .double()")
        if (block.dtype, block.device) != (q.dtype, q.device):
            raise ProblemError(
                f"{name} is {block.dtype} on {block.device}, but q is {q.dtype} on {q.device}; convert one with .to()"
            )
    _check_sizes(given)


def _check_sizes(given: Mapping[str, Tensor]) -> None:
    for name, block in given.items():
        least = 2 if name in MATRICES else 1
        if block.dim() < least:
            shape = "matrices (*batch, rows, n)" if name in MATRICES else "vectors (*batch, entries)"
            raise ProblemError(f"{name} has shape {tuple(block.shape)}, but must hold {shape}")
    n = given["q"].shape[-1]
    for name in ("P", "G", "A"):
        if name in given and given[name].shape[-1] != n:
            raise ProblemError(f"{name} has {given[name].shape[-1]} columns but q has {n} entries")
    if "P" in given and given["P"].shape[-2] != n:
        raise ProblemError(f"P has {given['P'].shape[-2]} rows but q has {n} entries")
    for name in ("lb", "ub"):
        if name in given and given[name].shape[-1] != n:
            raise ProblemError(
                f"{name} has {given[name].shape[-1]} entries but q has {n}; use inf where there is no bound"
            )
    for matrix, side in _PARTNERS:
        if matrix in given and given[matrix].shape[-2] != given[side].shape[-1]:
            raise ProblemError(
                f"{matrix} has {given[matrix].shape[-2]} rows but {side} has {given[side].shape[-1]} entries"
            )


def batch_shape(blocks: Mapping[str, Tensor]) -> torch.Size:
    """The batch shape that all blocks broadcast to.

    Raises:
        ProblemError: they don't; the message has the shape of each.
    """
    shapes = {name: block.shape[: block.dim() - (2 if name in MATRICES else 1)] for name, block in blocks.items()}
    if len(different := set(shapes.values())) == 1:
        return different.pop()
    try:
        return torch.Size(torch.broadcast_shapes(*shapes.values()))
    except RuntimeError as error:
        listed = ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())
        raise ProblemError(f"the batch dimensions don't broadcast: {listed}") from error


def check_objective(data: Data, given: torch.dtype) -> None:
    """Raise unless every finite ``P`` is symmetric and positive semidefinite, to rounding in the ``given`` dtype.

    Raises:
        ProblemError: naming the sample, and the eigenvalue if there is a negative one.
    """
    P = data.P
    if P is None or P.numel() == 0:
        return
    if isinstance(P, Sparse):
        return _check_sparse_objective(P, given)
    if bool((difference := P - P.mT).any()):
        _check_symmetric(P, difference)
    if data.curved or data.curvature is None:
        return
    doubtful = ~data.curvature[1] & P.isfinite().all(-1).all(-1)
    if not bool(doubtful.any()):
        return
    least = torch.linalg.eigvalsh(P[doubtful] if P.dim() > 2 else P[None])[:, 0]
    scale = _size(P)[doubtful] if P.dim() > 2 else _size(P)[None]
    if bool((least < -_rounding(P.shape[-1], given) * scale).any()):
        raise ProblemError(
            f"P isn't positive semidefinite{_sample(doubtful)}: it has the eigenvalue {float(least.min()):.3g}, so the "
            "problem isn't convex; add a multiple of the identity, or use minimize() for a local minimum"
        )


def _check_symmetric(P: Tensor, difference: Tensor) -> None:
    skew = difference.amax((-2, -1))  # which has each entry with both signs
    apart = skew > 1e-8 * _size(P)
    if bool(apart.any()):
        worst = float(skew.nan_to_num().max())
        raise ProblemError(
            f"P isn't symmetric{_sample(apart)}: it differs from its transpose by {worst:.1e}; "
            "pass (P + P.mT) / 2, which has the same objective"
        )


def _size(P: Tensor) -> Tensor:
    """The largest entry, which in a semidefinite matrix is on the diagonal."""
    return P.diagonal(dim1=-2, dim2=-1).abs().amax(-1)


def _rounding(n: int, dtype: torch.dtype) -> float:
    """How negative eigenvalues of a semidefinite ``P`` may be, beside its largest entry."""
    return max(1e-9, n * torch.finfo(dtype).eps)


def _check_sparse_objective(P: Sparse, given: torch.dtype) -> None:
    samples = P.values.shape[0] if P.values.dim() > 1 else 1
    for i, matrix in enumerate(P.csr(samples)):
        where = f" in sample {i}" if P.values.dim() > 1 else ""
        size = abs(matrix.data).max(initial=0)
        if not np.isfinite(size):
            continue
        skew = abs((matrix - matrix.T).data).max(initial=0)
        if skew > 1e-8 * size:
            raise ProblemError(
                f"P isn't symmetric{where}: it differs from its transpose by {skew:.1e}; pass (P + P.T) / 2, which has "
                "the same objective, or both triangles if you passed one"
            )
        if negative_curvature(matrix, _rounding(matrix.shape[0], given) * size):
            raise ProblemError(
                f"P isn't positive semidefinite{where}: it has the eigenvalue {least_eigenvalue(matrix):.3g}, so the "
                "problem isn't convex; add a multiple of the identity, or use minimize() for a local minimum"
            )


def _sample(which: Tensor) -> str:
    return f" in sample {int(which.nonzero()[0, 0])}" if which.dim() else ""
