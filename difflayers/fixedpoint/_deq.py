"""Deep equilibrium layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn
from torch._compile import _disable_dynamo
from torch.utils import _pytree as pytree

from difflayers._adjoint import Adjoint, ImplicitAdjoint
from difflayers._areas import available_solvers, resolve
from difflayers._arrays import Packing
from difflayers._implicit import ImplicitFunction
from difflayers._progress import showing
from difflayers._solution import OnFailure, Solution, restarted
from difflayers._solver import Solver
from difflayers.errors import ProblemError
from difflayers.fixedpoint._equilibrium import View, all_answered, recording, squared_jacobian
from difflayers.fixedpoint._problem import FixedPointProblem


@dataclass(frozen=True)
class Equilibrium(Solution):
    """What :meth:`DEQ.solve` gives back.

    Attributes:
        trajectory: the cell applied once to the iterates that ``at=`` asked for, on the graph of that one application.
        view: the cell as this solve saw it, with its evaluated parametrizations and random masks.
    """

    trajectory: tuple[Any, ...] = ()
    view: View | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class CellProblem(FixedPointProblem):
    """A fixed point of ``fn(z, tensors, *args)``, where the first argument is the module's own."""

    shared: ClassVar[int] = 1


class DEQ(nn.Module):
    """The equilibrium ``z = fn(z, *args)`` of a cell, as a layer (Bai, Kolter, Koltun 2019, NeurIPS).

    The cell is any module. During one solve, and in its derivatives, it is one fixed function of ``z``: weight and
    spectral normalization are evaluated once, dropout has one mask (and another in the next call), and buffers are
    updated by one evaluation at the equilibrium, so that running statistics count one step. A cell that draws from a
    generator of its own, or from NumPy, has to see to that itself.

    Where a cell has several equilibria, the solver finds the one in whose basin it starts, the same one every time.

    Args:
        fn: the cell, called as ``fn(z, *args)``; returns ``z``'s structure, shapes and dtype.
        solver: a solver object, or the name of one with its defaults.
        adjoint: the derivative rule; None is :class:`~difflayers.ImplicitAdjoint`.
        batch_dims: leading dimensions that index independent samples. Batch normalization makes samples depend on
            one another while it trains: it needs 0, which solves for the batch as one system.
        on_failure: ``"raise"``, ``"warn"`` or ``"ignore"``; see :class:`~difflayers.ImplicitFunction`. A step in which
            a sample has no answer leaves the buffers alone.
        start: where solves start, ``start(*args)``; its value says what ``z`` is, a pytree where there are several
            states. None is zeros like the first argument.

    >>> import torch
    >>> from difflayers.fixedpoint import DEQ
    >>> class Cell(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.linear = torch.nn.Linear(4, 4)
    ...     def forward(self, z, x):
    ...         return torch.tanh(0.5 * self.linear(z) + x)
    >>> DEQ(Cell())(torch.ones(3, 4)).shape
    torch.Size([3, 4])
    """

    def __init__(
        self,
        fn: nn.Module,
        *,
        solver: str | Solver = "anderson",
        adjoint: Adjoint | None = None,
        batch_dims: int = 1,
        on_failure: OnFailure = "warn",
        start: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(fn, nn.Module):
            raise ProblemError(f"fn must be an nn.Module, got {type(fn).__name__}; for a function use fixed_point()")
        self.fn = fn
        self.solver = resolve(solver, available_solvers("fixedpoint"))
        self.adjoint = adjoint or ImplicitAdjoint()
        self.batch_dims = batch_dims
        self.on_failure = on_failure
        self.start = start
        self._checked: dict[Any, set[Any]] = {}
        self._implicit(fn, self.solver)

    def forward(self, *args: Any, init: Any = None) -> Any:
        """The equilibrium; ``init`` as in :meth:`solve`."""
        return self.solve(*args, init=init).value

    def solve(self, *args: Any, init: Any = None, at: Sequence[int] = (), progress: bool = False) -> Equilibrium:
        """The equilibrium with status and statistics, its value on the graph.

        Args:
            args: what the cell gets after ``z``.
            init: where to start instead: a value like ``z``, or an earlier solution, whose samples without an answer
                start afresh. No gradient flows to it. An earlier solution keeps its graph alive for as long as it is
                kept; keep ``solution.value.detach()`` to let go of it.
            at: steps of the solver whose iterates are wanted too, in ``trajectory``, for losses on them (fixed-point
                correction; Bai et al. 2022, CVPR, "Deep Equilibrium Optical Flow Estimation"). They are ``fn`` applied
                once to the iterate after that many steps, and their derivatives are those of this one application at a
                fixed iterate, a one-step phantom gradient. Samples that are done earlier stand still.
            progress: whether to show a bar; see :func:`difflayers.progress`.
        """
        if torch.compiler.is_compiling():
            return _solve_outside_dynamo(self, args, init, at)
        return showing(progress, lambda: self._solve(args, init, at))

    def jacobian_penalty(
        self, solution: Any, *args: Any, samples: int = 1, generator: Generator | None = None
    ) -> Tensor:
        """An unbiased estimate of ``‖∂fn/∂z‖² / n`` (Frobenius) at the equilibrium, ``(*batch,)``, differentiable.

        Added to a loss it keeps equilibria easy to find (Bai, Koltun, Kolter 2021, ICML, "Stabilizing Equilibrium
        Models by Jacobian Regularization"). It is Hutchinson's estimate, from vector-Jacobian products with random
        signs. A sample without an answer gives NaN and no gradient.

        Args:
            solution: what :meth:`solve` gave, so that masks and normalized weights are those of that solve; or a value
                of ``z``, where the cell is seen afresh. The gradient through the equilibrium itself comes along, in the
                one adjoint solve that the loss needs anyway; detach the value to leave it out.
            args: what the solve got.
            samples: how many random directions, with one vector-Jacobian product each.
            generator: where these come from.
        """
        view = solution.view if isinstance(solution, Equilibrium) else None
        view = view or View(self.fn, advance=False)
        value = solution.value if isinstance(solution, Solution) else solution
        status = solution.status if isinstance(solution, Solution) else None
        if torch.compiler.is_compiling():
            return _penalty_outside_dynamo(view, value, args, status, self.batch_dims, samples, generator)
        return squared_jacobian(view, value, args, status, self.batch_dims, samples, generator)

    def extra_repr(self) -> str:
        return f"solver={self.solver!r}, adjoint={self.adjoint!r}, batch_dims={self.batch_dims}"

    def _solve(self, args: tuple[Any, ...], init: Any, at: Sequence[int]) -> Equilibrium:
        start = self._starting(args, init)
        view = View(self.fn)
        solver, iterates = recording(self.solver, at) if at else (self.solver, {})
        solution = self._implicit(view.frozen, solver)(view.frozen.tensors, *args, init=start)
        view.commit(solution, args)
        trajectory: tuple[Any, ...] = ()
        if at:
            packing = Packing.of(start, self.batch_dims)
            last = packing.pack(solution.value).detach()
            points = [packing.unpack(iterates.get(step, last)) for step in at]
            trajectory = tuple(view.apply(z, args, solution.status) for z in points)
        return Equilibrium(solution.value, solution.status, solution.stats, solution.state, trajectory, view)

    def _starting(self, args: tuple[Any, ...], init: Any) -> Any:
        if init is not None and not isinstance(init, Solution):
            return init
        if isinstance(init, Solution) and all_answered(init.status):
            return init.value
        fresh = self._fresh(args)
        return fresh if init is None else restarted(init, fresh)

    def _fresh(self, args: tuple[Any, ...]) -> Any:
        if self.start is not None:
            with torch.no_grad():
                return self.start(*args)
        if not args:
            raise ProblemError("the cell has no input to take the unknown's shape from; pass init= or start=")
        return pytree.tree_map(torch.zeros_like, args[0])

    def _implicit(self, fn: Any, solver: Solver) -> ImplicitFunction:
        # Made anew, since the cell may have been replaced or moved; what was checked before stays checked.
        function = ImplicitFunction(CellProblem(fn, self.batch_dims), solver, self.adjoint, self.on_failure)
        modes = tuple(module.training for module in self.fn.modules())
        object.__setattr__(function, "_checked", self._checked.setdefault(modes, set()))
        return function


# torch.compiler.disable would import the whole of dynamo here; this imports it when called.
_solve_outside_dynamo = _disable_dynamo(DEQ._solve)
_penalty_outside_dynamo = _disable_dynamo(squared_jacobian)
