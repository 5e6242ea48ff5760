"""The doctor, which has to work where packages are missing."""

import io
import subprocess
import sys

import pytest
from rich.console import Console

from difflayers.demo import _doctor

# Packages that look as if they weren't installed, to imports and to their versions.
WITHOUT = """
import sys
from importlib import metadata
hidden, sys.argv[1:] = sys.argv[1].split(","), sys.argv[2:]
sys.modules.update(dict.fromkeys(hidden))
version = metadata.version
def visible(name):
    if name in hidden:
        raise metadata.PackageNotFoundError(name)
    return version(name)
metadata.version = visible
from difflayers.demo._cli import main
main()
"""


def bare(hidden, *arguments):
    """The command line in an interpreter where the ``hidden`` packages aren't installed."""
    command = [sys.executable, "-c", WITHOUT, hidden, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("hidden", ["rich", "typer,rich,tqdm,matplotlib"])
def test_a_bare_install_gets_the_same_rows(hidden):
    done = bare(hidden, "doctor")
    assert done.returncode == 0, done.stderr
    report = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert [line.split("  ")[0] for line in done.stdout.splitlines()] == [row.what for row in _doctor.rows()]
    for name in hidden.split(","):
        assert report[name] == "not installed: pip install difflayers[demo]"
    assert "against finite differences" in done.stdout


def test_missing_core_packages_are_named_and_fail():
    done = bare("typer,rich,torch,scipy", "doctor")
    assert done.returncode == 1
    assert not done.stderr
    assert "torch           missing: pip install difflayers\n" in done.stdout
    assert "gradient error  unknown until nothing is missing\n" in done.stdout


def test_other_commands_say_what_installs_them():
    done = bare("typer,rich", "demo")
    assert done.returncode == 1
    assert "typer is not installed; run: pip install difflayers[demo]" in done.stderr
    assert "difflayers doctor" in done.stderr


def test_table_says_the_same_as_the_text(monkeypatch):
    monkeypatch.setitem(_doctor.OPTIONAL, "no-such-package", "demo")
    console = Console(width=100, record=True, file=io.StringIO())
    assert _doctor.run(console) == 0
    text = console.export_text()
    assert "not installed: pip install difflayers[demo]" in text
    assert all(row.what in text for row in _doctor.rows())


def test_a_gradient_that_is_wrong_is_a_failure(monkeypatch):
    monkeypatch.setattr(_doctor, "self_check", lambda: 1e-3)
    assert _doctor.exit_code(_doctor.rows()) == 1
