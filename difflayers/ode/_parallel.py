"""All stages of all accepted steps at once: their Jacobians first, then a short chain of small products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from difflayers.ode._mesh import Mesh
from difflayers.ode._problem import InitialValueProblem
from difflayers.ode._stages import weights_at
from difflayers.ode._tableaus import Coefficients, Tableau, coefficients


def parallel_gradient(
    problem: InitialValueProblem,
    tableau: Tableau,
    mesh: Mesh,
    tensors: Sequence[Tensor],
    followed: Sequence[Tensor],
    cotangent: Tensor,
) -> tuple[Tensor, list[Tensor | None]]:
    """The cotangent of the start, and the gradients of what is followed, for cotangents ``(samples, T, n)``.

    Every step maps the cotangent of its end to that of its start, ``λ = Pλ₁ + q``, and ``P`` and ``q`` need no other
    step: they take one evaluation of all ``(step, stage)`` pairs, ``n`` vector-Jacobian products, and products of
    ``n × n`` matrices. What is left to do in order is the chain of the ``P``.
    """
    samples, _, n = cotangent.shape
    known = coefficients(tableau, cotangent.dtype, cotangent.device)
    sources = _sources(tableau, mesh, cotangent)
    stages = sources.shape[1]
    t, h, points = _points(known, tableau, mesh, stages, (samples, n), cotangent)
    with torch.enable_grad():
        leaf = points.reshape(-1, *problem.native).requires_grad_()
        slopes = torch.func.vmap(problem.evaluator(tensors))(t, leaf)
    shape = (len(mesh.steps), stages, samples, n)
    jacobians = _jacobians(slopes, leaf, shape)
    weights = torch.cat([known.b, known.b.new_zeros(max(0, stages - tableau.stages))])
    own = torch.eye(n, dtype=cotangent.dtype, device=cotangent.device) * weights[:, None, None, None]
    outside = torch.cat([own.expand(shape[0], -1, samples, -1, -1), sources[:, :, :, :, None]], dim=-1)
    end = torch.zeros_like(outside[:, 0])
    stage_cotangents: list[Tensor] = []
    pulled: list[Tensor] = []
    for i in range(stages - 1, -1, -1):
        total = outside[:, i]
        for later, weight in zip(pulled, known.columns[i][: len(pulled)].flip(0).tolist(), strict=True):
            total = torch.add(total, later, alpha=weight) if weight else total
        stage_cotangents.append(total * h)
        pulled.append(jacobians[:, i].mT @ stage_cotangents[-1])
        end = end + pulled[-1]
    each = torch.stack(stage_cotangents[::-1], dim=1)
    return _chained(each, end, _direct(mesh, cotangent), slopes, followed)


def _chained(
    each: Tensor, end: Tensor, direct: Tensor, slopes: Tensor, followed: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor | None]]:
    n = direct.shape[-1]
    products = end[..., :n] + torch.eye(n, dtype=end.dtype, device=end.device)
    offsets = (end[..., n] + direct).unsqueeze(-1)
    adjoint = torch.zeros_like(offsets[0])
    ends = []
    for product, offset in zip(reversed(products.unbind(0)), reversed(offsets.unbind(0)), strict=True):
        ends.append(adjoint)
        adjoint = torch.baddbmm(offset, product, adjoint)
    at_end = torch.stack(ends[::-1]).unsqueeze(1)
    cotangents = (each[..., :n] @ at_end).squeeze(-1) + each[..., n]
    if not followed or not slopes.requires_grad:
        return adjoint.squeeze(-1), [None] * len(followed)
    gradients = torch.autograd.grad(slopes, followed, cotangents.reshape(slopes.shape), allow_unused=True)
    return adjoint.squeeze(-1), list(gradients)


def _sources(tableau: Tableau, mesh: Mesh, cotangent: Tensor) -> Tensor:
    """What the slopes of every step get from its outputs, ``(steps, stages, samples, n)``."""
    number, index, place = _outputs(mesh)
    inside = any(s != 1 for s in place)
    stages = tableau.total if inside else tableau.stages
    weights = weights_at(tableau, torch.tensor(place, dtype=torch.float64), cotangent) if inside else None
    if weights is None:
        weights = cotangent.new_tensor(list(tableau.b)).expand(len(place), -1)
    given = weights[:, :, None, None] * cotangent.transpose(0, 1)[index].unsqueeze(1)
    empty = cotangent.new_zeros(len(mesh.steps), stages, cotangent.shape[0], cotangent.shape[2])
    return empty.index_add_(0, torch.tensor(number, device=cotangent.device, dtype=torch.int64), given)


def _direct(mesh: Mesh, cotangent: Tensor) -> Tensor:
    """What the start of every step gets from its outputs, ``(steps, samples, n)``."""
    number, index, _ = _outputs(mesh)
    empty = cotangent.new_zeros(len(mesh.steps), cotangent.shape[0], cotangent.shape[2])
    where = torch.tensor(number, device=cotangent.device, dtype=torch.int64)
    return empty.index_add_(0, where, cotangent.transpose(0, 1)[index])


def _outputs(mesh: Mesh) -> tuple[list[int], list[int], list[float]]:
    """For every output that a step makes: of which step, which one, and where in it."""
    found = [(number, i, s) for number, step in enumerate(mesh.steps) for i, s in step.outputs]
    return [number for number, _, _ in found], [i for _, i, _ in found], [s for _, _, s in found]


def _points(
    known: Coefficients, tableau: Tableau, mesh: Mesh, stages: int, rows: tuple[int, int], like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Times ``(steps · stages,)``, step sizes, and points ``(steps, stages, samples · n)`` of all stages."""
    t = torch.tensor([step.t for step in mesh.steps], dtype=torch.float64, device=like.device)
    h = torch.tensor([step.h for step in mesh.steps], dtype=torch.float64, device=like.device)
    c = torch.tensor(tableau.c[:stages], dtype=torch.float64, device=like.device)
    times = (t[:, None] + h[:, None] * c).to(like.dtype).reshape(-1)
    square = torch.stack([torch.nn.functional.pad(row, (0, stages - len(row))) for row in known.rows[:stages]])
    y = torch.stack([step.y for step in mesh.steps if step.y is not None]).view(len(mesh.steps), 1, -1)
    slopes = torch.stack([step.stages for step in mesh.steps if step.stages is not None])
    h = h.to(like.dtype)
    points = torch.addcmul(y, h[:, None, None], square @ slopes[:, :stages].flatten(2))
    return times, h[:, None, None, None], points


def _jacobians(slopes: Tensor, leaf: Tensor, shape: tuple[int, ...]) -> Tensor:
    """``∂f/∂y`` of every stage of every step and sample, by ``n`` products, ``(steps, stages, samples, n, n)``."""
    n = shape[-1]
    if not slopes.requires_grad:
        return leaf.new_zeros(*shape, n)
    rows = []
    for unit in torch.eye(n, dtype=leaf.dtype, device=leaf.device):
        one = unit.expand(shape).reshape(slopes.shape)
        (row,) = torch.autograd.grad(slopes, leaf, one, retain_graph=True, materialize_grads=True)
        rows.append(row.view(shape))
    return torch.stack(rows, dim=-2)
