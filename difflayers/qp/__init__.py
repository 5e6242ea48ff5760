"""Quadratic programs, and layers on them."""

from difflayers.qp._api import QPSolution, solve_qp
from difflayers.qp._daqp import DAQP
from difflayers.qp._piqp import PIQP
from difflayers.qp._problem import QPProblem

SOLVERS = {"auto": DAQP, "daqp": DAQP, "piqp": PIQP}

__all__ = ["DAQP", "PIQP", "QPProblem", "QPSolution", "solve_qp"]
