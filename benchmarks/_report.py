"""Tables on the terminal or as Markdown, and the summary of what was asked and what was reached."""

from __future__ import annotations

import argparse
import platform
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field

import torch
from rich import box
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Goal:
    """One row of the summary, as text, and whether it is met."""

    work: str
    peer: str
    ours: str
    floor: str
    where: str
    asked: str
    reached: str
    met: bool


@dataclass
class Report:
    """Where results go.

    Attributes:
        quick: few repetitions: do the numbers come out at all?
        markdown: tables as ``README.md`` has them.
        only: the parts that were asked for, none for all.
        backends: a row for every backend of ours.
    """

    quick: bool = False
    markdown: bool = False
    only: Sequence[str] = ()
    backends: bool = False
    goals: list[Goal] = field(default_factory=list)
    console: Console = field(default_factory=lambda: Console(width=200, highlight=False))

    @classmethod
    def from_command_line(cls, parser: argparse.ArgumentParser) -> Report:
        parser.add_argument("--quick", action="store_true", help="few repetitions: do the numbers come out at all?")
        parser.add_argument("--markdown", action="store_true", help="tables as README.md has them")
        options = parser.parse_args()
        torch.set_num_threads(1)
        only, backends = getattr(options, "only", None) or (), getattr(options, "backends", False)
        report = cls(options.quick, options.markdown, only, backends)
        report.note(f"Python {platform.python_version()}, torch {torch.__version__}, 1 thread")
        return report

    def note(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)

    def goal(self, goal: Goal) -> None:
        self.goals.append(goal)

    def table(self, title: str, headings: str, rows: Iterable[Sequence[str]]) -> None:
        """``headings`` are joined by ``|``; numbers are on the right, and the first column is kept in one line."""
        names = headings.split("|")
        if self.markdown:
            lines = [names, ["---"] * len(names), *rows]
            self.note(f"\n### {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
            return
        table = Table(title=title, box=box.SIMPLE_HEAD)
        for i, name in enumerate(names):
            table.add_column(name, justify="right" if i else "left", no_wrap=not i)
        for row in rows:
            table.add_row(*row)
        self.console.print(table)

    def summary(self, peer: str = "torchdeq") -> None:
        headings = f"work|{peer}|difflayers|floor|where the time goes|asked|reached|met"
        rows = [(*map(str, astuple(goal)[:-1]), "yes" if goal.met else "no") for goal in self.goals]
        self.table(f"Summary: {sum(g.met for g in self.goals)} of {len(rows)} met", headings, rows)


Part = Callable[[Report], None]


def run(
    parts: Mapping[str, Part], description: str | None, peer: str, *, silenced: str = "", backends: bool = False
) -> None:
    """The parts that the command line asks for, all by default, and a summary.

    Args:
        parts: by name.
        description: of the whole benchmark, for ``--help``.
        peer: the heading of whom the summary compares with.
        silenced: modules whose warnings nobody needs to see, as a regular expression.
        backends: whether there is a row for every backend of ours, by choice.
    """
    if silenced:
        warnings.filterwarnings("ignore", module=silenced)
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=parts, metavar="NAME", help=", ".join(parts))
    if backends:
        parser.add_argument("--backends", action="store_true", help="every backend of ours is a row")
    report = Report.from_command_line(parser)
    for name, part in parts.items():
        if not report.only or name in report.only:
            part(report)
    if report.goals:
        report.summary(peer)


def ms(seconds: float) -> str:
    """Milliseconds, in three digits or so."""
    digits = 1 if seconds >= 0.01 else 2 if seconds >= 1e-3 else 3
    return f"{seconds * 1e3:.{digits}f} ms"
