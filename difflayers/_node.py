"""The one autograd function of the algebraic families: a solve as a node of the graph.

The derivative of an implicit function is itself an implicit function: with ``F(z, θ) = 0`` and ``J = ∂F/∂z``, the
adjoint ``u`` of a cotangent ``g`` satisfies ``Jᵀu + g = 0`` and the tangent ``w`` satisfies ``Jw + (∂F/∂θ)·dθ = 0``.
Both are problems in ``(g, z, θ)``, solved and attached by the same autograd function that solved ``F``: that is where
every order of forward and reverse derivative comes from.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from difflayers import linear
from difflayers._arrays import finite, widen
from difflayers._autodiff import (
    Tape,
    in_functorch,
    is_legacy_batched,
    over_legacy_batch,
    primal,
    pull,
    push,
    without_autocast,
)
from difflayers._linearized import Linearized, LinearSolve
from difflayers._monitor import Role, watch
from difflayers._problem import Problem, Residual
from difflayers._solution import OnFailure, Solution, check_status, has_answer
from difflayers._solver import Solver
from difflayers.errors import LinearSolveError, ProblemError


@dataclass
class Call:
    """One solve, with what its derivatives need to know."""

    problem: Problem
    solver: Solver
    linear_solver: linear.LinearSolver
    on_failure: OnFailure
    role: Role = "forward"
    closures: list[str] | None = None
    stat_names: list[str] = field(default_factory=list)
    first: Tensor | None = None  # F(init), where it was evaluated already
    learn: bool = False  # keep what the solver learns
    inverse: linear.LinearOperator | None = None  # what it learnt of the inverse of the Jacobian
    healthy: bool = False  # whether it is known that every sample has an answer

    def run(self, params: Sequence[Tensor], init: Tensor) -> Solution:
        problem = self.problem if self.first is None else self.problem.started(init, self.first)
        self.first = None
        solution = watch(self.role, self.solver, lambda: self.solver.solve(problem, params, init))
        self.stat_names[:] = solution.stats
        if self.role != "forward":
            return check_status(solution, self.on_failure, f"{self.role} system of a derivative", LinearSolveError)
        if self.learn and isinstance(solution.state, linear.LinearOperator):
            self.inverse = solution.state
        checked = check_status(solution, self.on_failure)
        self.healthy = self.on_failure == "raise"
        return checked

    def linear(self, role: Role, value: Tensor, residual: Residual | None = None) -> Call:
        """The adjoint or tangent system at ``value``, as a call in ``(g, z, *params)``.

        ``residual``: the condition bound to these very parameters, where somebody has it already.
        """
        known = self.inverse if not in_functorch() and self.inverse is not None else None
        problem = Linearized(self.problem, role == "adjoint", residual, known)
        linear_solver = self.linear_solver.held_to(self.solver.tolerance(value.dtype))
        return Call(problem, LinearSolve(linear_solver), self.linear_solver, self.on_failure, role, self.closures)

    def refuse_higher_order(self) -> None:
        """Raise where a derivative of this derivative would be silently wrong."""
        if self.closures is not None:
            names = ", ".join(map(repr, self.closures)) or "some tensors"
            raise ProblemError(
                f"the residual closes over {names}, which gives first derivatives only; for second derivatives pass "
                "them as parameters: residual(z, *params) and args=(...)"
            )
        if not self.linear_solver.exact:
            raise ProblemError(
                f"{self.linear_solver!r} approximates first derivatives and has no second ones; use an exact linear "
                "solver such as linear.Auto()"
            )


class _Implicit(torch.autograd.Function):
    """``(init, *params) -> (z, status, *stats)``; the only autograd function of the algebraic families."""

    @staticmethod
    def forward(call: Call, init: Tensor, *params: Tensor) -> tuple[Tensor, ...]:
        solution = call.run(params, init)
        value = solution.value.clone() if solution.value is init else solution.value
        return value, solution.status, *(stat.clone() for stat in solution.stats.values())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call, _, *params = inputs
        value, status, *stats = output
        ctx.call = call
        ctx.set_materialize_grads(False)  # statuses and statistics have none
        ctx.mark_non_differentiable(status, *stats)
        ctx.save_for_backward(value, status, *params)
        ctx.save_for_forward(value, status, *params)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        value, status, *params = ctx.saved_tensors
        if cotangent is None:
            return (None,) * (2 + len(params))
        wanted = [i for i, p in enumerate(params) if p.is_floating_point() and ctx.needs_input_grad[i + 2]]

        def rule(cotangent: Tensor) -> list[Tensor | None]:
            return cotangents(ctx.call, value, status, params, cotangent, wanted)

        gradients = over_legacy_batch(rule, cotangent) if is_legacy_batched(cotangent) else rule(cotangent)
        return (None, None, *gradients)

    @staticmethod
    def jvp(ctx: Any, _call: None, _init: None, *tangents: Tensor | None) -> tuple[Any, ...]:
        # Torch switches forward mode off in here, and an enclosing transform would silently lose its own tangents:
        # switch it on again, for primals that this transform has nothing more to do with.
        with torch.autograd.forward_ad._set_fwd_grad_enabled(True):
            value, status, *params = [primal(t) for t in ctx.saved_tensors]
            tangent = pushed(ctx.call, value, status, params, tangents)
        return (tangent, *[None] * (1 + len(ctx.call.stat_names)))

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], call: Call, init: Tensor, *params: Tensor
    ) -> tuple[tuple[Tensor, ...], Any]:
        _, init_dim, *dims = in_dims
        params = tuple(p if d is None else p.movedim(d, 0) for p, d in zip(params, dims, strict=True))
        init = init.expand(info.batch_size, *init.shape) if init_dim is None else init.movedim(init_dim, 0)
        shared = [i for i in range(call.problem.points) if dims[i] is None]
        params = tuple(
            p.unsqueeze(0).repeat(info.batch_size, *[1] * p.dim()) if i in shared else p for i, p in enumerate(params)
        )
        in_batch = tuple(None if d is None and i not in shared else 0 for i, d in enumerate(dims))
        problem = call.problem.vmapped(in_batch, info.randomness)
        output = solved(replace(call, problem=problem), init.contiguous(), *params)
        return output, (0,) * len(output)


# Torch asks for it in every call, and otherwise it is made anew.
_Implicit.forward.__signature__ = inspect.signature(_Implicit.forward)  # type: ignore[attr-defined]


def solved(call: Call, init: Tensor, *params: Tensor) -> tuple[Tensor, ...]:
    output: tuple[Tensor, ...] = _Implicit.apply(call, init, *params)  # type: ignore[no-untyped-call]
    return output


class FirstOnly(torch.autograd.Function):
    """The identity, which refuses to be differentiated twice."""

    @staticmethod
    def forward(ctx: Any, call: Call, x: Tensor) -> Tensor:
        ctx.call = call
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[None, Tensor]:
        if torch.is_grad_enabled():
            ctx.call.refuse_higher_order()
        return None, cotangent


def cotangents(
    call: Call, value: Tensor, status: Tensor, params: Sequence[Tensor], cotangent: Tensor, wanted: Sequence[int]
) -> list[Tensor | None]:
    """The gradient of every parameter in ``wanted``, None for the others: ``(∂F/∂θ)ᵀ u`` with ``Jᵀu = -cotangent``."""
    if torch.is_grad_enabled() and not in_functorch():
        call.refuse_higher_order()
    rule = _on_graph if torch.is_grad_enabled() or in_functorch() else _at_once
    answered = None if call.healthy else _answered(status)
    with without_autocast(value.device), _without_failed(value, params, answered) as (value, *params):
        if answered is not None:
            cotangent = torch.where(widen(answered, cotangent), cotangent, 0)
        pulled = rule(call, value, params, cotangent, wanted) if wanted else ()
    gradients: list[Tensor | None] = [None] * len(params)
    for i, gradient in zip(wanted, pulled, strict=True):
        gradients[i] = gradient if gradient is None or answered is None else _zero_failed_rows(gradient, answered)
    return gradients


def _on_graph(
    call: Call, value: Tensor, params: Sequence[Tensor], cotangent: Tensor, wanted: Sequence[int]
) -> tuple[Tensor | None, ...]:
    """The rule in differentiable steps, for derivatives of it and for ``torch.func``."""
    system = call.linear("adjoint", value)
    u = solved(system, torch.zeros_like(cotangent), cotangent, value, *params)[0]
    return pull(_partial(call.problem, params, wanted, value), [params[i] for i in wanted])(u)


def _at_once(
    call: Call, value: Tensor, params: Sequence[Tensor], cotangent: Tensor, wanted: Sequence[int]
) -> Sequence[Tensor | None]:
    """The same for a plain first derivative: one linearization serves the system and the parameters."""
    residual = call.problem.bind(*params)
    pullback = call.problem.pullback(residual, value, wanted)
    if pullback is None:
        tape = Tape(_partial(call.problem, params, wanted), [value, *[params[i] for i in wanted]])
        residual.pullback = lambda u: tape.pull(u, slice(0, 1))
    system = call.linear("adjoint", value, residual)
    u = system.run((cotangent, value, *params), torch.zeros_like(cotangent)).value
    return pullback(u) if pullback else tape.pull(u, slice(1, None))


def pushed(
    call: Call, value: Tensor, status: Tensor, params: Sequence[Tensor], tangents: Sequence[Tensor | None]
) -> Tensor:
    """The tangent ``w`` of the answer: ``Jw = -Σ ∂F/∂θ · dθ``."""
    moving = [i for i, t in enumerate(tangents) if t is not None and params[i].is_floating_point()]
    answered = None if call.healthy else _answered(status)
    with without_autocast(value.device), _without_failed(value, params, answered) as (value, *params):
        b = push(
            _partial(call.problem, params, moving, value),
            [params[i] for i in moving],
            [tangents[i] for i in moving],  # type: ignore[misc]
        )
        if answered is not None:
            b = torch.where(widen(answered, b), b, 0)
        return solved(call.linear("tangent", value), torch.zeros_like(b), b, value, *params)[0]


def _partial(
    problem: Problem, params: Sequence[Tensor], chosen: Sequence[int], z: Tensor | None = None
) -> Callable[..., Tensor]:
    """``F`` as a function of ``z``, unless it is given, and of the chosen parameters."""

    def partial(*values: Tensor) -> Tensor:
        point, *rest = values if z is None else (z, *values)
        everything = list(params)
        for i, v in zip(chosen, rest, strict=True):
            everything[i] = v
        return problem.bind(*everything)(point)  # type: ignore[no-any-return]

    return partial


def _answered(status: Tensor) -> Tensor | None:
    """Which samples have an answer; None where all have, as far as one may look."""
    answered = has_answer(status)
    return None if not in_functorch() and bool(answered.all()) else answered


@contextlib.contextmanager
def _without_failed(value: Tensor, params: Sequence[Tensor], answered: Tensor | None) -> Iterator[Sequence[Tensor]]:
    """The answer and parameters, and a tape, on which samples without an answer can't poison the others.

    Their cotangent is zero, but zero times NaN is NaN, and a shared parameter's gradient sums over samples. So what
    isn't finite becomes finite: in the parameters, and (in eager mode, where hooks exist) in what the tape saves.
    """
    if answered is None:
        yield value, *params
    elif in_functorch():
        yield [_harmless(t, answered) for t in (value, *params)]
    else:
        with torch.autograd.graph.saved_tensors_hooks(finite, lambda t: t):
            yield [_harmless(t, answered) for t in (value, *params)]


def _harmless(tensor: Tensor, answered: Tensor) -> Tensor:
    """Finite, and without what may overflow in rows of samples that have no answer."""
    tensor = finite(tensor)
    if not tensor.is_floating_point() or tensor.shape[: answered.dim()] != answered.shape:
        return tensor
    huge = tensor.abs() > torch.finfo(tensor.dtype).max ** 0.25
    return torch.where(huge & ~widen(answered, tensor), 0, tensor)


def _zero_failed_rows(gradient: Tensor, answered: Tensor) -> Tensor:
    """Exactly zero where a batched parameter's gradient isn't finite because its sample has no answer."""
    if gradient.shape[: answered.dim()] != answered.shape:
        return gradient
    return torch.where(widen(answered, gradient) | gradient.isfinite(), gradient, 0)
