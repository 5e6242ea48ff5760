"""What every solve reports; loops are scripted, so that traces are known exactly."""

import json
import threading
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

from difflayers import CallableSolver, ImplicitFunction, IterativeSolver, Record, RootProblem, Status, log_to, monitor
from difflayers.fixedpoint import DEQ, Anderson, LevenbergMarquardt, Newton, Picard, fixed_point, least_squares

NAN = float("nan")


@dataclass(frozen=True)
class Scripted(IterativeSolver):
    """Divides z by ten; sample i is at zero after ``script[i]`` steps. A negative number is the step that gives up."""

    script: tuple[int, ...] = ()
    rtol: float = 0.0
    atol: float = 0.0

    def init(self, residual, z):
        left = torch.tensor(self.script).reshape(z.shape[:-1])
        return left.abs(), left < 0

    def step(self, residual, z, state):
        left, breaks = state
        return torch.where((left == 1)[..., None], 0, z / 10), (left - 1, breaks)

    def failure(self, state):
        left, breaks = state
        return torch.where((left == 0) & breaks, int(Status.SINGULAR), int(Status.SUCCESS))


@dataclass(frozen=True)
class Divided(Scripted):
    divisible: ClassVar[bool] = True


def solve(solver, batch=None, batch_dims=1, trace=True):
    """One solve of F(z) = slope · z with slope 1; the record, and how many rows every evaluation had."""
    rows = []

    def residual(z, slope):
        rows.append(len(z))
        return slope * z

    shape = (len(solver.script), 1) if batch is None else (*batch, 1)
    fn = ImplicitFunction(RootProblem(residual, batch_dims), solver, on_failure="ignore")
    with monitor(trace=trace) as log:
        fn.solve(torch.ones(shape), init=torch.ones(shape))
    (record,) = log
    return record, rows


def expected(script, steps):
    """Powers of ten, then zero at the end, then NaN."""
    table = np.full((steps + 1, len(script)), NAN)
    for sample, last in enumerate(script):
        table[: abs(last), sample] = 10.0 ** -np.arange(abs(last))
        if last >= 0:
            table[last, sample] = 0
    return table


@pytest.mark.parametrize("solver", [Scripted, Divided])
def test_a_trace_is_the_residual_of_every_sample_after_every_step(solver):
    script = (3, 1, 12, 1, 2, 1, 1, 5)
    record, rows = solve(solver(script=script))
    np.testing.assert_allclose(record.trace.residual, expected(script, 12), rtol=1e-12)
    assert record.trace.status == ("SUCCESS",) * 8
    assert record.trace.tolerance.shape == (8,)
    assert (min(rows[1:]) == 1) == solver.divisible  # samples really left


@pytest.mark.parametrize("solver", [Scripted, Divided])
def test_a_sample_that_is_given_up_ends_before_that_step(solver):
    script = (2, -3, 1, 6)
    record, _ = solve(solver(script=script))
    np.testing.assert_allclose(record.trace.residual, expected(script, 6), rtol=1e-12)
    assert record.trace.status == ("SUCCESS", "SINGULAR", "SUCCESS", "SUCCESS")
    assert record.failed == 1


def test_a_trace_is_as_long_as_the_solve_not_as_max_steps():
    record, _ = solve(Scripted(script=(2, 1), max_steps=10**9))
    assert record.trace.residual.shape == (3, 2)
    record, _ = solve(Scripted(script=(9, 9), max_steps=4))
    assert record.trace.residual.shape == (5, 2)
    assert record.trace.status == ("MAX_STEPS", "MAX_STEPS")


def test_a_solve_that_starts_at_the_answer_or_nowhere():
    fn = ImplicitFunction(RootProblem(lambda z, a: z * a, 1), Scripted(script=(3, 3)), on_failure="ignore")
    with monitor(trace=True) as log:
        fn.solve(torch.tensor([[1.0], [NAN]]), init=torch.zeros(2, 1))
    assert log[0].trace.status == ("SUCCESS", "NONFINITE")
    np.testing.assert_array_equal(log[0].trace.residual, [[0, NAN]])


