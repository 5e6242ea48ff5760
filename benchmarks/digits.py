"""The deep equilibrium model of ``difflayers demo`` on scikit-learn's digits: accuracy and CPU time over five seeds."""

from __future__ import annotations

import argparse
from statistics import fmean

from _report import Goal, Report

# What was asked: a mean of test accuracies, and CPU time for each of them.
ACCURACY, SECONDS = 0.985, 20.0


def accuracy(seed: int, *, quick: bool) -> tuple[float, float]:
    """Test accuracy of the equilibrium model, and the CPU seconds of its training."""
    from difflayers.demo._digits import FULL, QUICK, digits_accuracy

    return digits_accuracy(seed, QUICK if quick else FULL)


def run(report: Report) -> None:
    """The table of seeds, and the goal."""
    runs = [accuracy(seed, quick=report.quick) for seed in range(2 if report.quick else 5)]
    rows = [(str(seed), f"{share:.2%}", f"{seconds:.1f} s") for seed, (share, seconds) in enumerate(runs)]
    mean, longest = fmean(share for share, _ in runs), max(seconds for _, seconds in runs)
    report.table("Digits DEQ", "seed|test accuracy|CPU time", [*rows, ("mean", f"{mean:.2%}", "")])
    asked = f"≥ {ACCURACY:.1%} in ≤ {SECONDS:g} s"
    reached = f"{mean:.2%} in ≤ {longest:.1f} s"
    met = mean >= ACCURACY and longest <= SECONDS
    report.goal(Goal(f"digits DEQ, mean of {len(runs)} seeds", "", "", "", "", asked, reached, met))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    run(Report.from_command_line(parser))


if __name__ == "__main__":
    main()
