"""One solve, and what its derivatives need to know of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from difflayers._monitor import watch
from difflayers._solution import OnFailure, Solution, Status, check_status
from difflayers.ode._explicit import OneStepSolver
from difflayers.ode._mesh import Mesh, RowMesh
from difflayers.ode._problem import InitialValueProblem


@dataclass
class Call:
    """One solve, with what its derivatives need to know."""

    problem: InitialValueProblem
    solver: OneStepSolver
    on_failure: OnFailure
    states: int | None
    transformed: bool = False  # whether a transform may need the mesh as tensors of its own
    keep_stages: bool = False
    stage_parallel: bool | None = None
    check: float | None = None
    slope: Tensor | None = None  # at the start, where it was evaluated already
    stiff: list[int] = field(default_factory=list)  # steps at the border of stability, of the sample with most of them
    failures: list[bool] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    meshes: list[Mesh | RowMesh] = field(default_factory=list)  # shared with the calls that transforms make of this one

    @property
    def mesh(self) -> Mesh | RowMesh:
        return self.meshes[-1]

    @property
    def failed(self) -> bool:
        """Whether any sample has."""
        return self.failures[-1]

    def columns(self, batch: Sequence[int]) -> list[Tensor]:
        """The mesh as tensors, where a transform may need them and samples have their own."""
        if not self.transformed or not isinstance(self.mesh, RowMesh):
            return []
        return [column.reshape(*batch, column.shape[-1]) for column in self.mesh.columns()]

    def run(self, params: Sequence[Tensor]) -> Solution:
        mesh = self.solver.mesh(params[1], self.states, self.keep_stages)
        slope, self.slope = self.slope, None
        solution = watch("forward", self.solver, lambda: self.solver.march(self.problem, params, mesh, slope))
        self.meshes.append(mesh)
        self.failures.append(not bool((solution.status == Status.SUCCESS).all()))
        self.stiff.append(int(solution.stats["stiff"].max()) if solution.stats["stiff"].numel() else 0)
        self.names[:] = solution.stats
        return check_status(solution, self.on_failure, explain=self.problem.explain(solution))


def with_dimension(
    size: int, in_dims: Sequence[int | None], params: Sequence[Tensor]
) -> tuple[list[Tensor], tuple[int | None, ...]]:
    """``(y0, t, *tensors)`` with the dimension that ``vmap`` adds in front, and which of the tensors have it.

    A start has it always, output times where each sample has its own.
    """
    start, times, *dims = in_dims
    y0, t, *tensors = [p if d is None else p.movedim(d, 0) for p, d in zip(params, in_dims, strict=True)]
    if start is None:
        y0 = y0.unsqueeze(0).repeat(size, *[1] * y0.dim())
    shared = params[1].dim() == (1 if times is None else 2)
    if times is not None and shared:
        t = t[(slice(None), *[None] * (y0.dim() - 2))].expand(*y0.shape[:-1], -1)
    elif times is None and not shared:
        t = t.expand(*y0.shape[:-1], -1)
    return [y0, t, *tensors], tuple(None if d is None else 0 for d in dims)
