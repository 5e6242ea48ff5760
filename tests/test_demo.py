"""The command line: doctor, and the demo in miniature."""

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from difflayers.demo import _commands, _run


@pytest.fixture
def run(monkeypatch, tmp_path):
    torch.set_default_dtype(torch.float32)

    def invoke(accuracy):
        monkeypatch.setattr(_run, "QUICK", replace(_run.QUICK, epochs=1, batch=512, accuracy=accuracy))
        return CliRunner().invoke(_commands.app, ["demo", "--quick", "--out", str(tmp_path)])

    return invoke


def test_doctor_is_healthy_here():
    result = CliRunner().invoke(_commands.app, ["doctor"])
    assert result.exit_code == 0, result.output
    assert torch.__version__ in result.output


def test_demo_writes_figures_and_metrics(run, tmp_path):
    result = run(0.0)
    assert result.exit_code == 0, result.output
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["missed"] == []
    assert metrics["equilibrium"]["gradient_error"] < 1e-5
    assert metrics["equilibrium"]["iterations"] > 1
    assert {path.name for path in tmp_path.glob("*.png")} == {"training.png", "solver.png"}


def test_a_missed_threshold_is_an_exit_code(run, tmp_path):
    result = run(1.1)
    assert result.exit_code == 1
    assert "is below 1.1" in result.output
    assert json.loads((tmp_path / "metrics.json").read_text())["missed"]
