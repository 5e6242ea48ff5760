"""Other differentiable QP solvers, behind the signature that all methods here have: ``method(case) -> run``.

``run() -> (x, gradients)`` solves the case and differentiates ``sum(cotangent * x)`` in ``P, q, G, h, A, b``. What is
made once per layer, such as cvxpylayers' canonical form or JAX's compiled code, is made before, or by a first call.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from _qp_problems import Case
from torch import Tensor

Run = Callable[[], tuple[Any, Sequence[Any]]]
Method = Callable[[Case], Run]


@dataclass(frozen=True)
class Peer:
    """Another package.

    Attributes:
        needs: modules; without them it is left out.
        quoted: per size, what it took when the area was planned: CPU milliseconds on one quiet core, gradient error.
    """

    method: Method
    needs: tuple[str, ...]
    quoted: dict[str, str]

    @property
    def missing(self) -> list[str]:
        return [module for module in self.needs if find_spec(module.partition(".")[0]) is None]


SIZES = ("128, 10, 10, 2", "128, 50, 50, 10", "32, 100, 100, 20", "8, 200, 200, 40")


def differentiated(case: Case, solve: Callable[..., Tensor]) -> Run:
    """``solve(P, q, G, h, A, b)`` and its gradients by backpropagation."""
    blocks = [leaf(block) for block in case.blocks]

    def run() -> tuple[Tensor, Sequence[Tensor | None]]:
        x = solve(*blocks)
        return x.detach(), torch.autograd.grad((x * case.cotangent).sum(), blocks)

    return run


def leaf(block: Any) -> Tensor:
    """The block as a tensor of its own that requires a gradient."""
    if isinstance(block, Tensor):
        return block.clone().requires_grad_()
    entries = block.tocoo()
    index = np.stack([entries.row, entries.col])
    tensor = torch.sparse_coo_tensor(index, entries.data, entries.shape, check_invariants=True)
    return tensor.coalesce().requires_grad_()


def qpth(case: Case) -> Run:
    from qpth.qp import QPFunction

    return differentiated(case, QPFunction(verbose=-1))


def qplayer(case: Case, **tolerances: float) -> Run:
    from proxsuite.torch.qplayer import QPFunction

    below = torch.full_like(case.blocks[3], -1e20)
    layer = QPFunction(**tolerances)
    return differentiated(case, lambda P, q, G, h, A, b: layer(P, q, A, b, G, below, h)[0])


def qplayer_tight(case: Case) -> Run:
    return qplayer(case, eps=1e-11, eps_backward=1e-11)


def moreau(case: Case) -> Run:
    import cvxpy as cp

    return _cvxpylayer(case, lambda x, P: cp.quad_form(x, P) / 2, lambda P: P, solver="MOREAU", psd=True)


def cvxpylayers(case: Case, **solver_args: Any) -> Run:
    import cvxpy as cp

    def root(P: Tensor) -> Tensor:
        return torch.linalg.cholesky(P).mT

    return _cvxpylayer(case, lambda x, root: cp.sum_squares(root @ x) / 2, root, solver_args=solver_args)


def cvxpylayers_clarabel(case: Case) -> Run:
    return cvxpylayers(case, solve_method="Clarabel")


def _cvxpylayer(
    case: Case,
    curvature: Callable[[Any, Any], Any],
    first: Callable[[Tensor], Tensor],
    solver: str | None = None,
    solver_args: dict[str, Any] | None = None,
    psd: bool = False,
) -> Run:
    import cvxpy as cp
    from cvxpylayers.torch import CvxpyLayer

    _, n, m, p = case.size
    x = cp.Variable(n)
    square = cp.Parameter((n, n), PSD=True) if psd else cp.Parameter((n, n))
    q, G, h, A, b = (cp.Parameter(shape) for shape in (n, (m, n), m, (p, n), p))
    problem = cp.Problem(cp.Minimize(curvature(x, square) + q @ x), [G @ x <= h, A @ x == b])
    parameters, options = [square, q, G, h, A, b], {} if solver is None else {"solver": solver}
    layer = CvxpyLayer(problem, parameters, [x], **options)
    return differentiated(case, lambda P, *rest: layer(first(P), *rest, solver_args=solver_args or {})[0])


def sparse_cvxpylayers(case: Case, **options: Any) -> Run:
    """With constant matrices: gradients of vectors only."""
    import cvxpy as cp
    from cvxpylayers.torch import CvxpyLayer

    P, q, G, h, A, b = case.blocks
    x = cp.Variable(P.shape[0])
    parameters = [cp.Parameter(vector.shape[-1]) for vector in (q, h, b)]
    cost = cp.quad_form(x, P, assume_PSD=True) / 2 + parameters[0] @ x
    problem = cp.Problem(cp.Minimize(cost), [G @ x <= parameters[1], A @ x == parameters[2]])
    arguments = options.pop("solver_args", {})
    layer = CvxpyLayer(problem, parameters, [x], **options)
    vectors = [leaf(vector) for vector in (q, h, b)]

    def run() -> tuple[Tensor, Sequence[Tensor | None]]:
        (x,) = layer(*vectors, solver_args=arguments)
        dq, dh, db = torch.autograd.grad((x * case.cotangent).sum(), vectors)
        return x.detach(), (None, dq, None, dh, None, db)

    return run


def sparse_moreau(case: Case) -> Run:
    return sparse_cvxpylayers(case, solver="MOREAU")


def sparse_clarabel(case: Case) -> Run:
    return sparse_cvxpylayers(case, solver_args={"solve_method": "Clarabel"})


def qpax(case: Case, **options: float) -> Run:
    import qpax

    return _compiled(case, lambda P, q, G, h, A, b: qpax.solve_qp_primal(P, q, A, b, G, h, **options))


def qpax_tight(case: Case) -> Run:
    return qpax(case, solver_tol=1e-10, target_kappa=1e-10, max_iter=60)


def jaxopt(case: Case, **options: float) -> Run:
    from jaxopt import OSQP

    solver = OSQP(**options)

    def solve(P: Any, q: Any, G: Any, h: Any, A: Any, b: Any) -> Any:
        return solver.run(params_obj=(P, q), params_eq=(A, b), params_ineq=(G, h)).params.primal

    return _compiled(case, solve)


def _compiled(case: Case, solve: Callable[..., Any]) -> Run:
    # One thread. With two, jaxlib 0.10 waits forever for its own threads in batched factorizations.
    os.environ.setdefault("NPROC", "1")
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    import jax

    jax.config.update("jax_enable_x64", True)
    blocks = [jax.numpy.array(block.numpy()) for block in case.blocks]
    cotangent = jax.numpy.array(case.cotangent.numpy())

    def loss(*blocks: Any) -> tuple[Any, Any]:
        x = jax.vmap(solve)(*blocks)
        return (x * cotangent).sum(), x

    gradient = jax.jit(jax.value_and_grad(loss, argnums=tuple(range(6)), has_aux=True))

    def run() -> tuple[Any, Sequence[Any]]:
        (_, x), gradients = gradient(*blocks)
        jax.block_until_ready(gradients)
        return x, gradients

    return run


def _quoted(*figures: str) -> dict[str, str]:
    return dict(zip(SIZES, figures, strict=True))


PEERS = {
    "qpth 0.0.18": Peer(qpth, ("qpth",), _quoted("26 ms / 8e-7", "235 ms / 2e-5", "186 ms / 3e-6", "209 ms / 6e-6")),
    "ProxQP's QPLayer 0.8": Peer(
        qplayer, ("proxsuite",), _quoted("32 ms / 9e-6", "139 ms / 6e-6", "105 ms / 6e-6", "94 ms / 7e-6")
    ),
    "QPLayer, to 1e-11": Peer(qplayer_tight, ("proxsuite",), {}),
    "Moreau 0.4.1 through cvxpylayers": Peer(
        moreau,
        ("moreau", "cvxpylayers"),
        _quoted("6.7 ms / 4e-12", "110 ms / 4e-13", "143 ms / 2e-13", "195 ms / 7e-14"),
    ),
    "cvxpylayers 1.2": Peer(
        cvxpylayers, ("cvxpylayers",), _quoted("309 ms / 2e-4", "1.5 s / 0.22", "2.1 s / 0.21", "3.6 s / 0.23")
    ),
    "cvxpylayers 1.2 with Clarabel": Peer(cvxpylayers_clarabel, ("cvxpylayers", "clarabel"), {}),
    "qpax": Peer(qpax, ("qpax",), _quoted("7.5 ms / 0.33", "175 ms / 0.36", "193 ms / 0.43", "272 ms / 0.47")),
    "qpax, to 1e-10": Peer(qpax_tight, ("qpax",), {}),
    "jaxopt's OSQP": Peer(jaxopt, ("jaxopt",), dict(zip(SIZES, ("31 ms / 0.01", "3.3 s / 0.11"), strict=False))),
}
SPARSE_PEERS = {
    "Moreau 0.4.1 through cvxpylayers": Peer(sparse_moreau, ("moreau", "cvxpylayers"), {}),
    "cvxpylayers 1.2 with Clarabel": Peer(sparse_clarabel, ("cvxpylayers", "clarabel"), {}),
}
