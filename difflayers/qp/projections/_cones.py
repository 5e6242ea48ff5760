"""The second-order cone and the cone of positive semidefinite matrices, both their own duals."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from difflayers.errors import ProblemError
from difflayers.qp.projections._call import projected
from difflayers.qp.projections._sets import length
from difflayers.qp.projections._spectral import positive_projector


def project_second_order_cone(x: Any, dim: int = -1) -> Any:
    """The nearest point ``(t, u)`` with ``‖u‖₂ ≤ t``; ``t`` is the first entry of ``x``.

    With ``m = (t + ‖u‖)/2`` it is ``x`` itself where ``‖u‖ ≤ t``, zero where ``‖u‖ ≤ -t``, and ``(m, m u/‖u‖)``
    between. The first condition that holds also gives the derivative: on the cone, its apex included, the identity; on
    the polar cone elsewhere zero.

    Args:
        x: ``(*batch, 1 + n)``, ``t`` first.
        dim: the dimension of ``x`` that isn't batch.

    >>> import torch
    >>> project_second_order_cone(torch.tensor([[0.0, 3.0, 4.0], [-6.0, 3.0, 4.0]]))
    tensor([[2.5000, 1.5000, 2.0000],
            [0.0000, 0.0000, 0.0000]])
    """
    shape = getattr(x, "shape", ())
    if -len(shape) <= dim < len(shape) and shape[dim] == 0:
        raise ProblemError(f"x has shape {tuple(shape)}, but a point of the cone has at least the entry t")
    return projected(second_order_cone, x, dim=dim)


def second_order_cone(x: Tensor) -> Tensor:
    """The same for finite ``x``, unchecked."""
    t, u = x[..., 0], x[..., 1:]
    size = length(u.detach())
    inside, polar = size <= t.detach(), size <= -t.detach()
    between = ~(inside | polar)
    size = length(u, between)
    middle = (t + size) / 2
    value = torch.cat([middle.unsqueeze(-1), (middle / size).unsqueeze(-1) * u], dim=-1)
    return torch.where(inside.unsqueeze(-1), x, torch.where(between.unsqueeze(-1), value, 0))


def project_psd(X: Any) -> Any:
    """The nearest positive semidefinite matrix, in the Frobenius norm.

    ``Σ max(0, λ) q qᵀ`` over eigenvalues and eigenvectors of the symmetric part of ``X`` (Higham 1988, "Computing a
    nearest symmetric positive semidefinite matrix", Linear Algebra and its Applications 103). The derivative in the
    direction ``E`` multiplies each entry of ``E``, in the basis of eigenvectors, by
    ``(max(0, λᵢ) - max(0, λⱼ))/(λᵢ - λⱼ)``, which is one or zero where signs are equal (Malick, Sendov 2006, "Clarke
    generalized Jacobian of the projection onto the cone of positive semidefinite matrices", Set-Valued Analysis 14). So
    equal eigenvalues do no harm; only one that is zero does. Within rounding of zero it counts as negative, which gives
    the smallest element of the generalized Jacobian.

    Args:
        X: ``(*batch, n, n)``.

    >>> import torch
    >>> project_psd(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
    tensor([[1.5000, 1.5000],
            [1.5000, 1.5000]])
    """
    return projected(psd, X, shape=("n", "n"))


def psd(X: Tensor) -> Tensor:
    """The same for finite ``X``, unchecked."""
    X = (X + X.mT) / 2
    value = X @ positive_projector(X)
    return (value + value.mT) / 2
