"""Bars: what they say, when they are silent, and that they end."""

import inspect
import io
import sys
import time

import cvxpy as cp
import pytest
import torch

import difflayers
from difflayers import CallableSolver, ImplicitFunction, RootProblem, UnrolledAdjoint, _progress, monitor, progress
from difflayers.errors import MissingBackendError, SolverError
from difflayers.fixedpoint import (
    DEQ,
    MonotoneConvDEQ,
    MonotoneDEQ,
    MultiscaleDEQ,
    Newton,
    Picard,
    ScipyRoot,
    fixed_point,
    least_squares,
    minimize,
    root,
)
from difflayers.ode import RK4, Dopri5, ODELayer, ScipyIVP, TorchDiffEq, odeint
from difflayers.qp import DAQP, PIQP, Cones, CvxpyLayer, InteriorPoint, QPLayer, closest_feasible, solve_cone, solve_qp

HALF = torch.tensor([0.5], dtype=torch.float64)


class Cell(torch.nn.Module):
    def forward(self, *args):
        return torch.tanh(args[-2]) * 0.5 + 1


class Decay(torch.nn.Module):
    def forward(self, t, y):
        return -y


def cvxpy_layer(**options):
    x, center = cp.Variable(2), cp.Parameter(2)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - center)), [cp.norm(x) <= 1])
    return CvxpyLayer(problem, [center], [x]).solve(torch.tensor([3.0, 4.0]), **options)


def disk(**options):
    C, d = torch.cat([torch.zeros(1, 2), -torch.eye(2)]), torch.tensor([1.0, 0, 0])
    return solve_cone(torch.eye(2), -torch.tensor([3.0, 4.0]), C, d, Cones(second_order=(3,)), **options)


def operator(**options):
    return ImplicitFunction(RootProblem(lambda z, a: z - a), Newton())(HALF, init=torch.zeros(1), **options)


