"""The root of one increasing equation per entry, with derivatives by Newton's method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from difflayers._autodiff import in_functorch
from difflayers.qp.projections._call import batch_first

Equation = Callable[..., tuple[Tensor, Tensor]]
# Bisection alone takes about as many from the widest bracket to the last bit.
STEPS = 100


def scalar_root(equation: Equation, low: Tensor, high: Tensor, start: Tensor, *params: Tensor) -> Tensor:
    """Where ``equation(root, *params)``, which gives a value and its derivative, vanishes; for every entry.

    Newton's method between ``low`` and ``high``, and on the graph of ``params``: a Newton step squares the error, so
    from the root itself the first one has the right first derivative, the second one those up to the third, the third
    one those up to the seventh. As a number each is zero, or rounding, which a flat equation would blow up; so that
    part is left out.
    """
    fixed = [t.detach() for t in (low, high, start, *params)]
    root: Tensor = _Bracketed.apply(equation, *torch.broadcast_tensors(*fixed))  # type: ignore[no-untyped-call]
    if not torch.is_grad_enabled() and not in_functorch() and not _in_forward_mode():
        return root
    for _ in range(3):
        value, slope = equation(root, *params)
        known = slope.detach()
        usable = known.isfinite() & (known != 0)
        step = torch.where(usable, value, 0) / torch.where(usable, slope, 1)
        root = root - (step - step.detach())
    return root


def untracked(x: Tensor) -> bool:
    """Whether nothing follows what is done with a tensor: no graph, transform, dual number or compiler."""
    graph = x.requires_grad and torch.is_grad_enabled()
    return not (graph or in_functorch() or _in_forward_mode() or torch.compiler.is_compiling())


def _in_forward_mode() -> bool:
    return torch.autograd.forward_ad._current_level >= 0


class _Bracketed(torch.autograd.Function):
    """A function for the sake of its vmap rule: inside, tensors can be looked at."""

    @staticmethod
    def forward(equation: Equation, *tensors: Tensor) -> Tensor:
        return _bracketed(equation, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], equation: Equation, *tensors: Tensor) -> tuple[Tensor, int]:
        together = batch_first(info.batch_size, in_dims[1:], tensors)
        return _Bracketed.apply(equation, *together), 0  # type: ignore[no-untyped-call]


@_disable_dynamo
def _bracketed(equation: Equation, low: Tensor, high: Tensor, root: Tensor, *params: Tensor) -> Tensor:
    """Newton's method; bisection where a step leaves the bracket, or the last one wasn't half of the one before."""
    eps = 4 * torch.finfo(root.dtype).eps
    before, done = torch.full_like(root, torch.inf), torch.zeros_like(root, dtype=torch.bool)
    for _ in range(STEPS):
        value, slope = equation(root, *params)
        low, high = torch.where(value <= 0, root, low), torch.where(value >= 0, root, high)
        newton = root - value / slope
        step = (newton - root).abs()
        done = done | ((step <= eps * root.abs().clamp_min(1)) & slope.isfinite()) | (value.abs() <= eps)
        if bool(done.all()):
            break
        good = (newton >= low) & (newton <= high) & (step <= before / 2)
        following = torch.where(done, root, torch.where(good, newton, (low + high) / 2))
        before = (following - root).abs()
        root = following
    return root
