"""Functions: state the condition, get the solution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from difflayers._adjoint import Adjoint, ImplicitAdjoint
from difflayers._areas import available_solvers, resolve
from difflayers._implicit import ImplicitFunction
from difflayers._problem import RootProblem
from difflayers._solution import OnFailure, Solution, restarted
from difflayers._solver import Solver
from difflayers.fixedpoint._least_squares import LeastSquaresProblem
from difflayers.fixedpoint._minimize import MinimizeProblem
from difflayers.fixedpoint._problem import FixedPointProblem


def root(
    fn: Callable[..., Any],
    z0: Any,
    args: Sequence[Any] = (),
    *,
    batch_dims: int = 0,
    solver: str | Solver = "newton",
    adjoint: Adjoint | None = None,
    init: Any = None,
    on_failure: OnFailure = "raise",
    progress: bool = False,
) -> Solution:
    """Solve ``fn(z, *args) = 0`` for ``z``, differentiable in ``args``.

    Args:
        fn: a function or ``nn.Module``; returns what must vanish, in the structure and shapes of ``z``.
        z0: where to start, ``(*batch, *event)``; a tensor, an array (then the answer is one) or a pytree of them.
        args: further arguments of ``fn``; pytrees of tensors or arrays.
        batch_dims: leading dimensions of ``z`` that index independent systems; 0 is one system of any shape.
        solver: a solver object, or the name of one with its defaults.
        adjoint: the derivative rule; None is :class:`~difflayers.ImplicitAdjoint`.
        init: a warm start that takes precedence over ``z0``: a value like it, or an earlier solution, whose samples
            without an answer start from ``z0`` again.
        on_failure: ``"raise"``, ``"warn"`` or ``"ignore"``.
        progress: whether to show a bar; see :func:`difflayers.progress`.

    Raises:
        ProblemError: shapes, dtypes or names don't fit.
        SolverError: a sample failed and ``on_failure`` is ``"raise"``.

    >>> import torch
    >>> from difflayers.fixedpoint import root
    >>> a = torch.tensor(9.0, requires_grad=True)
    >>> z = root(lambda z, a: z**2 - a, torch.tensor(1.0), (a,)).value
    >>> z.backward()
    >>> round(z.item(), 4), round(a.grad.item(), 4)
    (3.0, 0.1667)
    """
    problem = RootProblem(fn, batch_dims)
    return _call(problem, z0, args, solver, adjoint, init, on_failure, progress)


def fixed_point(
    fn: Callable[..., Any],
    z0: Any,
    args: Sequence[Any] = (),
    *,
    batch_dims: int = 0,
    solver: str | Solver = "anderson",
    adjoint: Adjoint | None = None,
    init: Any = None,
    on_failure: OnFailure = "raise",
    progress: bool = False,
) -> Solution:
    """Solve ``z = fn(z, *args)`` for ``z``, differentiable in ``args``; arguments as in :func:`root`.

    >>> import torch
    >>> from difflayers.fixedpoint import fixed_point
    >>> z = fixed_point(torch.cos, torch.tensor(1.0, dtype=torch.float64)).value
    >>> round(z.item(), 9)
    0.739085133
    """
    problem = FixedPointProblem(fn, batch_dims)
    return _call(problem, z0, args, solver, adjoint, init, on_failure, progress)


def minimize(
    fn: Callable[..., Any],
    z0: Any,
    args: Sequence[Any] = (),
    *,
    batch_dims: int = 0,
    solver: str | Solver = "lbfgs",
    adjoint: Adjoint | None = None,
    init: Any = None,
    on_failure: OnFailure = "raise",
    progress: bool = False,
) -> Solution:
    """Find ``z`` where ``fn(z, *args)`` is least nearby, differentiable in ``args``; arguments as in :func:`root`.

    ``fn`` returns one real number per sample, ``(*batch,)``. What holds at the answer is ``∇_z fn = 0``, so tolerances
    are those of the gradient's norm, relative to that at the start, and derivatives need a regular Hessian.

    >>> import torch
    >>> from difflayers.fixedpoint import minimize
    >>> a = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    >>> z = minimize(lambda z, a: (z.exp() - a * z).sum(), torch.zeros(2, dtype=torch.float64), (a,)).value
    >>> z.sum().backward()  # z = log(a)
    >>> a.grad.numpy().round(6)
    array([1. , 0.5])
    """
    return _call(MinimizeProblem(fn, batch_dims), z0, args, solver, adjoint, init, on_failure, progress)


def least_squares(
    fn: Callable[..., Any],
    z0: Any,
    args: Sequence[Any] = (),
    *,
    batch_dims: int = 0,
    solver: str | Solver = "lm",
    adjoint: Adjoint | None = None,
    init: Any = None,
    on_failure: OnFailure = "raise",
    progress: bool = False,
) -> Solution:
    """Find ``z`` where ``½‖fn(z, *args)‖²`` is least nearby, differentiable in ``args``; arguments as in :func:`root`.

    ``fn`` returns the residuals of every sample, ``(*batch, ...)``, as many as it likes. What holds at the answer is
    ``Jᵀ fn = 0`` for ``J = ∂fn/∂z``.

    >>> import torch
    >>> from difflayers.fixedpoint import least_squares
    >>> t = torch.linspace(0, 1, 20, dtype=torch.float64)
    >>> y = 2 * torch.exp(-1.5 * t)
    >>> z0 = torch.ones(2, dtype=torch.float64)
    >>> least_squares(lambda z, y: z[0] * torch.exp(-z[1] * t) - y, z0, (y,)).value.numpy().round(6)
    array([2. , 1.5])
    """
    return _call(LeastSquaresProblem(fn, batch_dims), z0, args, solver, adjoint, init, on_failure, progress)


def _call(
    problem: RootProblem,
    z0: Any,
    args: Sequence[Any],
    solver: str | Solver,
    adjoint: Adjoint | None,
    init: Any,
    on_failure: OnFailure,
    progress: bool,
) -> Solution:
    solver = resolve(solver, available_solvers("fixedpoint"))
    function = ImplicitFunction(problem, solver, adjoint or ImplicitAdjoint(), on_failure)
    return function(*args, init=_start(z0, init), progress=progress)


def _start(z0: Any, init: Any) -> Any:
    if not isinstance(init, Solution):
        return z0 if init is None else init
    return restarted(init, z0)
