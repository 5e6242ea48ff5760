"""Property tests at length: every public function on drawn data, healthy and sick, for as many minutes as you like.

What is drawn and what must hold is in ``tests/properties``; ``tests/test_properties.py`` tries a few examples of it.
Prints how the samples of each function ended; exits with 1 if a promise was broken, after writing the smallest example
that it found to ``soak-FUNCTION.json``, which ``--replay`` checks again. ``--only qp`` is a family, ``--only solve_qp``
a function.
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _report import Report
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Flaky
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from properties import PROPERTIES, Property, Violation, replayed

CHUNK = 200  # examples per run of hypothesis
SHRINKING = 20  # seconds
HUNG = 300  # seconds after which a call that doesn't even listen to signals is given up, with the process


@dataclass
class Tally:
    """What happened to one function."""

    examples: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    violation: str = ""
    case: Any = None


class Soak:
    """Draws examples of one property until its time is over or a promise broken."""

    def __init__(self, one: Property, seconds: float, bar: tqdm[Any]) -> None:
        self.one, self.seconds, self.bar = one, seconds, bar
        self.tally = Tally()
        self.failed: dict[str, str] = {}
        self.until = 0.0

    def run(self, first: int) -> Tally:
        start = time.perf_counter()
        self.until = start + self.seconds
        for number in itertools.count(first):
            if time.perf_counter() >= self.until:
                break
            try:
                self._chunk(number)
            except (Violation, Flaky):
                break
        if self.failed:
            self.tally.violation = self.failed[str(self.tally.case)]
        self.tally.seconds = time.perf_counter() - start
        return self.tally

    def _chunk(self, number: int) -> None:
        quiet = settings(
            max_examples=CHUNK, deadline=None, database=None, phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck), print_blob=False, report_multiple_bugs=False,
        )  # fmt: skip
        quiet(seed(number)(given(self.one.cases)(self._example)))()

    def _example(self, case: Any) -> None:
        # Beyond its time an example passes unseen, so that hypothesis comes to its end; one that failed fails again.
        if str(case) in self.failed:
            self.tally.case = case
            raise Violation(self.failed[str(case)])
        if time.perf_counter() >= self.until + (SHRINKING if self.failed else 0):
            return
        faulthandler.dump_traceback_later(HUNG, exit=True)
        try:
            ends = self.one(case)
        except Violation as error:
            self.failed[str(case)] = str(error)
            self.tally.case = case
            raise
        finally:
            faulthandler.cancel_dump_traceback_later()
            torch.set_default_dtype(torch.float32)
        if not self.failed:
            self.tally.examples += 1
            self.tally.ends += ends
            self.bar.set_postfix_str(f"{self.one.name}: {self.tally.examples} examples", refresh=False)
            self.bar.update(0)


def show(report: Report, tallies: dict[str, Tally]) -> None:
    others = sorted({end for tally in tallies.values() for end in tally.ends} - {"SUCCESS"})
    shown = [
        (
            name,
            str(tally.examples),
            *(str(tally.ends[end] or "") for end in ("SUCCESS", *others)),
            str(int(bool(tally.violation))),
            f"{tally.seconds:.0f}",
        )
        for name, tally in tallies.items()
    ]
    total = sum(tally.examples for tally in tallies.values())
    broken = sum(bool(tally.violation) for tally in tallies.values())
    title = f"{total} examples of {len(tallies)} functions, {broken} promises broken; samples by how they ended"
    report.table(title, "|".join(["function", "examples", "SUCCESS", *others, "violations", "seconds"]), shown)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1.0, help="in all, shared equally (default: 1)")
    families = sorted({one.family for one in PROPERTIES.values()})
    parser.add_argument("--only", action="append", choices=[*families, *PROPERTIES], help="a family or function")
    parser.add_argument("--seed", type=int, default=0, help="where to start drawing; another one draws others")
    parser.add_argument("--replay", type=Path, help="check the example in this file again")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for examples that break a promise")
    report = Report.from_command_line(parser)
    options = parser.parse_args()
    if options.replay:
        report.note(f"kept: {dict(replayed(options.replay.read_text(), PROPERTIES))}")
        return 0
    chosen = [one for one in PROPERTIES.values() if not options.only or {one.name, one.family} & set(options.only)]
    seconds = (10 if report.quick else 60 * options.minutes) / len(chosen)
    tallies = {}
    with tqdm(chosen, unit="function", disable=None) as bar:
        for one in bar:
            tallies[one.name] = tally = Soak(one, seconds, bar).run(1000 * options.seed)
            if tally.violation:
                path = options.out / f"soak-{one.name}.json"
                path.write_text(one.written(tally.case) + "\n", encoding="utf-8")
                bar.write(f"{one.name}: {tally.violation}\n  {tally.case}\n  python benchmarks/soak.py --replay {path}")
    show(report, tallies)
    return int(any(tally.violation for tally in tallies.values()))


if __name__ == "__main__":
    sys.exit(main())
