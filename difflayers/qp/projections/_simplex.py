"""The simplex, the l1 ball, and the sparse relatives of softmax."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from difflayers.errors import ProblemError
from difflayers.qp.projections._call import Parameter, positive, projected, readable
from difflayers.qp.projections._threshold import threshold


def project_simplex(x: Any, radius: Any = 1.0, dim: int = -1) -> Any:
    """The nearest point with ``x ≥ 0`` and ``Σx = radius``.

    By sorting (Held, Wolfe, Crowder 1974, "Validation of subgradient optimization", Mathematical Programming 6), or on
    the CPU by cutting off what can't be support (Michelot 1986, "A finite algorithm for finding the projection of a
    point onto the canonical simplex of Rⁿ", Journal of Optimization Theory and Applications 50), which is faster. The
    answer is linear in ``x`` as long as its support stays. An entry that is just about to leave zero doesn't count as
    support.

    Args:
        x: ``(*batch, n)``.
        radius: a positive number, or one per sample ``(*batch,)``.
        dim: the dimension of ``x`` that isn't batch.

    >>> import torch
    >>> x = torch.tensor([0.5, 1.0, -1.0], requires_grad=True)
    >>> project_simplex(x).detach()
    tensor([0.2500, 0.7500, 0.0000])
    >>> torch.autograd.functional.jacobian(project_simplex, x)
    tensor([[ 0.5000, -0.5000,  0.0000],
            [-0.5000,  0.5000,  0.0000],
            [ 0.0000,  0.0000,  0.0000]])
    """
    _refuse_empty(x, dim, "simplex")
    return projected(_simplex, x, positive("radius", radius), dim=dim)


def _simplex(x: Tensor, radius: Tensor) -> Tensor:
    radius = radius.unsqueeze(-1)
    # From the largest entry, since what all entries share would cancel in the sums.
    x = x - x.detach().amax(-1, keepdim=True)
    support = _simplex_support(x.detach(), radius.detach())
    size = support.sum(-1, keepdim=True)
    excess = (torch.where(support, x, 0).sum(-1, keepdim=True) - radius) / size
    return torch.where(support, x - excess, 0)


def _simplex_support(x: Tensor, radius: Tensor) -> Tensor:
    """Where the projection of an ``x`` with maximum zero isn't zero."""
    if not readable() or x.device.type != "cpu":
        return _simplex_support_by_sorting(x, radius)
    # Whatever would be negative if the support were all that is left leaves. A fifth of the time of sorting.
    support = x > -radius
    while True:
        excess = (torch.where(support, x, 0).sum(-1, keepdim=True) - radius) / support.sum(-1, keepdim=True)
        smaller = support & (x > excess)
        if torch.equal(smaller, support):
            return support
        support = smaller


def _simplex_support_by_sorting(x: Tensor, radius: Tensor) -> Tensor:
    ordered = x.sort(dim=-1, descending=True).values
    count = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device)
    excess = (ordered.cumsum(-1) - radius) / count
    size = (ordered > excess).sum(-1, keepdim=True).clamp(min=1)
    return x > excess.gather(-1, size - 1)


def project_l1_ball(x: Any, radius: Any = 1.0, dim: int = -1) -> Any:
    """The nearest point with ``‖x‖₁ ≤ radius``.

    Outside of the ball it is a simplex in the orthant of ``x`` (Duchi, Shalev-Shwartz, Singer, Chandra 2008, "Efficient
    projections onto the l1-ball", ICML). On the boundary the derivative is that of the inside, the identity.

    Args:
        x: ``(*batch, n)``.
        radius: a positive number, or one per sample ``(*batch,)``.
        dim: the dimension of ``x`` that isn't batch.

    >>> import torch
    >>> project_l1_ball(torch.tensor([1.5, -1.0]))
    tensor([ 0.7500, -0.2500])
    """
    return projected(_l1_ball, x, positive("radius", radius), dim=dim)


def _l1_ball(x: Tensor, radius: Tensor) -> Tensor:
    if x.shape[-1] == 0:
        return x
    sign = x.detach().sign()
    inside = x.detach().abs().sum(-1, keepdim=True) <= radius.detach().unsqueeze(-1)
    return torch.where(inside, x, sign * _simplex(sign * x, radius))