IMAGES = torch.rand(1, 2, 8, 8, dtype=torch.float64)
CALLS = {
    "fixed_point": lambda **o: fixed_point(torch.cos, HALF, **o),
    "root": lambda **o: root(torch.sin, HALF, **o),
    "minimize": lambda **o: minimize(lambda z: (z**2).sum(), HALF, **o),
    "least_squares": lambda **o: least_squares(lambda z: z - 1, HALF, **o),
    "solve_qp": lambda **o: solve_qp(torch.eye(2), torch.ones(2), lb=torch.zeros(2), **o),
    "solve_cone": disk,
    "closest_feasible": lambda **o: closest_feasible(torch.eye(2), -torch.ones(2), lb=torch.zeros(2), **o),
    "odeint": lambda **o: odeint(lambda t, y: -y, HALF, torch.tensor([0.0, 1.0]), **o),
    "ImplicitFunction": operator,
    "ImplicitFunction.solve": lambda **o: ImplicitFunction(RootProblem(torch.sin), ScipyRoot()).solve(init=HALF, **o),
    "DEQ": lambda **o: DEQ(Cell()).solve(HALF[None], **o),
    "MultiscaleDEQ": lambda **o: MultiscaleDEQ(2, (4, 8), groups=2, on_failure="ignore").solve(IMAGES, **o),
    "MonotoneDEQ": lambda **o: MonotoneDEQ(1, 3).solve(HALF[None], **o),
    "MonotoneConvDEQ": lambda **o: MonotoneConvDEQ(2, 3).solve(IMAGES, **o),
    "QPLayer": lambda **o: QPLayer().solve(torch.eye(2), torch.ones(2), lb=torch.zeros(2), **o),
    "CvxpyLayer": cvxpy_layer,
    "ODELayer": lambda **o: ODELayer(Decay(), [0.0, 1.0]).solve(HALF, **o),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def said(file):
    """What a bar wrote, picture by picture."""
    return [line.strip() for line in file.getvalue().replace("\n", "\r").split("\r") if line.strip()]


def slowly(fn, seconds=0.03):
    def slow(*args):
        time.sleep(seconds)
        return fn(*args)

    return slow


@every_call
def test_every_call_shows_a_bar_if_asked_to_and_nothing_otherwise(call, capfd):
    call()
    assert capfd.readouterr() == ("", "")
    call(progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "100%" in err
    assert "SUCCESS" in err or "MAX_STEPS" in err
    assert err.endswith("\n")


def test_nothing_is_left_out():
    public = {
        name: thing
        for area in (difflayers.fixedpoint, difflayers.qp, difflayers.ode)
        for name in area.__all__
        if callable(thing := getattr(area, name)) and "on_failure" in inspect.signature(thing).parameters
    }
    layers = {name: thing.solve for name, thing in public.items() if hasattr(thing, "solve")}
    without = {n for n, t in (public | layers).items() if "progress" not in inspect.signature(t).parameters}
    assert without == {"consistent_initial"}  # a few steps of Newton's method


def test_iterations_say_how_many_samples_are_left_and_the_largest_residual():
    file = io.StringIO()
    with progress(file=file):
        scale = torch.tensor([[0.1], [0.9]])
        fn = slowly(lambda z, scale: scale * z + 1)
        fixed_point(fn, torch.zeros(2, 1), (scale,), batch_dims=1, solver=Picard(rtol=1e-3, max_steps=50))
    middle, last = said(file)[-4], said(file)[-1]
    assert middle.startswith("Picard: ")
    assert "/50, 1/2 samples left, residual " in middle
    assert " steps, residual " in last
    assert last.endswith("2 SUCCESS")


@pytest.mark.parametrize(
    "solver", [Dopri5(), Dopri5(per_sample=True), RK4(step_size=0.05), ScipyIVP()], ids=lambda s: type(s).__name__
)
def test_odes_say_how_far_the_slowest_sample_is(solver, monkeypatch):
    monkeypatch.setattr(_progress.Bar, "interval", 0.01)
    file = io.StringIO()
    with progress(file=file):
        fn = slowly(lambda t, y: -(y**3), 0.004)
        odeint(fn, torch.tensor([[3.0]]), torch.tensor([0.0, 2.0]), batch_dims=1, solver=solver)
    done = [int(line.split("%")[0].split()[-1]) for line in said(file)]
    assert done == sorted(done)
    assert done[-1] == 100
    assert any(0 < part < 100 for part in done)


@pytest.mark.parametrize("threads", [1, 2])
def test_many_qps_are_counted(threads, monkeypatch):
    monkeypatch.setattr(_progress.Bar, "interval", 0.0)
    file = io.StringIO()
    q, G = torch.randn(250, 3), torch.randn(4, 3)
    with progress(file=file):
        shown = solve_qp(torch.eye(3), q, G, torch.ones(4), solver=DAQP(threads=threads))
    plain = solve_qp(torch.eye(3), q, G, torch.ones(4), solver=DAQP(threads=threads))
    assert torch.equal(shown.x, plain.x)
    text = " ".join(said(file))
    assert "DAQP" in text
    assert "99/250 samples" in text
    assert "exact answers" in text
    assert said(file)[-1].endswith("250 SUCCESS")


@pytest.mark.parametrize("solver", [PIQP(), InteriorPoint()], ids=lambda solver: type(solver).__name__)
def test_other_backends_say_how_many_samples_are_left_or_done(solver, monkeypatch):
    monkeypatch.setattr(_progress.Bar, "interval", 0.0)
    file = io.StringIO()
    with progress(file=file):
        solve_qp(torch.eye(3), torch.randn(9, 3), torch.randn(4, 3), torch.ones(4), solver=solver)
    assert "9/9 samples" in " ".join(said(file))


@pytest.mark.parametrize("solver", [ScipyRoot(), CallableSolver(lambda fn, z: z * 0)], ids=lambda s: type(s).__name__)
def test_samples_on_the_host_are_counted(solver):
    file = io.StringIO()
    with progress(file=file):
        fixed_point(slowly(lambda z: z / 2), torch.ones(5, 1), batch_dims=1, solver=solver)
    assert "/5 samples" in " ".join(said(file))


def test_ten_pictures_a_second_at_most():
    file = io.StringIO()
    start = time.perf_counter()
    with progress(file=file):
        for _ in range(60):
            fixed_point(torch.cos, HALF)
    assert len(said(file)) <= 10 * (time.perf_counter() - start) + 4


def test_a_context_shows_all_solves_inside_on_one_line():
    file = io.StringIO()
    a = torch.tensor([2.0], requires_grad=True)
    with progress(file=file):
        for _ in range(3):
            slow = slowly(lambda z, a: z**2 - a, 0.06)
            root(slow, torch.ones(1), (a,)).value.sum().backward()
    titles = {line.split(":")[0] for line in said(file)}
    assert titles == {"Newton", "adjoint, Auto"}
    assert file.getvalue().count("\n") == 1


def test_one_bar_for_nested_contexts_and_calls():
    file = io.StringIO()
    with progress(file=file), progress():
        fixed_point(torch.cos, HALF, progress=True)
    assert file.getvalue().count("\n") == 1


def test_a_solve_inside_another_one_is_not_shown():
    file = io.StringIO()

    def outer(z, a):
        return fixed_point(slowly(lambda y, z: torch.cos(y) * z, 0.005), HALF, (z,), progress=True).value - a

    function = ImplicitFunction(RootProblem(outer), Newton())
    function.solve(HALF, init=HALF)  # checks what it solves for, once
    with progress(file=file):
        function.solve(HALF, init=HALF)
    assert {line.split(":")[0] for line in said(file)} == {"Newton"}


def test_an_exception_ends_the_bar(capfd):
    def broken(z):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        fixed_point(broken, HALF, progress=True)
    with pytest.raises(SolverError):
        fixed_point(lambda z: 2 * z + 1, HALF, solver=Picard(max_steps=3), progress=True)
    err = capfd.readouterr().err
    assert err.endswith("1 MAX_STEPS\n")
    assert _progress.current_bar() is None
    fixed_point(torch.cos, HALF)
    assert capfd.readouterr().err == ""


def test_nothing_inside_transforms(capfd):
    def answer(a, adjoint=None):
        return fixed_point(lambda z, a: torch.cos(z) * a, HALF, (a,), adjoint=adjoint, progress=True).value.sum()

    torch.func.grad(answer)(HALF)
    torch.func.grad(lambda a: answer(a, UnrolledAdjoint()))(HALF)
    torch.func.vmap(answer)(torch.ones(3, 1))
    torch.func.jvp(answer, (HALF,), (HALF,))
    with progress():
        torch.func.grad(lambda a: answer(a, UnrolledAdjoint()))(HALF)
    assert capfd.readouterr().err == ""


def test_nothing_inside_compiled_graphs(capfd):
    layer = DEQ(Cell())
    compiled = torch.compile(lambda x: layer.solve(x, progress=True).value + 1, backend="eager")
    torch.testing.assert_close(compiled(HALF[None]), layer(HALF[None]) + 1)
    assert capfd.readouterr().err == ""


def test_numbers_and_records_are_the_same():
    fn = lambda z: torch.cos(z)  # noqa: E731
    plain = fixed_point(fn, torch.linspace(0, 1, 9)[:, None], batch_dims=1)
    with progress(file=io.StringIO()), monitor(trace=True) as log:
        shown = fixed_point(fn, torch.linspace(0, 1, 9)[:, None], batch_dims=1)
    assert torch.equal(shown.value, plain.value)
    (record,) = log
    assert record.trace.status == ("SUCCESS",) * 9


def test_without_tqdm_the_error_is_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(MissingBackendError, match=r"tqdm is not installed; run: pip install difflayers\[demo\]"):
        fixed_point(torch.cos, HALF, progress=True)
    fixed_point(torch.cos, HALF)


def test_torchdiffeq_counts_what_it_solves_alone():
    file = io.StringIO()
    times = torch.tensor([[0.0, 1.0], [0.0, 2.0]])
    with progress(file=file):
        odeint(slowly(lambda t, y: -y, 0.01), torch.ones(2, 1), times, batch_dims=1, solver=TorchDiffEq())
    assert "/2 samples" in " ".join(said(file))
