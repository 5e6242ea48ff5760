"""Figures of what solvers do, with matplotlib, from what :func:`difflayers.monitor` collected.

Every function draws where it is told to, or in a figure of its own (``axes.figure.savefig("name.png")``). Nothing is
shown, and no global setting of matplotlib is changed. The colors are told apart without color
vision (Wong 2011, Nature Methods 8, "Points of view: Color blindness").
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from difflayers._monitor import Record, Trace
from difflayers._solution import Status
from difflayers.errors import MissingBackendError, ProblemError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["convergence", "spectral_radius", "training"]

Array = np.ndarray[Any, np.dtype[np.float64]]

BLUE, VERMILION, GREEN, GRAY = "#0072b2", "#d55e00", "#009e73", "#767676"
_ROLES = {"forward": BLUE, "adjoint": VERMILION, "tangent": GREEN}


def convergence(record: Record | Sequence[Record], ax: Axes | None = None, *, relative: bool = False) -> Axes:
    """The residual norm of every sample, iteration by iteration.

    A sample's line ends, with a dot, where it is done; one that failed stands out, and ends with a cross.

    Args:
        record: a solve inside ``monitor(trace=True)``, or such a log, of which the last traced solve is shown.
        ax: where to draw.
        relative: in units of each sample's own tolerance, so that all are done below one.

    Raises:
        ProblemError: there is no trace.
        MissingBackendError: matplotlib isn't installed.
    """
    trace = _trace(record)
    ax = _figure(5.6, 3.6).subplots() if ax is None else ax
    failed = np.array([name != Status.SUCCESS.name for name in trace.status])
    with np.errstate(divide="ignore", invalid="ignore"):  # a tolerance may be zero, where the answer is
        residual = trace.residual / trace.tolerance if relative else trace.residual
    names = ", ".join(f"{count} {name}" for name, count in Counter(trace.status).items() if name != "SUCCESS")
    _samples(ax, residual[:, ~failed], f"{(~failed).sum()} converged", BLUE, "o")
    _samples(ax, residual[:, failed], f"{failed.sum()} failed ({names})", VERMILION, "X")
    started = np.isfinite(trace.residual[0])
    _tolerance(ax, np.ones(1) if relative else trace.tolerance[started])
    ax.set(xlabel="iteration", ylabel="residual norm / tolerance" if relative else "residual norm ‖F(z)‖")
    shown = residual[np.isfinite(residual) & (residual > 0)]
    if shown.size:  # an exact start has nothing that a logarithmic scale could show
        ax.set_yscale("log")
        ax.update_datalim([(0, shown.max() * (shown.max() / shown.min()) ** 0.3)])  # room for the legend
        ax.autoscale_view()
    return _finished(ax)


def training(log: Sequence[Record], figure: Figure | None = None) -> Figure:
    """Iterations, residuals and failures of every solve in a log, forward and for derivatives, in three panels.

    Args:
        log: what :func:`difflayers.monitor` collected over training.
        figure: where to draw; a subfigure will do.

    Raises:
        ProblemError: the log is empty, or isn't one.
        MissingBackendError: matplotlib isn't installed.
    """
    log = _records(log)
    figure = _figure(11, 3.2) if figure is None else figure
    iterations, residuals, failures = figure.subplots(1, 3)
    for role, color in _ROLES.items():
        if not (solves := [record for record in log if record.role == role]):
            continue
        mean, worst = _series(solves, "mean_steps"), _series(solves, "steps")
        thin = {"color": color, "linewidth": 1.0}
        thick = {"color": color, "linewidth": 1.8}
        count = np.arange(1, len(solves) + 1)
        iterations.plot(count, worst, **thin, alpha=0.45, label=f"{role}, worst sample")
        iterations.plot(count, mean, **thick, label=f"{role}, mean")
        residuals.plot(count, _series(solves, "residual"), **thick, label=role)
        failures.plot(count, [100 * s.failed / max(s.samples, 1) for s in solves], **thick, label=role)
    iterations.set(ylabel="iterations", ylim=(0, None))
    if (worst := np.array([s.steps for s in log if s.steps])).size and worst.max() > 8 * np.median(worst):
        iterations.set(yscale="log", ylim=(0.8, None))
        iterations.yaxis.set_major_formatter("{x:g}")
    residuals.set(ylabel="residual norm, worst sample", yscale="log")
    failures.set(ylabel="failed samples (%)", ylim=(-0.5, None))
    failures.set_ylim(top=max(10, failures.get_ylim()[1]))
    for ax in (iterations, residuals, failures):
        ax.set_xlabel("solves so far")
        _finished(ax)
    return figure


def spectral_radius(values: Any, ax: Axes | None = None, *, steps: Sequence[float] | None = None) -> Axes:
    """Estimates of spectral radii, as a histogram or over training; at one, plain iteration stops converging.

    Args:
        values: what :func:`difflayers.fixedpoint.spectral_radius` gave: a tensor or an array. With ``steps``, one of
            them for each. Samples without an estimate (NaN) are left out.
        ax: where to draw.
        steps: the training steps that the values belong to; the figure then shows the median over the samples, the
            middle 80 % and the largest. None is a histogram of all values.

    Raises:
        ProblemError: no value is finite, or ``steps`` has another length than ``values``.
        MissingBackendError: matplotlib isn't installed.
    """
    if steps is not None and (not hasattr(values, "__len__") or len(values) != len(steps)):
        raise ProblemError(f"steps has {len(steps)} entries; pass as many values, one number or tensor for each")
    moments = [_finite(value) for value in ([values] if steps is None else values)]
    if not any(len(moment) for moment in moments):
        raise ProblemError("values holds no finite number; pass what fixedpoint.spectral_radius gave")
    ax = _figure(5.6, 3.6).subplots() if ax is None else ax
    label = "spectral radius of ∂f/∂z (estimate)"
    bound: dict[str, Any] = {
        "color": GRAY,
        "linestyle": "--",
        "linewidth": 1.2,
        "label": "1: plain iteration stops converging",
    }
    if steps is None:
        ax.hist(moments[0], bins="auto", color=BLUE, edgecolor="white", linewidth=0.5)
        ax.axvline(1, **bound)
        ax.set(xlabel=label, ylabel="samples", ylim=(0, 1.2 * ax.get_ylim()[1]))
    else:
        _over_training(ax, moments, np.asarray(steps, dtype=float))
        ax.axhline(1, **bound)
        ax.set(xlabel="training step", ylabel=label, ylim=(0, 1.4 * max(1, *(max(m, default=0) for m in moments))))
    return _finished(ax)


def _records(log: Any) -> list[Record]:
    records = [log] if isinstance(log, Record) else log
    if not isinstance(records, Sequence) or not all(isinstance(record, Record) for record in records):
        raise ProblemError(f"got {type(log).__name__}; pass a Record, or the list that `with monitor() as log` gives")
    if not records:
        raise ProblemError("the log is empty; no solve ran inside monitor()")
    return list(records)


def _trace(record: Record | Sequence[Record]) -> Trace:
    traces = [record.trace for record in _records(record) if record.trace is not None]
    if not traces:
        raise ProblemError(
            "no solve was traced; run it inside `with monitor(trace=True) as log`, with an iterative solver"
        )
    return traces[-1]


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingBackendError("matplotlib", "demo") from error
    return Figure(figsize=(width, height), layout="constrained")


def _finished(ax: Axes) -> Axes:
    from matplotlib.ticker import MaxNLocator

    if ax.get_xlabel().startswith(("iteration", "solves", "training")):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize="small", loc="upper right")  # the best place takes long to find
    return ax


def _samples(ax: Axes, residual: Array, label: str, color: str, marker: str) -> None:
    count = residual.shape[1]
    if not count:
        return
    alpha = float(np.clip(16 / count, 0.2, 0.9))
    ax.plot(residual, color=color, linewidth=1.2, alpha=alpha)
    last = np.isfinite(residual).cumsum(0).argmax(0)  # the first of the largest counts: the last finite one
    ends = residual[last, np.arange(count)]
    ax.plot(last, ends, marker, color=color, markersize=4, markeredgewidth=0, label=label)


def _tolerance(ax: Axes, tolerance: Array) -> None:
    known = tolerance[np.isfinite(tolerance) & (tolerance > 0)]
    if not len(known):
        return
    if known.max() <= 1.1 * known.min():
        ax.axhline(float(known.max()), color=GRAY, linestyle="--", linewidth=1.2, label="tolerance")
    else:  # it goes with the size of a sample's answer
        ax.axhspan(float(known.min()), float(known.max()), color=GRAY, alpha=0.25, linewidth=0, label="tolerances")


def _series(records: list[Record], name: str) -> Array:
    return np.array([getattr(record, name) for record in records], dtype=float)  # None becomes NaN


def _finite(value: Any) -> Array:
    try:
        array = np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value, dtype=float).reshape(-1)
    except (TypeError, ValueError) as error:
        raise ProblemError(f"values must be numbers, got {type(value).__name__}") from error
    finite: Array = array[np.isfinite(array)]
    return finite


def _over_training(ax: Axes, moments: list[Array], steps: Array) -> None:
    low, middle, high, largest = np.array(
        [np.quantile(moment, (0.1, 0.5, 0.9, 1)) if len(moment) else (np.nan,) * 4 for moment in moments]
    ).T
    ax.fill_between(steps, low, high, color=BLUE, alpha=0.2, linewidth=0, label="middle 80 % of samples")
    ax.plot(steps, middle, color=BLUE, linewidth=1.8, label="median")
    ax.plot(steps, largest, color=VERMILION, linewidth=1.2, label="largest")
