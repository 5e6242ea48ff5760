"""Who finds roots of the Moré-Garbow-Hillstrom systems: 14 of them, 32 starts each, all starts in one batched call."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from _report import Goal, Report
from _systems import System, starts, systems
from torch import Tensor

from difflayers import ImplicitFunction, RootProblem, Solver
from difflayers.fixedpoint import Dogleg, LevenbergMarquardt, Newton

Find = Callable[[System, np.ndarray], Tensor]
OURS = ("Dogleg", "LevenbergMarquardt", "Newton")
ASKED = 430


def finders() -> dict[str, Find]:
    """Everybody, with at most 100 steps where steps can be limited."""
    tolerances = {"rtol": 1e-9, "atol": 1e-9, "max_steps": 100}
    return {
        "Dogleg": _ours(Dogleg(**tolerances)),
        "LevenbergMarquardt": _ours(LevenbergMarquardt(**tolerances)),
        "Newton": _ours(Newton(**tolerances)),
        "SciPy hybr, one by one": _scipy("hybr"),
        "SciPy lm, one by one": _scipy("lm"),
        **{f"torchdeq {name}": _torchdeq(name) for name in ("broyden", "anderson", "fixed_point_iter")},
    }


def _ours(solver: Solver) -> Find:
    def find(system: System, points: np.ndarray) -> Tensor:
        function = ImplicitFunction(RootProblem(system.fn, batch_dims=1), solver, on_failure="ignore")
        value: Tensor = function.solve(init=torch.from_numpy(points)).value
        return value

    return find


def _scipy(method: str) -> Find:
    from scipy.optimize import root

    def find(system: System, points: np.ndarray) -> Tensor:
        def fn(x: np.ndarray) -> np.ndarray:
            value: np.ndarray = system.fn(torch.from_numpy(x)).numpy()
            return value

        with np.errstate(all="ignore"):
            found = [root(fn, point, method=method, tol=1e-10).x for point in points]
        return torch.from_numpy(np.stack(found))

    return find


def _torchdeq(name: str) -> Find:
    from torchdeq.solver import get_solver

    def find(system: System, points: np.ndarray) -> Tensor:
        solve = get_solver(name)
        try:
            value: Tensor = solve(lambda z: z + system.fn(z), torch.from_numpy(points), max_iter=100, tol=1e-9)[0]
        except torch.linalg.LinAlgError:  # its Anderson iteration, where residuals overflow
            return torch.full(points.shape, torch.nan, dtype=torch.float64)
        return value

    return find


def solved(system: System, points: np.ndarray, value: Tensor) -> int:
    """From how many starts ``‖F‖ <= 1e-8 max(1, ‖F(start)‖)`` was reached."""
    first = system.fn(torch.from_numpy(points)).norm(dim=1).clamp_min(1)
    return int((system.fn(value).norm(dim=1) <= 1e-8 * first).sum())


def run(report: Report) -> None:
    """The table of all systems, and the goal."""
    everybody = finders()
    counts: dict[str, list[int]] = {name: [] for name in everybody}
    seconds = dict.fromkeys(everybody, 0.0)
    for system, points in zip(systems(), starts(), strict=True):
        for name, find in everybody.items():
            start = time.process_time()
            value = find(system, points)
            seconds[name] += time.process_time() - start
            counts[name].append(solved(system, points, value))
    rows = [(s.name, *(str(counts[name][i]) for name in everybody)) for i, s in enumerate(systems())]
    rows.append(("all 448", *(str(sum(counts[name])) for name in everybody)))
    rows.append(("CPU seconds", *(f"{seconds[name]:.1f}" for name in everybody)))
    report.table("Moré-Garbow-Hillstrom systems: solved of 32 starts", "|".join(["system", *everybody]), rows)
    report.goal(_goal({name: sum(found) for name, found in counts.items()}, seconds))


def _goal(found: dict[str, int], seconds: dict[str, float]) -> Goal:
    peer = max(count for name, count in found.items() if name.startswith("torchdeq"))
    best = max(OURS, key=found.__getitem__)
    return Goal(
        work="Moré-Garbow-Hillstrom systems, 14 × 32 starts",
        peer=f"{peer} (SciPy hybr {found['SciPy hybr, one by one']})",
        ours=", ".join(f"{name} {found[name]}" for name in OURS),
        floor="",
        where=f"{seconds[best]:.1f} s in all",
        asked=f"≥ {ASKED} of 448",
        reached=f"{found[best]} ({best})",
        met=found[best] >= ASKED,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    run(Report.from_command_line(parser))


if __name__ == "__main__":
    main()
