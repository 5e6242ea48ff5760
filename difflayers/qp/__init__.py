"""Quadratic programs ``argmin ½xᵀPx + qᵀx``, cone programs, CVXPY problems, and layers on them.

The gradient is that of the optimality conditions: one linear system on the active constraints, whatever found them.

>>> import torch
>>> from difflayers.qp import solve_qp
>>> q = torch.tensor([-2.0, 1.0], dtype=torch.float64, requires_grad=True)
>>> x = solve_qp(torch.eye(2).double(), q, lb=torch.zeros(2).double()).x  # the nearest point to -q that isn't negative
>>> x.sum().backward()
>>> x.tolist(), q.grad.tolist()
([2.0, 0.0], [-1.0, 0.0])
"""

from difflayers._solver import Solver
from difflayers.qp import projections
from difflayers.qp._api import QPSolution, solve_qp
from difflayers.qp._auto import Auto
from difflayers.qp._clarabel import Clarabel
from difflayers.qp._cone_api import ConeSolution, solve_cone
from difflayers.qp._cone_problem import ConeProblem
from difflayers.qp._cone_scs import SCS
from difflayers.qp._cone_solver import ConeSolver
from difflayers.qp._cones import Cones
from difflayers.qp._cvxpy import CvxpyLayer, CvxpySolution
from difflayers.qp._daqp import DAQP
from difflayers.qp._feasible import Sides, closest_feasible
from difflayers.qp._highs import HiGHS
from difflayers.qp._interior_point import InteriorPoint
from difflayers.qp._layer import QPLayer
from difflayers.qp._lpgd import LPGDAdjoint
from difflayers.qp._moreau import Moreau
from difflayers.qp._osqp import OSQP
from difflayers.qp._piqp import PIQP
from difflayers.qp._problem import QPProblem
from difflayers.qp._proxqp import ProxQP
from difflayers.qp._solver import QPSolver
from difflayers.qp._sparse import Sparse

SOLVERS: dict[str, type[Solver]] = {
    "auto": Auto,
    "clarabel": Clarabel,
    "daqp": DAQP,
    "highs": HiGHS,
    "interior_point": InteriorPoint,
    "moreau": Moreau,
    "osqp": OSQP,
    "piqp": PIQP,
    "proxqp": ProxQP,
}

__all__ = [
    "DAQP",
    "OSQP",
    "PIQP",
    "SCS",
    "Auto",
    "Clarabel",
    "ConeProblem",
    "ConeSolution",
    "ConeSolver",
    "Cones",
    "CvxpyLayer",
    "CvxpySolution",
    "HiGHS",
    "InteriorPoint",
    "LPGDAdjoint",
    "Moreau",
    "ProxQP",
    "QPLayer",
    "QPProblem",
    "QPSolution",
    "QPSolver",
    "Sides",
    "Sparse",
    "closest_feasible",
    "projections",
    "solve_cone",
    "solve_qp",
]
