"""Training and its measurements."""

from __future__ import annotations

import time
from copy import deepcopy
from dataclasses import dataclass, field
from statistics import fmean
from typing import cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from difflayers import ImplicitAdjoint, ImplicitFunction, Record, linear, monitor
from difflayers.demo._model import Classifier, Data, digits
from difflayers.fixedpoint import DEQ, Anderson, FixedPointProblem


@dataclass(frozen=True)
class Budget:
    """How long to train, and what the result is held to."""

    epochs: int
    accuracy: float
    converged: float = 0.99
    gradient_error: float = 1e-5
    batch: int = 64


QUICK = Budget(epochs=3, accuracy=0.88)
FULL = Budget(epochs=15, accuracy=0.94)


@dataclass
class Result:
    """What one model did; solver figures only where there is a solver."""

    name: str
    accuracy: float
    seconds: float
    losses: list[float]
    iterations: float | None = None
    residual: float | None = None
    converged: float | None = None
    gradient_error: float | None = None
    log: list[Record] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)


@dataclass
class Results:
    """Both models, and what they are held to."""

    equilibrium: Result
    once: Result
    budget: Budget
    seed: int

    def missed(self) -> list[str]:
        """The thresholds that were missed, as sentences."""
        deq, budget = self.equilibrium, self.budget
        checks = [
            (deq.accuracy >= budget.accuracy, f"test accuracy {deq.accuracy:.3f} is below {budget.accuracy}"),
            (cast(float, deq.converged) >= budget.converged, f"only {deq.converged:.1%} of test solves converged"),
            (
                cast(float, deq.gradient_error) <= budget.gradient_error,
                f"gradient error {deq.gradient_error:.1e} is above {budget.gradient_error:.0e}",
            ),
        ]
        return [sentence for held, sentence in checks if not held]


def run(budget: Budget, *, seed: int, device: str) -> Results:
    """Train both models on the same data with the same budget."""
    data = digits(seed, device)
    once = train("same cell, applied once", data, budget, seed, equilibrium=False)[0]
    deq, model = train("equilibrium (DEQ)", data, budget, seed, equilibrium=True)
    layer = cast(DEQ, model.core)
    with torch.no_grad():
        solution = layer.solve(model.stem(data.x_test))
    deq.steps = solution.stats["steps"].tolist()
    deq.iterations = fmean(deq.steps)
    deq.residual = float(solution.stats["relative_residual"].max())
    deq.converged = float(solution.ok.float().mean())
    deq.gradient_error = gradient_error(layer, model.stem(data.x_test[:4]).detach())
    return Results(deq, once, budget, seed)


def train(name: str, data: Data, budget: Budget, seed: int, *, equilibrium: bool) -> tuple[Result, Classifier]:
    """One model, trained; the bar shows loss, mean solver iterations and residual as they are."""
    torch.manual_seed(seed)
    model = Classifier(equilibrium=equilibrium).to(data.x.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batches = -(-len(data.x) // budget.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=budget.epochs * batches)
    losses: list[float] = []
    start = time.perf_counter()
    with monitor() as log, tqdm(total=budget.epochs * batches, desc=name, unit="step", mininterval=0.5) as bar:
        for _ in range(budget.epochs):
            for rows in torch.randperm(len(data.x), device=data.x.device).split(budget.batch):
                losses.append(step(model, optimizer, data.x[rows], data.y[rows]))
                schedule.step()
                bar.set_postfix(live(losses, log), refresh=False)
                bar.update()
    seconds = time.perf_counter() - start
    model.eval()
    with torch.no_grad():
        accuracy = float((model(data.x_test).argmax(1) == data.y_test).float().mean())
    return Result(name, accuracy, seconds, losses, log=log), model


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
    """One optimizer step; the loss before it."""
    loss = nn.functional.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def live(losses: list[float], log: list[Record]) -> dict[str, str]:
    """What the progress bar shows."""
    shown = {"loss": f"{losses[-1]:.3f}"}
    forward = [record for record in log[-2:] if record.role == "forward"]
    if forward:
        shown |= {"iterations": str(forward[-1].steps), "residual": f"{forward[-1].residual or 0:.0e}"}
    return shown


def gradient_error(layer: DEQ, x: Tensor, step: float = 1e-5) -> float:
    """Relative error of the layer's gradient in float64, tightly solved, against central differences.

    Along random directions of the input and of every parameter at once, the layer's own code path.
    """
    cell = deepcopy(layer.fn).double().cpu()
    x = x.double().cpu()
    tight = Anderson(rtol=1e-13, atol=1e-13, max_steps=500)
    function = ImplicitFunction(FixedPointProblem(cell, 1), tight, ImplicitAdjoint(linear.GMRES(rtol=1e-12)), "warn")
    generator = torch.Generator().manual_seed(0)
    wrt = [x.requires_grad_(), *cell.parameters()]
    weight = torch.randn(x.shape, generator=generator, dtype=torch.float64)

    def loss() -> Tensor:
        total: Tensor = (function(x, init=torch.zeros_like(x)).value * weight).sum()
        return total

    gradients = torch.autograd.grad(loss(), wrt)
    errors = []
    for _ in range(3):
        move = [torch.randn(t.shape, generator=generator, dtype=torch.float64) * t.detach().abs().mean() for t in wrt]
        exact = sum(float((g * m).sum()) for g, m in zip(gradients, move, strict=True))
        sides = []
        for sign in (1, -2):
            with torch.no_grad():
                torch._foreach_add_([t.detach() for t in wrt], move, alpha=sign * step)
                sides.append(float(loss()))
        with torch.no_grad():
            torch._foreach_add_([t.detach() for t in wrt], move, alpha=step)
        errors.append(abs(exact - (sides[0] - sides[1]) / (2 * step)) / abs(exact))
    return max(errors)
