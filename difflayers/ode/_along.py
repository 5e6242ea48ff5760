"""The solution along the steps of a solve, whichever kind of mesh they are on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from difflayers.ode._mesh import Mesh, RowMesh
from difflayers.ode._problem import InitialValueProblem
from difflayers.ode._replay import replay
from difflayers.ode._row_replay import replay_rows
from difflayers.ode._tableaus import Tableau


def along(
    problem: InitialValueProblem,
    tableau: Tableau,
    mesh: Mesh | RowMesh,
    columns: Sequence[Tensor],
    params: Sequence[Tensor],
    moves: bool,
) -> Tensor:
    """The outputs ``(*batch, T, n)`` on the graph of the parameters; of output times only if these move.

    ``columns`` are those of a :class:`RowMesh`, wrapped like the parameters.
    """
    y0, t, *tensors = params
    evaluate = problem.evaluator(tensors)
    if isinstance(mesh, Mesh):
        return replay(tableau, evaluate, mesh, y0, t if moves else None)
    batch = y0.shape[:-1]
    flat = [column.reshape(batch.numel(), column.shape[-1]) for column in columns]
    times = in_rows(t, batch) if moves else None
    value = replay_rows(tableau, evaluate, flat, mesh.inside, y0.reshape(batch.numel(), y0.shape[-1]), times)
    return value.reshape(batch + value.shape[1:])


def in_rows(t: Tensor, batch: torch.Size) -> Tensor:
    """Output times ``(samples, T)``, one row for every sample."""
    return t.expand(*batch, t.shape[-1]).reshape(batch.numel(), t.shape[-1])


def by_row(value: Tensor) -> Tensor:
    """Values ``(*batch, T, n)`` with one batch dimension."""
    return value.reshape(value.shape[:-2].numel(), *value.shape[-2:])
