"""Where the modules are, and that nothing loads them by the way."""

import subprocess
import sys
from pathlib import Path

import difflayers.compat

MODULES = ("torchdiffeq", "qpth.qp", "cvxpylayers.torch", "torchdeq")
PEERS = {"torchdiffeq", "cvxpylayers", "qpth", "torchdeq", "cvxpy"}


def printed(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_they_are_submodules_only():
    areas = "difflayers.ode, difflayers.qp, difflayers.fixedpoint"
    found = printed(f"import sys, difflayers, {areas}\nprint(hasattr(difflayers, 'compat'), *sys.modules)")
    assert found[0] == "False"
    assert not [name for name in found if name.startswith("difflayers.compat")]


def test_they_load_no_peer_nor_cvxpy():
    imports = "\n".join(f"import difflayers.compat.{module}" for module in MODULES)
    assert PEERS.isdisjoint(printed(f"import sys\n{imports}\nprint(*sys.modules)"))


def test_they_are_thin():
    paths = Path(difflayers.compat.__file__).parent.rglob("*.py")
    assert all(len(path.read_text().splitlines()) < 150 for path in paths)
