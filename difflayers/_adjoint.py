"""How the answer moves when the inputs move.

The derivative of an implicit function is itself an implicit function: with ``F(z, θ) = 0`` and ``J = ∂F/∂z``, the
adjoint ``u`` of a cotangent ``g`` satisfies ``Jᵀu + g = 0`` and the tangent ``w`` satisfies ``Jw + (∂F/∂θ)·dθ = 0``.
Both are problems in ``(g, z, θ)``, solved and attached by the same autograd function that solved ``F``: that is where
every order of forward and reverse derivative comes from.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from difflayers import linear
from difflayers._arrays import widen
from difflayers._autodiff import (
    Tape,
    batch_levels,
    in_functorch,
    is_legacy_batched,
    is_tracked,
    over_legacy_batch,
    primal,
    pull,
    push,
    without_autocast,
)
from difflayers._linearized import Linearized, LinearSolve
from difflayers._monitor import Role, watch
from difflayers._problem import Problem, Residual, closure_names
from difflayers._solution import OnFailure, Solution, check_status, has_answer
from difflayers._solver import Solver, mask_failed
from difflayers.errors import LinearSolveError, ProblemError


class Adjoint(ABC):
    """A rule for the derivatives of a value that was computed out of autograd's sight."""

    @abstractmethod
    def supports(self, problem: Problem, solver: Solver) -> str | None:
        """Why this rule can't serve, or None."""

    @abstractmethod
    def apply(
        self, problem: Problem, solver: Solver, params: Sequence[Tensor], init: Tensor, on_failure: OnFailure = "raise"
    ) -> Solution:
        """The solution, its value on the graph of ``params``."""


@dataclass(frozen=True)
class ImplicitAdjoint(Adjoint):
    """The implicit function theorem: one linear solve per derivative, ``Jᵀu = -g``; memory of one state.

    Args:
        linear_solver: solves ``Jᵀu = -g`` and ``Jw = -b``. Exact ones give derivatives of every order; approximate ones
            (:class:`difflayers.linear.Neumann`, :class:`difflayers.linear.Identity`) give first derivatives only.
    """

    linear_solver: linear.LinearSolver = field(default_factory=linear.Auto)

    def supports(self, problem: Problem, solver: Solver) -> str | None:
        if problem.form == "ode":
            return "an initial value problem is no algebraic equation; use ode.CheckpointedAdjoint()"
        return self.linear_solver.supports(problem.properties)

    def apply(
        self, problem: Problem, solver: Solver, params: Sequence[Tensor], init: Tensor, on_failure: OnFailure = "raise"
    ) -> Solution:
        init = init.detach()
        hidden, first = _closes_over(problem, params, init)
        learn = torch.is_grad_enabled() and not in_functorch()
        call = _Call(problem, solver, self.linear_solver, on_failure, closures=hidden, first=first, learn=learn)
        value, status, *stats = _solve(call, init, *params)
        if hidden is not None:
            value = value + self._through_closures(call, value, params)
        if in_functorch() or not bool(has_answer(status).all()):
            value = mask_failed(value, status)
        return Solution(value, status, dict(zip(call.stat_names, stats, strict=True)))

    def _through_closures(self, call: _Call, value: Tensor, params: Sequence[Tensor]) -> Tensor:
        """Zero, whose first derivatives flow to whatever the residual closes over."""
        fixed = [p.detach() for p in params]
        with torch.enable_grad():
            residual = _FirstOnly.apply(call, call.problem.bind(*fixed)(value.detach()))  # type: ignore[no-untyped-call]
        move = _solve(call.linear("tangent", value), torch.zeros_like(value), residual, value.detach(), *fixed)[0]
        return move - move.detach()


def _instead(problem: Problem) -> str:
    """What serves where steps can't be unrolled."""
    known = "CheckpointedAdjoint() with a solver such as Dopri5()"
    return known if problem.form in ("ode", "dae") else "ImplicitAdjoint()"


