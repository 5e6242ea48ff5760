"""``CvxpyLayer`` with the signature of cvxpylayers 1.2.0 (Agrawal et al. 2019, NeurIPS).

It is :class:`difflayers.qp.CvxpyLayer`, which says how solvers and options go by their names there. What differs from
cvxpylayers:

- Any number of batch dimensions; float32 comes out as float32, but is solved in float64.
- A sample without a solution raises :class:`~difflayers.errors.SolverError`, a ``RuntimeError`` that carries the
  others; with ``layer.on_failure = "warn"`` it is NaN instead. ``layer.solve`` tells the status of each.
- ``solver`` is one of :mod:`difflayers.qp` or a name, never a ``SolverInterface``; ``warm_start=True`` is
  ``layer.solve(..., init=solution)``, since nothing is remembered between calls.
- ``verbose`` and ``canon_backend`` have no meaning here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from difflayers import qp
from difflayers._solver import Solver
from difflayers.compat._ignored import ignored
from difflayers.errors import ProblemError

__all__ = ["CvxpyLayer"]


class CvxpyLayer(qp.CvxpyLayer):
    """The solution of a CVXPY problem as a function of its parameters; see :class:`difflayers.qp.CvxpyLayer`.

    >>> import cvxpy as cp, torch
    >>> from difflayers.compat.cvxpylayers.torch import CvxpyLayer
    >>> x, center = cp.Variable(2), cp.Parameter(2)
    >>> problem = cp.Problem(cp.Minimize(cp.sum_squares(x - center)), [cp.norm(x) <= 1])
    >>> CvxpyLayer(problem, [center], [x])(torch.tensor([3.0, 4.0]))
    (tensor([0.6000, 0.8000]),)
    """

    def __init__(
        self,
        problem: Any,
        parameters: Sequence[Any],
        variables: Sequence[Any],
        solver: str | Solver | None = None,
        gp: bool = False,
        verbose: bool = False,
        canon_backend: str | None = None,
        solver_args: Mapping[str, Any] | None = None,
    ) -> None:
        if verbose:
            ignored("verbose of cvxpylayers", "use difflayers.monitor() or difflayers.progress()")
        if canon_backend is not None:
            ignored("canon_backend of cvxpylayers", "the problem is reduced once, by CVXPY")
        super().__init__(
            problem, parameters, variables, solver=solver, gp=gp, solver_args=solver_args, on_failure="raise"
        )

    def forward(
        self,
        *params: Any,
        solver_args: Mapping[str, Any] | None = None,
        warm_start: bool = False,
        init: qp.CvxpySolution | None = None,
    ) -> tuple[Any, ...]:
        """The variables, ``(*batch, *shape)`` each."""
        if warm_start:
            raise ProblemError(
                "warm_start=True: nothing is remembered between calls; keep solution = layer.solve(...), and pass "
                "init=solution to the next call"
            )
        return super().forward(*params, solver_args=solver_args, init=init)
