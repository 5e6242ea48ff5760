"""What is installed, what isn't, and whether the core works here."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import TYPE_CHECKING, NamedTuple, TextIO

if TYPE_CHECKING:
    import torch
    from rich.console import Console

CORE = ("difflayers", "torch", "numpy", "scipy", "cvxpy", "daqp", "piqp", "qdldl", "torchdiffeq")
OPTIONAL = {
    "typer": "demo",
    "rich": "demo",
    "tqdm": "demo",
    "matplotlib": "demo",
    "scikit-learn": "demo",
    "moreau": "qp",
    "proxsuite": "qp",
}


class Row(NamedTuple):
    """One line of the report; ``good`` is None where it makes no difference to the core."""

    what: str
    state: str
    good: bool | None = None


def rows() -> list[Row]:
    """Everything there is to know."""
    found = [Row("python", platform.python_version())]
    for name in CORE:
        installed = version(name)
        found.append(Row(name, installed or "missing: pip install difflayers", installed is not None))
    healthy = all(row.good is not False for row in found)
    if healthy:
        found.append(Row("devices", devices()))
    for name, extra in OPTIONAL.items():
        found.append(Row(name, version(name) or f"not installed: pip install difflayers[{extra}]"))
    error = self_check() if healthy else None
    checked = "unknown until nothing is missing" if error is None else f"{error:.1e} against finite differences"
    return [*found, Row("gradient error", checked, error is not None and error < 1e-6)]


def run(console: Console) -> int:
    """Print the table; the exit code is 0 if the core is healthy."""
    from rich.markup import escape
    from rich.table import Table

    table, report = Table("what", "state", title="difflayers doctor"), rows()
    for what, state, good in report:
        table.add_row(what, escape(state), style={True: "green", False: "red", None: None}[good])
    console.print(table)
    return exit_code(report)


def run_plainly(stream: TextIO) -> int:
    """The same as text, where rich isn't installed."""
    report = rows()
    width = max(len(row.what) for row in report)
    for what, state, _ in report:
        stream.write(f"{what:<{width}}  {state}\n")
    return exit_code(report)


def exit_code(report: list[Row]) -> int:
    """0 if nothing is wrong with the core."""
    return int(any(row.good is False for row in report))


def devices() -> str:
    """What torch can compute on."""
    import torch

    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return f"cpu, {torch.get_num_threads()} threads; cuda: {cuda}"


def version(name: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def self_check() -> float:
    """Relative gradient error of a small fixed point."""
    import torch

    from difflayers.fixedpoint import Anderson, fixed_point

    def solve(a: torch.Tensor) -> torch.Tensor:
        start, tight = torch.zeros_like(a), Anderson(rtol=1e-14, atol=1e-14)
        value: torch.Tensor = fixed_point(lambda z, a: torch.cos(a * z), start, (a,), solver=tight).value
        return value.sum()

    a = torch.tensor([0.3, 0.8], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(solve(a), a)
    step = 1e-5
    with torch.no_grad():
        units = step * torch.eye(2, dtype=torch.float64)
        numeric = torch.stack([(solve(a + unit) - solve(a - unit)) / (2 * step) for unit in units])
    return float((gradient - numeric).norm() / numeric.norm())
