"""What every family of the demonstration reports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import getsource
from textwrap import dedent
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.figure import Figure

    from difflayers import Record


@dataclass(frozen=True)
class Score:
    """A figure of merit, beside that of a baseline.

    Attributes:
        name: what it is.
        value: ours.
        baseline: the other's name.
        other: the other's value.
        form: how it is printed.
        more: whether more is better.
    """

    name: str
    value: float
    baseline: str
    other: float
    form: str = ".3f"
    more: bool = False

    @property
    def beats(self) -> bool:
        """Whether ours is the better one."""
        return self.value > self.other if self.more else self.value < self.other


@dataclass(frozen=True)
class Check:
    """A threshold: ``value`` has to be at least, or at most, ``bound``."""

    name: str
    value: float
    bound: float
    at_least: bool = False

    def missed(self) -> str | None:
        """As a sentence, if it was."""
        held = self.value >= self.bound if self.at_least else self.value <= self.bound
        side = "below" if self.at_least else "above"
        return None if held else f"{self.name}: {self.value:.3g} is {side} {self.bound:g}"


@dataclass
class Row:
    """One family: what it did, how exactly, and how long it took.

    Attributes:
        family: what kind of layer.
        data: what it was used on.
        score: how well, beside an honest baseline.
        iterations: of the solver, the mean over solves of the test.
        residual: the largest left in the condition that defines the layer.
        gradient_error: relative, against central differences.
        reference: whose answer ours is compared with.
        difference: from it, the largest.
        seconds: wall clock, training included.
        checks: what it is held to.
        code: what it takes, as source.
        figures: by title.
        notes: sentences for the report.
        details: more figures for ``metrics.json``.
    """

    family: str
    data: str
    score: Score
    iterations: float
    residual: float
    gradient_error: float
    reference: str
    difference: float
    seconds: float
    checks: Sequence[Check]
    code: str
    figures: dict[str, Figure] = field(default_factory=dict)
    notes: Sequence[str] = ()
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def missed(self) -> list[str]:
        """The thresholds that were missed, as sentences."""
        return [sentence for check in self.checks if (sentence := check.missed())]


def source(*functions: Callable[..., Any]) -> str:
    """The source of what was run."""
    return "\n".join(dedent(getsource(function)) for function in functions)


@contextmanager
def float64() -> Iterator[None]:
    """New tensors in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def live(log: Sequence[Record], **numbers: str) -> dict[str, str]:
    """What a bar shows: numbers, and the iterations and the residual of the latest forward solve that was recorded."""
    last = next((record for record in reversed(log) if record.role == "forward"), None)
    if last is None:
        return numbers
    shown = numbers | {"iterations": f"{last.mean_steps or 0:.1f}"}
    return shown if last.residual is None else shown | {"residual": f"{last.residual:.0e}"}


def gradient_error(loss: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-5) -> float:
    """Relative error of the gradient of ``loss`` against central differences, along three random directions."""
    x = at.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x), x)
    generator = torch.Generator().manual_seed(0)
    errors = []
    with torch.no_grad():
        for _ in range(3):
            move = torch.randn(x.shape, generator=generator, dtype=x.dtype)
            slope = (loss(at + step * move) - loss(at - step * move)) / (2 * step)
            errors.append(float((slope - (gradient * move).sum()).abs() / slope.abs()))
    return max(errors)
