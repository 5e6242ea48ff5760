"""Vector-Jacobian and Jacobian-vector products that work in eager mode and inside ``torch.func``."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
from torch.autograd import forward_ad

Function = Callable[..., Tensor]
Pullback = Callable[[Tensor], tuple[Tensor | None, ...]]


def in_functorch() -> bool:
    """Whether a ``torch.func`` transform is active, so that tensors may be wrapped and values unreadable."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def pull(fn: Function, inputs: Sequence[Tensor]) -> Pullback:
    """The pullback ``u -> (∂fn/∂input)ᵀ u`` at ``inputs``; linearizes once, may be called often.

    A cotangent is None where ``fn`` ignores that input. Outside ``torch.func`` this is the eager tape, so that hooks
    and checkpointing inside ``fn`` work.
    """
    if in_functorch():
        pullback: Pullback = torch.func.vjp(fn, *inputs)[1]
        return pullback
    return Tape(fn, inputs).pull


class Tape:
    """``fn`` linearized at ``inputs`` on the eager tape, for pullbacks to all inputs or to some."""

    def __init__(self, fn: Function, inputs: Sequence[Tensor]) -> None:
        self._aliases, self._output = _trace(fn, inputs)

    def pull(self, cotangent: Tensor, chosen: slice = slice(None)) -> tuple[Tensor | None, ...]:
        """``(∂fn/∂input)ᵀ cotangent`` for the chosen inputs; what only the others need is not computed."""
        aliases = self._aliases[chosen]
        if not aliases or not self._output.requires_grad:
            return (None,) * len(aliases)
        # Grad mode is read now, not when the tape was made: whoever calls decides about higher orders.
        track = torch.is_grad_enabled()
        return torch.autograd.grad(
            self._output, aliases, cotangent, retain_graph=True, create_graph=track, allow_unused=True
        )


def push(fn: Function, inputs: Sequence[Tensor], tangents: Sequence[Tensor]) -> Tensor:
    """The product ``Σ ∂fn/∂input · tangent`` at ``inputs``."""
    if in_functorch():
        # Copies, since torch makes no dual of an expanded tensor.
        product: Tensor = torch.func.jvp(fn, tuple(x.clone() for x in inputs), tuple(tangents))[1]
        return product
    # Dual levels don't nest in eager mode, so the product is the derivative of a pullback, which is linear in u.
    with torch.enable_grad():
        aliases, output = _trace(fn, inputs)
        if not output.requires_grad:
            return torch.zeros_like(output)
        cotangent = torch.zeros_like(output).requires_grad_()
        pulled = torch.autograd.grad(output, aliases, cotangent, create_graph=True, allow_unused=True)
    live = [(p, t) for p, t in zip(pulled, tangents, strict=True) if p is not None and p.requires_grad]
    if not live:
        return torch.zeros_like(output)
    (product,) = torch.autograd.grad(
        [p for p, _ in live], cotangent, [t for _, t in live], create_graph=torch.is_grad_enabled()
    )
    return product


def primal(tensor: Tensor) -> Tensor:
    """The tensor without the tangent of the innermost forward-mode level."""
    bare: Tensor = forward_ad.unpack_dual(tensor, level=0).primal
    return bare


