"""The command line: the demo in miniature, and what it reports."""

import json
from dataclasses import replace
from importlib import metadata

import pytest
import torch
from typer.testing import CliRunner

from difflayers.demo import _commands, _digits, _digits_row, _dispatch, _failure, _penalties, _predators, _report, _run
from difflayers.demo._data import digits, distort
from difflayers.demo._model import classifier
from difflayers.demo._row import Check, Score

MINIATURE = replace(_digits.QUICK, epochs=1, batch=512, accuracy=0.0)


@pytest.fixture
def float32():
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def rows():
    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr(_digits_row, "QUICK", MINIATURE)
        torch.set_default_dtype(torch.float32)
        rows, failure = _run.run(True, seed=0, device="cpu")
        torch.set_default_dtype(torch.float64)
    return rows, failure


def test_doctor_is_healthy_here():
    result = CliRunner().invoke(_commands.app, ["doctor"])
    assert result.exit_code == 0, result.output
    assert metadata.version("torch") in result.output


def test_every_family_is_exact_and_held_to_something(rows):
    families = {row.family: row for row in rows[0]}
    assert set(families) == {"deep equilibrium", "ODE", "QP", "cone program"}
    for row in families.values():
        assert row.missed == [], row.family
        assert row.gradient_error < 1e-4
        assert row.difference < 1e-4
        assert row.iterations > 1
        assert len(row.code.splitlines()) >= 5
    assert families["ODE"].score.beats
    assert families["QP"].score.beats


def test_the_fitted_rates_are_those_of_the_literature(rows):
    # Carpenter 2018, "Predator-prey population dynamics: the Lotka-Volterra model in Stan": posterior means.
    fitted = next(row for row in rows[0] if row.family == "ODE").details["parameters"]
    for name, expected in {"hares born": 0.55, "hares eaten": 0.028, "lynx died": 0.80, "lynx born": 0.024}.items():
        value, deviation = fitted[name]
        assert abs(value - expected) < deviation


def test_report_and_metrics(rows, monkeypatch, tmp_path):
    monkeypatch.setattr(_run, "run", lambda quick, *, seed, device: rows)
    result = CliRunner().invoke(_commands.app, ["demo", "--quick", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "INFEASIBLE" in result.output
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["missed"] == []
    assert metrics["families"]["deep equilibrium"]["equilibrium"]["iterations"] > 1
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == sum(len(row.figures) for row in rows[0])
    assert 'src="http' not in page
    assert 'href="http' not in page
    assert all(row.family in page for row in rows[0])


def test_a_missed_threshold_is_an_exit_code(rows, monkeypatch, tmp_path):
    missed = replace(rows[0][0], checks=[Check("test accuracy", 0.5, 1.1, at_least=True)], figures={})
    monkeypatch.setattr(_run, "run", lambda quick, *, seed, device: ([missed], rows[1]))
    result = CliRunner().invoke(_commands.app, ["demo", "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "is below 1.1" in result.output
    assert json.loads((tmp_path / "metrics.json").read_text())["missed"]


def test_a_baseline_that_is_not_beaten_is_shown(rows):
    losing = replace(rows[0][0], score=Score("error", 2.0, "somebody", 1.0))
    assert any("not beaten" in cell for cell in _report.cells(losing))


def test_the_failure_has_a_status_a_proof_and_advice():
    text = _failure.infeasible()
    assert "INFEASIBLE" in text
    assert "(1.000, 1.000)" in text
    assert "x is nan, its gradient zero" in text


def test_the_dispatch_cost_is_that_of_pandapower():
    grid = _dispatch.Grid.ieee30()
    x = _dispatch.dispatch(grid, grid.quadratic, grid.linear, torch.tensor([grid.demand]), *_dispatch._bounds(grid)).x[
        0
    ]
    assert float(x.square() @ grid.quadratic / 2 + x @ grid.linear) == pytest.approx(grid.cost, rel=1e-6)


def test_folds_leave_every_patient_out_once_at_most():
    x, y, *_ = _penalties._data()
    folds = _penalties._folds(x, y)
    left_out = folds.y.flatten()
    assert len(left_out) == len(y) // _penalties.FOLDS * _penalties.FOLDS
    torch.testing.assert_close(left_out.sort().values, y[: len(left_out)].sort().values)


def test_error_bars_grow_with_what_is_not_explained():
    years, logs = torch.arange(8.0), torch.tensor(_predators.GUESS).log()
    counts = _predators.populations(logs, years).ys
    noise = torch.randn(counts.shape, generator=torch.Generator().manual_seed(0))
    small, large = (_predators.deviations(logs, years, counts * (size * noise).exp()) for size in (0.1, 0.2))
    torch.testing.assert_close(large, 2 * small)


def test_models_have_equal_parameters():
    counts = {kind: sum(weight.numel() for weight in classifier(kind).parameters()) for kind in _digits.NAMES}
    assert counts["equilibrium"] == counts["once"]
    assert counts["explicit"] == pytest.approx(counts["equilibrium"], rel=0.02)


def test_accuracy_is_reproducible_and_leaves_threads_alone(float32):
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        first, seconds = _digits.digits_accuracy(0, MINIATURE)
        second, _ = _digits.digits_accuracy(0, MINIATURE)
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    assert first == second
    assert seconds > 0


def test_distortions_are_small_and_differ_between_images(float32):
    torch.manual_seed(0)
    images = digits(0, "cpu").x[:1].expand(50, -1, -1, -1)
    distorted = distort(images)
    assert distorted.shape == images.shape
    center = [(image * torch.arange(8.0)).sum() / image.sum() for image in distorted[:, 0]]
    original = (images[0, 0] * torch.arange(8.0)).sum() / images[0, 0].sum()
    moved = (torch.stack(center) - original).abs()
    assert 0.1 < moved.mean() < 1
    assert moved.max() < 1.5
