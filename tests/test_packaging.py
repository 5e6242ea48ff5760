"""What is written down in more than one place: versions, extras, targets."""

from __future__ import annotations

import configparser
import re
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
