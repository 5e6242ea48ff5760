"""A cone program of CVXPY's as a layer: penalties of a group lasso, tuned by the gradient of the validation error."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

import cvxpy as cp
import torch
from torch import Tensor
from tqdm import tqdm

from difflayers import monitor
from difflayers.demo._row import Check, Row, Score, float64, gradient_error, live, source
from difflayers.qp import CvxpyLayer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KNOTS = 4  # a feature is a group: itself, and its hinges at so many quantiles
FOLDS = 5


class Fit(NamedTuple):
    """A regression, reduced to ``‖Rw - z‖²``, and what it is tried on."""

    R: Tensor
    z: Tensor
    x: Tensor
    y: Tensor


def group_lasso(groups: list[slice], unknowns: int) -> tuple[CvxpyLayer, cp.Problem]:
    """``min ‖Rw - z‖² + Σ penaltyₖ ‖w of group k‖``, from data and penalties to weights."""
    R, z = cp.Parameter((unknowns, unknowns), "R"), cp.Parameter(unknowns, "z")
    penalties, w = cp.Parameter(len(groups), "penalties", nonneg=True), cp.Variable(unknowns)
    norms = sum(penalties[k] * cp.norm(w[group]) for k, group in enumerate(groups))  # type: ignore[attr-defined]
    problem = cp.Problem(cp.Minimize(cp.sum_squares(R @ w - z) + norms))  # type: ignore[attr-defined]
    return CvxpyLayer(problem, [R, z, penalties], [w]), problem


def run(quick: bool) -> Row:
    """One penalty for all groups, and one for each."""
    start = time.perf_counter()
    with float64():
        x, y, x_test, y_test, groups, names = _data()
        folds, whole = _folds(x, y), _fit(x, y, x_test, y_test)
        layer, problem = group_lasso(groups, x.shape[1])
        grid = torch.linspace(-5, 0, 6 if quick else 16)
        with torch.no_grad():
            same = grid[:, None].expand(-1, len(groups))
            one = same[int(torch.stack([_error(layer, folds, logs) for logs in same]).argmin())]
        each, losses = _tuned(layer, folds, one, 8 if quick else 40)
        test = {k: float(_error(layer, whole, logs)) for k, logs in (("one", one), ("each", each))}
        return _row(layer, problem, (folds, whole), (one, each), losses, test, names, start)


def _data() -> tuple[Any, ...]:
    """Scikit-learn's 442 patients with diabetes, a quarter for testing; features standardized, then hinges of each."""
    from sklearn.datasets import load_diabetes

    raw = load_diabetes()
    x, y = torch.as_tensor(raw.data), torch.as_tensor(raw.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[: 3 * len(x) // 4], order[3 * len(x) // 4 :]
    columns: list[Tensor] = []
    groups: list[slice] = []
    for feature in x.mT:
        knots = torch.quantile(feature[train], torch.linspace(0, 1, KNOTS + 2)[1:-1]).unique()
        own = [feature, *[torch.relu(feature - knot) for knot in knots]]
        own = own if len(feature.unique()) > 2 else own[:1]
        groups.append(slice(len(columns), len(columns) + len(own)))
        columns += own
    wide = torch.stack(columns, dim=1)
    wide = (wide - wide[train].mean(0)) / wide[train].std(0)
    y = (y - y[train].mean()) / y[train].std()
    return wide[train], y[train], wide[test], y[test], groups, raw.feature_names


def _fit(x: Tensor, y: Tensor, x_other: Tensor, y_other: Tensor) -> Fit:
    Q, R = torch.linalg.qr(x)
    size = len(x) ** 0.5
    return Fit(*[part[None] for part in (R / size, Q.mT @ y / size, x_other, y_other)])


def _folds(x: Tensor, y: Tensor) -> Fit:
    """Each fifth of the data is tried on after a fit to the others; all fits are one batch."""
    size = len(x) // FOLDS
    parts = []
    for k in range(FOLDS):
        left_out = torch.zeros(len(x), dtype=torch.bool)
        left_out[k * size : (k + 1) * size] = True
        parts.append(_fit(x[~left_out], y[~left_out], x[left_out], y[left_out]))
    return Fit(*[torch.cat(tensors) for tensors in zip(*parts, strict=True)])


def _error(layer: CvxpyLayer, fit: Fit, logs: Tensor) -> Tensor:
    """The mean squared error on what was left out; ``logs`` of the penalties."""
    (w,) = layer(fit.R, fit.z, logs.exp())
    rest: Tensor = (fit.x @ w.unsqueeze(-1)).squeeze(-1) - fit.y
    return rest.square().mean()


def _tuned(layer: CvxpyLayer, folds: Fit, start: Tensor, steps: int) -> tuple[Tensor, list[float]]:
    logs, losses = start.clone().requires_grad_(), []
    optimizer = torch.optim.Adam([logs], lr=0.15)
    with monitor() as log, tqdm(range(steps), desc="cone program", unit="step", mininterval=0.5) as bar:
        for _ in bar:
            loss = _error(layer, folds, logs)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            bar.set_postfix(live(log, validation=f"{losses[-1]:.4f}"), refresh=False)
    return logs.detach(), losses


def _row(
    layer: CvxpyLayer,
    problem: cp.Problem,
    fits: tuple[Fit, Fit],
    penalties: tuple[Tensor, Tensor],
    losses: list[float],
    test: dict[str, float],
    names: list[str],
    start: float,
) -> Row:
    (folds, fit), logs = fits, penalties[1]
    solution = layer.solve(fit.R, fit.z, logs.exp())
    error = gradient_error(lambda logs: _error(layer, folds, logs), logs)
    for name, value in (("R", fit.R[0]), ("z", fit.z[0]), ("penalties", logs.exp())):
        problem.param_dict[name].value = value.numpy()
    problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-9, tol_gap_rel=1e-9, tol_feas=1e-9)  # type: ignore[no-untyped-call]
    difference = float(abs(problem.variables()[0].value - solution.value[0][0].detach().numpy()).max())
    residual = float(solution.stats["residual"].max())
    checks = [
        Check("gradient error of the cone program", error, 1e-5),
        Check("difference from CVXPY", difference, 1e-4),
        Check("residual of the cone program", residual, 1e-8),
    ]
    return Row(
        "cone program",
        "penalties for 10 features of 442 diabetics",
        Score("test error", test["each"], "one penalty, same validation", test["one"]),
        float(solution.stats["steps"].double().mean()),
        residual,
        error,
        "CVXPY with Clarabel",
        difference,
        time.perf_counter() - start,
        checks,
        source(group_lasso, _error),
        {"Validation error, and penalties": _figure(penalties, losses, names)},
        [f"The validation error fell from {losses[0]:.3f} to {losses[-1]:.3f}."],
        {"losses": losses, "penalties": logs.exp().tolist()},
    )


def _figure(penalties: tuple[Tensor, Tensor], losses: list[float], names: list[str]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(losses, color="#0072b2")
    left.set(xlabel="step", ylabel="validation error")
    right.bar(names, penalties[1].exp().tolist(), color="#0072b2", label="one each")
    right.axhline(float(penalties[0][0].exp()), color="#d55e00", linestyle="--", label="one for all")
    right.set(yscale="log", ylabel="penalty")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure
