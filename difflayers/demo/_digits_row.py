"""Figures of the digits, and what was measured."""

from __future__ import annotations

import time
from statistics import fmean
from typing import TYPE_CHECKING, Any, cast

import torch

from difflayers import plot
from difflayers.demo._digits import FULL, QUICK, Budget, Result, Results, Test, measured
from difflayers.demo._model import Cell, Kind, equilibrium
from difflayers.demo._row import Check, Row, Score, source

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

# distinguishable without color vision (Wong 2011)
COLORS: dict[Kind, str] = {"equilibrium": "#0072b2", "once": "#d55e00", "explicit": "#009e73"}


def run(quick: bool, *, seed: int, device: str) -> Row:
    """The equilibrium model, beside explicit ones of as many parameters."""
    start, budget = time.perf_counter(), QUICK if quick else FULL
    results = measured(budget, seed=seed, device=device)
    deq = results.models["equilibrium"]
    test = cast(Test, deq.test)
    return Row(
        "deep equilibrium",
        "1797 handwritten digits, a fifth for testing",
        Score("test accuracy", deq.accuracy, "explicit network", results.models["explicit"].accuracy, ".1%", more=True),
        test.iterations,
        test.residual,
        test.gradient_error,
        "SciPy's df-sane",
        test.difference,
        time.perf_counter() - start,
        checks(deq, budget),
        source(Cell, equilibrium),
        figures(results),
        [f"The cell applied once instead: {results.models['once'].accuracy:.1%}."],
        details(results),
    )


def checks(deq: Result, budget: Budget) -> list[Check]:
    """What the equilibrium model is held to."""
    test = cast(Test, deq.test)
    return [
        Check("test accuracy of the equilibrium model", deq.accuracy, budget.accuracy, at_least=True),
        Check("share of test solves that converged", test.converged, budget.converged, at_least=True),
        Check("gradient error of the equilibrium model", test.gradient_error, budget.gradient_error),
        Check("difference from SciPy", test.difference, 1e-6),
    ]


def details(results: Results) -> dict[str, Any]:
    """What was measured of every model, as plain data."""
    names: dict[Kind, str] = {"equilibrium": "equilibrium", "once": "applied_once", "explicit": "explicit"}
    return {name: _measured(results.models[kind]) for kind, name in names.items()}


def _measured(result: Result) -> dict[str, Any]:
    keys = ("parameters", "accuracy", "seconds", "cpu_seconds", "losses")
    plain = {key: getattr(result, key) for key in keys}
    if result.test is None:
        return plain
    test = result.test
    return plain | {
        "iterations": test.iterations,
        "residual": test.residual,
        "converged": test.converged,
        "gradient_error": test.gradient_error,
        "accuracy_after_iterations": test.accuracies,
    }


def figures(results: Results) -> dict[str, Figure]:
    """Losses, and what is still misread; iterations in training and in the test."""
    from matplotlib.figure import Figure

    deq = results.models["equilibrium"]
    training = Figure(figsize=(10, 3.8), layout="constrained")
    parts: Any = training.subfigures(1, 2)
    left, right = parts
    _losses(results, left.subplots())
    _misread(results, right)

    figure = Figure(figsize=(11, 6.8), layout="constrained")
    parts = figure.subfigures(2, 1)
    above, below = parts
    above.suptitle("training: every batch", fontsize="medium")
    plot.training(deq.log, above)
    below.suptitle("test: every image", fontsize="medium")
    test = cast(Test, deq.test)
    left, middle, right = below.subplots(1, 3)
    plot.convergence(test.record, left, relative=True)
    _iterations(test, middle)
    _accuracies(results, right)
    return {"Losses, and what is misread": training, "Iterations, in training and in the test": figure}


def _losses(results: Results, axes: Axes) -> None:
    for kind, result in results.models.items():
        axes.plot(result.losses, color=COLORS[kind], linewidth=0.6, alpha=0.3)
        axes.plot(_smooth(result.losses), color=COLORS[kind], linewidth=1.6, label=result.name)
    axes.set(xlabel="step", ylabel="training loss, distorted images", yscale="log")
    axes.legend(frameon=False, loc="upper right")
    axes.spines[["top", "right"]].set_visible(False)


def _smooth(losses: list[float], window: int = 10) -> list[float]:
    return [fmean(losses[max(0, end - window) : end]) for end in range(1, len(losses) + 1)]


def _misread(results: Results, figure: SubFigure, shown: int = 12) -> None:
    data, guesses = results.data, torch.tensor(results.models["equilibrium"].guesses)
    labels = data.y_test.cpu()
    wrong = (guesses != labels).nonzero().flatten().tolist()
    figure.suptitle(
        f"{len(wrong)} of {len(labels)} test images misread at equilibrium"
        + (f", {shown} of them here" if len(wrong) > shown else ""),
        fontsize="medium",
    )
    grid = figure.subplots(max(1, -(-len(wrong[:shown]) // 4)), 4)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, index in zip(grid.flat, wrong[:shown], strict=False):
        axes.imshow(data.x_test[index, 0].cpu().numpy(), cmap="gray_r")
        axes.set_title(f"{labels[index]} read as {guesses[index]}", fontsize="small")


def _iterations(test: Test, axes: Axes) -> None:
    low, high = min(test.steps), max(test.steps)
    axes.hist(test.steps, bins=[edge - 0.5 for edge in range(low, high + 2)], color=COLORS["equilibrium"])
    axes.set(xlabel="iterations to converge", ylabel="test images")
    axes.spines[["top", "right"]].set_visible(False)


def _accuracies(results: Results, axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    deq = results.models["equilibrium"]
    accuracies = cast(Test, deq.test).accuracies
    axes.plot(range(1, len(accuracies) + 1), accuracies, ".-", color=COLORS["equilibrium"], label=deq.name)
    for kind in ("once", "explicit"):
        result = results.models[kind]
        axes.axhline(result.accuracy, color=COLORS[kind], linestyle="--", linewidth=1.2, label=result.name)
    axes.set(xlabel="applications of the cell", ylabel="test accuracy")
    axes.yaxis.set_major_formatter("{x:.1%}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize="small", loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
