"""Whether an installed package is whole and works: what ``make dist`` runs where nothing else of this repository is.

Run as ``python -I tests/smoke.py``; it needs what the package requires, no extras and no pytest.
"""

import subprocess
import sys
from importlib import metadata
from pathlib import Path


def contents():
    files = [path.as_posix() for path in metadata.files("difflayers")]
    here = {"difflayers", f"difflayers-{metadata.version('difflayers')}.dist-info", ".."}  # ..: bin/difflayers
    strays = [path for path in files if path.split("/")[0] not in here or "tests" in path.split("/")]
    assert not strays, f"the package installs what isn't its own: {strays}"
    needed = {"difflayers/py.typed", "difflayers/demo/report.html.jinja"}
    assert needed <= set(files), f"the package lacks {sorted(needed - set(files))}"


def imports():
    import difflayers

    place = Path(difflayers.__file__).resolve()
    assert place.is_relative_to(Path(sys.prefix).resolve()), f"{place} isn't the installed package"
    assert difflayers.__version__ == metadata.version("difflayers")
    assert all(hasattr(difflayers, name) for name in difflayers.__all__)
    assert all(difflayers.available_solvers(area) for area in ("fixedpoint", "qp", "ode"))


def quadratic_program():
    import torch

    from difflayers.qp import solve_qp

    q = torch.tensor([-1.0, -3.0, 2.0], dtype=torch.float64, requires_grad=True)
    P, ones = torch.eye(3, dtype=q.dtype), torch.ones(1, 3, dtype=q.dtype)
    x = solve_qp(P, q, A=ones, b=ones[:, 0], lb=torch.zeros_like(q)).x  # the projection of -q on the simplex
    torch.testing.assert_close(x, torch.tensor([0.0, 1.0, 0.0], dtype=q.dtype))
    x = solve_qp(P, q, A=ones, b=ones[:, 0]).x  # -q less its mean, plus a third
    (gradient,) = torch.autograd.grad(x[0], q)
    torch.testing.assert_close(gradient, torch.tensor([-2.0, 1.0, 1.0], dtype=q.dtype) / 3)


def fixed_point():
    import torch

    from difflayers.fixedpoint import fixed_point

    a = torch.tensor([2.0, 9.0], dtype=torch.float64, requires_grad=True)
    root = fixed_point(lambda z, a: (z + a / z) / 2, torch.ones_like(a), (a,)).value
    torch.testing.assert_close(root, a.sqrt())
    (gradient,) = torch.autograd.grad(root.sum(), a)
    torch.testing.assert_close(gradient, 0.5 / a.detach().sqrt())


def differential_equation():
    import torch

    from difflayers.ode import odeint

    rate = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.0, 1.0], dtype=rate.dtype)
    end = odeint(lambda t, y, rate: -rate * y, torch.ones_like(rate), t, (rate,)).ys[-1]
    (gradient,) = torch.autograd.grad(end.sum(), rate)
    torch.testing.assert_close(end, (-rate).exp(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradient, -(-rate).exp().detach(), rtol=1e-4, atol=1e-6)


def cvxpy_layer():
    import cvxpy
    import torch

    from difflayers.qp import CvxpyLayer

    x, center = cvxpy.Variable(2), cvxpy.Parameter(2)
    problem = cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(x - center)), [cvxpy.norm(x) <= 1])
    at = torch.tensor([3.0, 4.0], dtype=torch.float64, requires_grad=True)
    (nearest,) = CvxpyLayer(problem, parameters=[center], variables=[x])(at)
    (gradient,) = torch.autograd.grad(nearest[0], at)
    torch.testing.assert_close(nearest, torch.tensor([0.6, 0.8], dtype=at.dtype))
    torch.testing.assert_close(gradient, torch.tensor([0.128, -0.096], dtype=at.dtype))  # (I - uuᵀ) / |center|


def doctor():
    subprocess.run([Path(sys.executable).with_name("difflayers"), "doctor"], check=True)


if __name__ == "__main__":
    for check in (contents, imports, quadratic_program, fixed_point, differential_equation, cvxpy_layer, doctor):
        check()
        print(f"{check.__name__.replace('_', ' ')}: as it should be", flush=True)
