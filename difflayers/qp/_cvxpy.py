"""CVXPY problems as layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from difflayers._adjoint import Adjoint, ImplicitAdjoint
from difflayers._arrays import to_tensors
from difflayers._autodiff import without_autocast
from difflayers._progress import showing
from difflayers._solution import OnFailure, Solution, to_numpy
from difflayers._solver import Solver
from difflayers.errors import ProblemError
from difflayers.qp._canonical import canonicalized
from difflayers.qp._cone_api import ConeSolution, solve_cone
from difflayers.qp._disciplined import check_parameters, check_problem, check_variables
from difflayers.qp._options import named, with_options


@dataclass(frozen=True)
class CvxpySolution(Solution):
    """The answer of a layer. ``value`` is the tuple of variables that it returns.

    Attributes:
        cone: the solution of the cone program that CVXPY made of the problem.
    """

    cone: ConeSolution | None = None


class CvxpyLayer(nn.Module):
    """The solution of a CVXPY problem as a function of its parameters.

    The problem is canonicalized once; a call is then one affine map to the data of a cone program, for the whole batch,
    and :func:`solve_cone` (Agrawal, Amos, Barratt, Boyd, Diamond, Kolter 2019, "Differentiable convex optimization
    layers", NeurIPS, whose call this is).

    Args:
        problem: a ``cvxpy.Problem`` that is disciplined in its parameters (DPP).
        parameters: all parameters of the problem, in the order in which their values come.
        variables: what to return: variables, or dual variables of constraints, ``constraint.dual_variables[0]``.
        solver: a solver object, or the name of one; None is Clarabel, or for linear and quadratic programs what
            :func:`solve_qp` chooses. cvxpylayers' ``"DIFFCP"`` and ``"CUCLARABEL"`` are names of the default too.
        gp: whether the problem is a log-log convex program, such as a geometric one.
        solver_args: options of the solver by name, such as ``{"tol": 1e-8}``; a call may have others. The names that
            diffcp and SCS have serve too, and where one has no meaning here, a warning says so.
        adjoint: the derivative rule; None is :class:`~difflayers.ImplicitAdjoint`.
        on_failure: ``"raise"``, ``"warn"`` or ``"ignore"``: a sample without a solution is NaN and gives no gradient.

    Raises:
        ProblemError: the problem isn't DPP, naming the expression, or has integer or complex variables; parameters are
            missing, repeated or not those of the problem; a variable isn't in it.

    >>> import cvxpy as cp
    >>> x, center = cp.Variable(2), cp.Parameter(2)
    >>> problem = cp.Problem(cp.Minimize(cp.sum_squares(x - center)), [cp.norm(x) <= 1])
    >>> layer = CvxpyLayer(problem, parameters=[center], variables=[x])
    >>> (nearest,) = layer(torch.tensor([[3.0, 4.0], [0.0, 0.5]]))
    >>> nearest
    tensor([[0.6000, 0.8000],
            [0.0000, 0.5000]])
    """

    def __init__(
        self,
        problem: Any,
        parameters: Sequence[Any],
        variables: Sequence[Any],
        *,
        solver: str | Solver | None = None,
        gp: bool = False,
        solver_args: Mapping[str, Any] | None = None,
        adjoint: Adjoint | None = None,
        on_failure: OnFailure = "warn",
    ) -> None:
        super().__init__()
        check_problem(problem, gp=gp)
        check_parameters(problem, parameters)
        check_variables(problem, variables)
        self.gp, self.on_failure, self.adjoint = gp, on_failure, adjoint or ImplicitAdjoint()
        self.solver = with_options(named(solver), solver_args)
        self.names = tuple(parameter.name() for parameter in parameters)
        self.shapes = tuple(tuple(parameter.shape) for parameter in parameters)
        self.canonical = canonicalized(problem, parameters, variables, gp=gp)

    def forward(
        self, *values: Any, solver_args: Mapping[str, Any] | None = None, init: CvxpySolution | None = None
    ) -> tuple[Any, ...]:
        """The variables, ``(*batch, *shape)`` each.

        Args:
            values: one per parameter, ``(*batch, *shape)``; without batch dimensions it is shared by all samples.
            solver_args: options of the solver for this call.
            init: what :meth:`solve` gave for similar values.
        """
        call = _outside_dynamo if torch.compiler.is_compiling() else _variables
        return call(self, values, solver_args, init)

    def solve(
        self,
        *values: Any,
        solver_args: Mapping[str, Any] | None = None,
        init: CvxpySolution | None = None,
        progress: bool = False,
    ) -> CvxpySolution:
        """The solution with status, statistics and the cone program's own, on the graph; with a bar if ``progress``."""
        return showing(progress, lambda: _solved(self, values, solver_args, init))

    def extra_repr(self) -> str:
        parameters = ", ".join(f"{name} {shape}" for name, shape in zip(self.names, self.shapes, strict=True))
        return f"parameters: {parameters}; {self.canonical.cones}; solver={self.solver!r}, gp={self.gp}"


def _solved(
    layer: CvxpyLayer, values: Sequence[Any], options: Mapping[str, Any] | None, init: CvxpySolution | None
) -> CvxpySolution:
    tensors, batch, numpy = _checked(layer, values)
    solver = with_options(layer.solver, options)
    with without_autocast(tensors[0].device if tensors else torch.device("cpu")):
        P, q, C, d = layer.canonical.data(tensors, batch)
        # A constant one may be all that tells the batch; not a view, which forward mode couldn't write to.
        q = q.expand(*batch, -1).clone()
        solution = solve_cone(
            P, q, C, d, layer.canonical.cones, solver=solver or "clarabel", adjoint=layer.adjoint,
            init=None if init is None else init.cone, on_failure=layer.on_failure,
        )  # fmt: skip
        found = tuple(select(solution.x, solution.y) for select in layer.canonical.variables)
    found = to_numpy(found) if numpy else found
    return CvxpySolution(found, solution.status, solution.stats, None, solution)


def _checked(layer: CvxpyLayer, values: Sequence[Any]) -> tuple[list[Tensor], torch.Size, bool]:
    """The parameters with their entries in one dimension, the batch shape, and whether NumPy came in.

    Raises:
        ProblemError: a count, type or shape that doesn't fit.
    """
    if len(values) != len(layer.shapes):
        raise ProblemError(f"got {len(values)} values for {len(layer.shapes)} parameters: {', '.join(layer.names)}")
    numpy = any(isinstance(value, np.ndarray | np.generic) for value in values)
    tensors = [to_tensors(value) for value in values]
    first, batches = None, []
    for name, shape, tensor in zip(layer.names, layer.shapes, tensors, strict=True):
        first = _check_value(name, shape, tensor, first)
        batches.append(tensor.shape[: tensor.dim() - len(shape)])
    try:
        batch = torch.Size(torch.broadcast_shapes(*batches))
    except RuntimeError as error:
        listed = ", ".join(f"{name} {tuple(shape)}" for name, shape in zip(layer.names, batches, strict=True))
        raise ProblemError(f"the batch dimensions don't broadcast: {listed}") from error
    flat = [
        tensor.reshape(*own, int(np.prod(shape)))
        for tensor, own, shape in zip(tensors, batches, layer.shapes, strict=True)
    ]
    return flat, batch, numpy


def _check_value(name: str, shape: tuple[int, ...], value: Any, first: Tensor | None) -> Tensor:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        what = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
        foreign = type(value).__module__.split(".")[0] in ("jax", "jaxlib", "mlx")
        hint = "; there are no layers for JAX and MLX, pass numpy.asarray(value)" if foreign else ""
        raise ProblemError(f"the value of {name} must be a tensor or array of real floating point, got {what}{hint}")
    if tuple(value.shape[max(value.dim() - len(shape), 0) :]) != shape:
        raise ProblemError(
            f"the value of {name} has shape {tuple(value.shape)}, but must be {shape}, or that after batch dimensions"
        )
    if first is not None and (value.dtype, value.device) != (first.dtype, first.device):
        raise ProblemError(
            f"the value of {name} is {value.dtype} on {value.device}, but another one {first.dtype} on {first.device}; "
            "convert one with .to()"
        )
    return value


def _variables(
    layer: CvxpyLayer, values: Sequence[Any], options: Mapping[str, Any] | None, init: CvxpySolution | None
) -> tuple[Any, ...]:
    value: tuple[Any, ...] = _solved(layer, values, options, init).value
    return value


_outside_dynamo = _disable_dynamo(_variables)
