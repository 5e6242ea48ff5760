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
    device: Annotated[str, typer.Option(help="Where to train, for example cpu or cuda.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Where figures and metrics.json go.")] = Path("difflayers-demo"),
) -> None:
    """Train a deep equilibrium model on handwritten digits, beside explicit networks of as many parameters."""
    results = _run.run(_run.QUICK if quick else _run.FULL, seed=seed, device=device)
    missed = _report.report(results, out, Console())
    raise typer.Exit(1 if missed else 0)
