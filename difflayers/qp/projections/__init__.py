"""Nearest points in simple sets, in closed form, batched, with derivatives of every order.

All but ``dim`` are differentiable arguments: points and parameters, in reverse and forward mode, under ``torch.func``.
Where a projection has a kink there is no derivative, and each function says which element of the generalized Jacobian
(the limits of nearby derivatives, and what lies between them) comes out. A sample that isn't finite gives NaN, and zero
gradient once it is masked out of the loss; the others are not affected.
"""

from difflayers.qp.projections._cones import project_psd, project_second_order_cone
from difflayers.qp.projections._sets import project_affine, project_box, project_halfspace, project_l2_ball
from difflayers.qp.projections._simplex import entmax, project_l1_ball, project_simplex, sparsemax

__all__ = [
    "entmax",
    "project_affine",
    "project_box",
    "project_halfspace",
    "project_l1_ball",
    "project_l2_ball",
    "project_psd",
    "project_second_order_cone",
    "project_simplex",
    "sparsemax",
]
