"""The commands, which need the packages of the demo extra."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from difflayers.demo import _doctor, _report, _run

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Implicit layers for PyTorch.")


@app.command()
def doctor() -> None:
    """Versions, devices and backends; what is missing and how to install it; a self-check."""
    raise typer.Exit(_doctor.run(Console()))


@app.command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="A short run, under 20 seconds.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the split and the weights.")] = 0,
    device: Annotated[
        str, typer.Option(help="Where to train the networks on digits, for example cpu or cuda.")
    ] = "cpu",
    out: Annotated[Path, typer.Option(help="Where report.html and metrics.json go.")] = Path("difflayers-demo"),
) -> None:
    """Every family once: an equilibrium model, an ODE, a QP and a cone program, each beside an honest baseline."""
    rows, failure = _run.run(quick, seed=seed, device=device)
    missed = _report.report(rows, failure, out, Console())
    raise typer.Exit(1 if missed else 0)
