"""An ODE fitted to the lynx and hares of the Hudson's Bay Company."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from difflayers import monitor
from difflayers.demo._row import Check, Row, Score, float64, gradient_error, live, source
from difflayers.ode import Dopri5, ODESolution, odeint

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Pelts in thousands, 1900 to 1920, from Elton and Nicholson (1942), J. Animal Ecology 11(2), as read off by Howard
# (2009), "Modeling basics".
# fmt: off
HARES = (30, 47.2, 70.2, 77.4, 36.3, 20.6, 18.1, 21.4, 22, 25.4, 27.1,
         40.3, 57, 76.6, 52.3, 19.5, 11.2, 7.6, 14.6, 16.2, 24.7)
LYNX = (4, 6.1, 9.8, 35.2, 59.4, 41.7, 19, 13, 8.3, 9.1, 7.4,
        8, 12.3, 19.5, 45.7, 51.1, 29.7, 15.8, 9.7, 10.1, 8.6)
# fmt: on
FIRST, PERIOD = 1900, 10  # years; the animals' cycle is about ten years long
NAMES = ("hares born", "hares eaten", "lynx died", "lynx born", "hares in 1900", "lynx in 1900")
GUESS = (0.5, 0.03, 0.8, 0.03, 30.0, 4.0)
SOLVER = Dopri5(rtol=1e-8, atol=1e-8)


def rates(t: Tensor, y: Tensor, born: Tensor, eaten: Tensor, died: Tensor, fed: Tensor) -> Tensor:
    """Lotka and Volterra's equations: hares are born and eaten, lynx die and are born of what they eat."""
    hares, lynx = y[..., 0], y[..., 1]
    return torch.stack([(born - eaten * lynx) * hares, (fed * hares - died) * lynx], dim=-1)


def populations(logs: Tensor, years: Tensor) -> ODESolution:
    """Hares and lynx of every year, ``(years, 2)``; ``logs`` of four rates and two populations in 1900."""
    born, eaten, died, fed, hares, lynx = logs.exp()
    return odeint(rates, torch.stack([hares, lynx]), years, (born, eaten, died, fed), solver=SOLVER)


def errors(logs: Tensor, years: Tensor, counts: Tensor) -> Tensor:
    """Of the logarithms: counts are off by a factor."""
    logarithms: Tensor = populations(logs, years).ys.log()
    return logarithms - counts.log()


def run(quick: bool) -> Row:
    """Fit, forecast, error bars."""
    start = time.perf_counter()
    with float64():
        counts = torch.tensor([HARES, LYNX]).mT
        years = torch.arange(len(counts), dtype=torch.float64)
        logs = fit(years, counts, 15 if quick else 60)
        known = len(counts) - 5
        early = fit(years[:known], counts[:known], 15 if quick else 60, "ODE, without the last five years")
        score = Score(
            "error of a five-year forecast, log counts",
            root_mean_square(errors(early, years, counts)[known:]),
            "what it was ten years before",
            root_mean_square((counts[known - PERIOD : -PERIOD] / counts[known:]).log()),
        )
        return _row(logs, early, years, counts, score, start)


def fit(years: Tensor, counts: Tensor, steps: int, what: str = "ODE") -> Tensor:
    """The logarithms of the parameters that fit best, by Gauss–Newton steps, damped where they would go too far."""
    logs, damping = torch.tensor(GUESS).log(), 1e-2
    with monitor() as log, tqdm(range(steps), desc=what, unit="step") as bar:
        for _ in bar:
            jacobian = torch.func.jacrev(errors)(logs, years, counts).reshape(-1, len(logs))
            rest = errors(logs, years, counts).reshape(-1)
            normal = jacobian.mT @ jacobian
            step = torch.linalg.solve(normal + damping * normal.diagonal().diag(), -jacobian.mT @ rest)
            after = errors(logs + step, years, counts).square().sum()
            better = bool(after < rest.square().sum())
            logs, damping = (logs + step, damping / 5) if better else (logs, damping * 5)
            bar.set_postfix(live(log, error=f"{float(rest.square().mean().sqrt()):.3f}"), refresh=False)
            if float(step.abs().max()) < 1e-6:
                break
    return logs


