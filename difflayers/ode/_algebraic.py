"""Differential-algebraic equations: mass matrices as they are given, and states that satisfy what is algebraic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from difflayers._adjoint import ImplicitAdjoint
from difflayers._arguments import Arguments
from difflayers._arrays import check_devices, to_tensors, uses_numpy
from difflayers._autodiff import Autocast, in_functorch, without_autocast
from difflayers._implicit import ImplicitFunction
from difflayers._problem import Residual, RootProblem
from difflayers._solution import OnFailure, Status, to_numpy
from difflayers._solver import IterativeSolver, Solver
from difflayers.errors import ProblemError
from difflayers.linear._direct import lu_factor, pivot_status
from difflayers.ode._control import tolerances
from difflayers.ode._linearization import linearized
from difflayers.ode._mass import constraint_of, mass_of, times
from difflayers.ode._problem import InitialValueProblem
from difflayers.ode._state import State


def mass_rows(mass: Any, state: State, like: Tensor) -> Tensor:
    """A mass matrix as ``(n, n)`` or ``(samples, n, n)``.

    Raises:
        ProblemError: it has another shape, or isn't real and finite.
    """
    n = sum(state.sizes)
    matrix = torch.as_tensor(to_tensors(mass), device=like.device)
    if matrix.shape not in ((n, n), (*state.batch, n, n)):
        batched = f" or {(*state.batch, n, n)}" if state.batch else ""
        raise ProblemError(
            f"mass has shape {tuple(matrix.shape)}, but a sample of y0 has {n} numbers; pass {(n, n)}{batched}, "
            "torch.diag(...) if only a diagonal is known"
        )
    if matrix.is_complex():
        raise ProblemError("mass is complex; it acts on real numbers, a complex one in y0 counting as two")
    if not in_functorch() and not bool(matrix.isfinite().all()):
        raise ProblemError("mass isn't finite")
    rows = matrix.reshape(-1, n, n) if state.batch and matrix.dim() > 2 else matrix
    return rows.to(like.dtype)


def check_consistent(
    problem: InitialValueProblem, start: Tensor, t: Tensor, tensors: Sequence[Tensor], solver: Solver
) -> None:
    """That the start satisfies the algebraic equations, as well as the tolerance tells.

    Raises:
        ProblemError: it doesn't, or they don't determine anything.
    """
    evaluate = problem.evaluator([tensor.detach() for tensor in tensors])
    mass, constraint = mass_of(evaluate), constraint_of(evaluate)
    if mass is None or constraint is None or not start.numel() or in_functorch():
        return
    y = start.detach()
    with torch.no_grad():
        around = linearized(evaluate, t.detach()[..., :1] if t.dim() > 1 else t.detach()[0], y, moving=False)
    lu, pivots = lu_factor(mass + constraint @ around.jacobian)
    status = pivot_status(lu)
    if bool((status == Status.SINGULAR).any()):
        raise ProblemError(
            f"mass is singular, and at y0 the algebraic equations of {_share(status == Status.SINGULAR)} don't "
            "determine the rest of the state; differentiate them in time until they do (index 1)"
        )
    gap = torch.linalg.lu_solve(lu, pivots, times(constraint, around.slope).unsqueeze(-1)).squeeze(-1)
    rtol, atol = tolerances(getattr(solver, "rtol", 0.0), getattr(solver, "atol", 0.0), y)
    far = (gap / (atol + rtol * y.abs())).square().mean(-1).sqrt() > 1
    if bool(far.any()):
        raise ProblemError(
            f"mass is singular, and y0 doesn't satisfy the algebraic equations of {_share(far)}: they are "
            f"{float(gap[far].abs().max()):.2g} away in y, more than the solver's tolerance; start from "
            "consistent_initial(fn, y0, t[0], args, mass=mass)"
        )


def _share(which: Tensor) -> str:
    first = which.nonzero().squeeze(1)[:8].tolist()
    return f"{int(which.sum())} of {which.numel()} samples ({', '.join(map(str, first))})"


@dataclass(frozen=True)
class _Newton(IterativeSolver):
    """Newton's method as it is."""

    max_steps: int = 50
    patience: int = field(default=10, kw_only=True)

    def init(self, residual: Residual, z: Tensor) -> None:
        return None

    def step(self, residual: Residual, z: Tensor, state: None) -> tuple[Tensor, None]:
        lu, pivots = lu_factor(residual.jacobian(z).dense)
        return z - torch.linalg.lu_solve(lu, pivots, residual(z).unsqueeze(-1)).squeeze(-1), None


def consistent_initial(
    fn: Callable[..., Any],
    y0: Any,
    t0: Any,
    args: Sequence[Any] = (),
    *,
    mass: Any,
    batch_dims: int = 0,
    on_failure: OnFailure = "raise",
) -> Any:
    """The state ``y`` near ``y0`` at which ``M dy/dt = fn(t0, y, *args)`` can start; differentiable.

    ``M y = M y0``, and what ``M`` doesn't determine satisfies the algebraic equations, found by Newton's method from
    ``y0``. For problems of index 1; where ``M`` is regular, it is ``y0``. Derivatives are those of the implicit
    function theorem, in ``y0`` and ``args``.

    Args:
        fn: the right-hand side, as for :func:`odeint`.
        y0: a guess, right in what is differential.
        t0: the time, a number.
        args: further arguments of ``fn``.
        mass: ``M``, as for :func:`odeint`.
        batch_dims: leading dimensions of ``y0`` that index independent systems.
        on_failure: ``"raise"``, ``"warn"`` or ``"ignore"``, where Newton's method finds nothing.

    Raises:
        ProblemError: shapes or dtypes don't fit.
        SolverError: nothing was found and ``on_failure`` is ``"raise"``.

    >>> import torch
    >>> from difflayers.ode import consistent_initial
    >>> circle = lambda t, y: torch.stack((-y[1], y[0] ** 2 + y[1] ** 2 - 1))
    >>> guess = torch.tensor([0.6, 1.0], dtype=torch.float64)
    >>> consistent_initial(circle, guess, 0.0, mass=torch.diag(torch.tensor([1.0, 0.0])))
    tensor([0.6000, 0.8000], dtype=torch.float64)
    """
    numpy = uses_numpy(y0, (t0, args))
    y0 = to_tensors(y0)
    state = State.of(y0, batch_dims)
    start = state.pack(y0)
    arguments, tensors = Arguments.of(fn, to_tensors(tuple(args), start))
    tensors = (*tensors, mass_rows(mass, state, start))
    check_devices(list(tensors), start)
    problem = InitialValueProblem(fn, state, arguments, Autocast.current(start.device), massive=True)
    t = torch.as_tensor(t0).to(start)

    def residual(y: Tensor, y0: Tensor, *tensors: Tensor) -> Tensor:
        evaluate = problem.evaluator(tensors)
        constraint, apart = constraint_of(evaluate), times(tensors[-1], y - y0)
        return apart if constraint is None else apart + times(constraint, evaluate(t, y))

    implicit = ImplicitFunction(RootProblem(residual, batch_dims=1), _Newton(), ImplicitAdjoint(), on_failure)
    with without_autocast(start.device):
        found = state.unpack(implicit(start, *tensors, init=start.detach()).value)
    return to_numpy(found) if numpy else found
