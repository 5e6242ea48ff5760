"""All stages of all accepted steps at once: their Jacobians first, then a short chain of small products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from difflayers.ode._mesh import Mesh
from difflayers.ode._problem import InitialValueProblem
from difflayers.ode._propagators import jacobians, product, propagators
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
    step: they take one evaluation of all ``(stage, step)`` pairs, ``n`` vector-Jacobian products, and products of
    ``n × n`` matrices. What is left to do in order is the chain of the ``P``.
    """
    samples, _, n = cotangent.shape
    known, steps = coefficients(tableau, cotangent.dtype, cotangent.device), len(mesh.steps)
    outside, direct = _sources(tableau, known, mesh, cotangent)
    stages = len(outside)
    t, h, points, slopes = _points(known, tableau, mesh, stages, cotangent)
    leaf, found = _evaluated(problem, tensors, t, points, slopes)
    matrices = jacobians(leaf, found).view(stages, steps, n, n, samples)
    by_stage = matrices.permute(0, 2, 3, 1, 4).reshape(stages, n, n, -1)
    length = h.repeat_interleave(samples)
    each, start = propagators(tableau, known, by_stage.__getitem__, outside.flatten(2), length)
    after, adjoint = _chained(start.view(n, n + 1, steps, samples), direct)
    if not followed or not found.requires_grad:
        return adjoint, [None] * len(followed)
    kappas = torch.stack([product(stage[:, :n], after, stage[:, n:]).squeeze(1) for stage in each])
    kappas = kappas.view(stages, n, steps, samples).permute(0, 2, 3, 1).reshape(found.shape)
    return adjoint, list(torch.autograd.grad(found, followed, kappas, allow_unused=True))


def _chained(start: Tensor, direct: Tensor) -> tuple[Tensor, Tensor]:
    """The cotangents at the ends of all steps, ``(n, 1, steps · samples)``, and that at the first start."""
    n = len(start)
    products, offsets = start.permute(2, 3, 0, 1).contiguous().split([n, 1], dim=-1)
    adjoint, ends = torch.zeros_like(offsets[0]), []
    offsets = offsets + direct.unsqueeze(-1)
    for matrix, offset in zip(reversed(products.unbind(0)), reversed(offsets.unbind(0)), strict=True):
        ends.append(adjoint)
        adjoint = torch.baddbmm(offset, matrix, adjoint)
    return torch.stack(ends[::-1]).permute(2, 3, 0, 1).reshape(n, 1, -1), adjoint.squeeze(-1)


def _evaluated(
    problem: InitialValueProblem, tensors: Sequence[Tensor], t: Tensor, points: Tensor, slopes: Tensor
) -> tuple[Tensor, Tensor]:
    """The points as a leaf, and the right-hand side there, both ``(stages · steps, samples, n)``.

    As one large batch if that gives the ``slopes`` that the solve had, otherwise under vmap, which takes longer.
    """
    evaluate, samples = problem.evaluator(tensors), points.shape[1]
    leaf = points.requires_grad_()
    divided = problem.divided(tensors, torch.arange(0, device=t.device))
    if divided is not None and not any(divided[1]):
        allowed = torch.finfo(t.dtype).eps ** (2 / 3) * (1 + slopes.abs().amax())
        try:
            with torch.enable_grad():
                value = evaluate(t.repeat_interleave(samples)[:, None], leaf.flatten(0, 1)).view_as(leaf)
            if bool(((value.detach() - slopes).abs() <= allowed).all()):
                return leaf, value
        except Exception:  # whatever a callable does with batch sizes that it wasn't written for
            pass
    with torch.enable_grad():
        return leaf, torch.func.vmap(evaluate)(t, leaf.view(-1, *problem.native)).reshape(leaf.shape)


def _sources(tableau: Tableau, known: Coefficients, mesh: Mesh, cotangent: Tensor) -> tuple[Tensor, Tensor]:
    """What slopes get from outputs, ``(stages, n, steps, samples)``, and what starts get, ``(steps, samples, n)``."""
    placed = [(number, index, s) for number, step in enumerate(mesh.steps) for index, s in step.outputs]
    number, index, place = zip(*placed, strict=True) if placed else ((), (), ())
    where = torch.tensor(number, dtype=torch.int64, device=cotangent.device)
    given = cotangent.transpose(0, 1)[list(index)]
    direct = cotangent.new_zeros(len(mesh.steps), *given.shape[1:]).index_add_(0, where, given)
    h = cotangent.new_tensor([step.h for step in mesh.steps])[:, None]
    if all(s == 1 for s in place):
        ends = (direct.permute(2, 0, 1) * h).expand(tableau.stages, -1, -1, -1)
        return ends * known.b[:, None, None, None], direct
    weights = weights_at(tableau, torch.tensor(place, dtype=torch.float64, device=where.device), cotangent)
    parts = weights.t()[:, None, :, None] * given.permute(2, 0, 1)
    outside = cotangent.new_zeros(len(weights.t()), parts.shape[1], *direct.shape[:2]).index_add_(2, where, parts)
    outside *= h
    if tableau.total == tableau.stages + 1 and all(s == 1 for _, s in mesh.steps[-1].outputs):
        # The slope at the end of a step is the first one of the next, and isn't evaluated twice.
        outside[0, :, 1:] += outside[-1, :, :-1]
        outside = outside[:-1]
    return outside, direct


def _points(
    known: Coefficients, tableau: Tableau, mesh: Mesh, stages: int, like: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Times ``(stages · steps,)``, step sizes ``(steps,)``, points and slopes ``(stages · steps, samples, n)``."""
    t = torch.tensor([step.t for step in mesh.steps], dtype=torch.float64, device=like.device)
    h = torch.tensor([step.h for step in mesh.steps], dtype=torch.float64, device=like.device)
    times = (t + known.places[:stages, 0] * h).to(like.dtype).reshape(-1)
    y = torch.stack([step.y for step in mesh.steps if step.y is not None]).view(len(mesh.steps), 1, -1)
    slopes = torch.stack([step.stages for step in mesh.steps if step.stages is not None])[:, :stages].flatten(2)
    h = h.to(like.dtype)
    points = torch.addcmul(y, h[:, None, None], known.square[:stages, :stages] @ slopes)
    rows = (-1, like.shape[0], like.shape[2])
    return times, h, points.transpose(0, 1).reshape(rows), slopes.transpose(0, 1).reshape(rows)