@dataclass(frozen=True)
class UnrolledAdjoint(Adjoint):
    """Backpropagation through the solver's own steps; memory grows with them. For comparison, and for few steps."""

    def supports(self, problem: Problem, solver: Solver) -> str | None:
        if not solver.traceable:
            name = type(solver).__name__
            return f"{name} takes steps outside autograd, which can't be unrolled; use {_instead(problem)}"
        return None

    def apply(
        self, problem: Problem, solver: Solver, params: Sequence[Tensor], init: Tensor, on_failure: OnFailure = "raise"
    ) -> Solution:
        if any(map(batch_levels, (init, *params))):
            raise ProblemError(
                "UnrolledAdjoint can't be vmapped: the loop that it traces reads which samples are done; give fn the "
                f"batch and batch_dims=1 instead, or use {_instead(problem)}"
            )
        solution = watch("forward", solver, lambda: solver.solve(problem, params, init))
        check_status(solution, on_failure)
        if not bool(has_answer(solution.status).all()):
            # Once more, on a tape on which samples without an answer can't poison the others.
            with torch.autograd.graph.saved_tensors_hooks(_finite, lambda t: t):
                value = solver.solve(problem, [_finite(p) for p in params], init).value
            solution = replace(solution, value=mask_failed(value, solution.status))
        return solution


@dataclass
class _Call:
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

    def run(self, params: Sequence[Tensor], init: Tensor) -> Solution:
        problem = self.problem if self.first is None else self.problem.started(init, self.first)
        self.first = None
        solution = watch(self.role, self.solver, lambda: self.solver.solve(problem, params, init))
        self.stat_names[:] = solution.stats
        if self.role != "forward":
            return check_status(solution, self.on_failure, f"{self.role} system of a derivative", LinearSolveError)
        if self.learn and isinstance(solution.state, linear.LinearOperator):
            self.inverse = solution.state
        return check_status(solution, self.on_failure)

    def linear(self, role: Role, value: Tensor, residual: Residual | None = None) -> _Call:
        """The adjoint or tangent system at ``value``, as a call in ``(g, z, *params)``.

        ``residual``: the condition bound to these very parameters, where somebody has it already.
        """
        known = self.inverse if not in_functorch() and self.inverse is not None else None
        problem = Linearized(self.problem, role == "adjoint", residual, known)
        linear_solver = self.linear_solver.held_to(self.solver.tolerance(value.dtype))
        return replace(
            self,
            problem=problem,
            solver=LinearSolve(linear_solver),
            role=role,
            stat_names=[],
            learn=False,
            inverse=None,
        )

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
    def forward(call: _Call, init: Tensor, *params: Tensor) -> tuple[Tensor, ...]:
        solution = call.run(params, init)
        value = solution.value.clone() if solution.value is init else solution.value
        return value, solution.status, *(stat.clone() for stat in solution.stats.values())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call, _, *params = inputs
        value, status, *stats = output
        ctx.call = call
        ctx.mark_non_differentiable(status, *stats)
        ctx.save_for_backward(value, status, *params)
        ctx.save_for_forward(value, status, *params)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        value, status, *params = ctx.saved_tensors
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
        info: Any, in_dims: tuple[int | None, ...], call: _Call, init: Tensor, *params: Tensor
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
        output = _solve(replace(call, problem=problem), init.contiguous(), *params)
        return output, (0,) * len(output)


def _solve(call: _Call, init: Tensor, *params: Tensor) -> tuple[Tensor, ...]:
    output: tuple[Tensor, ...] = _Implicit.apply(call, init, *params)  # type: ignore[no-untyped-call]
    return output


class _FirstOnly(torch.autograd.Function):
    """The identity, which refuses to be differentiated twice."""

    @staticmethod
    def forward(ctx: Any, call: _Call, x: Tensor) -> Tensor:
        ctx.call = call
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[None, Tensor]:
        if torch.is_grad_enabled():
            ctx.call.refuse_higher_order()
        return None, cotangent


def cotangents(
    call: _Call, value: Tensor, status: Tensor, params: Sequence[Tensor], cotangent: Tensor, wanted: Sequence[int]
) -> list[Tensor | None]:
    """The gradient of every parameter in ``wanted``, None for the others: ``(∂F/∂θ)ᵀ u`` with ``Jᵀu = -cotangent``."""
    if torch.is_grad_enabled() and not in_functorch():
        call.refuse_higher_order()
    rule = _on_graph if torch.is_grad_enabled() or in_functorch() else _at_once
    with without_autocast(value.device), _without_failed(value, status, params) as (value, *params):
        cotangent = torch.where(widen(has_answer(status), cotangent), cotangent, 0)
        pulled = rule(call, value, params, cotangent, wanted) if wanted else ()
    gradients: list[Tensor | None] = [None] * len(params)
    for i, gradient in zip(wanted, pulled, strict=True):
        gradients[i] = None if gradient is None else _zero_failed_rows(gradient, status)
    return gradients


