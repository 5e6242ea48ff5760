"""``QPFunction`` and ``QPSolvers`` with the signatures of qpth 0.0.18 (Amos and Kolter 2017, ICML, "OptNet").

What differs:

- The gradient of a block that all samples share is the sum over them, as autograd has it everywhere; qpth takes the
  mean.
- Answers and gradients are refined to rounding, so ``eps``, ``maxIter`` and ``notImprovedLim`` have no meaning here.
- ``Q`` may be singular, whatever ``check_Q_spd`` is; where it isn't positive semidefinite, or a shape doesn't fit, the
  call raises :class:`~difflayers.errors.ProblemError`.
- A sample without a solution is NaN and gives no gradient, with a :class:`~difflayers.errors.ConvergenceWarning`, or
  without one if ``verbose`` is negative, where qpth returns its last iterate. ``solve`` tells the status of each.
- There may be no constraints at all. ``solver`` may be one of :mod:`difflayers.qp` as well, or its name.
- float32 comes out as float32, but is solved in float64.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import Enum

from torch import Tensor

from difflayers._solver import Solver
from difflayers.compat._ignored import ignored
from difflayers.qp import QPLayer, QPSolution

__all__ = ["QPFunction", "QPSolvers"]


class QPSolvers(Enum):
    """The solvers of qpth: here what ``solver="auto"`` chooses, and Clarabel, as CVXPY does."""

    PDIPM_BATCHED = 1
    CVXPY = 2


_SOLVERS = {QPSolvers.PDIPM_BATCHED: "auto", QPSolvers.CVXPY: "clarabel"}


@dataclass(frozen=True)
class QPFunction:
    """The minimizer of ``½zᵀQz + pᵀz`` subject to ``Gz ≤ h``, ``Az = b``, ``(batch, n)``, as a function of the blocks.

    A block without a batch dimension is shared by all samples, and empty tensors stand for constraints that aren't
    there.

    >>> import torch
    >>> from difflayers.compat.qpth.qp import QPFunction
    >>> Q, p, e = torch.eye(2), torch.tensor([[-3.0, 1.0], [-0.5, -0.5]]), torch.Tensor()
    >>> QPFunction(verbose=-1)(Q, p, -torch.eye(2), torch.zeros(2), e, e)
    tensor([[3.0000, 0.0000],
            [0.5000, 0.5000]])
    """

    eps: float = 1e-12
    verbose: int = 0
    notImprovedLim: int = 3
    maxIter: int = 20
    solver: QPSolvers | Solver | str = QPSolvers.PDIPM_BATCHED
    check_Q_spd: bool = True

    def __post_init__(self) -> None:
        options = {field.name: field.default for field in fields(self)}
        for name in ("eps", "notImprovedLim", "maxIter"):
            if getattr(self, name) != options[name]:
                ignored(f"{name} of qpth", "answers are refined to rounding")
        if self.verbose > 0:
            ignored("verbose of qpth", "use difflayers.monitor() or difflayers.progress()")

    def __call__(self, Q: Tensor, p: Tensor, G: Tensor, h: Tensor, A: Tensor, b: Tensor) -> Tensor:
        """The minimizers, ``(batch, n)``, where the batch is one sample if no block has one."""
        x: Tensor = self.solve(Q, p, G, h, A, b).x
        return x if x.dim() > 1 else x[None]

    def solve(self, Q: Tensor, p: Tensor, G: Tensor, h: Tensor, A: Tensor, b: Tensor) -> QPSolution:
        """The solution with multipliers, status and statistics."""
        # The gradient of Q is symmetric there.
        symmetric = (Q + Q.mT) / 2
        blocks = [block if block.numel() else None for block in (G, h, A, b)]
        solver = _SOLVERS[self.solver] if isinstance(self.solver, QPSolvers) else self.solver
        layer = QPLayer(solver=solver, on_failure="ignore" if self.verbose < 0 else "warn")
        return layer.solve(symmetric, p, *blocks)