def sparsemax(x: Any, dim: int = -1) -> Any:
    """Probabilities, some of them zero: the projection of scores on the simplex.

    Martins, Astudillo 2016, "From softmax to sparsemax", ICML.

    >>> import torch
    >>> sparsemax(torch.tensor([0.5, 1.0, -1.0]))
    tensor([0.2500, 0.7500, 0.0000])
    """
    return project_simplex(x, 1.0, dim)


def entmax(x: Any, alpha: Any = 1.5, dim: int = -1) -> Any:
    """Probabilities between :func:`torch.softmax` (``alpha=1``) and :func:`sparsemax` (``alpha=2``).

    ``argmax_p pᵀx + (1 - Σ pᵅ)/(α(α - 1))`` over the simplex, which is ``max(0, (α - 1)x - τ)^(1/(α - 1))`` with the
    threshold ``τ`` for which it sums to one (Peters, Niculae, Martins 2019, "Sparse sequence-to-sequence models", ACL;
    learning ``alpha``: Correia, Niculae, Martins 2019, "Adaptively sparse transformers", EMNLP). 1.5 goes by sorting,
    other numbers by bisection. Where an entry leaves zero, there is a derivative for ``alpha < 2`` and a kink from 2
    on; an entry that is just about to leave zero doesn't count as support.

    Args:
        x: scores, ``(*batch, n)``.
        alpha: a number of at least one, or a tensor ``(*batch,)`` of numbers above one, which may be learned.
        dim: the dimension of ``x`` that isn't batch.

    >>> import torch
    >>> entmax(torch.tensor([0.5, 1.0, -1.0])).round(decimals=3)
    tensor([0.3260, 0.6740, 0.0000])
    """
    _refuse_empty(x, dim, "simplex")
    if isinstance(alpha, (int, float)):
        if alpha == 1:
            return projected(lambda x: torch.softmax(x, -1), x, dim=dim)
        if alpha == 2:
            return sparsemax(x, dim)
        if alpha == 1.5:
            return projected(_entmax15, x, dim=dim)
    above_one = Parameter("alpha", alpha, (), lambda t: (t > 1) & (t < torch.inf), "above one and finite", 2.0)
    return projected(_entmax, x, above_one, dim=dim)


def _entmax15(x: Tensor) -> Tensor:
    z = (x - x.detach().amax(-1, keepdim=True)) / 2
    support = _entmax15_support(z.detach())
    tau = _entmax15_threshold(torch.where(support, z, 0), support.sum(-1, keepdim=True), support)
    return torch.where(support, z - tau, 0).square()


def _entmax15_threshold(z: Tensor, size: Tensor, support: Tensor) -> Tensor:
    """The smaller root of ``Σ (z - τ)² = 1`` over the support."""
    mean = z.sum(-1, keepdim=True) / size
    spread = torch.where(support, z - mean, 0).square().sum(-1, keepdim=True)
    return mean - torch.sqrt((1 - spread) / size)


def _entmax15_support(z: Tensor) -> Tensor:
    ordered = z.sort(dim=-1, descending=True).values
    count = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype, device=z.device)
    mean = ordered.cumsum(-1) / count
    spread = ordered.square().cumsum(-1) - count * mean.square()
    tau = mean - torch.sqrt(((1 - spread) / count).clamp(min=0))
    size = (ordered > tau).sum(-1, keepdim=True).clamp(min=1)
    return z > tau.gather(-1, size - 1)


def _entmax(x: Tensor, alpha: Tensor) -> Tensor:
    alpha = alpha.unsqueeze(-1)
    z = (alpha - 1) * (x - x.detach().amax(-1, keepdim=True))
    power = 1 / (alpha - 1)
    tau = threshold(z, power.expand(*z.shape[:-1], 1))
    support = z > tau
    return torch.where(support, torch.where(support, z - tau, 1) ** power, 0)


def _refuse_empty(x: Any, dim: int, what: str) -> None:
    shape = getattr(x, "shape", ())
    if -len(shape) <= dim < len(shape) and shape[dim] == 0:
        raise ProblemError(f"x has shape {tuple(shape)}, but a {what} without entries has no points")
