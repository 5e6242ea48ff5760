"""The table, the figures and ``metrics.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from difflayers.demo._run import Result, Results

if TYPE_CHECKING:
    from rich.console import Console

EQUILIBRIUM, ONCE = "#0072b2", "#d55e00"  # distinguishable without color vision (Wong 2011)


def report(results: Results, out: Path, console: Console) -> list[str]:
    """Show and save everything; the thresholds that were missed."""
    from rich.table import Table

    out.mkdir(parents=True, exist_ok=True)
    table = Table(
        "model", "test accuracy", "iterations", "residual", "gradient error", "seconds", title="handwritten digits"
    )
    for result in (results.equilibrium, results.once):
        table.add_row(*_cells(result))
    console.print(table)
    missed = results.missed()
    (out / "metrics.json").write_text(json.dumps(metrics(results), indent=2) + "\n")
    figures(results, out)
    console.print(f"figures and metrics.json are in {out}/")
    for sentence in missed:
        console.print(f"[red]missed:[/] {sentence}")
    return missed


def _cells(result: Result) -> list[str]:
    def show(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    return [
        result.name,
        f"{result.accuracy:.3f}",
        show(result.iterations, ".1f"),
        show(result.residual, ".1e"),
        show(result.gradient_error, ".1e"),
        f"{result.seconds:.1f}",
    ]


def metrics(results: Results) -> dict[str, Any]:
    """Everything that was measured, as plain data."""
    keys = ("accuracy", "seconds", "iterations", "residual", "converged", "gradient_error", "losses")
    return {
        "seed": results.seed,
        "missed": results.missed(),
        "equilibrium": {key: getattr(results.equilibrium, key) for key in keys},
        "applied_once": {key: getattr(results.once, key) for key in keys if getattr(results.once, key) is not None},
    }


def figures(results: Results, out: Path) -> None:
    """``training.png``: the loss of both. ``solver.png``: what the solver did meanwhile, and on the test set."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for result, color in ((results.equilibrium, EQUILIBRIUM), (results.once, ONCE)):
        axes.plot(result.losses, color=color, linewidth=1.4, label=result.name)
    axes.set(xlabel="step", ylabel="training loss", yscale="log")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out / "training.png", dpi=150)

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    forward = [record for record in results.equilibrium.log if record.role == "forward"]
    adjoint = [record for record in results.equilibrium.log if record.role == "adjoint"]
    left.plot([r.steps for r in forward], color=EQUILIBRIUM, label="forward")
    left.plot([r.steps for r in adjoint], color=ONCE, label="adjoint")
    left.set(xlabel="training step", ylabel="solver iterations, worst sample", ylim=(0, None))
    left.legend(frameon=False)
    middle.plot([r.residual for r in forward], color=EQUILIBRIUM)
    middle.set(xlabel="training step", ylabel="residual norm, worst sample", yscale="log")
    steps = results.equilibrium.steps
    right.hist(steps, bins=range(min(steps), max(steps) + 2), color=EQUILIBRIUM, align="left")
    right.set(xlabel="iterations to converge", ylabel="test samples")
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out / "solver.png", dpi=150)
