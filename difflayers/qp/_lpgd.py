"""Derivatives by a second solve with a perturbed objective, which say something even where the exact ones are zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from difflayers._adjoint import Adjoint
from difflayers._arrays import widen
from difflayers._autodiff import in_functorch
from difflayers._monitor import watch
from difflayers._problem import Problem
from difflayers._solution import OnFailure, Solution, check_status, has_answer
from difflayers._solver import Solver, mask_failed
from difflayers.errors import LinearSolveError, ProblemError, UnknownNameError
from difflayers.qp._cone_problem import ConeProblem
from difflayers.qp._data import Data, times
from difflayers.qp._problem import QPProblem
from difflayers.qp._sparse import Sparse

ENVELOPES = ("lower", "upper", "average")
Convex = QPProblem | ConeProblem


@dataclass(frozen=True)
class LPGDAdjoint(Adjoint):
    """Lagrangian proximal gradient descent: how the answer moves when the loss is added to the objective.

    With ``g`` the gradient of the loss at the answer ``x``, the problem is solved again for the objective
    ``f + τgᵀx' + ρ/2 ‖x' - x‖²``. The gradient is the difference of the Lagrangian's gradients at both solutions, over
    ``τ`` (Paulus et al. 2024, "LPGD: a general framework for backpropagation through embedded optimization
    layers", ICML). As ``τ`` and ``ρ`` become small it is the exact derivative where there is one. The derivative of a
    linear program in its objective is zero almost everywhere; this one isn't.

    First derivatives in reverse mode, of ``x`` alone, not of multipliers.

    Args:
        tau: how much of the loss is added: large enough to move the answer.
        rho: a pull to the answer, for programs that the perturbation would make unbounded.
        envelope: ``"lower"`` is this, ``"upper"`` subtracts the loss instead, ``"average"`` is the mean of both, whose
            error is of second order in ``tau``, for three solves in all.
    """

    tau: float = 0.1
    rho: float = 0.0
    envelope: Literal["lower", "upper", "average"] = "lower"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.envelope not in ENVELOPES:
            raise UnknownNameError("envelope", self.envelope, ENVELOPES)

    def supports(self, problem: Problem, solver: Solver) -> str | None:
        if isinstance(problem, QPProblem | ConeProblem):
            return None
        return "LPGDAdjoint perturbs quadratic and cone programs, which this isn't; use ImplicitAdjoint()"

    def apply(
        self, problem: Problem, solver: Solver, params: Sequence[Tensor], init: Tensor, on_failure: OnFailure = "raise"
    ) -> Solution:
        if not isinstance(problem, QPProblem | ConeProblem):
            raise TypeError(f"expected a QPProblem or a ConeProblem, got {type(problem).__name__}")
        if in_functorch():
            raise ProblemError("LPGDAdjoint can't be used in torch.func transforms; use ImplicitAdjoint()")
        call = _Call(self, problem, solver, on_failure)
        value, status, *stats = _Perturbed.apply(call, init.detach(), *params)  # type: ignore[no-untyped-call]
        if not bool(has_answer(status).all()):
            value = mask_failed(value, status)
        return Solution(value, status, dict(zip(call.names, stats, strict=True)))

    @property
    def sides(self) -> tuple[tuple[float, float], ...]:
        """By how much of the loss problems are perturbed, and the weight of their Lagrangian."""
        lower, upper = (self.tau, 1 / self.tau), (-self.tau, -1 / self.tau)
        if self.envelope == "average":
            return tuple((step, weight / 2) for step, weight in (lower, upper))
        return (lower,) if self.envelope == "lower" else (upper,)


class _Call:
    """One solve, with what its derivative needs to know."""

    def __init__(self, adjoint: LPGDAdjoint, problem: Convex, solver: Solver, on_failure: OnFailure) -> None:
        self.adjoint, self.problem, self.solver, self.on_failure = adjoint, problem, solver, on_failure
        self.names: list[str] = []

    def gradients(
        self, params: Sequence[Tensor], value: Tensor, status: Tensor, cotangent: Tensor
    ) -> tuple[Tensor | None, ...]:
        """By the perturbed problems."""
        n = self.problem.data(params).layout.n
        known = has_answer(status)
        cotangent = torch.where(widen(known, cotangent), cotangent, 0)
        if bool((cotangent[..., n:] != 0).any()):
            raise ProblemError(
                "LPGDAdjoint gives derivatives of x, not of multipliers or slacks; use ImplicitAdjoint()"
            )
        found = []
        for step, weight in self.adjoint.sides:
            problem, perturbed = self._perturbed(params, value[..., :n], step * cotangent[..., :n])
            start = torch.where(widen(known, value), value, 0)
            solve = partial(self._solved, problem, perturbed, start, known)
            solution = watch("adjoint", self.solver, solve)
            found.append((weight, solution.value, known & has_answer(solution.status)))
        return self._difference(params, value, found)

    def _solved(self, problem: Convex, params: Sequence[Tensor], start: Tensor, known: Tensor) -> Solution:
        solution = self.solver.solve(problem, params, start)
        judged = replace(solution, status=torch.where(known, solution.status, 0))
        check_status(judged, self.on_failure, "perturbed problem of a derivative", LinearSolveError)
        return solution

    def _perturbed(self, params: Sequence[Tensor], x: Tensor, push: Tensor) -> tuple[Convex, list[Tensor]]:
        """The problem and its parameters; without a ``P`` it gets one if it needs one."""
        named = dict(zip(self.problem.blocks, [p.detach() for p in params], strict=True))
        patterns, rho = dict(self.problem.patterns), self.adjoint.rho
        named["q"] = named["q"] + push
        if rho:
            named["q"] = named["q"] - rho * torch.where(x.isfinite(), x, 0)
            P = _shifted(self.problem.data(params).P, rho, x)
            named = {"P": P.values if isinstance(P, Sparse) else P} | {k: v for k, v in named.items() if k != "P"}
            patterns |= {"P": P.pattern} if isinstance(P, Sparse) else {}
        problem = replace(self.problem, blocks=tuple(named), patterns=patterns, warm=True, known=None)
        return problem, list(named.values())

    def _difference(
        self, params: Sequence[Tensor], value: Tensor, found: list[tuple[float, Tensor, Tensor]]
    ) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            leaves = [p.detach().requires_grad_() for p in params]
            data, total = self.problem.data(leaves), torch.zeros((), dtype=value.dtype, device=value.device)
            for weight, moved, fine in found:
                here, there = (torch.where(widen(fine, w), w, 0) for w in (value, moved))
                total = total + weight * (
                    _lagrangian(self.problem, data, there) - _lagrangian(self.problem, data, here)
                )
        return torch.autograd.grad(total, leaves, allow_unused=True)


def _lagrangian(problem: Convex, data: Data, w: Tensor) -> Tensor:
    """The sum over samples; what is constant in the data is left out."""
    x, y, z, low, high = data.layout.split(w)
    total = (data.q * x).sum()
    if data.P is not None:
        total = total + (x * times(data.P, x)).sum() / 2
    if data.G is not None and data.h is not None:
        multiplier = problem.cones.project(z) if isinstance(problem, ConeProblem) else torch.relu(z)
        total = total + (multiplier.detach() * (times(data.G, x) - data.h)).sum()
    if data.A is not None and data.b is not None:
        total = total + (y * (times(data.A, x) - data.b)).sum()
    for bound, v, sign in ((data.lb, low, 1), (data.ub, high, -1)):
        if bound is not None:
            total = total + sign * (torch.relu(v) * torch.where(bound.isfinite(), bound, 0)).sum()
    return total


def _shifted(P: Any, rho: float, x: Tensor) -> Any:
    n = x.shape[-1]
    eye = rho * torch.eye(n, dtype=x.dtype, device=x.device)
    if P is None:
        return eye
    if isinstance(P, Tensor):
        return P.detach() + eye
    own, places = P.pattern, torch.arange(n, device=x.device)
    indices = torch.cat([torch.stack([own.rows, own.columns]), torch.stack([places, places])], dim=1)
    values = P.values.detach()
    diagonal = torch.full_like(places, rho, dtype=x.dtype).expand(*values.shape[:-1], n)
    return Sparse(indices, torch.cat([values, diagonal], dim=-1), own.shape)


class _Perturbed(torch.autograd.Function):
    """``(init, *params) -> (value, status, *stats)``, for plain first derivatives."""

    @staticmethod
    def forward(call: _Call, init: Tensor, *params: Tensor) -> tuple[Tensor, ...]:
        solution = watch("forward", call.solver, lambda: call.solver.solve(call.problem, params, init))
        check_status(solution, call.on_failure)
        call.names[:] = solution.stats
        value = solution.value.clone() if solution.value is init else solution.value
        return value, solution.status, *(stat.clone() for stat in solution.stats.values())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call, _, *params = inputs
        value, status, *stats = output
        ctx.mark_non_differentiable(status, *stats)
        ctx.save_for_backward(value, status, *params)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise ProblemError("LPGDAdjoint gives first derivatives only; for second ones use ImplicitAdjoint()")
        value, status, *params = ctx.saved_tensors
        return None, None, *ctx.call.gradients(params, value, status, cotangent)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> tuple[Tensor, ...]:
        raise ProblemError("LPGDAdjoint has no forward mode; use ImplicitAdjoint()")
