"""Solvers of torchdiffeq and SciPy behind the interface: answers, statuses, what a batch is to them."""

import copy
import math
import pickle
import warnings

import pytest
import torch
from torch import nn

from difflayers import Status, UnrolledAdjoint, monitor, ode
from difflayers.errors import ProblemError, SolverError, UnknownNameError
from difflayers.ode import BacksolveAdjoint, CheckpointedAdjoint, Dopri8, ODELayer, ScipyIVP, TorchDiffEq, odeint

A = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]], dtype=torch.float64)
TIGHT = {"rtol": 1e-8, "atol": 1e-8}
ADAPTIVE = [
    *[TorchDiffEq(method, **TIGHT) for method in ("dopri8", "dopri5", "bosh3", "fehlberg2", "scipy_solver")],
    TorchDiffEq("adaptive_heun", rtol=1e-6, atol=1e-6),
    *[ScipyIVP(method, **TIGHT) for method in ("RK45", "RK23", "DOP853", "Radau", "BDF", "LSODA")],
]
SECOND_ORDER = ("fehlberg2", "adaptive_heun")
FIXED = [
    # Explicit Adams methods of high order are stable for the shortest of steps only.
    (TorchDiffEq(method, step_size=0.002 if method == "explicit_adams" else 0.01), error)
    for method, error in {
        "euler": 0.1, "midpoint": 1e-3, "heun2": 1e-3, "heun3": 1e-5, "rk4": 1e-7,
        "explicit_adams": 1e-5, "implicit_adams": 1e-7, "fixed_adams": 1e-7,
    }.items()
]  # fmt: skip
HOST = [
    TorchDiffEq(max_evaluations=5000),
    *[ScipyIVP(method, max_evaluations=5000) for method in ("RK45", "Radau", "LSODA")],
]


def linear(t, y, A):
    return y @ A.mT


def exact(y0, t):
    return torch.stack([y0 @ torch.matrix_exp(A * (s - t[0])).mT for s in t])


@pytest.mark.parametrize(
    # Steps of an embedded pair of order 2 are as long as the cube root of the tolerance, and its error is their square.
    ("solver", "error"),
    [*[(s, 10 * s.rtol ** (2 / 3) if s.method in SECOND_ORDER else 200 * s.rtol) for s in ADAPTIVE], *FIXED],
    ids=lambda v: getattr(v, "method", ""),
)
def test_answers(solver, error):
    y0 = torch.randn(3, 2)
    for t in (torch.tensor([0.0, 0.0, 0.3, 0.3, 0.505, 1.0]), torch.tensor([1.0, 0.4, 0.0])):
        solution = odeint(linear, y0, t, (A,), batch_dims=1, solver=solver)
        assert (solution.ys - exact(y0, t)).abs().max() < error
        assert solution.ok.all()
        assert torch.equal(solution.ys[0], y0)
        assert solution.stats["outputs"].tolist() == [len(t)] * 3
        assert solution.stats["time"].tolist() == [t[-1].item()] * 3
        assert (solution.stats["evaluations"] > 0).all()


def test_every_method_of_the_installed_torchdiffeq_is_there():
    import importlib

    known = importlib.import_module("torchdiffeq._impl.odeint").SOLVERS
    assert {s.method for s in [*ADAPTIVE, *[s for s, _ in FIXED]] if isinstance(s, TorchDiffEq)} == set(known)


