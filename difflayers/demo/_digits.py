"""Training and its measurements."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from difflayers import ImplicitAdjoint, ImplicitFunction, Record, linear, monitor
from difflayers.demo._data import Data, digits, distort
from difflayers.demo._model import TESTING, Classifier, Kind, classifier
from difflayers.demo._row import live
from difflayers.fixedpoint import DEQ, Anderson, FixedPointProblem, fixed_point


@dataclass(frozen=True)
class Budget:
    """How to train, every model alike, and what the equilibrium model is held to."""

    epochs: int
    accuracy: float
    converged: float = 0.99
    gradient_error: float = 1e-5
    batch: int = 64
    rate: float = 1e-2
    penalty: float = 0.5


QUICK = Budget(epochs=2, accuracy=0.9)
FULL = Budget(epochs=9, accuracy=0.97)

TIGHT = Anderson(rtol=1e-13, atol=1e-13, max_steps=500)

Array = np.ndarray[Any, np.dtype[np.float64]]
NAMES: dict[Kind, str] = {
    "equilibrium": "equilibrium",
    "once": "applied once",
    "explicit": "explicit",
}


@dataclass
class Test:
    """What the solver did on the test set.

    Attributes:
        record: the solve, traced.
        steps: iterations of every sample.
        residual: the largest relative residual.
        converged: the fraction of samples that met the tolerance.
        accuracies: test accuracy from the cell applied to the iterates after 0, 1, ... steps.
        gradient_error: relative, of a few samples, against finite differences.
        difference: of an equilibrium from SciPy's, relative, both in float64.
    """

    record: Record
    steps: list[int]
    residual: float
    converged: float
    accuracies: list[float]
    gradient_error: float
    difference: float

    @property
    def iterations(self) -> float:
        """The mean over the samples."""
        return fmean(self.steps)


@dataclass
class Result:
    """What one model did; solver figures only where there is a solver."""

    name: str
    parameters: int
    accuracy: float
    seconds: float
    cpu_seconds: float
    losses: list[float]
    guesses: list[int]
    log: list[Record] = field(default_factory=list)
    test: Test | None = None


@dataclass
class Results:
    """All models, and what the equilibrium model is held to."""

    models: dict[Kind, Result]
    data: Data
    budget: Budget
    seed: int


def measured(budget: Budget, *, seed: int, device: str) -> Results:
    """Train every model on the same data with the same budget."""
    data = digits(seed, device)
    with one_thread():
        models = {kind: train(kind, data, budget, seed) for kind in NAMES}
        deq, model = models["equilibrium"]
        deq.test = test(model, data)
    return Results({kind: result for kind, (result, _) in models.items()}, data, budget, seed)


def digits_accuracy(seed: int, budget: Budget = FULL) -> tuple[float, float]:
    """Test accuracy of the equilibrium model, and the CPU seconds of its training and testing in one thread."""
    data = digits(seed, "cpu")
    with one_thread():
        start = time.process_time()
        result, _ = train("equilibrium", data, budget, seed, show=False)
        return result.accuracy, time.process_time() - start


@contextmanager
def one_thread() -> Iterator[None]:
    """Run in one thread: these tensors are too small to share, and threads on a busy machine wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def train(kind: Kind, data: Data, budget: Budget, seed: int, *, show: bool = True) -> tuple[Result, Classifier]:
    """One model, trained; the bar shows loss, solver iterations and residual as they are."""
    torch.manual_seed(seed)
    model = classifier(kind).to(data.x.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=budget.rate)
    total = budget.epochs * -(-len(data.x) // budget.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, budget.rate, total_steps=total, pct_start=0.2)
    losses: list[float] = []
    start, start_cpu = time.perf_counter(), time.process_time()
    with monitor() as log, tqdm(total=total, desc=NAMES[kind], unit="step", mininterval=0.5, disable=not show) as bar:
        for _ in range(budget.epochs):
            for rows in torch.randperm(len(data.x), device=data.x.device).split(budget.batch):
                losses.append(step(model, optimizer, distort(data.x[rows]), data.y[rows], budget.penalty))
                schedule.step()
                bar.set_postfix(live(log, loss=f"{losses[-1]:.3f}"), refresh=False)
                bar.update()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    parameters = sum(weight.numel() for weight in model.parameters())
    guesses = predict(model.eval(), data.x_test)
    accuracy = float((guesses == data.y_test).float().mean())
    return Result(NAMES[kind], parameters, accuracy, seconds, cpu_seconds, losses, guesses.tolist(), log), model


def step(model: Classifier, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, weight: float) -> float:
    """One optimizer step; the loss before it, without the penalty."""
    logits, penalty = model.penalized(x)
    loss = cross_entropy(logits, y)
    optimizer.zero_grad()
    (loss if penalty is None else loss + weight * penalty).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach())


@torch.no_grad()
def predict(model: Classifier, images: Tensor) -> Tensor:
    """The likeliest digits, from equilibria found to the tolerance for tests."""
    if isinstance(model.core, DEQ):
        model.core.solver = TESTING
    guesses: Tensor = model(images).argmax(1)
    return guesses


def test(model: Classifier, data: Data) -> Test:
    """What the solver does on the test set, as in :func:`predict`."""
    layer = cast(DEQ, model.core)
    with torch.no_grad(), monitor(trace=True) as log:
        x = model.stem(data.x_test)
        solution = layer.solve(x, at=range(TESTING.max_steps // 4))
        accuracies = [float((model.head(z).argmax(1) == data.y_test).float().mean()) for z in solution.trajectory]
    residual = float(solution.stats["relative_residual"].max())
    converged = float(solution.ok.float().mean())
    steps, error = solution.stats["steps"].tolist(), gradient_error(layer, x[:4])
    return Test(log[-1], steps, residual, converged, accuracies, error, difference(layer, x[:1]))


def difference(layer: DEQ, x: Tensor) -> float:
    """How far our equilibrium is from SciPy's."""
    from scipy.optimize import root

    cell, x = deepcopy(layer.fn).double().cpu(), x.double().cpu()
    with torch.no_grad():
        ours = fixed_point(cell, torch.zeros_like(x), (x,), batch_dims=1, solver=TIGHT).value.numpy()

        def residual(z: Array) -> Array:
            inside = torch.from_numpy(z).reshape(x.shape)
            left: Array = (cell(inside, x) - inside).numpy().ravel()
            return left

        options = {"fatol": 1e-10, "ftol": 0.0, "maxfev": 5000}
        theirs = root(residual, np.zeros(ours.size), method="df-sane", options=options).x.reshape(ours.shape)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def gradient_error(layer: DEQ, x: Tensor, step: float = 1e-5) -> float:
    """Relative error of the layer's gradient in float64, tightly solved, against central differences.

    Along random directions of the input and of every parameter at once, the layer's own code path.
    """
    cell = deepcopy(layer.fn).double().cpu()
    x = x.double().cpu()
    function = ImplicitFunction(FixedPointProblem(cell, 1), TIGHT, ImplicitAdjoint(linear.GMRES(rtol=1e-12)), "warn")
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
