"""Figures hold what the records say; nothing global is touched."""

import io
import sys

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from difflayers import Record, Trace, monitor, plot
from difflayers.errors import MissingBackendError, ProblemError
from difflayers.fixedpoint import DEQ, Picard, fixed_point

NAN = float("nan")
TRACE = Trace(
    np.array([[1.0, 2, 3], [0.1, 0.5, 3], [1e-3, 0.2, NAN], [NAN, 0.3, NAN]]),
    np.array([1e-2, 1e-2, 1e-2]),
    ("SUCCESS", "STALLED", "NONFINITE"),
)


def record(role="forward", steps=3, mean=2.0, residual=1e-3, failed=0, trace=None):
    status = {"SUCCESS": 3 - failed, "STALLED": failed}
    return Record(role, "mine", 3, steps, 4, residual, status, 0.1, mean, trace)


def lines(ax, color):
    """The curves of one color, markers aside."""
    return [line for line in ax.lines if to_hex(line.get_color()) == color and line.get_linestyle() == "-"]


def labels(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def marks(ax):
    return {line.get_marker(): line.get_xydata().tolist() for line in ax.lines if line.get_linestyle() == "None"}


def test_convergence_shows_every_sample_and_where_it_ended():
    ax = plot.convergence(record(trace=TRACE))
    (good,) = lines(ax, plot.BLUE)
    np.testing.assert_array_equal(good.get_ydata(), TRACE.residual[:, 0])
    np.testing.assert_array_equal([line.get_ydata() for line in lines(ax, plot.VERMILION)], TRACE.residual[:, 1:].T)
    assert marks(ax) == {"o": [[2, 1e-3]], "X": [[3, 0.3], [1, 3]]}
    assert labels(ax) == ["1 converged", "2 failed (1 STALLED, 1 NONFINITE)", "tolerance"]
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_yscale()) == ("iteration", "residual norm ‖F(z)‖", "log")
    assert [line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == "--"] == [1e-2]


def test_convergence_in_units_of_the_tolerance():
    ax = plot.convergence(record(trace=TRACE), relative=True)
    np.testing.assert_allclose(lines(ax, plot.BLUE)[0].get_ydata()[:3], [100, 10, 0.1])
    assert [line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == "--"] == [1]


def test_tolerances_that_differ_are_a_band_over_samples_that_started():
    residual = np.array([[1.0, 1, NAN], [0.1, 0.1, NAN]])
    trace = Trace(residual, np.array([1e-3, 1e-1, 1e-9]), ("SUCCESS", "SUCCESS", "NONFINITE"))
    ax = plot.convergence(record(trace=trace))
    assert labels(ax)[-1] == "tolerances"
    (band,) = ax.patches
    np.testing.assert_allclose(
        sorted({y for _, y in band.get_path().vertices * [1, band.get_height() or 1]}), [0, 1e-1 - 1e-3]
    )
    assert band.get_y() == pytest.approx(1e-3)


def test_convergence_of_a_log_is_that_of_its_last_traced_solve():
    slope = torch.tensor([[0.1], [0.5], [1.5]])
    with monitor(trace=True) as log:
        for size in (2, 3):
            fixed_point(lambda z, s: s * z + 1, torch.zeros(size, 1), (slope[:size],), batch_dims=1,
                        solver=Picard(max_steps=60), on_failure="ignore")  # fmt: skip
    ax = plot.convergence(log)
    assert len(lines(ax, plot.BLUE)) == 2
    assert len(lines(ax, plot.VERMILION)) == 1


@pytest.mark.parametrize("relative", [False, True])
def test_convergence_of_a_start_that_is_exact_or_not_finite(relative):
    with monitor(trace=True) as log:
        fixed_point(lambda z, a: a * z, torch.zeros(2, 1), (torch.tensor([[0.5], [NAN]]),), batch_dims=1,
                    solver=Picard(rtol=0.0, atol=0.0), on_failure="ignore")  # fmt: skip
    ax = plot.convergence(log, relative=relative)
    ax.figure.savefig(io.BytesIO(), format="png")
    assert labels(ax)[:2] == ["1 converged", "1 failed (1 NONFINITE)"]


