"""What an import loads, in fresh interpreters: heavy packages come when they are used, not before."""

import json
import subprocess
import sys

import pytest

import difflayers

HEAVY = ("cvxpy", "matplotlib", "scipy", "torchdiffeq")
PREAMBLE = "import json, sys, time, torch\n"


def fresh(code):
    """What ``code`` leaves in ``answer``, in an interpreter that has imported torch and nothing else."""
    command = [sys.executable, "-c", f"{PREAMBLE}{code}\nprint(json.dumps(answer))"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def loaded_by(code, packages=HEAVY):
    # What torch itself brings along is not counted.
    return fresh(
        f"before = set(sys.modules)\n{code}\nanswer = [p for p in {packages!r} if p in set(sys.modules) - before]"
    )


def test_import_is_fast():
    clock = "start = time.perf_counter()\nimport difflayers\nanswer = time.perf_counter() - start"
    # Noise only adds, so the best of several is what the import takes.
    assert min(fresh(clock) for _ in range(3)) < 0.05


@pytest.mark.parametrize("statement", ["import difflayers", "from difflayers import *"])
def test_import_loads_nothing_heavy(statement):
    assert loaded_by(statement) == []


def test_import_loads_no_area():
    assert loaded_by("import difflayers", tuple(f"difflayers.{name}" for name in difflayers._MODULES)) == []


def test_scipy_loads_when_a_solve_uses_it():
    imported = "import difflayers.fixedpoint as fp"
    made = f"{imported}\nsolver = fp.ScipyRoot()"
    used = f"{made}\nfp.root(lambda z: z - 1, torch.zeros(1, 2), solver=solver)"
    optimize = ("scipy.optimize",)
    assert [loaded_by(code, optimize) for code in (imported, made, used)] == [[], [], ["scipy.optimize"]]


@pytest.mark.parametrize("name", difflayers.__all__)
def test_every_public_name_resolves(name):
    assert getattr(difflayers, name) is not None
    assert name in dir(difflayers)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nonsense"):
        difflayers.nonsense  # noqa: B018