def _on_graph(
    call: _Call, value: Tensor, params: Sequence[Tensor], cotangent: Tensor, wanted: Sequence[int]
) -> tuple[Tensor | None, ...]:
    """The rule in differentiable steps, for derivatives of it and for ``torch.func``."""
    system = call.linear("adjoint", value)
    u = _solve(system, torch.zeros_like(cotangent), cotangent, value, *params)[0]
    return pull(_partial(call.problem, params, wanted, value), [params[i] for i in wanted])(u)


def _at_once(
    call: _Call, value: Tensor, params: Sequence[Tensor], cotangent: Tensor, wanted: Sequence[int]
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
    call: _Call, value: Tensor, status: Tensor, params: Sequence[Tensor], tangents: Sequence[Tensor | None]
) -> Tensor:
    """The tangent ``w`` of the answer: ``Jw = -Σ ∂F/∂θ · dθ``."""
    moving = [i for i, t in enumerate(tangents) if t is not None and params[i].is_floating_point()]
    with without_autocast(value.device), _without_failed(value, status, params) as (value, *params):
        b = push(
            _partial(call.problem, params, moving, value),
            [params[i] for i in moving],
            [tangents[i] for i in moving],  # type: ignore[misc]
        )
        b = torch.where(widen(has_answer(status), b), b, 0)
        return _solve(call.linear("tangent", value), torch.zeros_like(b), b, value, *params)[0]


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


@contextlib.contextmanager
def _without_failed(value: Tensor, status: Tensor, params: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
    """The answer and parameters, and a tape, on which samples without an answer can't poison the others.

    Their cotangent is zero, but zero times NaN is NaN, and a shared parameter's gradient sums over samples. So what
    isn't finite becomes finite: in the parameters, and (in eager mode, where hooks exist) in what the tape saves.
    """
    if in_functorch():
        yield [_finite(t) for t in (value, *params)]
    elif bool(has_answer(status).all()):
        yield value, *params
    else:
        with torch.autograd.graph.saved_tensors_hooks(_finite, lambda t: t):
            yield [_finite(t) for t in (value, *params)]


def _finite(tensor: Tensor) -> Tensor:
    return torch.where(tensor.isfinite(), tensor, 0) if tensor.is_floating_point() else tensor


def _zero_failed_rows(gradient: Tensor, status: Tensor) -> Tensor:
    """Exactly zero where a batched parameter's gradient isn't finite because its sample has no answer."""
    if gradient.shape[: status.dim()] != status.shape:
        return gradient
    if not in_functorch() and bool(has_answer(status).all()):
        return gradient
    return torch.where(widen(has_answer(status), gradient) | gradient.isfinite(), gradient, 0)


def _closes_over(problem: Problem, params: Sequence[Tensor], init: Tensor) -> tuple[list[str] | None, Tensor | None]:
    """Names of tensors that the residual closes over and that want gradients (maybe unknown: empty), None if none.

    And the residual at ``init``, which it took to find out.

    Raises:
        ProblemError: in forward mode or under a ``torch.func`` transform, where such a tensor can't be reached.
    """
    if not torch.is_grad_enabled() or init.numel() == 0 or problem.closed:
        return None, None
    names = closure_names(getattr(problem, "function", None))
    output = problem.bind(*[p.detach() for p in params])(init)
    known = batch_levels(init).union(*map(batch_levels, params))
    # Under a transform even a constant is out of reach if it was made inside, since the solve runs below all levels.
    wrapped = in_functorch() and bool(names)
    if not wrapped and not is_tracked(output) and batch_levels(output) <= known:
        return None, None if in_functorch() else output
    if in_functorch() or not output.requires_grad:
        raise ProblemError(
            f"the residual closes over {', '.join(map(repr, names)) or 'a tensor'}, which belongs to forward mode or "
            "to a torch.func transform; pass it as a parameter: residual(z, *params) and args=(...)"
        )
    return names, output.detach()