def test_training_draws_each_role_in_its_color():
    log = [record(steps=4, mean=3.5), record("adjoint", steps=7, mean=6.0, residual=1e-6), record(steps=9, failed=1)]
    iterations, residuals, failures = plot.training(log).axes
    assert labels(iterations) == ["forward, worst sample", "forward, mean", "adjoint, worst sample", "adjoint, mean"]
    assert [line.get_ydata().tolist() for line in lines(iterations, plot.BLUE)] == [[4, 9], [3.5, 2]]
    assert [line.get_ydata().tolist() for line in lines(iterations, plot.VERMILION)] == [[7], [6]]
    assert lines(residuals, plot.BLUE)[0].get_ydata().tolist() == [1e-3, 1e-3]
    assert lines(residuals, plot.VERMILION)[0].get_ydata().tolist() == [1e-6]
    np.testing.assert_allclose(lines(failures, plot.BLUE)[0].get_ydata(), [0, 100 / 3])
    assert residuals.get_yscale() == "log"
    assert failures.get_ylabel() == "failed samples (%)"
    assert {ax.get_xlabel() for ax in (iterations, residuals, failures)} == {"solves so far"}


def test_training_leaves_out_what_a_solver_does_not_count():
    iterations, residuals, _ = plot.training([record(steps=None, mean=None, residual=None), record()]).axes
    np.testing.assert_array_equal(lines(iterations, plot.BLUE)[0].get_ydata(), [NAN, 3])
    np.testing.assert_array_equal(lines(residuals, plot.BLUE)[0].get_ydata(), [NAN, 1e-3])


def test_training_changes_scale_for_outliers():
    calm = plot.training([record(steps=10)] * 9).axes[0]
    wild = plot.training([*[record(steps=10)] * 9, record(steps=400)]).axes[0]
    assert (calm.get_yscale(), wild.get_yscale()) == ("linear", "log")


def test_training_of_a_real_log():
    layer = DEQ(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh()))
    with monitor() as log:
        for _ in range(2):
            layer(init=torch.zeros(2, 3)).sum().backward()
    iterations = plot.training(log, Figure()).axes[0]
    assert lines(iterations, plot.BLUE)[0].get_ydata().tolist() == [r.steps for r in log if r.role == "forward"]


def test_spectral_radius_of_one_moment_is_a_histogram():
    ax = plot.spectral_radius(torch.tensor([[0.2, 0.9], [NAN, 1.1]]))
    assert sum(bar.get_height() for bar in ax.patches) == 3
    assert ax.get_xlabel() == "spectral radius of ∂f/∂z (estimate)"
    assert ax.get_ylabel() == "samples"
    assert [line.get_xdata()[0] for line in ax.lines] == [1]


def test_spectral_radius_over_training():
    values = [torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.4, NAN, 0.6]), torch.tensor([NAN])]
    ax = plot.spectral_radius(values, steps=[0, 10, 20])
    (middle,), (largest,) = lines(ax, plot.BLUE), lines(ax, plot.VERMILION)
    np.testing.assert_allclose(middle.get_ydata(), [0.2, 0.5, NAN])
    np.testing.assert_allclose(largest.get_ydata(), [0.3, 0.6, NAN])
    assert middle.get_xdata().tolist() == [0, 10, 20]
    assert labels(ax) == ["middle 80 % of samples", "median", "largest", "1: plain iteration stops converging"]


@pytest.mark.parametrize("draw", [plot.convergence, plot.training])
@pytest.mark.parametrize("log", [[], None, "log", 3, [1], {"steps": 3}])
def test_what_is_not_a_log_is_refused(draw, log):
    with pytest.raises(ProblemError, match="monitor"):
        draw(log)


def test_a_record_without_trace_says_how_to_get_one():
    with pytest.raises(ProblemError, match=r"monitor\(trace=True\)"):
        plot.convergence(record())


@pytest.mark.parametrize(
    ("values", "steps", "message"),
    [
        ([], None, "no finite"),
        (torch.tensor([NAN]), None, "no finite"),
        ("radius", None, "numbers"),
        ([0.1], [1, 2], "2 entries; pass as many"),
        (0.5, [1], "1 entries; pass as many"),
    ],
)
def test_bad_values_are_refused(values, steps, message):
    with pytest.raises(ProblemError, match=message):
        plot.spectral_radius(values, steps=steps)


def test_figures_are_their_own_and_global_state_is_untouched():
    settings = dict(matplotlib.rcParams)
    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert plot.convergence(record(trace=TRACE), left) is left
    assert plot.spectral_radius([0.5], right) is right
    assert plot.training([record()], figure) is figure
    assert isinstance(plot.convergence(record(trace=TRACE)).figure, Figure)
    assert dict(matplotlib.rcParams) == settings
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for draw in (
        lambda: plot.convergence(record(trace=TRACE)),
        lambda: plot.training([record()]),
        lambda: plot.spectral_radius([0.5]),
    ):
        with pytest.raises(MissingBackendError, match=r"pip install difflayers\[demo\]"):
            draw()
