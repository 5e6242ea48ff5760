"""From a solver's answer to the exact one: the active set, verified and corrected."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

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
    verified: Tensor  # (samples,)
    reduced: Reduced


def polished(data: Data, active: Tensor, start: tuple[Tensor, Tensor, Tensor], rounds: int = ROUNDS) -> Polished:
    """The exact solution for the active set, which is corrected until multipliers and slacks have the right signs.

    That is a semismooth Newton method on the optimality conditions (Hintermüller, Ito, Kunisch 2002, SIAM J. Optim.
    13(3)): with a good guess it is one factorization, which derivatives then use again.
    """
    first = _on(data, active)
    if bool(first.verified.all()) or rounds == 0 or not active.shape[-1]:
        return first
    wrong = ~first.verified
    if data.sparse:
        return _sparsely(data, first, start, rounds)
    mended = _corrected(data.rows(wrong), active[wrong], first.z[wrong], first.x[wrong], rounds)
    return _patched(first, wrong, _on(data.rows(wrong), mended))


def _patched(first: Polished, wrong: Tensor, mended: Polished) -> Polished:
    """The samples that were wrong replaced; what was factored for the others stays."""
    if bool(wrong.all()):
        return mended
    old, new = first[:5], mended[:5]
    x, y, z, active, verified = (a.index_put((wrong,), b) for a, b in zip(old, new, strict=True))
    return Polished(x, y, z, active, verified, Patched(first.reduced, wrong, mended.reduced))


def _sparsely(data: Data, first: Polished, start: tuple[Tensor, Tensor, Tensor], rounds: int) -> Polished:
    """By exchanging wrong rows a few times, which mostly does, or what is near the start."""
    for _ in range(EXCHANGES):
        wrong = ~first.verified & ~first.reduced.degenerate
        if not bool(wrong.any()):
            break
        errors = signed_errors(data, first.x, first.z, first.active) * wrong[:, None]
        first = _on(data, first.active ^ (errors > 0), first.reduced)
    return first if bool(first.verified.all()) else _proximally(data, first, start, rounds)


def _proximally(data: Data, first: Polished, start: tuple[Tensor, Tensor, Tensor], rounds: int) -> Polished:
    """What is right, and for other samples what is near the start."""
    wrong = ~first.verified
    part = data.rows(wrong)
    x, y, z = (t[wrong] for t in start)
    x, y, z, active = proximal(part, x, y, z, 3 * rounds)
    exact = _on(data, first.active.index_put((wrong,), active), first.reduced)
    for new, near in ((exact.x, x), (exact.y, y), (exact.z, z)):
        new[wrong] = torch.where(exact.verified[wrong, None], new[wrong], near)
    violation = part.violation(x, y, z, part.limits - part.products(x))
    exact.verified[wrong] |= violation <= VIOLATION * (1 + part.magnitude)
    return exact


def _corrected(data: Data, active: Tensor, z: Tensor, x: Tensor, rounds: int) -> Tensor:
    active = active.clone()
    going = torch.arange(len(active), device=active.device)
    for count in range(rounds):
        errors = signed_errors(data, x, z, active[going])
        if count >= TOGETHER:
            errors = torch.where(errors == errors.amax(-1, keepdim=True), errors, 0)
        active[going] = active[going] ^ (errors > 0)
        trial = _on(data, active[going])
        left = ~trial.verified
        if not bool(left.any()):
            break
        data, going, z, x = data.rows(left), going[left], trial.z[left], trial.x[left]
    return active


def _on(data: Data, active: Tensor, before: Reduced | None = None) -> Polished:
    system = reduced(data, active, before)
    empty = data.q.new_zeros(*active.shape[:1], 0)
    b = empty if data.b is None else data.b.expand(len(active), -1)
    x, y, z = system.refined(-data.q.expand(len(active), -1), b, data.limits.expand_as(active))
    finite = (x.sum(-1) + z.sum(-1)).isfinite()
    verified = finite & ~signed_errors(data, x, z, active).any(-1)
    if bool(system.degenerate.any()):  # least squares may solve what has no solution
        violation = data.violation(x, y, z, data.limits - data.products(x))
        verified = verified & ~(system.degenerate & (violation > VIOLATION * (1 + data.magnitude)))
    return Polished(x, y, z, active, verified, system)


def signed_errors(data: Data, x: Tensor, z: Tensor, active: Tensor) -> Tensor:
    """By how much multipliers of active rows and slacks of the others are negative, beyond rounding; else zero."""
    limits = data.limits.expand_as(active)
    slack = limits - data.products(x)
    size = 1 + torch.where(limits.isfinite(), limits, 0).abs() + x.abs().amax(-1, keepdim=True)
    scale = torch.where(active, 1 + z.abs().amax(-1, keepdim=True), size) if z.shape[-1] else size
    negative = torch.where(active, -z, -slack)
    return torch.where(negative > 1e-11 * scale, negative / scale, 0)
