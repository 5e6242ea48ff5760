"""What else a solve of a deep equilibrium layer is good for: iterates on the way, the Jacobian's size, buffers."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.utils import _pytree as pytree

from difflayers._arrays import Packing, finite, widen
from difflayers._autodiff import in_functorch, pull
from difflayers._problem import Residual
from difflayers._solution import Solution, has_answer
from difflayers._solver import IterativeSolver, Solver, mask_failed
from difflayers.errors import ProblemError
from difflayers.fixedpoint._frozen import FrozenModule


class View:
    """A cell as one solve sees it, and the tensors that it sees."""

    def __init__(self, fn: nn.Module, *, advance: bool = True) -> None:
        self.frozen = FrozenModule(fn, advance=advance)

    def __call__(self, z: Any, *args: Any) -> Any:
        return self.frozen(z, self.frozen.tensors, *args)

    def apply(self, z: Any, args: Sequence[Any], status: Tensor | None) -> Any:
        """The cell at ``z``; NaN without gradients for samples that have no answer."""
        if status is None or all_answered(status):
            return self(z, *args)
        value = self(_answered(z, status), *_finite(args))
        return pytree.tree_map(lambda leaf: mask_failed(leaf, status), value)

    def commit(self, solution: Solution, args: Sequence[Any]) -> None:
        """Update the cell's buffers at the equilibrium, unless a sample has none."""
        if self.frozen.writes and (in_functorch() or all_answered(solution.status)):
            self.frozen.commit(pytree.tree_map(torch.Tensor.detach, solution.value), args)


def recording(solver: Solver, at: Sequence[int]) -> tuple[IterativeSolver, dict[int, Tensor]]:
    """The same solver, and where it leaves its iterates after ``at`` steps.

    Raises:
        ProblemError: the solver has no steps, or ``at`` isn't made of their numbers.
    """
    if not isinstance(solver, IterativeSolver):
        raise ProblemError(f"{solver!r} doesn't show its iterates; use a batched solver such as Anderson()")
    if not all(isinstance(step, int) and step >= 0 for step in at):
        raise ProblemError(f"at must hold numbers of steps, 0 or more, got {tuple(at)}")
    if in_functorch():
        raise ProblemError("at= gives iterates, which torch.func transforms can't see; call solve outside of them")
    iterates: dict[int, Tensor] = {}
    steps = itertools.count()

    def step(residual: Residual, z: Tensor, state: Any) -> tuple[Tensor, Any]:
        number = next(steps)
        if number in at:
            iterates[number] = z.detach()
        return solver.step(residual, z, state)

    twin = copy.copy(solver)
    object.__setattr__(twin, "step", step)
    object.__setattr__(twin, "divisible", False)  # so that every iterate has every sample
    return twin, iterates


def squared_jacobian(
    view: View,
    z: Any,
    args: Sequence[Any],
    status: Tensor | None,
    batch_dims: int,
    samples: int,
    generator: Generator | None,
) -> Tensor:
    """Hutchinson's estimate of ``‖∂f/∂z‖² / n`` of every sample, ``(*batch,)``.

    Raises:
        ProblemError: ``samples`` is less than one.
    """
    if samples < 1:
        raise ProblemError(f"samples must be at least 1, got {samples}")
    failed = status is not None and not all_answered(status)
    if failed:
        z, args = _answered(z, status), _finite(args)
    packing = Packing.of(z, batch_dims)
    point = packing.pack(z)
    with torch.enable_grad():
        pullback = pull(lambda packed: packing.pack(view(packing.unpack(packed), *args)), (point,))
        squares = [_square(pullback(_signs(point, generator))[0], point, batch_dims) for _ in range(samples)]
    penalty = torch.stack(squares).mean(0)
    return mask_failed(penalty, status) if failed and status is not None else penalty


def all_answered(status: Tensor) -> bool:
    """Whether every sample is known to have an answer; inside a transform that can't be read."""
    return not in_functorch() and bool(has_answer(status).all())


def _square(pulled: Tensor | None, z: Tensor, batch_dims: int) -> Tensor:
    if pulled is None:
        return z.new_zeros(z.shape[:batch_dims])
    batch = z.shape[:batch_dims]
    size = max(z.shape[batch_dims:].numel(), 1)
    return pulled.reshape(*batch, size).square().sum(-1) / size


def _signs(z: Tensor, generator: Generator | None) -> Tensor:
    return torch.empty_like(z).bernoulli_(0.5, generator=generator) * 2 - 1


def _answered(z: Any, status: Tensor | None) -> Any:
    if status is None:
        return z
    answered = has_answer(status)
    return pytree.tree_map(lambda leaf: torch.where(widen(answered, leaf), leaf, 0), z)


def _finite(tree: Any) -> Any:
    return pytree.tree_map_only(Tensor, finite, tree)
