"""Convex QPs of the Maros-Mészáros set: status, KKT residuals, and gradients beside finite differences.

``python benchmarks/qp_maros.py --data DIR`` solves every ``.mat`` file in ``DIR`` as a sparse problem: rows
``l ≤ Ax ≤ u`` become equations where ``u - l ≤ 1e-10`` and else rows of ``G``, one for each side that is finite; the
last ``n`` rows of ``A`` are bounds.

Residuals are of the problem as it is in the file, beside the largest of their terms: primal is the largest violation of
a constraint, dual the largest entry of ``Px + q + Gᵀz + Aᵀy + z_box``, gap the difference of the two objectives. The
gradient is of ``cᵀx`` along a random direction of ``q`` and all right-hand sides, beside a central difference; where
constraints depend on each other or there are several solutions ("degenerate"), among those for which there is a
derivative. Where a constraint is weakly active (margin about zero) there is none.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from _report import Report
from scipy.io import loadmat
from scipy.sparse import csr_matrix, vstack
from torch import Tensor

from difflayers import Status
from difflayers.qp import QPSolution, solve_qp

INFINITE = 9e19  # entries at or beyond it stand for infinity
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Posed:
    """One problem, as :func:`~difflayers.qp.solve_qp` takes it."""

    name: str
    P: csr_matrix
    q: Tensor
    G: csr_matrix | None
    h: Tensor | None
    A: csr_matrix | None
    b: Tensor | None
    lb: Tensor
    ub: Tensor

    @classmethod
    def read(cls, path: Path) -> Posed:
        file = loadmat(path)
        n = file["P"].shape[0]
        low, high = (file[side].ravel().astype(float) for side in "lu")
        low, high = np.where(low <= -INFINITE, -np.inf, low), np.where(high >= INFINITE, np.inf, high)
        rows = csr_matrix(file["A"])
        both = rows.shape[0] - n
        equal = (high - low <= 1e-10)[:both]
        # A fixed variable is an equation too: two bounds at one place would depend on each other.
        fixed = high[both:] - low[both:] <= 1e-10
        A = vstack([rows[:both][equal], rows[both:][fixed]]).tocsr()
        b = np.concatenate([low[:both][equal], low[both:][fixed]])
        above, below = (~equal & np.isfinite(side[:both]) for side in (high, low))
        G = vstack([rows[:both][above], -rows[:both][below]]).tocsr()
        h = np.concatenate([high[:both][above], -low[:both][below]])
        lb, ub = np.where(fixed, -np.inf, low[both:]), np.where(fixed, np.inf, high[both:])
        vectors = map(torch.from_numpy, (file["q"].ravel().astype(float), h, b, lb, ub))
        q, h_, b_, lb_, ub_ = vectors
        has_G, has_A = bool(len(h)), bool(len(b))
        return cls(
            path.stem,
            csr_matrix(file["P"]),
            q,
            G if has_G else None,
            h_ if has_G else None,
            A if has_A else None,
            b_ if has_A else None,
            lb_,
            ub_,
        )

    def vectors(self) -> dict[str, Tensor]:
        """What directional derivatives move: right-hand sides and the linear term."""
        return {name: block for name in ("q", "h", "b", "lb", "ub") if (block := getattr(self, name)) is not None}

    def solve(self, vectors: dict[str, Tensor]) -> QPSolution:
        return solve_qp(self.P, G=self.G, A=self.A, **vectors, on_failure="ignore")


@dataclass(frozen=True)
class Outcome:
    """How one problem went."""

    posed: Posed
    solution: QPSolution
    residuals: tuple[float, float, float]
    gradient_error: float
    seconds: tuple[float, float]

    @property
    def claimed(self) -> bool:
        return bool(self.solution.status == Status.SUCCESS)

    @property
    def solved(self) -> bool:
        """Residuals to 1e-6 of what the problem's numbers are."""
        return max(self.residuals) <= TOLERANCE

    @property
    def smooth(self) -> bool:
        """Whether there is a derivative, as far as the solver knows."""
        stats = self.solution.stats
        return not bool(stats["degenerate"]) and float(stats["margin"]) > TOLERANCE

    @property
    def differentiated(self) -> bool:
        return self.gradient_error <= 1e-4


