"""The stages of a step as one compiled function, and their vector-Jacobian products as another."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from difflayers.ode._problem import Evaluate, InitialValueProblem
from difflayers.ode._stages import Stages, Time, mixed
from difflayers.ode._tableaus import Tableau

_known: WeakKeyDictionary[Any, dict[Callable[..., Any], Callable[..., Any]]] = WeakKeyDictionary()


class CompiledStages(Stages):
    """Stages that are evaluated in one call of what ``torch.compile`` makes of them."""

    def __init__(
        self,
        tableau: Tableau,
        evaluate: Evaluate,
        like: Tensor,
        problem: InitialValueProblem,
        tensors: Sequence[Tensor],
    ) -> None:
        super().__init__(tableau, evaluate, like)
        self.problem, self.tensors = problem, list(tensors)
        self._attempt = compiled(_attempt, problem.function)

    def attempt(self, t: Time, y: Tensor, h: Time) -> Tensor:
        made = self.tableau.stages + bool(self.tableau.error)
        end, slopes = self._attempt(
            self.problem, self.tableau, _number(t), _number(h), y.detach(), self.first, self.tensors
        )
        self.slopes[1:made].copy_(slopes)
        self.evaluations += made - 1
        self._made = made
        return end  # type: ignore[no-any-return]


class CompiledSweep:
    """What the stages of a step give to its start, as :func:`~difflayers.ode._replay.swept`.

    Args:
        problem: whose right-hand side it is.
        tensors: its arguments and module parameters, and
        followed: which of them gradients are wanted of.
    """

    def __init__(self, problem: InitialValueProblem, tensors: Sequence[Tensor], followed: Sequence[int]) -> None:
        self.problem, self.tensors, self.followed = problem, [p.detach() for p in tensors], list(followed)
        self._sweep = compiled(_sweep, problem.function)

    def __call__(
        self,
        tableau: Tableau,
        evaluate: Evaluate,
        t: Time,
        h: Time,
        y: Tensor,
        direct: Tensor,
        wanted: Sequence[Tensor],
        gradients: list[Tensor | None],
    ) -> Tensor:
        # Apart, so that how many there are isn't a size that may vary.
        outside = list(direct.unbind(0))
        back, *found = self._sweep(
            self.problem, tableau, _number(t), _number(h), y.detach(), outside, self.tensors, self.followed
        )
        for index, gradient in enumerate(found):
            total = gradients[index]
            gradients[index] = gradient if total is None else total.add_(gradient)
        return back  # type: ignore[no-any-return]


def compiled(step: Callable[..., Any], fn: Callable[..., Any]) -> Callable[..., Any]:
    """``step`` as compiled for right-hand sides with the code of ``fn``.

    torch keeps what it compiled with the code of a function, and gives up after a few versions: every right-hand side
    gets a copy of its own.
    """
    own = _known.setdefault(_code(fn), {})
    if step not in own:
        copy = types.FunctionType(step.__code__.replace(), step.__globals__, step.__name__)
        own[step] = torch.compile(copy)
    return own[step]


def _code(fn: Any) -> Any:
    while isinstance(fn, functools.partial):
        fn = fn.func
    fn = type(fn).forward if isinstance(fn, nn.Module) else fn
    return getattr(fn, "__code__", None) or type(fn)


def _number(value: Time) -> Tensor:
    return value if isinstance(value, Tensor) else torch.scalar_tensor(value, dtype=torch.float64)


def _attempt(
    problem: InitialValueProblem,
    tableau: Tableau,
    t: Tensor,
    h: Tensor,
    y: Tensor,
    first: Tensor,
    tensors: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """The state after a step, and all its slopes but the first one."""
    made = tableau.stages + (1 if tableau.error else 0)
    slopes = _slopes(problem.evaluator(tensors), tableau, t, h, y, first, made)
    rest = torch.stack(slopes[1:]) if made > 1 else y.new_zeros(0, *y.shape)
    return mixed(y, slopes, tableau.b, h), rest


def _sweep(
    problem: InitialValueProblem,
    tableau: Tableau,
    t: Tensor,
    h: Tensor,
    y: Tensor,
    outside: list[Tensor],
    tensors: list[Tensor],
    followed: list[int],
) -> tuple[Tensor, ...]:
    def slopes(y: Tensor, *chosen: Tensor) -> list[Tensor]:
        everything = list(tensors)
        for i, tensor in zip(followed, chosen, strict=True):
            everything[i] = tensor
        evaluate = problem.evaluator(everything)
        return _slopes(evaluate, tableau, t, h, y, evaluate(t.to(y.dtype), y), len(outside))

    pulled: tuple[Tensor, ...] = torch.func.vjp(slopes, y, *[tensors[i] for i in followed])[1](outside)
    return pulled


def _slopes(
    evaluate: Evaluate, tableau: Tableau, t: Tensor, h: Tensor, y: Tensor, first: Tensor, count: int
) -> list[Tensor]:
    slopes = [first]
    for row, c in zip(tableau.rows[: count - 1], tableau.c[1:count], strict=True):
        slopes.append(evaluate((t + c * h).to(y.dtype), mixed(y, slopes, row, h)))
    return slopes