@pytest.mark.parametrize(("batch", "batch_dims", "script"), [((2, 3), 2, (1, 2, 3, 4, 5, 6)), ((), 0, (4,))])
def test_samples_of_any_batch_are_columns(batch, batch_dims, script):
    record, _ = solve(Scripted(script=script), batch, batch_dims)
    np.testing.assert_allclose(record.trace.residual, expected(script, max(script)), rtol=1e-12)


@pytest.mark.parametrize("solver", [Picard(), Anderson(), Newton()], ids=repr)
def test_a_trace_agrees_with_the_statistics(solver):
    slope = torch.linspace(0.1, 0.9, 16)[:, None]
    with monitor(trace=True) as log:
        solution = fixed_point(lambda z, s: s * torch.sin(z) + 1, torch.zeros(16, 3), (slope,), batch_dims=1,
                               solver=solver)  # fmt: skip
    trace, steps = log[0].trace, solution.stats["steps"].numpy()
    np.testing.assert_array_equal(np.isfinite(trace.residual).sum(0), steps + 1)
    last = trace.residual[steps, np.arange(16)]
    np.testing.assert_array_equal(last, solution.stats["residual"].numpy())
    assert (last <= trace.tolerance).all()
    before = trace.residual[steps - 1, np.arange(16)]
    assert (before > trace.tolerance * (1 - 1e-3)).all()  # the tolerance moves a little with z
    assert log[0].steps == steps.max()
    assert log[0].mean_steps == pytest.approx(steps.mean())


def test_other_errors_are_traced_as_the_solver_measures_them():
    t = torch.linspace(0, 1, 9)
    with monitor(trace=True) as log:
        least_squares(lambda z, y: z[0] * torch.exp(z[1] * t) - y, torch.ones(2), (2 * torch.exp(-t),),
                      solver=LevenbergMarquardt())  # fmt: skip
    assert log[0].trace.residual.shape == (log[0].steps + 1, 1)


def test_nothing_is_traced_unless_asked_for():
    record, _ = solve(Scripted(script=(2, 1)), trace=False)
    assert record.trace is None
    with monitor(trace=True) as traced, monitor() as plain:
        fixed_point(torch.cos, torch.zeros(3))
    assert traced == plain
    assert traced[0].trace is not None
    assert plain[0].trace is None


def test_solvers_without_steps_have_no_trace():
    solver = CallableSolver(lambda residual, z: z - residual(z))
    with monitor(trace=True) as log:
        ImplicitFunction(RootProblem(lambda z: z - 1, 1), solver).solve(init=torch.zeros(2, 1))
        fixed_point(torch.cos, torch.zeros(0, 3), batch_dims=1)
    assert [record.trace for record in log] == [None, None]


def test_a_solve_inside_a_solve_has_its_own_trace():
    solver = Picard(max_steps=300)

    def outer(z):
        return 0.5 * fixed_point(lambda y, z: 0.2 * y + z, torch.zeros(2, 1), (z,), batch_dims=1, solver=solver).value

    with monitor(trace=True) as log:
        fixed_point(lambda z: outer(z) + 1, torch.zeros(2, 1), batch_dims=1, solver=solver)
    forward = [record for record in log if record.role == "forward"]
    assert all(record.trace.residual.shape == (record.steps + 1, 2) for record in forward)
    assert len({record.steps for record in forward}) > 1


def test_derivatives_and_other_threads_are_recorded_too():
    layer = DEQ(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh()))
    with monitor(trace=True) as log:
        layer(init=torch.zeros(2, 3)).sum().backward()
        thread = threading.Thread(target=lambda: layer(init=torch.zeros(4, 3)))
        thread.start()
        thread.join()
    assert [record.role for record in log] == ["forward", "adjoint", "forward"]
    assert [record.trace is None for record in log] == [False, True, False]
    assert log[2].trace.residual.shape[1] == 4


