"""Quadratic programs as a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from difflayers._adjoint import Adjoint, ImplicitAdjoint
from difflayers._areas import available_solvers, resolve
from difflayers._solution import OnFailure
from difflayers._solver import Solver
from difflayers.qp._api import QPSolution, solve_qp


class QPLayer(nn.Module):
    """The minimizer of ``½xᵀPx + qᵀx`` subject to ``Gx ≤ h``, ``Ax = b``, ``lb ≤ x ≤ ub``, as a layer.

    It has no parameters of its own: blocks are inputs, or parameters of the model around it (Amos and Kolter 2017,
    ICML, "OptNet"). Arguments as in :func:`solve_qp`.

    Args:
        solver: a solver object, or the name of one with its defaults; ``"auto"`` chooses.
        adjoint: the derivative rule; None is :class:`~difflayers.ImplicitAdjoint`.
        on_failure: ``"raise"``, ``"warn"`` or ``"ignore"``: a sample without a solution is NaN and gives no gradient.

    >>> import torch
    >>> from difflayers.qp import QPLayer
    >>> layer = QPLayer()
    >>> q = torch.tensor([[-3.0, 1.0], [-0.5, -0.5]], requires_grad=True)
    >>> x = layer(torch.eye(2), q, lb=torch.zeros(2), ub=torch.ones(2))  # a projection on the box
    >>> x.detach()
    tensor([[1.0000, 0.0000],
            [0.5000, 0.5000]])
    >>> x.sum().backward()
    >>> q.grad
    tensor([[ 0.,  0.],
            [-1., -1.]])
    """

    def __init__(
        self, *, solver: str | Solver = "auto", adjoint: Adjoint | None = None, on_failure: OnFailure = "warn"
    ) -> None:
        super().__init__()
        self.solver = resolve(solver, available_solvers("qp"))
        self.adjoint = adjoint or ImplicitAdjoint()
        self.on_failure = on_failure

    def forward(
        self,
        P: Tensor | None,
        q: Tensor,
        G: Tensor | None = None,
        h: Tensor | None = None,
        A: Tensor | None = None,
        b: Tensor | None = None,
        lb: Tensor | None = None,
        ub: Tensor | None = None,
        *,
        init: Any = None,
    ) -> Tensor:
        """The minimizer, ``(*batch, n)``; ``init`` as in :func:`solve_qp`."""
        x: Tensor = self.solve(P, q, G, h, A, b, lb, ub, init=init).x
        return x

    def solve(
        self,
        P: Tensor | None,
        q: Tensor,
        G: Tensor | None = None,
        h: Tensor | None = None,
        A: Tensor | None = None,
        b: Tensor | None = None,
        lb: Tensor | None = None,
        ub: Tensor | None = None,
        *,
        init: Any = None,
        progress: bool = False,
    ) -> QPSolution:
        """The solution with multipliers, status and statistics, on the graph; with a bar if ``progress``."""
        call = _outside_dynamo if torch.compiler.is_compiling() else solve_qp
        return call(
            P, q, G, h, A, b, lb, ub,
            solver=self.solver, adjoint=self.adjoint, init=init, on_failure=self.on_failure, progress=progress,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"solver={self.solver!r}, adjoint={self.adjoint!r}"


# torch.compiler.disable would import the whole of dynamo here; this imports it when called.
_outside_dynamo = _disable_dynamo(solve_qp)
