"""What is written down in more than one place: versions, extras, targets."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
from importlib import metadata, resources
from pathlib import Path

import pytest

import difflayers

ROOT = Path(__file__).parents[1]
PROSE = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.rst"), ROOT / ".ci" / "run"]
MAKEFILE = (ROOT / "Makefile").read_text()


@pytest.fixture
def config():
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "setup.cfg")
    return parser


def test_version_is_the_same_everywhere(config):
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1]
    version = config["metadata"]["version"]
    assert [metadata.version("difflayers"), difflayers.__version__, cited] == [version] * 3


def test_lowest_python_is_the_same_everywhere(config):
    minor = re.fullmatch(r">=3\.(\d+)", config["options"]["python_requires"])[1]
    assert f'target-version = "py3{minor}"' in (ROOT / "pyproject.toml").read_text()
    assert f"(3, {minor})" in MAKEFILE


def test_all_is_every_other_extra(config):
    extras = dict(config["options.extras_require"])
    everything = re.fullmatch(r"difflayers\[(.+)\]", extras.pop("all").strip())[1]
    assert sorted(everything.split(",")) == sorted(extras)


def test_extras_that_are_named_exist(config):
    sources = [*PROSE, *ROOT.glob("difflayers/**/*.py"), ROOT / "setup.cfg"]
    named = {path: re.findall(r"difflayers\[([a-z,]+)\]", path.read_text()) for path in sources}
    named[ROOT / "Makefile"] = re.findall(r"\$\(STAMP\)/([a-z]+)", MAKEFILE)
    unknown = [
        (path.name, extra)
        for path, groups in named.items()
        for extra in ",".join(groups).split(",")
        if extra and extra not in config["options.extras_require"]
    ]
    assert not unknown


def test_make_commands_that_are_named_exist():
    command = re.compile(r"(?:`|```\w*\n|^ {4}|^step |&& )make ([a-z]+)", re.MULTILINE)
    targets = set(re.findall(r"^([a-z]+):", MAKEFILE, re.MULTILINE))
    named = {path.name: set(command.findall(path.read_text())) for path in PROSE}
    assert named["run"] == {"lint", "docs", "demo", "test"}
    assert not {name: commands - targets for name, commands in named.items() if commands - targets}


def test_type_hints_are_shipped(config):
    assert "py.typed" in config["options.package_data"]["difflayers"]
    assert resources.files("difflayers").joinpath("py.typed").is_file()


def test_console_script_starts():
    (script,) = metadata.entry_points(group="console_scripts", name="difflayers")
    assert callable(script.load())


@pytest.fixture
def make(tmp_path):
    """Runs make in a directory that has nothing but what make reads."""
    if shutil.which("make") is None:
        pytest.skip("make isn't here")
    for name in ("Makefile", "setup.cfg", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    told = re.compile(r"MAKE.*|" + "|".join(re.findall(r"^(\w+) \?=", MAKEFILE, re.MULTILINE)))  # what make passes on
    clean = {name: value for name, value in os.environ.items() if not told.fullmatch(name)}

    def run(*arguments):
        command = ["make", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True, check=False)

    return run


def script(path, body):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_make_says_when_environments_cannot_be_made(make, tmp_path):
    # As on Debian without python3-venv: it fails after it made half of one.
    half = 'if [ "$1" = -m ]; then mkdir -p "$3/bin"; : > "$3/bin/python"; echo no ensurepip; exit 1; fi'
    for _ in range(2):
        done = make("demo", f"PYTHON={script(tmp_path / 'python', half)}")
        assert done.returncode != 0
        assert "apt install python3-venv" in done.stderr
        assert "no ensurepip" in done.stderr
        assert "make VENV=" in done.stderr
    done = make("demo", f"PYTHON={script(tmp_path / 'python', 'exit 1')}")
    assert "isn't a Python 3.11 or newer" in done.stderr


@pytest.mark.parametrize(
    ("there", "limits"), [("torch==9.9+cu\nnumpy==1.0", "torch==9.9+cu\nnumpy==1.0\n"), ("", None)]
)
def test_make_installs_once_and_keeps_what_is_there(make, tmp_path, there, limits):
    calls, venv = tmp_path / "calls", tmp_path / "own"
    listed = f'case "$*" in *list*) printf "{there}" ;; esac'
    script(venv / "bin" / "python", f'echo "$*" >> "{calls}"; {listed}')
    script(venv / "bin" / "difflayers", 'echo "ran $*"')
    first = make("demo", f"VENV={venv}", "ARGS=--quick")
    assert first.stdout.splitlines()[1:] == ["ran demo --quick"]
    assert "install" in calls.read_text()
    assert (venv / ".difflayers" / "limits.txt").read_text() == (limits or (ROOT / "constraints.txt").read_text())
    calls.unlink()
    assert make("demo", f"VENV={venv}").stdout == "ran demo\n"
    assert not calls.exists()
