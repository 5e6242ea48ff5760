"""The table, ``report.html`` and ``metrics.json``."""

from __future__ import annotations

import base64
import json
import platform
from collections.abc import Sequence
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from difflayers.demo._row import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console

COLUMNS = (
    "family",
    "data",
    "metric",
    "ours",
    "baseline",
    "iterations",
    "residual",
    "gradient\nerror",
    "difference\nfrom",
    "seconds",
)
NEXT = (
    ('python -c "import difflayers; print(difflayers.available_solvers())"', "what there is to choose from"),
    ("difflayers doctor", "what is installed here, and a self-check"),
    ("make docs", "the documentation, docs/_build/html/index.html"),
)


def report(rows: Sequence[Row], failure: str, out: Path, console: Console) -> list[str]:
    """Show and save everything; the thresholds that were missed."""
    out.mkdir(parents=True, exist_ok=True)
    missed = [sentence for row in rows for sentence in row.missed]
    console.print(_table(rows))
    console.print(f"[bold]A failure, on purpose.[/] {failure}", highlight=False)
    (out / "metrics.json").write_text(json.dumps(metrics(rows), indent=2) + "\n")
    (out / "report.html").write_text(page(rows, failure), encoding="utf-8")
    console.print(f"\nreport.html and metrics.json are in {out}/. Next:", highlight=False)
    for command, what in NEXT:
        console.print(f"  {command}  [dim]# {what}[/]", highlight=False)
    for sentence in missed:
        console.print(f"[red]missed:[/] {sentence}")
    return missed


def cells(row: Row) -> list[str]:
    """The row as text, in the order of ``COLUMNS``."""
    score = row.score
    return [
        row.family,
        row.data,
        score.name,
        f"{score.value:{score.form}}",
        f"{score.other:{score.form}}, {score.baseline}" + ("" if score.beats else " (not beaten)"),
        f"{row.iterations:.1f}",
        f"{row.residual:.0e}",
        f"{row.gradient_error:.0e}",
        f"{row.difference:.0e}, {row.reference}",
        f"{row.seconds:.1f}",
    ]


def _table(rows: Sequence[Row]) -> Any:
    from rich import box
    from rich.table import Table

    columns = ("layer", "result, beside a baseline", "solver", "exactness", "s")
    table = Table(*columns, title="difflayers", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_lines=True)
    for row in rows:
        score = row.score
        table.add_row(
            f"[bold]{row.family}[/]\n{row.data}",
            f"{score.name}\n[bold]{score.value:{score.form}}[/]\n{score.baseline}: {score.other:{score.form}}"
            + ("" if score.beats else " [yellow](not beaten)[/]"),
            f"{row.iterations:.0f} iterations\nresidual {row.residual:.0e}",
            f"gradient {row.gradient_error:.0e}\n{row.difference:.0e} from\n{row.reference}",
            f"{row.seconds:.0f}",
        )
    return table


def metrics(rows: Sequence[Row]) -> dict[str, Any]:
    """Everything that was measured, as plain data."""
    plain = {}
    for row in rows:
        score = row.score
        plain[row.family] = {
            "data": row.data,
            "metric": score.name,
            "value": score.value,
            "baseline": {score.baseline: score.other},
            "iterations": row.iterations,
            "residual": row.residual,
            "gradient_error": row.gradient_error,
            "difference": {row.reference: row.difference},
            "seconds": row.seconds,
            "missed": row.missed,
            **row.details,
        }
    return {"missed": [sentence for row in rows for sentence in row.missed], "families": plain}


def page(rows: Sequence[Row], failure: str) -> str:
    """One HTML page that needs nothing else: figures are inside."""
    from jinja2 import Environment

    template = files("difflayers.demo").joinpath("report.html.jinja").read_text(encoding="utf-8")
    return (
        Environment(autoescape=True)
        .from_string(template)
        .render(
            columns=[name.replace("\n", " ") for name in COLUMNS],
            table=[cells(row) for row in rows],
            rows=rows,
            failure=failure,
            next=NEXT,
            image=_embedded,
            code=_highlighted,
            machine=f"{platform.machine()}, {torch.get_num_threads()} threads, Python {platform.python_version()}, "
            f"torch {torch.__version__}",
        )
    )


def _embedded(figure: Figure) -> str:
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    return f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"


def _highlighted(code: str) -> Any:
    from markupsafe import Markup
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer

    return Markup(highlight(code, PythonLexer(), HtmlFormatter(noclasses=True, style="friendly")))
