"""The command line: doctor, and the demo in miniature."""

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from difflayers.demo import _commands, _run
from difflayers.demo._data import digits, distort
from difflayers.demo._model import classifier

MINIATURE = replace(_run.QUICK, epochs=1, batch=512)


@pytest.fixture
def float32():
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def results():
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    yield _run.run(MINIATURE, seed=0, device="cpu")
    torch.set_default_dtype(dtype)


@pytest.fixture
def demo(results, monkeypatch, tmp_path):
    def invoke(accuracy):
        def run(budget, *, seed, device):
            assert budget is _run.QUICK
            return replace(results, budget=replace(budget, accuracy=accuracy))

        monkeypatch.setattr(_run, "run", run)
        return CliRunner().invoke(_commands.app, ["demo", "--quick", "--out", str(tmp_path)])

    return invoke


def test_doctor_is_healthy_here():
    result = CliRunner().invoke(_commands.app, ["doctor"])
    assert result.exit_code == 0, result.output
    assert torch.__version__ in result.output


def test_demo_writes_figures_and_metrics(demo, tmp_path):
    result = demo(0.0)
    assert result.exit_code == 0, result.output
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["missed"] == []
    assert metrics["equilibrium"]["gradient_error"] < 1e-5
    assert metrics["equilibrium"]["iterations"] > 1
    # The cell applied to an iterate near the equilibrium reads the same digits as the equilibrium itself.
    assert metrics["equilibrium"]["accuracy_after_iterations"][-1] == pytest.approx(metrics["equilibrium"]["accuracy"])
    assert {path.name for path in tmp_path.glob("*.png")} == {"training.png", "solver.png"}


def test_a_missed_threshold_is_an_exit_code(demo, tmp_path):
    result = demo(1.1)
    assert result.exit_code == 1
    assert "is below 1.1" in result.output
    assert json.loads((tmp_path / "metrics.json").read_text())["missed"]


def test_models_have_equal_parameters():
    counts = {kind: sum(weight.numel() for weight in classifier(kind).parameters()) for kind in _run.NAMES}
    assert counts["equilibrium"] == counts["once"]
    assert counts["explicit"] == pytest.approx(counts["equilibrium"], rel=0.02)


def test_accuracy_is_reproducible_and_leaves_threads_alone(float32):
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        first, seconds = _run.digits_accuracy(0, MINIATURE)
        second, _ = _run.digits_accuracy(0, MINIATURE)
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
