"""
Which backend: time against size
================================

Answer and gradient of a batch of 16 random QPs, by every backend that is installed here, on one thread. All answers are
polished, so they agree to rounding: what differs is time. :doc:`/qp/choosing` has the advice that follows from this.

The problems: ``n`` unknowns, ``n`` inequalities of which about a third are active, ``n / 5`` equations, a positive
definite ``P`` with a condition number of about 100, all blocks different in every sample. The second set are linear
programs in a box. The numbers are from one machine, that of this build, which may have had other things to do.
"""

from __future__ import annotations

import importlib.util
import time

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from difflayers.qp import DAQP, OSQP, PIQP, Clarabel, HiGHS, InteriorPoint, ProxQP, QPSolver, solve_qp

torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)

BATCH, SIZES, LIMIT = 16, (5, 10, 20, 50, 100, 200), 1.0
NAMES = ("P", "q", "G", "h", "A", "b", "lb", "ub")


def quadratic(n: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(n)

    def normal(*shape: int) -> Tensor:
        return torch.randn(BATCH, *shape, generator=generator)

    basis = torch.linalg.qr(normal(n, n))[0]
    P = basis @ torch.diag(torch.logspace(-1, 1, n)) @ basis.mT
    G, A, inside = normal(n, n) / n**0.5, normal(n // 5, n) / n**0.5, normal(n)
    h = (G @ inside[..., None])[..., 0] + 0.3 * normal(n).abs()
    return {"P": (P + P.mT) / 2, "q": 2 * normal(n), "G": G, "h": h, "A": A, "b": (A @ inside[..., None])[..., 0]}


def linear(n: int) -> dict[str, Tensor]:
    blocks = quadratic(n)
    inside = torch.linalg.lstsq(blocks["A"], blocks["b"][..., None]).solution[..., 0]
    bound = 1 + inside.abs()
    h = torch.maximum(blocks["h"], (blocks["G"] @ inside[..., None])[..., 0] + 0.3)
    return {**blocks, "P": None, "h": h, "lb": inside - bound, "ub": inside + bound}


# %%
# Every size is tried until a backend takes more than a second; then it is left out of larger ones.

BACKENDS = {
    "DAQP": (DAQP(), "daqp"),
    "PIQP": (PIQP(), "piqp"),
    "InteriorPoint": (InteriorPoint(), "torch"),
    "Clarabel": (Clarabel(), "clarabel"),
    "OSQP": (OSQP(), "osqp"),
    "HiGHS": (HiGHS(), "scipy"),
    "ProxQP": (ProxQP(), "proxsuite"),
}


def measure(blocks: dict[str, Tensor], solver: QPSolver, warm: bool = False) -> tuple[float, Tensor, float]:
    """The best of three times, an answer, and how many samples were solved; infinite time if it isn't all."""
    inputs = {name: block if block is None else block.clone().requires_grad_() for name, block in blocks.items()}
    init = solve_qp(**inputs, solver=solver, on_failure="ignore") if warm else None
    best, start = torch.inf, time.perf_counter()
    for _ in range(3):
        begin = time.perf_counter()
        solution = solve_qp(**inputs, solver=solver, init=init, on_failure="ignore")
        solution.x[solution.ok].sum().backward()
        best = min(best, time.perf_counter() - begin)
        if time.perf_counter() - start > LIMIT:
            break
    return best, solution.x.detach(), float(solution.ok.double().mean())


def curve(make, solver: QPSolver, warm: bool = False) -> dict[int, tuple[float, Tensor, float]]:
    found = {}
    for n in SIZES:
        found[n] = measure(make(n), solver, warm)
        if found[n][0] > LIMIT:
            break
    return found


def ready(solver: QPSolver, package: str) -> bool:
    """Whether it is installed; its imports aren't what is measured."""
    if importlib.util.find_spec(package) is None:
        return False
    solve_qp(**linear(5), solver=solver, on_failure="ignore")
    return True


there = {name: solver for name, (solver, package) in BACKENDS.items() if ready(solver, package)}
curves = {
    "quadratic": {name: curve(quadratic, solver) for name, solver in there.items() if name != "HiGHS"},
    "linear": {name: curve(linear, solver) for name, solver in there.items()},
}
curves["quadratic"]["DAQP, warm start"] = curve(quadratic, DAQP(), warm=True)
for title, found in curves.items():
    print(f"\n{title} programs, milliseconds for {BATCH}: answer and gradient")
    print(" " * 18 + "".join(f"{n:>9}" for n in SIZES))
    for name, times in found.items():
        cells = [f"{1000 * times[n][0]:9.1f}" if n in times else f"{'':9}" for n in SIZES]
        least = min(share for *_, share in times.values())
        print(f"{name:18}" + "".join(cells) + (f"   solved at least {least:.0%}" if least < 1 else ""))

# %%
# How far answers differ, at most, over all sizes:

for title, found in curves.items():
    reference = found["PIQP"]
    gaps = [
        float((x - reference[n][1]).nan_to_num().abs().max())
        for times in found.values()
        for n, (_, x, _) in times.items()
        if n in reference
    ]
    print(f"{title} programs: {max(gaps):.1e}")

# %%
# The picture
# -----------

TEXT = "#767676"  # a gray for light and dark pages
plt.rcParams.update(
    {
        "font.size": 11,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), TEXT),
    }
)
STYLES = {
    "DAQP": ("#0072b2", "-"),
    "DAQP, warm start": ("#0072b2", "--"),
    "PIQP": ("#d55e00", "-"),
    "InteriorPoint": ("#009e73", "-"),
    "Clarabel": ("#cc79a7", "-"),
    "OSQP": ("#e69f00", "-"),
    "HiGHS": ("#56b4e9", "-"),
    "ProxQP": (TEXT, "-"),
}
figure, panels = plt.subplots(1, 2, figsize=(8.6, 4.4), layout="constrained", sharey=True)
for axes, (title, found) in zip(panels, curves.items(), strict=True):
    for name, times in found.items():
        color, line = STYLES[name]
        milliseconds = [1000 * seconds for seconds, *_ in times.values()]
        axes.plot(list(times), milliseconds, line, color=color, marker="o", markersize=4, label=name)
    axes.set(xscale="log", yscale="log", xlabel="unknowns", title=f"{title} programs", xticks=SIZES)
    axes.set_xticklabels([str(n) for n in SIZES])
    axes.minorticks_off()
    axes.grid(color=TEXT, alpha=0.2, linewidth=0.8)
panels[0].set_ylabel(f"milliseconds for {BATCH}, answer and gradient")
lines = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=4, frameon=False)
plt.show()