def test_a_solve_that_raises_leaves_nothing_behind():
    def fn(z):
        raise RuntimeError("mine")

    with monitor(trace=True) as log:
        with pytest.raises(RuntimeError, match="mine"):
            fixed_point(fn, torch.zeros(2))
        fixed_point(torch.cos, torch.zeros(2))
    assert len(log) == 1
    assert log[0].trace.residual.shape[0] == log[0].steps + 1


def test_records_are_rows_for_json_and_scalars_for_tensorboard():
    record, _ = solve(Scripted(script=(2, -3, 1)))
    row = json.loads(json.dumps(record.as_dict(), allow_nan=False))
    assert row["role"] == "forward"
    assert row["solver"] == repr(Scripted(script=(2, -3, 1)))
    assert (row["samples"], row["steps"], row["mean_steps"], row["failed"]) == (3, 2, 5 / 3, 1)
    assert (row["status/SUCCESS"], row["status/SINGULAR"]) == (2, 1)
    scalars = record.scalars()
    assert scalars["forward/steps"] == 2
    assert scalars["forward/status/SINGULAR"] == 1
    assert all(isinstance(value, int | float) for value in scalars.values())
    assert not {"forward/role", "forward/solver"} & scalars.keys()


def test_what_a_solver_does_not_count_is_no_scalar():
    record = Record("adjoint", "mine", 2, None, None, None, {"SUCCESS": 2}, 0.5)
    assert record.as_dict()["steps"] is None
    assert record.scalars() == {
        "adjoint/samples": 2, "adjoint/failed": 0, "adjoint/seconds": 0.5, "adjoint/status/SUCCESS": 2
    }  # fmt: skip


class Writer:
    """What a SummaryWriter is to its callers."""

    def __init__(self):
        self.scalars = {}

    def add_scalar(self, tag, scalar_value, global_step):
        assert (tag, global_step) not in self.scalars
        self.scalars[tag, global_step] = scalar_value


def test_log_to_writes_one_number_per_name_and_step():
    writer = Writer()
    first = Record("forward", "Newton()", 3, 5, 6, 1e-9, {"SUCCESS": 2, "STALLED": 1}, 0.5, mean_steps=4.0)
    second = Record("forward", "Newton()", 1, 9, 10, 1e-3, {"SUCCESS": 1}, 0.25, mean_steps=8.0)
    silent = Record("adjoint", "Mine()", 1, None, None, None, {"SUCCESS": 1}, 0.125)
    log_to(writer, [first, silent, second], 7)
    log_to(writer, [], 8)
    assert writer.scalars == {
        ("forward/samples", 7): 4,
        ("forward/steps", 7): 9,
        ("forward/mean_steps", 7): 5.0,
        ("forward/evaluations", 7): 16,
        ("forward/residual", 7): 1e-3,
        ("forward/failed", 7): 1,
        ("forward/seconds", 7): 0.75,
        ("forward/status/SUCCESS", 7): 3,
        ("forward/status/STALLED", 7): 1,
        ("adjoint/samples", 7): 1,
        ("adjoint/failed", 7): 0,
        ("adjoint/seconds", 7): 0.125,
        ("adjoint/status/SUCCESS", 7): 1,
    }


def test_log_to_takes_what_a_training_step_left():
    writer, a = Writer(), torch.rand(3, 1, requires_grad=True)
    for step in range(2):
        with monitor() as log:
            fixed_point(lambda z, a: torch.cos(z) * a, torch.zeros(3, 1), (a,), batch_dims=1).value.sum().backward()
        log_to(writer, log, step)
    assert {step for _, step in writer.scalars} == {0, 1}
    assert writer.scalars["forward/samples", 1] == writer.scalars["adjoint/samples", 1] == 3
    assert writer.scalars["forward/residual", 0] < 1e-9