def is_tracked(tensor: Tensor) -> bool:
    """Whether any gradient, reverse or forward, eager or of any ``torch.func`` level, follows this tensor."""
    if not in_functorch():
        return _has_gradient(tensor)
    functorch = torch._C._functorch
    tensor = functorch.unwrap_if_dead(tensor)  # saved in a level that has ended
    top = functorch.peek_interpreter_stack()
    if functorch.maybe_get_level(tensor) == top.level():
        if not functorch.is_batchedtensor(tensor) and _has_gradient(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    with temporarily_pop_interpreter_stack():
        return is_tracked(tensor)


def _has_gradient(tensor: Tensor) -> bool:
    return tensor.requires_grad or forward_ad.unpack_dual(tensor, level=0).tangent is not None


def batch_levels(tensor: Tensor) -> set[int]:
    """The ``vmap`` levels over which a tensor is batched."""
    levels = set()
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            levels.add(torch._C._functorch.maybe_get_level(tensor))
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return levels


def numbers(tensor: Tensor) -> list[Any]:
    """``tensor.tolist()``, which torch 2.6 has not under a transform."""
    if not in_functorch():
        return tensor.tolist()
    return [numbers(row) if row.dim() else row.item() for row in tensor]


def is_legacy_batched(tensor: Tensor) -> bool:
    """Whether this is the cotangent of ``is_grads_batched=True``, which goes through torch's vmap before functorch."""
    legacy: bool = torch._C._functorch.is_legacy_batchedtensor(tensor)
    return legacy


def over_legacy_batch(fn: Callable[[Tensor], list[Tensor | None]], cotangent: Tensor) -> list[Tensor | None]:
    """``fn`` of every row of such a cotangent, by ``torch.func.vmap``: the legacy one can't read a tensor's values."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    rows = torch._remove_batch_dim(cotangent, level, 1, 0)  # the size matters only to tensors that aren't batched
    absent: list[bool] = []

    def present(row: Tensor) -> list[Tensor]:
        results = fn(row)
        absent[:] = [result is None for result in results]
        return [result for result in results if result is not None]

    found = iter(torch.func.vmap(present)(rows))
    return [None if missing else torch._add_batch_dim(next(found), 0, level) for missing in absent]


def _trace(fn: Function, inputs: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    track = torch.is_grad_enabled()
    with torch.enable_grad():
        # Fresh aliases: a derivative with respect to a saved output itself would walk back through the node that
        # saved it, and never return.
        aliases = [x.view_as(x) if track and x.requires_grad else x.detach().requires_grad_() for x in inputs]
        return aliases, fn(*aliases)


@dataclass(frozen=True)
class Autocast:
    """The autocast state of the call, which evaluations of the user's code enter again, and nothing else does.

    A solver's own products in half precision would be the end of its convergence. Casts aren't cached: made while
    gradients are off, they would reach the caller's own use of the same weights and cut it from the graph.
    """

    device: str
    dtype: torch.dtype | None

    @classmethod
    def current(cls, device: torch.device) -> Autocast:
        return cls(device.type, torch.get_autocast_dtype(device.type) if _autocasts(device.type) else None)

    def __call__(self) -> AbstractContextManager[object]:
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device, dtype=self.dtype, cache_enabled=False)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Where solvers run."""
    return torch.autocast(device.type, enabled=False) if _autocasts(device.type) else contextlib.nullcontext()


def _autocasts(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def value_and_gradient(fn: Function, x: Tensor, total: Function) -> tuple[Tensor, Tensor | None]:
    """``fn(x)``, and the gradient in ``x`` of the number ``total(fn(x))``; None where ``fn`` ignores ``x``.

    Both are on the graph of whatever ``x`` and ``fn`` depend on, and of nothing else.
    """
    if in_functorch():
        # Inside one level: a pullback that outlives its level breaks under forward mode around it.
        gradient, (_, value) = torch.func.grad_and_value(lambda x: (total(v := fn(x)), v), has_aux=True)(x)
        return value, gradient
    (alias,), value = _trace(fn, (x,))
    if not value.requires_grad:
        return value, None
    # The gradient depends on the alias. Whether that is on anybody's graph, only a look without alias tells.
    track = torch.is_grad_enabled() and (x.requires_grad or is_tracked(fn(x)))
    with torch.enable_grad():
        number = total(value)
    (gradient,) = torch.autograd.grad(number, alias, create_graph=track, allow_unused=True)
    return value if track else value.detach(), gradient


def value_and_jacobian(fn: Function, x: Tensor, batch_dims: int) -> tuple[Tensor, Tensor]:
    """``fn(x)`` as rows ``(samples, m)``, and its Jacobian ``(samples, m, n)`` for ``x`` of ``n`` entries per sample.

    By as many products as the shorter side of the Jacobian has entries.
    """
    samples, n = x.shape[:batch_dims].numel(), x.shape[batch_dims:].numel()
    if in_functorch():
        output, pullback = torch.func.vjp(fn, x)  # type: ignore[misc]
    else:
        (alias,), output = _trace(fn, (x,))
        pullback = functools.partial(_pulled, output, alias)
        if not torch.is_grad_enabled():
            output = output.detach()
    value = output.reshape(samples, -1)
    m = value.shape[1]
    if m <= n or in_functorch():
        rows = [pullback(unit.expand(samples, m).reshape(output.shape))[0] for unit in torch.eye(m).to(x)]
        parts, dim = [row.reshape(samples, n) for row in rows], 1
    else:
        push_one = _pushforward(pullback, output)
        parts = [push_one(unit.expand(samples, n).reshape(x.shape)).reshape(samples, m) for unit in torch.eye(n).to(x)]
        dim = 2
    return value, torch.stack(parts, dim) if parts else x.new_zeros(samples, m, n)


def _pulled(output: Tensor, alias: Tensor, cotangent: Tensor) -> tuple[Tensor]:
    if not output.requires_grad:
        return (torch.zeros_like(alias),)
    track = torch.is_grad_enabled()
    (pulled,) = torch.autograd.grad(
        output, alias, cotangent, retain_graph=True, create_graph=track, materialize_grads=True
    )
    return (pulled,)


def _pushforward(pullback: Pullback, output: Tensor) -> Function:
    """``v -> J v``, as the derivative of the pullback, which is linear in its cotangent."""
    track = torch.is_grad_enabled()
    with torch.enable_grad():
        cotangent = torch.zeros_like(output).requires_grad_()
        (pulled,) = pullback(cotangent)
    if pulled is None or not pulled.requires_grad:
        return lambda v: torch.zeros_like(output)

    def push_one(v: Tensor) -> Tensor:
        (pushed,) = torch.autograd.grad(
            pulled, cotangent, v, retain_graph=True, create_graph=track, materialize_grads=True
        )
        return pushed

    return push_one
