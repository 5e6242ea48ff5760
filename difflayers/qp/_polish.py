"""From a solver's answer to the exact one: the active set, verified and corrected."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from difflayers._arrays import widen
from difflayers.qp._data import Data
from difflayers.qp._proximal import proximal
from difflayers.qp._reduced import Patched, Reduced
from difflayers.qp._sparse_reduced import reduced

# Rounds of correction. The first few exchange all wrong rows at once, which is Newton's method and may cycle.
ROUNDS, TOGETHER = 20, 5
EXCHANGES = 3  # rounds for sparse problems, before what is slower but can't cycle
# What of the conditions may be violated, beside the data, where they can't hold exactly.
VIOLATION = 1e-9


class Polished(NamedTuple):
    """The solution on an active set, and whether that is the right one."""

    x: Tensor
    y: Tensor
    z: Tensor  # of all inequalities, (samples, rows)
    active: Tensor
    slack: Tensor
    violation: Tensor  # of the optimality conditions, (samples,)
    verified: Tensor  # (samples,)
    reduced: Reduced
    errors: Tensor | None  # see signed_errors; None where all signs are right


def polished(data: Data, active: Tensor, start: tuple[Tensor, Tensor, Tensor], rounds: int = ROUNDS) -> Polished:
    """The exact solution for the active set, which is corrected until multipliers and slacks have the right signs.

    That is a semismooth Newton method on the optimality conditions (Hintermüller, Ito, Kunisch 2002, SIAM J. Optim.
    13(3)): with a good guess it is one factorization, which derivatives then use again.
    """
    first = _on(data, active)
    if bool(first.verified.all()) or rounds == 0 or not active.shape[-1]:
        return first
    if data.sparse:
        return _sparsely(data, first, start, rounds)
    if first.errors is None:
        return first
    wrong = ~first.verified
    return _patched(first, wrong, _corrected(data.rows(wrong), active[wrong], first.errors[wrong], rounds))


def _patched(first: Polished, wrong: Tensor, mended: Polished) -> Polished:
    """The samples that were wrong replaced; what was factored for the others stays."""
    if bool(wrong.all()):
        return mended
    old, new = first[:7], mended[:7]
    x, y, z, active, slack, violation, verified = (a.index_put((wrong,), b) for a, b in zip(old, new, strict=True))
    return Polished(x, y, z, active, slack, violation, verified, Patched(first.reduced, wrong, mended.reduced), None)


def _sparsely(data: Data, first: Polished, start: tuple[Tensor, Tensor, Tensor], rounds: int) -> Polished:
    """By exchanging wrong rows a few times, which mostly does, or what is near the start."""
    for _ in range(EXCHANGES):
        wrong = ~first.verified & ~first.reduced.degenerate
        if first.errors is None or not bool(wrong.any()):
            break
        first = _on(data, first.active ^ ((first.errors > 0) & wrong[:, None]), first.reduced)
    return first if bool(first.verified.all()) else _proximally(data, first, start, rounds)


def _proximally(data: Data, first: Polished, start: tuple[Tensor, Tensor, Tensor], rounds: int) -> Polished:
    """What is right, and for other samples what is near the start."""
    wrong = ~first.verified
    part = data.rows(wrong)
    x, y, z = (t[wrong] for t in start)
    x, y, z, active = proximal(part, x, y, z, 3 * rounds)
    exact = _on(data, first.active.index_put((wrong,), active), first.reduced)
    slack = part.limits - part.products(x)
    violation = part.violation(x, y, z, slack)
    found, near = (exact.x, exact.y, exact.z, exact.slack, exact.violation), (x, y, z, slack, violation)
    for new, other in zip(found, near, strict=True):
        new[wrong] = torch.where(widen(exact.verified[wrong], other), new[wrong], other)
    exact.verified[wrong] |= violation <= VIOLATION * (1 + part.magnitude)
    return exact


def _corrected(whole: Data, active: Tensor, errors: Tensor, rounds: int) -> Polished:
    data, going = whole, torch.arange(len(active), device=active.device)
    for count in range(rounds):
        if count >= TOGETHER:
            errors = torch.where(errors == errors.amax(-1, keepdim=True), errors, 0)
        active[going] = active[going] ^ (errors > 0)
        trial = _on(data, active[going])
        left = ~trial.verified
        if trial.errors is None or not bool(left.any()):
            break
        data, going, errors = data.rows(left), going[left], trial.errors[left]
    return trial if len(trial.active) == len(active) else _on(whole, active)


def _on(data: Data, active: Tensor, before: Reduced | None = None) -> Polished:
    system, count, p = reduced(data, active, before), active.shape[0], data.layout.p
    found = system.solved(-data.q.expand(count, -1), data.sides.expand(count, -1))
    z, slack = found.w[:, p:], found.slack[:, p:]
    parts = [found.gradient, found.slack[:, :p], torch.minimum(z, slack)]
    violation = torch.cat(parts, dim=-1).abs().amax(-1)  # min(z, slack) = 0: both signs, and that one is zero
    # Least squares, or rows that nearly depend on each other, may solve what has no solution.
    verified = violation <= VIOLATION * (1 + data.magnitude)
    if bool(system.degenerate.any()):
        verified = verified & (found.rest.abs() <= VIOLATION * (1 + data.sides.abs())).all(-1)
    errors = None
    if not bool((torch.where(active, z, slack) >= 0).all()):
        errors = signed_errors(data, active, found.x, z, slack)
        verified = verified & ~errors.any(-1)
    return Polished(found.x, found.w[:, :p], z, active, slack, violation, verified, system, errors)


def signed_errors(data: Data, active: Tensor, x: Tensor, z: Tensor, slack: Tensor) -> Tensor:
    """By how much multipliers of active rows and slacks of the others are negative, beyond rounding; else zero."""
    size = data.extents + x.abs().amax(-1, keepdim=True)
    scale = torch.where(active, 1 + z.abs().amax(-1, keepdim=True), size)
    negative = torch.where(active, -z, -slack)
    return torch.where(negative > 1e-11 * scale, negative / scale, 0)
