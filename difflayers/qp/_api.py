"""Functions: state the problem, get the solution."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from difflayers._adjoint import Adjoint, ImplicitAdjoint
from difflayers._areas import available_solvers, resolve
from difflayers._arrays import to_tensors, uses_numpy
from difflayers._autodiff import in_functorch, without_autocast
from difflayers._progress import showing
from difflayers._solution import OnFailure, Solution, in_shape, to_numpy
from difflayers._solver import Solver
from difflayers.errors import ProblemError
from difflayers.qp._checks import batch_shape, check_blocks, check_objective
from difflayers.qp._data import MATRICES, NAMES, Data, Matrix, flattened
from difflayers.qp._problem import QPProblem
from difflayers.qp._solver import QPSolver
from difflayers.qp._sparse import Sparse, as_sparse


@dataclass(frozen=True)
class QPSolution(Solution):
    """The answer of a QP. ``value`` is ``x``; what has no answer is NaN.

    Attributes:
        y: multipliers of ``Ax = b``, ``(*batch, p)``.
        z: multipliers of ``Gx ≤ h``, ``(*batch, m)``, not negative.
        z_box: multipliers of the bounds, ``(*batch, n)``: positive at upper, negative at lower ones. At the solution
            ``Px + q + Gᵀz + Aᵀy + z_box = 0``.
        solver: which solver it was.
        point: the unknown of :class:`QPProblem`, ``(samples, ...)``, off the graph: what warm starts start from.
    """

    y: Any = None
    z: Any = None
    z_box: Any = None
    solver: Solver | None = None
    point: Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def x(self) -> Any:
        """The minimizer, ``(*batch, n)``."""
        return self.value

    def numpy(self) -> QPSolution:
        """The same with NumPy arrays, detached, on the CPU."""
        plain = super().numpy()
        y, z, z_box = (to_numpy(part) for part in (self.y, self.z, self.z_box))
        return QPSolution(plain.value, plain.status, plain.stats, None, y, z, z_box, self.solver, self.point)


def solve_qp(
    P: Any,
    q: Any,
    G: Any = None,
    h: Any = None,
    A: Any = None,
    b: Any = None,
    lb: Any = None,
    ub: Any = None,
    *,
    solver: str | Solver = "auto",
    adjoint: Adjoint | None = None,
    init: Any = None,
    on_failure: OnFailure = "raise",
    progress: bool = False,
) -> QPSolution:
    """Minimize ``½xᵀPx + qᵀx`` subject to ``Gx ≤ h``, ``Ax = b``, ``lb ≤ x ≤ ub``; differentiable in all of them.

    All leading dimensions are batch, and broadcast: a block without them is shared by all samples, and its gradient is
    summed over them. Any block but ``q`` may be None. A matrix may be sparse: a torch tensor (COO or CSR, whose
    gradient has the same pattern), a SciPy matrix, or :class:`Sparse` for a batch of values on one pattern.

    Args:
        P: symmetric positive semidefinite, ``(*batch, n, n)``; None for a linear program. Its gradient isn't made
            symmetric: a parametrization such as ``LLᵀ`` does that.
        q: ``(*batch, n)``.
        G: ``(*batch, m, n)``.
        h: ``(*batch, m)``.
        A: ``(*batch, p, n)``.
        b: ``(*batch, p)``.
        lb: ``(*batch, n)``, ``-inf`` where there is no bound.
        ub: ``(*batch, n)``, ``inf`` where there is no bound.
        solver: a solver object, or the name of one with its defaults; ``"auto"`` chooses, and ``solution.solver`` says
            which.
        adjoint: the derivative rule; None is :class:`~difflayers.ImplicitAdjoint`.
        init: an earlier solution of a similar problem, whose active set is the first guess, or a point ``x``.
        on_failure: ``"raise"``, ``"warn"`` or ``"ignore"``.
        progress: whether to show a bar; see :func:`difflayers.progress`.

    Raises:
        ProblemError: shapes or dtypes don't fit, or ``P`` isn't symmetric or positive semidefinite.
        SolverError: a sample failed and ``on_failure`` is ``"raise"``.

    >>> import torch
    >>> from difflayers.qp import solve_qp
    >>> q = torch.tensor([-2.0, -6.0], dtype=torch.float64, requires_grad=True)
    >>> P = torch.tensor([[1.0, -1.0], [-1.0, 2.0]], dtype=torch.float64)
    >>> G = torch.tensor([[1.0, 1.0], [-1.0, 2.0]], dtype=torch.float64)
    >>> h = torch.tensor([2.0, 2.0], dtype=torch.float64)
    >>> solution = solve_qp(P, q, G, h, lb=torch.zeros(2, dtype=torch.float64))
    >>> solution.x.detach().numpy().round(4)
    array([0.6667, 1.3333])
    >>> solution.x[0].backward()
    """
    given_blocks = [P, q, G, h, A, b, lb, ub]
    numpy = uses_numpy(given_blocks, given_blocks)
    like = next((block for block in given_blocks if isinstance(block, Tensor)), None)
    tensors = zip(NAMES, to_tensors(given_blocks, like) if numpy else given_blocks, strict=True)
    blocks = {name: as_sparse(block, name, like) for name, block in tensors}
    check_blocks(blocks)
    given = {name: block for name, block in blocks.items() if block is not None}
    batch = batch_shape(given)
    flat = {name: flattened(block, batch, 2 if name in MATRICES else 1) for name, block in given.items()}
    solution = showing(progress, lambda: _solved(flat, batch.numel(), solver, adjoint, init, on_failure))
    shaped = in_shape(solution, batch, "value", "y", "z", "z_box")
    return shaped.numpy() if numpy else shaped


def _solved(
    blocks: dict[str, Matrix],
    samples: int,
    solver: str | Solver,
    adjoint: Adjoint | None,
    init: Any,
    on_failure: OnFailure,
) -> QPSolution:
    """For one batch dimension."""
    data = Data.of(blocks)
    known = None
    if not in_functorch():
        known = data.map(lambda block: block.detach().double())
        check_objective(known, data.q.dtype)
    chosen = resolve(solver, available_solvers("qp"))
    first = chosen.choices(known)[0] if known is not None and isinstance(chosen, QPSolver) else chosen
    start = _start(data, samples, init)
    patterns = {name: block.pattern for name, block in blocks.items() if isinstance(block, Sparse)}
    params = tuple(block.values if isinstance(block, Sparse) else block for block in blocks.values())
    problem = QPProblem(tuple(blocks), warm=init is not None, patterns=patterns, known=known)
    if reason := chosen.supports(problem) or (adjoint or ImplicitAdjoint()).supports(problem, chosen):
        raise TypeError(f"{chosen!r} can't serve here: {reason}")
    with without_autocast(start.device):
        found = (adjoint or ImplicitAdjoint()).apply(problem, chosen, params, start, on_failure)
    x, y, v, low, high = data.layout.split(found.value)
    box = 0 * x.detach()  # NaN where there is no answer
    box = box if data.lb is None else box - torch.relu(low)
    box = box if data.ub is None else box + torch.relu(high)
    return QPSolution(x, found.status, found.stats, None, y, torch.relu(v), box, first, found.value.detach())


def _start(data: Data, samples: int, init: Any) -> Tensor:
    """The unknown to start from: zeros, that of an earlier solution, or that of a point ``x``.

    Raises:
        ProblemError: ``init`` is neither, or of another size.
    """
    size = data.layout.unknowns
    if init is None:
        return data.q.new_zeros(samples, size)
    point = init.point if isinstance(init, QPSolution) else init
    if isinstance(init, QPSolution) and point is not None and point.shape == (samples, size):
        return point.to(data.q)
    if isinstance(point, Tensor) and not isinstance(init, QPSolution) and point.shape[-1] == data.layout.n:
        x = point.detach().to(data.q).expand(samples, -1)
        near = data.map(torch.Tensor.detach)
        slack = near.limits - near.products(x)
        v = torch.where(slack <= 1e-6 * near.extents, 1, -slack)
        return torch.cat([x, x.new_zeros(samples, data.layout.p), v], dim=-1)
    shape = tuple(point.shape) if isinstance(point, Tensor) else type(init).__name__
    raise ProblemError(
        f"init is {shape}, but must be a QPSolution of {samples} problems with {size} unknowns, or a point x with "
        f"{data.layout.n} entries"
    )
