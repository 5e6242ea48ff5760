"""What is installed, what isn't, and whether the core works here."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from rich.console import Console

CORE = ("difflayers", "torch", "numpy", "scipy", "cvxpy", "torchdiffeq")
OPTIONAL = {
    "typer": "demo",
    "rich": "demo",
    "tqdm": "demo",
    "matplotlib": "demo",
    "scikit-learn": "demo",
    "daqp": "qp",
    "piqp": "qp",
    "qdldl": "qp",
}


def run(console: Console) -> int:
    """Print the table; the exit code is 0 if the core is healthy."""
    from rich.table import Table

    table = Table("what", "state", title="difflayers doctor")
    table.add_row("python", platform.python_version())
    missing = [name for name in CORE if version(name) is None]
    for name in CORE:
        table.add_row(name, version(name) or "[red]missing[/]: pip install difflayers")
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    table.add_row("devices", f"cpu, {torch.get_num_threads()} threads; cuda: {cuda}")
    for name, extra in OPTIONAL.items():
        table.add_row(name, version(name) or f"not installed: pip install {_escaped(f'difflayers[{extra}]')}")
    error = self_check()
    healthy = not missing and error < 1e-6
    table.add_row("gradient error", f"{error:.1e} against finite differences", style="green" if healthy else "red")
    console.print(table)
    return 0 if healthy else 1


def version(name: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def self_check() -> float:
    """Relative gradient error of a small fixed point."""
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


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")