def residuals(posed: Posed, solution: QPSolution) -> tuple[float, float, float]:
    """Primal, dual and gap; relative to the largest term of each."""
    x, y, z, box = (t.detach().numpy() for t in (solution.x, solution.y, solution.z, solution.z_box))
    if not np.isfinite(x).all():
        return np.inf, np.inf, np.inf
    q, lb, ub = posed.q.numpy(), posed.lb.numpy(), posed.ub.numpy()
    low, high = np.maximum(-box, 0), np.maximum(box, 0)
    curved = posed.P @ x
    dual, sizes = curved + q + box, [np.abs(curved).max(), np.abs(q).max(), np.abs(box).max(), 1]
    primal, scales = [np.maximum(lb - x, 0).max(), np.maximum(x - ub, 0).max()], [1.0]
    objective = x @ curved
    bound = low[low > 0] @ lb[low > 0] - high[high > 0] @ ub[high > 0]
    for matrix, side, multipliers, equal in ((posed.G, posed.h, z, False), (posed.A, posed.b, y, True)):
        if matrix is None or side is None:
            continue
        reached, limit = matrix @ x, side.numpy()
        primal.append((np.abs(reached - limit) if equal else np.maximum(reached - limit, 0)).max())
        scales += [np.abs(reached).max(), np.abs(limit).max()]
        pulled = matrix.T @ multipliers
        dual, sizes = dual + pulled, [*sizes, np.abs(pulled).max()]
        bound -= multipliers @ limit
    gap = abs(objective + q @ x - bound) / max(1, abs(objective), abs(q @ x), abs(bound))
    return float(max(primal) / max(scales)), float(np.abs(dual).max() / max(sizes)), float(gap)


def examine(posed: Posed) -> Outcome:
    start = time.process_time()
    leaves = {name: block.clone().requires_grad_() for name, block in posed.vectors().items()}
    solution = posed.solve(leaves)
    middle = time.process_time()
    c, directions = functional(posed, solution)
    before = time.process_time()
    gradients = torch.autograd.grad(solution.x @ c, list(leaves.values()), allow_unused=True)
    seconds = middle - start, time.process_time() - before
    told = sum(float(g @ directions[name]) for name, g in zip(leaves, gradients, strict=True) if g is not None)
    return Outcome(posed, solution, residuals(posed, solution), difference(posed, c, directions, told), seconds)


def functional(posed: Posed, solution: QPSolution) -> tuple[Tensor, dict[str, Tensor]]:
    """The vector ``c`` whose ``cᵀx`` is differentiated, and the direction, by block; random.

    Where active rows depend on each other, or there are several solutions, not every ``cᵀx`` has a value, and not
    every direction leaves a solution. So there ``c`` is in the range of ``[P, Cᵀ]``, rows are moved so that a shifted
    ``x`` is feasible, and ``q`` along ``P`` and by small multiples of rows that have multipliers.
    """
    random = np.random.default_rng(0)
    vectors, n = posed.vectors(), len(posed.q)
    if not bool(solution.stats["degenerate"]):
        directions = {name: torch.from_numpy(random.standard_normal(len(block))) for name, block in vectors.items()}
        return torch.from_numpy(random.standard_normal(n)), _within(vectors, directions)
    z, box = solution.z.detach().numpy(), solution.z_box.detach().numpy()
    shift, move = random.standard_normal(n), posed.P @ random.standard_normal(n)
    c, pulled = posed.P @ random.standard_normal(n), np.zeros(n)
    found = {"q": None, "lb": shift, "ub": shift}
    for name, matrix, weights in (("h", posed.G, z), ("b", posed.A, None)):
        if matrix is not None:
            found[name] = matrix @ shift
            own = np.ones(matrix.shape[0]) if weights is None else np.minimum(weights, 1)
            c += matrix.T @ (own * random.standard_normal(len(own)))
            pulled += matrix.T @ (own * random.standard_normal(len(own)))
    c += np.clip(box, -1, 1) * random.standard_normal(n)
    found["q"] = move - posed.P @ shift + pulled
    return torch.from_numpy(c), _within(vectors, {name: torch.from_numpy(block) for name, block in found.items()})


