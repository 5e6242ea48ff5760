"""The common interface: a problem, a solver and an adjoint make a function from parameters to answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.utils import _pytree as pytree

from difflayers import _node
from difflayers._adjoint import Adjoint, ImplicitAdjoint
from difflayers._arguments import Arguments, with_parameters
from difflayers._arrays import Packing, check_devices, to_tensors, uses_numpy
from difflayers._autodiff import Autocast, in_functorch, without_autocast
from difflayers._monitor import watch
from difflayers._problem import DerivedProblem, Problem, Residual, RootProblem
from difflayers._progress import showing
from difflayers._solution import OnFailure, Solution, check_status
from difflayers._solver import Solver, mask_failed
from difflayers.errors import ProblemError


@dataclass(frozen=True)
class ImplicitFunction:
    """A differentiable function from parameters to the answer of ``F(z, *params) = 0``; made once, called often.

    Args:
        problem: what must hold at the answer.
        solver: finds the answer; autograd never looks inside.
        adjoint: how the answer moves when the parameters move.
        on_failure: what happens when a sample fails, in the solve or in a derivative's: ``"raise"`` an error,
            ``"warn"``, or ``"ignore"`` (read the status). In the last two a sample that stopped short gives its best
            iterate, and one without an answer gives NaN and no gradient.

    Raises:
        TypeError: the solver can't serve this problem, or the adjoint can't serve one of them; the message says why.
    """

    problem: RootProblem
    solver: Solver
    adjoint: Adjoint = field(default_factory=ImplicitAdjoint)
    on_failure: OnFailure = "raise"
    _checked: set[Any] = field(default_factory=set, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if reason := self.solver.supports(self.problem):
            raise TypeError(f"{self.solver!r} can't serve here: {reason}")
        if reason := self.adjoint.supports(self.problem, self.solver):
            raise TypeError(f"{self.adjoint!r} can't serve here: {reason}")

    def __call__(self, *params: Any, init: Any = None, progress: bool = False) -> Solution:
        """The answer for ``params``, its value on their graph.

        Args:
            params: pytrees of tensors or arrays, and anything else; what the residual gets after ``z``.
            init: where to start: a tensor, array or pytree like the unknown, or an earlier solution. A sample that
                starts at NaN, such as one that had no answer, is ``NONFINITE``.
            progress: whether to show a bar; see :func:`difflayers.progress`.

        Raises:
            ProblemError: shapes, dtypes or devices don't fit.
            SolverError: a sample failed and ``on_failure`` is ``"raise"``.
        """
        if torch.compiler.is_compiling():
            return _call_outside_dynamo(self, params, init)
        return showing(progress, lambda: self._call(params, init))

    def _call(self, params: Sequence[Any], init: Any) -> Solution:
        return self._with(params, init, self._attached)

    def solve(self, *params: Any, init: Any = None, progress: bool = False) -> Solution:
        """The same numbers without a graph."""
        with torch.no_grad():
            return showing(progress, lambda: self._with(params, init, self._detached))

    def vjp(self, params: Sequence[Any], solution: Solution, cotangent: Any) -> tuple[Any, ...]:
        """The gradient of ``<cotangent, value>`` for every parameter, None where it isn't a floating tensor."""
        posed = _Posed.of(self.problem, params, solution)
        tensors = [t.detach() for t in posed.tensors]
        floating = [i for i, t in enumerate(tensors) if t.is_floating_point()]
        with torch.no_grad():
            gradients = _node.cotangents(
                self._rules(posed), posed.init, solution.status, tensors, posed.packing.pack(cotangent), floating
            )
        return posed.arguments(
            [torch.zeros_like(tensors[i]) if g is None and i in floating else g for i, g in enumerate(gradients)]
        )

    def jvp(self, params: Sequence[Any], solution: Solution, tangents: Sequence[Any]) -> Any:
        """How the value moves when the parameters move along ``tangents``, None for those that stand still."""
        posed = _Posed.of(self.problem, params, solution)
        tensors = [t.detach() for t in posed.tensors]
        aligned = posed.align(tangents)
        with torch.no_grad():
            moved = _node.pushed(self._rules(posed), posed.init, solution.status, tensors, aligned)
        return posed.packing.unpack(moved)

    def _rules(self, posed: _Posed) -> Any:
        if not isinstance(self.adjoint, ImplicitAdjoint):
            raise TypeError(f"vjp and jvp need ImplicitAdjoint, not {self.adjoint!r}")
        return _node.Call(posed.problem, self.solver, self.adjoint.linear_solver, self.on_failure)

    def _with(self, params: Sequence[Any], init: Any, solve: Callable[[_Posed], Solution]) -> Solution:
        start = init.value if isinstance(init, Solution) else init
        numpy = uses_numpy(start, params)
        start = to_tensors(start)
        like = next((leaf for leaf in pytree.tree_leaves(start) if isinstance(leaf, Tensor)), None)
        if like is None:
            raise ProblemError("init is missing: pass the starting point of the solve, a tensor like the unknown")
        posed = _Posed.of(self.problem, to_tensors(tuple(params), like), start)
        self._check_once(posed)
        with without_autocast(posed.init.device):
            solution = solve(posed)
        solution = replace(solution, value=posed.packing.unpack(solution.value))
        return solution.numpy() if numpy else solution

    def _attached(self, posed: _Posed) -> Solution:
        return self.adjoint.apply(posed.problem, self.solver, posed.tensors, posed.init, self.on_failure)

    def _detached(self, posed: _Posed) -> Solution:
        solution = watch("forward", self.solver, lambda: self.solver.solve(posed.problem, posed.tensors, posed.init))
        solution = replace(solution, value=mask_failed(solution.value, solution.status))
        return check_status(solution, self.on_failure, explain=posed.problem.explain(solution))

    def _check_once(self, posed: _Posed) -> None:
        """The checks that cost evaluations, once per shape and training mode."""
        if in_functorch():
            return
        function = self.problem.function
        modes = tuple(m.training for m in function.modules()) if isinstance(function, nn.Module) else ()
        key = (posed.init.shape, modes)
        if key not in self._checked:
            with torch.no_grad():
                posed.problem.base.check(posed.values(posed.tensors), posed.packing.unpack(posed.init))
            self._checked.add(key)


