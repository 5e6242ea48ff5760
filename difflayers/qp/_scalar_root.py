"""The root of one increasing equation per entry, with derivatives by Newton's method."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from difflayers.qp.projections._call import readable

Equation = Callable[[Tensor], tuple[Tensor, Tensor]]
# Bisection alone takes about as many from the widest bracket to the last bit.
STEPS = 80


def bracketed_root(equation: Equation, low: Tensor, high: Tensor) -> Tensor:
    """Where ``equation``, which gives a value and its derivative, vanishes between ``low`` and ``high``.

    Newton's method; bisection where a step leaves the bracket, or the last one wasn't half of the one before.
    """
    root = (low + high) / 2
    before = high - low
    for _ in range(STEPS):
        value, slope = equation(root)
        low, high = torch.where(value <= 0, root, low), torch.where(value >= 0, root, high)
        newton = root - value / slope
        middle = (low + high) / 2
        good = (newton > low) & (newton < high) & ((newton - root).abs() <= before / 2)
        following = torch.where(good, newton, middle)
        moved = (following - root).abs()
        root, before = following, moved
        if readable() and bool((moved <= 2 * torch.finfo(root.dtype).eps * root.abs()).all()):
            break
    return root


def polished_root(equation: Equation, root: Tensor) -> Tensor:
    """The root on the graph of whatever ``equation`` depends on.

    A Newton step squares the error, so from the root itself the first one has the right first derivative, the second
    one those up to the third, the third one those up to the seventh. As a number each is zero, or rounding, which a
    flat equation would blow up; so that part is left out.
    """
    for _ in range(3):
        value, slope = equation(root)
        known = slope.detach()
        usable = known.isfinite() & (known != 0)
        step = torch.where(usable, value, 0) / torch.where(usable, slope, 1)
        root = root - (step - step.detach())
    return root
