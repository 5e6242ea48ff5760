"""The initial value problems of the ODE benchmark, with gradients that no package of ours is involved in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

Solve = Callable[[Tensor, Sequence[Tensor]], Tensor]


class MLP(nn.Module):
    """``W₂ tanh(W₁ y + b₁) + b₂``, with weights ``scale`` times those that torch starts from."""

    def __init__(self, n: int, hidden: int, scale: float) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(n, hidden), nn.Linear(hidden, n)
        with torch.no_grad():
            self.first.weight.mul_(scale)
            self.second.weight.mul_(scale)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        value: Tensor = self.second(torch.tanh(self.first(y)))
        return value


class LotkaVolterra(nn.Module):
    """Prey and predators; four rates for every sample."""

    def forward(self, t: Tensor, y: Tensor, rates: Tensor) -> Tensor:
        a, b, c, d = rates.unbind(-1)
        prey, predators = y.unbind(-1)
        met = prey * predators
        return torch.stack((a * prey - b * met, c * met - d * predators), -1)


@dataclass(frozen=True)
class Case:
    """A batch of systems ``dy/dt = field(t, y, *args)`` and a loss of all outputs.

    ``args`` go with the samples; the module's parameters are everybody's. Gradients are in the start, ``args`` and the
    parameters.
    """

    name: str
    field: nn.Module
    y0: Tensor
    t: Tensor
    args: tuple[Tensor, ...] = ()
    rtol: float = 1e-6
    atol: float = 1e-8

    @property
    def shared(self) -> list[nn.Parameter]:
        return list(self.field.parameters())

    def leaves(self) -> list[Tensor]:
        """Start and args as fresh leaves, then the parameters."""
        return [*[x.clone().requires_grad_() for x in (self.y0, *self.args)], *self.shared]

    @cached_property
    def weights(self) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        return torch.randn(len(self.t), *self.y0.shape, generator=generator, dtype=torch.float64)

    def loss(self, ys: Tensor) -> Tensor:
        return ((ys * self.weights).sum() + ys.square().sum() / 2) / self.y0.numel()

    def gradient(self, solve: Solve) -> Tensor:
        leaves = self.leaves()
        ys = solve(leaves[0], leaves[1 : 1 + len(self.args)])
        return torch.cat([g.flatten() for g in torch.autograd.grad(self.loss(ys), leaves)])

    def error(self, gradient: Tensor) -> float:
        return float((gradient - self.reference).norm() / self.reference.norm())

    @cached_property
    def reference(self) -> Tensor:
        """By torchdiffeq's dopri8 on the tape, near rounding."""
        import torchdiffeq

        def solve(y0: Tensor, args: Sequence[Tensor]) -> Tensor:
            def field(t: Tensor, y: Tensor) -> Tensor:
                return self.field(t, y, *args)

            pieces = [y0]
            # Steps that end at outputs: interpolation is less accurate.
            for span in self.t.unfold(0, 2, 1):
                options = {"rtol": 1e-11, "atol": 1e-12, "method": "dopri8"}
                pieces.append(torchdiffeq.odeint(field, pieces[-1], span, **options)[-1])
            return torch.stack(pieces)

        return self.gradient(solve)


def _start(samples: int, n: int) -> Tensor:
    return torch.randn(samples, n, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def _mlp(n: int, hidden: int, scale: float) -> MLP:
    torch.manual_seed(0)
    return MLP(n, hidden, scale).double()


def _times(end: float, count: int) -> Tensor:
    return torch.linspace(0, end, count, dtype=torch.float64)


def spiral(samples: int) -> Case:
    return Case(f"spiral MLP, {samples}×2", _mlp(2, 50, 3.0), _start(samples, 2), _times(5, 10))


def wide() -> Case:
    return Case("MLP 128×64, hidden 256", _mlp(64, 256, 2.0), _start(128, 64), _times(3, 10))


def lotka_volterra(samples: int) -> Case:
    """One system as in the textbooks, or many whose rates spread over e³."""
    generator = torch.Generator().manual_seed(1)
    rates = torch.tensor([[1.5, 1.0, 1.0, 3.0]], dtype=torch.float64)
    y0, t = torch.ones(samples, 2, dtype=torch.float64), _times(10, 20)
    if samples > 1:
        rates = rates * torch.exp(3 * torch.rand(samples, 1, generator=generator, dtype=torch.float64))
        y0, t = y0 + 0.5 * torch.rand(samples, 2, generator=generator, dtype=torch.float64), _times(3, 10)
    return Case(f"Lotka–Volterra, {samples}", LotkaVolterra(), y0, t, (rates,))


CASES: dict[str, Callable[[], Case]] = {
    "spiral20": lambda: spiral(20),
    "spiral512": lambda: spiral(512),
    "wide": wide,
    "lotka": lambda: lotka_volterra(1),
}