@dataclass(frozen=True)
class _Posed:
    """A problem with its data: what users wrote, as tensors in a row."""

    problem: _Flat
    tensors: tuple[Tensor, ...]
    init: Tensor

    @classmethod
    def of(cls, problem: RootProblem, params: Sequence[Any], init: Any) -> _Posed:
        start = init.value if isinstance(init, Solution) else init
        start = pytree.tree_map_only(Tensor, torch.Tensor.detach, start)
        packing = Packing.of(start, problem.batch_dims)
        arguments, tensors = Arguments.of(problem.function, params)
        unknown = packing.pack(start)
        check_devices(list(tensors), unknown)
        autocast = Autocast.current(unknown.device)
        return cls(_Flat(problem, packing, arguments, autocast), tensors, unknown)

    @property
    def packing(self) -> Packing:
        return self.problem.packing

    def values(self, tensors: Sequence[Any]) -> tuple[Any, ...]:
        """The parameters as the residual gets them."""
        return self.problem.arguments.unflatten(tensors)[1]

    def arguments(self, results: Sequence[Any]) -> tuple[Any, ...]:
        """One result per tensor in the structure of the parameters; None in place of what isn't a tensor."""
        found = iter(results)
        layout = self.problem.arguments
        leaves = [next(found) if fixed is None else None for fixed in layout.fixed]
        return pytree.tree_unflatten(leaves, layout.structure)[1]  # type: ignore[no-any-return]

    def align(self, tangents: Sequence[Any]) -> list[Tensor | None]:
        """One tangent per tensor, from trees that hold None where nothing moves."""
        module_size = len(self.problem.arguments.unflatten(self.tensors)[0])
        aligned: list[Tensor | None] = [None] * module_size
        for value, tangent in zip(self.values(self.tensors), tangents, strict=True):
            leaves = pytree.tree_leaves(value)
            moved = [None] * len(leaves) if tangent is None else pytree.tree_leaves(tangent)
            aligned += [t for leaf, t in zip(leaves, moved, strict=True) if isinstance(leaf, Tensor)]
        return aligned


@dataclass(frozen=True)
class _Flat(DerivedProblem):
    """A problem on one packed unknown and a row of tensors, module parameters first."""

    base: RootProblem
    packing: Packing
    arguments: Arguments
    autocast: Autocast
    start: tuple[Tensor, Tensor] | None = None

    @property
    def function(self) -> Callable[..., Any]:
        return self.base.function

    def bind(self, *tensors: Any) -> Residual:
        module_params, params = self.arguments.unflatten(tensors)
        problem = self.base
        function = with_parameters(problem.function, module_params)
        if function is not problem.function:
            problem = problem.with_function(function)
        residual = problem.bind(*params)
        of_packed = residual.packed(self.packing)

        def evaluate(z: Tensor) -> Tensor:
            version = None if z.is_inference() else z._version
            with self.autocast():
                value = of_packed(z)
            if version is not None and z._version != version:
                raise ProblemError(
                    "the function writes to its unknown in place, and would change the iterate that it is evaluated "
                    "at; use operations that return new tensors, or z = z.clone() first"
                )
            return value

        flat = self.residual_type(evaluate, self)
        flat.within = residual.inside
        return flat if self.start is None else flat.remember(*self.start)

    @property
    def precision(self) -> torch.dtype | None:  # type: ignore[override]
        return self.autocast.dtype

    def part(self, params: Sequence[Any], rows: Tensor, samples: int) -> Residual | None:
        # The parameters of a module are everybody's; an argument whose first dimension has the size of the batch goes
        # with it, as far as shapes tell.
        own, arguments = self.arguments.unflatten(params)
        shared = len(own) + sum(isinstance(t, Tensor) for t in pytree.tree_leaves(arguments[: self.base.shared]))
        return self.bind(
            *params[:shared], *[p[rows] if p.dim() and p.shape[0] == samples else p for p in params[shared:]]
        )

    def started(self, z: Tensor, value: Tensor) -> Problem:
        return replace(self, start=(z, value))


# torch.compiler.disable would import the whole of dynamo here; this imports it when called.
_call_outside_dynamo = _disable_dynamo(ImplicitFunction._call)
