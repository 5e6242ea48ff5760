"""Deep equilibrium layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from difflayers._adjoint import Adjoint, ImplicitAdjoint
from difflayers._areas import available_solvers, resolve
from difflayers._implicit import ImplicitFunction
from difflayers._solution import OnFailure, Solution
from difflayers._solver import Solver
from difflayers.errors import ProblemError
from difflayers.fixedpoint._problem import FixedPointProblem


class DEQ(nn.Module):
    """The equilibrium ``z = fn(z, *args)`` of a cell, as a layer (Bai, Kolter, Koltun 2019, NeurIPS).

    Args:
        fn: the cell, called as ``fn(z, *args)``; returns ``z``'s structure, shapes and dtype.
        solver: a solver object, or the name of one with its defaults.
        adjoint: the derivative rule; None is :class:`~difflayers.ImplicitAdjoint`.
        batch_dims: leading dimensions that index independent samples.
        on_failure: ``"raise"``, ``"warn"`` or ``"ignore"``; see :class:`~difflayers.ImplicitFunction`.

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
    ) -> None:
        super().__init__()
        if not isinstance(fn, nn.Module):
            raise ProblemError(f"fn must be an nn.Module, got {type(fn).__name__}; for a function use fixed_point()")
        self.fn = fn
        self.solver = resolve(solver, available_solvers("fixedpoint"))
        self.adjoint = adjoint or ImplicitAdjoint()
        self.batch_dims = batch_dims
        self.on_failure = on_failure
        self._implicit()

    def forward(self, *args: Any, init: Any = None) -> Any:
        """The equilibrium; ``init`` starts the solve (default: zeros like the first argument)."""
        return self.solve(*args, init=init).value

    def solve(self, *args: Any, init: Any = None) -> Solution:
        """The equilibrium with status and statistics, its value on the graph."""
        if init is None:
            if not args:
                raise ProblemError("the cell has no input to take the unknown's shape from; pass init=")
            init = pytree.tree_map(torch.zeros_like, args[0])
        return self._implicit()(*args, init=init)

    def extra_repr(self) -> str:
        return f"solver={self.solver!r}, adjoint={self.adjoint!r}, batch_dims={self.batch_dims}"

    def _implicit(self) -> ImplicitFunction:
        # Made anew, since the cell may have been replaced or moved; what was checked before stays checked.
        function = ImplicitFunction(
            FixedPointProblem(self.fn, self.batch_dims), self.solver, self.adjoint, self.on_failure
        )
        function._checked.update(self.__dict__.setdefault("_checked", set()))
        self.__dict__["_checked"] = function._checked
        return function
