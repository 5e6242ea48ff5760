"""Initial value problems: what holds along the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from difflayers._arguments import Arguments, with_parameters
from difflayers._autodiff import Autocast
from difflayers._problem import Form, Problem, Residual, matched
from difflayers._solution import Explain, Solution
from difflayers.errors import ProblemError
from difflayers.linear import Property
from difflayers.ode._failure import explained
from difflayers.ode._mass import Massive
from difflayers.ode._state import State

Evaluate = Callable[[Tensor, Tensor], Tensor]
IN_PLACE = "fn writes to y in place; use operations that return new tensors, or y.clone()"


@dataclass(frozen=True)
class InitialValueProblem(Problem):
    """``dy/dt = fn(t, y, *args)`` with ``y(t₀) = y₀``, for states as rows; ``M dy/dt`` with a mass matrix.

    Its parameters are ``(y0, t, *tensors)``: ``y0`` as rows ``(samples, n)``, output times ``(T,)`` or
    ``(samples, T)``, and the tensors of ``arguments``. The answer is ``(samples, T, n)``.

    Args:
        function: ``fn``.
        state: how a state lies in rows.
        arguments: how the arguments of ``fn`` and its module parameters lie in a row of tensors.
        autocast: what evaluations of ``fn`` run in.
        massive: whether the last of the tensors is a mass matrix, ``(n, n)`` or ``(samples, n, n)``.
    """

    function: Callable[..., Any]
    state: State
    arguments: Arguments
    autocast: Autocast
    batch_dims: int = 1
    properties: frozenset[Property] = frozenset()
    massive: bool = False

    @property
    def form(self) -> Form:  # type: ignore[override]
        return "dae" if self.massive else "ode"

    @property
    def advice(self) -> str:  # type: ignore[override]
        return "Rodas()" if self.massive else "Dopri5()"

    @property
    def samples(self) -> int:
        return self.state.samples

    def explain(self, solution: Solution) -> Explain:
        return lambda status, failed: explained(status, solution.stats, failed)

    def bind(self, *params: Any) -> Residual:
        raise TypeError("an initial value problem has no residual; its right-hand side is evaluator()")

    @property
    def native(self) -> torch.Size:
        """The shape in which states of the whole batch cost the least to evaluate: that of ``y``, or rows."""
        state = self.state
        return state.batch + state.shapes[0] if state.plain else torch.Size((self.samples, sum(state.sizes)))

    @property
    def count(self) -> int:
        """How many tensors it has: arguments, parameters, and the mass matrix."""
        return sum(fixed is None for fixed in self.arguments.fixed) + self.massive

    def evaluator(self, tensors: Sequence[Tensor]) -> Evaluate:
        """The right-hand side for these tensors, of states of the native shape or as rows."""
        parameters, args = self.arguments.unflatten(tensors)
        fn, state, autocast = with_parameters(self.function, parameters), self.state, self.autocast
        native = self.native if state.plain else None
        # Some samples of one batch dimension, each a row, are what the callable gets.
        flat = native is not None and len(native) == 2 and len(state.batch) == 1

        # What is compiled was evaluated before.
        compiling = torch.compiler.is_compiling()

        def checked(value: Any, y: Any) -> Any:
            return value if _alike(value, y) else matched(value, y, "fn")

        def evaluate(t: Tensor, rows: Tensor) -> Tensor:
            y = rows if flat or rows.shape == native else state.unpack(rows)
            before = None if compiling or rows.is_inference() else rows._version
            if not flat and t.dim():
                t = state.own_times(t)
            if autocast.dtype is None:
                value = checked(fn(t, y, *args), y)
            else:
                with autocast():
                    value = checked(fn(t, y, *args), y)
            if before is not None and rows._version != before:
                raise ProblemError(IN_PLACE)
            return value if y is rows else state.pack(value, rows.shape[0])

        return Massive(evaluate, tensors[-1]) if self.massive else evaluate

    def mass(self, matrix: Tensor) -> Tensor:
        """The mass matrix, for everybody or for every sample, from what is in the tensors."""
        return matrix

    def divided(self, tensors: Sequence[Tensor], rows: Tensor) -> tuple[list[Tensor], list[bool]] | None:
        """The tensors of some samples alone, and which of them were divided; None if nobody knows how to.

        The parameters of a module are everybody's; an argument whose first dimension has the size of the batch goes
        with it, as far as shapes tell.
        """
        if len(self.state.batch) != 1:
            return None
        shared = len(self.arguments.unflatten(tensors)[0])
        own = [i >= shared and p.dim() > 0 and p.shape[0] == self.samples for i, p in enumerate(tensors)]
        if self.massive:
            own[-1] = tensors[-1].dim() == 3
        return [p[rows] if goes else p for p, goes in zip(tensors, own, strict=True)], own

    def mapped(self, size: int, in_dims: tuple[int | None, ...], randomness: str) -> InitialValueProblem:
        """The same with one more leading dimension of samples; ``in_dims`` says which tensors have it."""
        own = self.function, self.state, self.arguments, self.autocast, self.batch_dims + 1, self.properties
        return _Mapped(*own, self.massive, self, size, in_dims, randomness)


@dataclass(frozen=True)
class _Mapped(InitialValueProblem):
    base: InitialValueProblem = field(kw_only=False, default=None)  # type: ignore[assignment]
    size: int = 1
    in_dims: tuple[int | None, ...] = ()
    randomness: str = "error"

    @property
    def samples(self) -> int:
        return self.size * self.base.samples

    @property
    def native(self) -> torch.Size:
        return torch.Size((self.samples, sum(self.state.sizes)))

    def evaluator(self, tensors: Sequence[Tensor]) -> Evaluate:
        def one(t: Tensor, rows: Tensor, *tensors: Tensor) -> Tensor:
            return self.base.evaluator(tensors)(t, rows)

        def evaluate(t: Tensor, rows: Tensor) -> Tensor:
            dims = (0 if t.dim() else None, 0, *self.in_dims)
            own = self._split(t) if t.dim() else t
            result: Tensor = torch.func.vmap(one, dims, randomness=self.randomness)(own, self._split(rows), *tensors)
            return result.reshape(rows.shape)

        if not self.massive:
            return evaluate
        with torch.enable_grad():  # views of what wants a gradient, whoever asks
            return Massive(evaluate, self.mass(tensors[-1]))

    def mass(self, matrix: Tensor) -> Tensor:
        if self.in_dims[-1] is None:
            own = self.base.mass(matrix)
            return own.repeat(self.size, 1, 1) if own.dim() > 2 else own
        own = torch.func.vmap(self.base.mass)(matrix)
        if own.dim() < 4:
            own = own.unsqueeze(1).expand(-1, self.base.samples, -1, -1)
        return own.reshape(self.samples, *own.shape[2:])

    def divided(self, tensors: Sequence[Tensor], rows: Tensor) -> None:
        return None

    def _split(self, rows: Tensor) -> Tensor:
        return rows.reshape(self.size, self.base.samples, rows.shape[-1])


def _alike(value: Any, y: Any) -> bool:
    if not type(value) is type(y) is Tensor:
        return False
    return value.shape == y.shape and value.dtype == y.dtype and value.device == y.device


def check_tolerances(rtol: float, atol: float) -> None:
    """Raise unless a step can be small enough."""
    if rtol + atol == 0:
        raise ProblemError("rtol and atol must not both be zero: no step would be accurate enough")