@pytest.mark.parametrize("solver", HOST, ids=lambda s: s.method)
def test_own_times_trees_float32_and_edges(solver):
    y0 = torch.randn(2, 2)
    t = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.5, 0.5]])
    ys = odeint(linear, y0, t, (A,), batch_dims=1, solver=solver).ys
    for i in range(2):
        torch.testing.assert_close(ys[:, i], exact(y0[i], t[i]), rtol=1e-4, atol=1e-4)
    tree = {"x": torch.randn(2, 3), "z": torch.randn(2, dtype=torch.complex128)}
    ys = odeint(lambda t, y: {"x": -y["x"], "z": 1j * y["z"]}, tree, [0.0, 1.0], batch_dims=1, solver=solver).ys
    torch.testing.assert_close(ys["x"][-1], math.exp(-1) * tree["x"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ys["z"][-1], tree["z"] * complex(math.cos(1), math.sin(1)), rtol=1e-4, atol=1e-4)
    single = odeint(linear, y0.float(), [0.0, 1.0], (A.float(),), solver=type(solver)(solver.method, 1e-12, 1e-12))
    assert single.ys.dtype == torch.float32
    torch.testing.assert_close(single.ys.double(), exact(y0, torch.tensor([0.0, 1.0])), rtol=1e-4, atol=1e-4)
    for shape in ((0, 2), (2, 0)):
        assert odeint(lambda t, y: -y, torch.ones(shape), [0.0, 1.0], batch_dims=1, solver=solver).ys.shape == (
            2,
            *shape,
        )
    assert odeint(lambda t, y: -y, y0, [0.0], solver=solver).ys.shape == (1, 2, 2)
    assert isinstance(odeint(lambda t, y: -y, y0.numpy(), [0.0, 1.0], solver=solver).ys, type(y0.numpy()))


@pytest.mark.parametrize("solver", HOST, ids=lambda s: s.method)
def test_one_bad_sample_leaves_the_others_alone(solver):
    y0 = torch.tensor([[0.5], [math.nan], [1.0], [0.25]])
    rate = torch.tensor([[1.0], [1.0], [2.0], [1.0]])
    t = torch.tensor([0.0, 0.3, 1.0])
    fn = lambda t, y, rate: rate * y**2  # noqa: E731
    solution = odeint(fn, y0, t, (rate,), batch_dims=1, solver=solver, on_failure="ignore")
    assert solution.ok.tolist() == [True, False, False, True]
    assert solution.status[1] == Status.NONFINITE
    assert solution.status[2] in (Status.NONFINITE, Status.STALLED, Status.MAX_STEPS)
    closed = torch.stack([y0 / (1 - y0 * s) for s in t])
    torch.testing.assert_close(solution.ys[:, [0, 3]], closed[:, [0, 3]], rtol=1e-4, atol=1e-5)
    assert solution.ys[-1, 1:3].isnan().all()
    with pytest.raises(SolverError, match="1 of 4 samples"):
        odeint(fn, y0, t, (rate,), batch_dims=1, solver=solver)


@pytest.mark.parametrize(
    "solver", [TorchDiffEq(max_evaluations=2000), *[ScipyIVP(m, max_evaluations=2000) for m in ("RK45", "LSODA")]],
    ids=lambda s: s.method,
)  # fmt: skip
@pytest.mark.parametrize("fn", [lambda t, y: -torch.sign(y) * 1e3, lambda t, y: y**2, lambda t, y: y * math.nan])
def test_ugly_fields_end(solver, fn):
    solution = odeint(fn, torch.ones(1), [0.0, 2.0], solver=solver, on_failure="ignore")
    assert solution.stats["evaluations"] <= 2000
    assert not solution.ok or solution.ys[-1].abs() < 1


def test_exceptions_of_fn_are_the_users():
    class Mine(AssertionError):
        pass

    def fn(t, y):
        if t.max() > 0:
            raise Mine("hers")
        return -y

    for solver in HOST:
        for batch_dims in (0, 1):
            with pytest.raises(Mine, match="hers"):
                odeint(fn, torch.ones(3, 1), [0.0, 1.0], batch_dims=batch_dims, solver=solver)


def test_implicit_adams_says_when_its_iteration_did_not_converge():
    t = torch.linspace(0, 12, 30)
    solver = TorchDiffEq("implicit_adams", rtol=1e-9, atol=1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = odeint(lambda t, y: -y, torch.ones(1), t, solver=solver, on_failure="ignore")
    assert solution.status == Status.STALLED
    assert solution.ys.isfinite().all()


def test_samples_that_cannot_be_divided():
    """An argument that belongs to the samples without looking like it."""
    rate = torch.tensor([1.0, 2.0])
    fn = lambda t, y, rate: -y * rate.expand(3, 2).T.reshape(2, 3)[: len(y)]  # noqa: E731
    for solver in (ScipyIVP(), TorchDiffEq()):
        t = torch.tensor([[0.0, 1.0], [0.0, 2.0]])
        ys = odeint(fn, torch.ones(2, 3), t, (rate,), batch_dims=1, solver=solver).ys
        torch.testing.assert_close(ys[-1, :, 0], torch.tensor([math.exp(-1), math.exp(-4)]), rtol=1e-4, atol=1e-5)


def test_stiff():
    def robertson(t, y):
        a, b, c = y.unbind(-1)
        first, second = -0.04 * a + 1e4 * b * c, 3e7 * b**2
        return torch.stack([first, -first - second, second], -1)

    y0 = torch.tensor([1.0, 0.0, 0.0])
    for method in ("Radau", "BDF", "LSODA"):
        solution = odeint(robertson, y0, [0.0, 40.0], solver=ScipyIVP(method, 1e-8, 1e-12))
        # Hairer, Wanner 1996, section IV.10.
        expected = torch.tensor([0.7158270688, 9.185534764e-06, 0.2841637457])
        torch.testing.assert_close(solution.ys[-1], expected, rtol=1e-5, atol=1e-9)
        assert solution.stats["evaluations"] < 3000


def test_names_options_and_pairings():
    assert {ode.SOLVERS["torchdiffeq"], ode.SOLVERS["scipy"]} == {TorchDiffEq, ScipyIVP}
    for kind, near in ((TorchDiffEq, "dopri5"), (ScipyIVP, "RK45")):
        with pytest.raises(UnknownNameError, match=f"did you mean '{near}'"):
            kind(near + "5")
        with pytest.raises(ProblemError, match="both be zero"):
            kind(rtol=0.0, atol=0.0)
        solver = kind(rtol=1e-3)
        assert pickle.loads(pickle.dumps(solver)) == copy.deepcopy(solver) == solver
        for wrong, reason in ((CheckpointedAdjoint(), kind.__name__), (UnrolledAdjoint(), "use CheckpointedAdjoint")):
            with pytest.raises(TypeError, match=reason):
                ODELayer(nn.Linear(2, 2), [0.0, 1.0], solver=solver, adjoint=wrong)
    with pytest.raises(ProblemError, match="fixed step"):
        TorchDiffEq("dopri5", step_size=0.1)
    assert isinstance(ODELayer(nn.Linear(2, 2), [0.0, 1.0], solver="scipy").adjoint, BacksolveAdjoint)
    assert isinstance(ODELayer(nn.Linear(2, 2), [0.0, 1.0], solver=Dopri8()).adjoint, CheckpointedAdjoint)


def test_monitor_sees_them():
    with monitor() as log:
        odeint(lambda t, y: -y, torch.ones(2), [0.0, 1.0], solver=ScipyIVP())
        odeint(lambda t, y: -y, torch.ones(2), [0.0, 1.0], solver=TorchDiffEq())
    assert [r.role for r in log] == ["forward", "forward"]
    assert log[0].steps > 0
    assert log[1].steps is None