def _within(vectors: dict[str, Tensor], directions: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.where(block.isfinite(), directions[name], 0) for name, block in vectors.items()}


def difference(posed: Posed, c: Tensor, directions: dict[str, Tensor], told: float) -> float:
    """How far the derivative that autograd ``told`` is from central differences, the closest of several steps."""
    vectors, errors = posed.vectors(), []
    for step in (1e-5, 1e-6, 1e-7, 1e-8):
        ends = [
            posed.solve({name: block + sign * step * directions[name] for name, block in vectors.items()})
            for sign in (1, -1)
        ]
        seen = float((ends[0].x - ends[1].x) @ c) / (2 * step)
        errors.append(abs(told - seen) / max(abs(seen), abs(told), 1e-3))
    return float(np.nanmin([*errors, np.inf]))


def row(outcome: Outcome) -> tuple[str, ...]:
    posed, stats = outcome.posed, outcome.solution.stats
    primal, dual, gap = (f"{r:.0e}" for r in outcome.residuals)
    size = f"{len(posed.q)}, {0 if posed.h is None else len(posed.h)}, {0 if posed.b is None else len(posed.b)}"
    status = Status(int(outcome.solution.status)).name
    facts = f"{'yes' if bool(stats['degenerate']) else ''}", f"{float(stats['margin']):.0e}"
    seconds = f"{outcome.seconds[0]:.3f}", f"{outcome.seconds[1]:.3f}"
    return (posed.name, size, status, primal, dual, gap, f"{outcome.gradient_error:.0e}", *facts, *seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder with the .mat files")
    parser.add_argument("--only", action="append", help="a problem, by name; may be repeated")
    report = Report.from_command_line(parser)
    data = parser.parse_args().data
    paths = [path for path in sorted(data.glob("*.mat")) if not report.only or path.stem in report.only]
    if not paths:
        parser.error(f"no .mat file of that name in {data}")
    outcomes = []
    for path in paths:
        outcomes.append(examine(Posed.read(path)))
        if not report.markdown:
            report.note("  ".join(row(outcomes[-1])))
    headings = "problem|n, m, p|status|primal|dual|gap|gradient error|degenerate|margin|forward, s|backward, s"
    report.table("Maros-Mészáros problems", headings, map(row, outcomes))
    summarize(report, outcomes)


def summarize(report: Report, outcomes: list[Outcome]) -> None:
    count = len(outcomes)
    smooth = [outcome for outcome in outcomes if outcome.claimed and outcome.smooth]
    false = [outcome.posed.name for outcome in outcomes if outcome.claimed and not outcome.solved]
    missed = [outcome.posed.name for outcome in outcomes if not outcome.claimed]
    wrong = [outcome.posed.name for outcome in smooth if not outcome.differentiated]
    rough = [outcome for outcome in outcomes if outcome.claimed and not outcome.smooth]
    agreeing = sum(outcome.differentiated for outcome in rough)
    report.note(
        f"solved to {TOLERANCE:.0e}: {sum(o.claimed and o.solved for o in outcomes)} of {count}"
        f"{'; not: ' + ', '.join(missed) if missed else ''}; reported solved that aren't: {', '.join(false) or 'none'}"
    )
    report.note(
        f"gradients as finite differences: {len(smooth) - len(wrong)} of the {len(smooth)} with a derivative"
        f"{'; not: ' + ', '.join(wrong) if wrong else ''}; and {agreeing} of the {len(rough)} flagged as degenerate or "
        "weakly active"
    )


if __name__ == "__main__":
    main()
