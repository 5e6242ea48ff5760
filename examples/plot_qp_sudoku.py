"""
Sudoku, learned from examples
=============================

A layer that is told nothing of the rules: :math:`\\min_z \\tfrac{\\varepsilon}{2} \\|z\\|^2 - p^\\top z` subject to
:math:`Az = b` and :math:`z \\ge 0`, where ``p`` marks the digits that are given and ``A`` is learned from puzzles and
their solutions (Amos and Kolter 2017, ICML, "OptNet", section 4.4). On 4×4 grids the rules are 64 equations of which 40
are independent, so ``A`` has 40 rows.

There are 288 such grids. The puzzles are generated from them: cells are emptied in random order as long as the solution
stays unique. Training uses 200 of the grids, the test only the other 88.
"""

from __future__ import annotations

import itertools
import time

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from difflayers.qp import DAQP, QPLayer, QPSolution

torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
rng = np.random.default_rng(0)

CELLS = np.arange(16)
GROUPS = np.stack([CELLS // 4, CELLS % 4, CELLS // 8 * 2 + CELLS % 4 // 2])  # row, column and block of every cell


def all_grids() -> np.ndarray:
    """Every grid, ``(288, 16)``, with digits 0 to 3."""
    rows = np.array(list(itertools.permutations(range(4))))
    picks = np.array(list(itertools.product(range(24), repeat=4)))
    grids = rows[picks].reshape(-1, 16)
    for group in GROUPS[1:]:  # rows are permutations already
        for value in range(4):
            seen = np.sort(grids[:, group == value], axis=1)
            grids = grids[(seen == np.arange(4)).all(1)]
    return grids


GRIDS = all_grids()


def puzzle(grid: np.ndarray) -> np.ndarray:
    """Which cells are given: no more than a unique solution needs."""
    given = np.ones(16, dtype=bool)
    for cell in rng.permutation(16):
        given[cell] = False
        given[cell] = (GRIDS[:, given] == grid[given]).all(1).sum() > 1
    return given


def puzzles(grids: np.ndarray, count: int) -> tuple[Tensor, Tensor]:
    """Marks of the digits given, and of all, ``(count, 64)``."""
    chosen = grids[rng.integers(len(grids), size=count)]
    given = np.array([puzzle(grid) for grid in chosen])
    marks = np.eye(4)[chosen]
    return torch.as_tensor(marks * given[..., None]).flatten(1), torch.as_tensor(marks).flatten(1)


order = rng.permutation(len(GRIDS))
clues, answers = puzzles(GRIDS[order[:200]], 2000)
test_clues, test_answers = puzzles(GRIDS[order[200:]], 500)
print(f"{len(GRIDS)} grids; {clues.sum(1).mean():.1f} digits given on average, {int(clues.sum(1).min())} at least")

# %%
# The layer, and a network to compare with
# ----------------------------------------
# ``b`` is what ``A`` makes of a positive point, so that there is always a feasible one. The network has two hidden
# layers and many more parameters.


class Rules(nn.Module):
    """Unknown linear rules."""

    def __init__(self, rules: int = 40, curvature: float = 0.1) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.rand(rules, 64))
        self.log_point = nn.Parameter(torch.full((64,), 0.25).log())
        self.register_buffer("P", curvature * torch.eye(64))
        self.layer = QPLayer(solver=DAQP())

    def solve(self, clues: Tensor) -> QPSolution:
        return self.layer.solve(self.P, -clues, A=self.A, b=self.A @ self.log_point.exp(), lb=torch.zeros(64))

    def forward(self, clues: Tensor) -> Tensor:
        return self.solve(clues).x


def solved(guess: Tensor, answers: Tensor) -> Tensor:
    """Which puzzles have every cell right."""
    return (guess.view(-1, 16, 4).argmax(-1) == answers.view(-1, 16, 4).argmax(-1)).all(1)


def train(model: nn.Module, steps: int, rate: float) -> dict[int, tuple[float, float]]:
    """Share of puzzles solved, in training and in the test, now and then."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    shares = {}
    for step in range(1, steps + 1):
        rows = torch.randint(len(clues), (64,))
        loss = F.mse_loss(model(clues[rows]), answers[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % (steps // 15) == 0:
            with torch.no_grad():
                pairs = (clues[:250], answers[:250]), (test_clues[:250], test_answers[:250])
                shares[step] = tuple(float(solved(model(c), a).double().mean()) for c, a in pairs)
    return shares


def size(model: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in model.parameters())} parameters"


start = time.process_time()
rules = Rules()
learned = train(rules, steps=330, rate=0.05)
print(f"the layer: {size(rules)}, {time.process_time() - start:.0f} s of CPU")
start = time.process_time()
network = nn.Sequential(nn.Linear(64, 160), nn.ReLU(), nn.Linear(160, 160), nn.ReLU(), nn.Linear(160, 64))
compared = train(network, steps=6000, rate=1e-2)
print(f"the network: {size(network)}, {time.process_time() - start:.0f} s of CPU")

# %%
# The test
# --------
# All 500 puzzles, of grids that were never seen. Beside the two: the same QP with the true rules, which needs no
# training.

ROWS = np.concatenate([np.eye(4)[group].T for group in GROUPS])  # (12, 16)
TRUE = torch.as_tensor(np.concatenate([np.kron(ROWS, np.eye(4)), np.kron(np.eye(16), np.ones(4))]))
with torch.no_grad():
    solution = rules.solve(test_clues)
    known = QPLayer(solver=DAQP()).solve(rules.P, -test_clues[:50], A=TRUE, b=torch.ones(64), lb=torch.zeros(64))
    guesses = {"learned rules": solution.x, "network": network(test_clues), "true rules, 50 puzzles": known.x}
for name, guess in guesses.items():
    print(f"{name:23} {solved(guess, test_answers[: len(guess)]).double().mean():.1%} of test puzzles solved")
    share = {
        name: solved(model(clues), answers).double().mean() for name, model in (("layer", rules), ("network", network))
    }
print("of training puzzles:", ", ".join(f"{value:.1%} by the {name}" for name, value in share.items()))
degenerate = int(solution.stats["degenerate"].sum()), int(known.stats["degenerate"].sum())
print(f"degenerate samples: {degenerate[0]} of 500 with learned rules, {degenerate[1]} of 50 with the true ones")

# %%
# Right, a test puzzle: digits given are bold, the others are the layer's.

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
figure, (curves, board) = plt.subplots(1, 2, figsize=(8.6, 3.8), layout="constrained", width_ratios=(5, 4))
for shares, color, name in ((learned, "#0072b2", "layer"), (compared, "#d55e00", "network")):
    x = np.array(list(shares)) / max(shares)
    curves.plot(x, [pair[0] for pair in shares.values()], "--", color=color, label=f"{name}, training grids")
    curves.plot(x, [pair[1] for pair in shares.values()], color=color, label=f"{name}, new grids")
curves.set(xlabel="share of its steps", ylabel="puzzles solved", ylim=(-0.03, 1.03))
curves.legend(frameon=False, fontsize="small")
given, digits = test_clues[0].view(16, 4).any(-1), guesses["learned rules"][0].view(16, 4).argmax(-1) + 1
for cell in range(16):
    color, weight = (TEXT, "bold") if given[cell] else ("#0072b2", "normal")
    place = cell % 4 + 0.5, cell // 4 + 0.5
    board.text(*place, str(int(digits[cell])), size=20, color=color, weight=weight, ha="center", va="center")
board.set(xlim=(0, 4), ylim=(4, 0), aspect="equal", xticks=[], yticks=[])
for line in range(5):
    board.axhline(line, color=TEXT, linewidth=2 if line % 2 == 0 else 0.6)
    board.axvline(line, color=TEXT, linewidth=2 if line % 2 == 0 else 0.6)
plt.show()

# %%
# What it shows
# -------------
# - The layer solves what it has never seen: the rules are linear, and linear rules are all that it can learn. The
#   network knows the training grids by heart.
# - Nothing searches here: with the true rules the QP solves these puzzles as well. That says nothing about 9×9 grids.
# - With the true rules every sample is degenerate: 64 equations of rank 40, and at a corner of the polytope more are
#   active than there are unknowns. The answer is right, derivatives are those of least norm (:doc:`/qp/degenerate`),
#   and each sample takes a pseudoinverse, which is much slower. Learned rules are in general position.
