"""Boxes, half-spaces, affine sets, Euclidean balls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from difflayers._solution import to_numpy
from difflayers.errors import ProblemError
from difflayers.qp._data import times
from difflayers.qp.projections._call import Parameter, checked, positive, projected, readable


def project_box(x: Any, lower: Any = None, upper: Any = None) -> Any:
    """The nearest point with ``lower ≤ x ≤ upper``, entry by entry.

    At a bound the derivative is that of the inside: one in ``x``, zero in the bound.

    Args:
        x: any shape.
        lower: a number, or a tensor that broadcasts with ``x``; None or ``-inf`` where there is no bound.
        upper: the same, with ``inf``.

    Raises:
        ProblemError: a lower bound is above its upper one. Inside ``torch.func`` and ``torch.compile``, where values
            can't be read, such an entry is NaN.

    >>> import torch
    >>> project_box(torch.tensor([-1.0, 0.5, 3.0]), 0, torch.tensor([1.0, 1.0, 2.0]))
    tensor([0.0000, 0.5000, 2.0000])
    """
    bounds = (Parameter("lower", lower), Parameter("upper", upper))
    (point, *given), numpy = checked([Parameter("x", x, ()), *[b for b in bounds if b.value is not None]])
    sides = {p.name: p.value for p in given}
    value = _clamped(point.value, sides.get("lower"), sides.get("upper"))
    return to_numpy(value) if numpy else value


def _clamped(x: Tensor, lower: Tensor | None, upper: Tensor | None) -> Tensor:
    if lower is None and upper is None:
        return x.clone()
    # Not clamp: at a bound that is a tensor its derivative depends on the release of torch.
    value = x if lower is None else torch.where((x < lower) | lower.isnan(), lower, x)
    value = value if upper is None else torch.where((value > upper) | upper.isnan(), upper, value)
    if lower is None or upper is None:
        return value
    contradictory = lower > upper
    if readable() and bool(contradictory.any()):
        low, high = (t.detach().expand(contradictory.shape)[contradictory][0] for t in (lower, upper))
        raise ProblemError(f"lower {low:.6g} is above upper {high:.6g} in {int(contradictory.sum())} entries")
    return torch.where(contradictory, torch.nan, value)


def project_halfspace(x: Any, normal: Any, offset: Any) -> Any:
    """The nearest point with ``normalᵀx ≤ offset``.

    On the boundary the derivative is that of the inside, the identity.

    Args:
        x: ``(*batch, n)``.
        normal: ``(*batch, n)``, of any length but zero.
        offset: ``(*batch,)``, or a number.

    >>> import torch
    >>> project_halfspace(torch.tensor([2.0, 3.0]), torch.tensor([0.0, 2.0]), 4.0)
    tensor([2., 2.])
    """
    return projected(
        _halfspace,
        x,
        Parameter("normal", normal, ("n",), lambda t: (t != 0).any(-1), "other than zero"),
        Parameter("offset", offset, (), lambda t: t.abs() < torch.inf, "finite"),
    )


def _halfspace(x: Tensor, normal: Tensor, offset: Tensor) -> Tensor:
    # Lengths cancel; this one keeps squares from overflowing.
    scale = normal.detach().abs().amax(-1)
    normal, offset = normal / scale.unsqueeze(-1), offset / scale
    excess = torch.relu((normal * x).sum(-1) - offset) / normal.square().sum(-1)
    return x - excess.unsqueeze(-1) * normal


def project_affine(x: Any, A: Any, b: Any) -> Any:
    """The nearest point with ``Ax = b``, ``x - A⁺(Ax - b)``.

    Rows may be redundant; then derivatives in ``A`` are those along which the rank stays. Where rows contradict one
    another there is no such point, and the sample is NaN.

    Args:
        x: ``(*batch, n)``.
        A: ``(*batch, p, n)``.
        b: ``(*batch, p)``.

    >>> import torch
    >>> project_affine(torch.tensor([2.0, 3.0]), torch.tensor([[0.0, 2.0]]), torch.tensor([1.0]))
    tensor([2.0000, 0.5000])
    """
    return projected(_affine, x, Parameter("A", A, ("p", "n")), Parameter("b", b, ("p",)))


def _affine(x: Tensor, A: Tensor, b: Tensor) -> Tensor:
    if b.shape[-1] == 0:
        return x.expand(torch.broadcast_shapes(x.shape, (*b.shape[:-1], 1), (*A.shape[:-2], 1))).clone()
    inverse = torch.linalg.pinv(A)
    value = x - times(inverse, times(A, x) - b)
    gap = (times(A, value) - b).detach().abs().amax(-1)
    scale = (times(A.abs(), value.abs()) + b.abs()).detach().amax(-1)
    eps = torch.finfo(x.dtype).eps
    rounding = 16 * eps * times(A.abs(), x.abs()).detach().amax(-1)  # all that is left where the value is zero
    solved = gap <= eps**0.5 * scale + rounding
    return torch.where(solved.unsqueeze(-1), value, torch.nan)


def project_l2_ball(x: Any, radius: Any = 1.0, dim: int = -1) -> Any:
    """The nearest point with ``‖x‖₂ ≤ radius``.

    On the sphere the derivative is that of the inside: the identity in ``x``, zero in ``radius``.

    Args:
        x: ``(*batch, n)``.
        radius: a positive number, or one per sample ``(*batch,)``.
        dim: the dimension of ``x`` that isn't batch.

    >>> import torch
    >>> project_l2_ball(torch.tensor([[3.0, 4.0], [0.3, 0.4]]))
    tensor([[0.6000, 0.8000],
            [0.3000, 0.4000]])
    """
    return projected(_l2_ball, x, positive("radius", radius), dim=dim)


def _l2_ball(x: Tensor, radius: Tensor) -> Tensor:
    outside = length(x.detach()) > radius
    size = length(x, outside)
    return x * torch.where(outside, radius / size, 1).unsqueeze(-1)


def length(x: Tensor, where: Tensor | None = None) -> Tensor:
    """The Euclidean norm over the last dimension; elsewhere than ``where`` any positive number, of derivative zero."""
    if x.shape[-1] == 0:
        return x.sum(-1) if where is None else x.sum(-1) + 1
    # Squares of 1e-200 and 1e200 neither vanish nor overflow.
    scale = x.detach().abs().amax(-1)
    scale = torch.where(scale > 0, scale, 1)
    square = (x / scale.unsqueeze(-1)).square().sum(-1)
    return scale * torch.sqrt(square if where is None else torch.where(where, square, 1))