def deviations(logs: Tensor, years: Tensor, counts: Tensor) -> Tensor:
    """Standard deviations of the logarithms of the parameters: ``σ² (JᵀJ)⁻¹``, with ``σ`` from what isn't explained."""
    jacobian = torch.func.jacfwd(errors)(logs, years, counts).reshape(-1, len(logs))
    rest = errors(logs, years, counts)
    variance = rest.square().sum() / (rest.numel() - len(logs))
    covariance: Tensor = variance * torch.linalg.inv(jacobian.mT @ jacobian)
    return covariance.diagonal().sqrt()


def slope_error(logs: Tensor, years: Tensor, step: float = 1e-3) -> float:
    """The largest difference between the slope of the populations and what the equations say, relative."""
    inside = years[1:-1]
    moments = torch.stack([inside - step, inside, inside + step], dim=1).flatten()
    ys = populations(logs, torch.cat([years[:1], moments])).ys[1:].unflatten(0, (-1, 3))
    said = rates(inside, ys[:, 1], *logs.exp()[:4])
    return float(((ys[:, 2] - ys[:, 0]) / (2 * step) - said).abs().max() / said.abs().max())


def root_mean_square(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def _row(logs: Tensor, early: Tensor, years: Tensor, counts: Tensor, score: Score, start: float) -> Row:
    from scipy.integrate import solve_ivp

    solution = populations(logs, years)
    plain = logs.exp().numpy()

    def field(_: float, y: Any) -> list[float]:
        return [(plain[0] - plain[1] * y[1]) * y[0], (plain[3] * y[0] - plain[2]) * y[1]]

    scipy = solve_ivp(field, (0, float(years[-1])), plain[4:], "DOP853", years.numpy(), rtol=1e-12, atol=1e-12)
    difference = float(np.abs(scipy.y.T / solution.ys.numpy() - 1).max())
    # At the guess: at the best fit the gradient is zero.
    error = gradient_error(lambda logs: errors(logs, years, counts).square().sum(), torch.tensor(GUESS).log())
    bars = deviations(logs, years, counts)
    in_sample = root_mean_square(errors(logs, years, counts))
    checks = [
        Check("error of the fitted ODE, log counts", in_sample, 0.3),
        Check("gradient error of the ODE", error, 1e-4),
        Check("difference from SciPy", difference, 1e-5),
    ]
    fitted = {name: [float(v), float(v * bar)] for name, v, bar in zip(NAMES, logs.exp(), bars, strict=True)}
    notes = ["Parameters: " + ", ".join(f"{name} {v:.3g} ± {bar:.2g}" for name, (v, bar) in fitted.items()) + "."]
    return Row(
        "ODE",
        "lynx and hares, 1900–1920",
        score,
        float(solution.stats["steps"]),
        slope_error(logs, years),
        error,
        "SciPy's DOP853",
        difference,
        time.perf_counter() - start,
        checks,
        source(rates, populations, errors),
        {"Populations, and parameters with error bars": _figure(logs, early, bars, years, counts)},
        notes,
        {"parameters": fitted, "error": in_sample},
    )


def _figure(logs: Tensor, early: Tensor, bars: Tensor, years: Tensor, counts: Tensor) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    fine = torch.linspace(0, float(years[-1]), 400, dtype=torch.float64)
    for k, (name, color) in enumerate((("hares", "#0072b2"), ("lynx", "#d55e00"))):
        left.plot(FIRST + years, counts[:, k], "o", color=color, label=name, markersize=4)
        left.plot(FIRST + fine, populations(logs, fine).ys[:, k], color=color)
        later = fine[fine >= years[-6]]
        after = populations(early, torch.cat([years[:1], later])).ys[1:, k]
        left.plot(FIRST + later, after, "--", color=color, label=f"{name}, forecast")
    left.set(ylabel="pelts, thousands", xticks=range(FIRST, FIRST + len(years), 5))
    left.legend(loc="upper right", frameon=False, fontsize="small")
    values = logs.exp() / torch.tensor(GUESS)
    right.errorbar(
        values.numpy(), range(len(NAMES)), xerr=(2 * values * bars).numpy(), fmt="o", color="#0072b2", capsize=3
    )
    right.axvline(1, color="gray", linewidth=0.8, linestyle=":")
    right.set_yticks(range(len(NAMES)), NAMES)
    right.set(xlabel="fitted ÷ first guess, ± 2 standard deviations")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure
