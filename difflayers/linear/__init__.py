"""Linear solvers for the systems behind derivatives, ``J x = b`` and ``Jᵀ x = b``, batched over samples.

Exact: :class:`LU`, :class:`CG`, :class:`GCR`, :class:`GMRES`, :class:`BiCGSTAB`, :class:`Picard`, :class:`Anderson`,
:class:`LeastSquares`, and :class:`Auto`, which chooses. Approximate, by choice: :class:`Neumann` (phantom gradients)
and :class:`Identity` (Jacobian-free backpropagation).
"""

from difflayers.linear._auto import Auto
from difflayers.linear._base import Factor, IterativeLinearSolver, LinearSolution, LinearSolver
from difflayers.linear._direct import LU, LeastSquares
from difflayers.linear._krylov import CG, GCR, GMRES, BiCGSTAB
from difflayers.linear._operator import JacobianOperator, LinearOperator, MatrixOperator, Property
from difflayers.linear._stationary import Anderson, Identity, Neumann, Picard

__all__ = [
    "CG",
    "GCR",
    "GMRES",
    "LU",
    "Anderson",
    "Auto",
    "BiCGSTAB",
    "Factor",
    "Identity",
    "IterativeLinearSolver",
    "JacobianOperator",
    "LeastSquares",
    "LinearOperator",
    "LinearSolution",
    "LinearSolver",
    "MatrixOperator",
    "Neumann",
    "Picard",
    "Property",
]
