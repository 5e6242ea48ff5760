"""root and fixed_point: structures, boundaries, wrong calls."""

from dataclasses import replace

import contracts
import numpy as np
import problems
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from difflayers import ImplicitFunction, RootProblem, Status, available_solvers
from difflayers.errors import ConvergenceWarning, ProblemError, SolverError
from difflayers.fixedpoint import Anderson, Newton, Picard, ScipyRoot, fixed_point, root

METHODS = ["hybr", "lm", "df-sane", "broyden1", "broyden2", "anderson", "diagbroyden", "krylov"]


@pytest.mark.parametrize("method", METHODS)
def test_scipy_methods_find_the_root(method):
    a = torch.tensor([[0.5, 1.0], [0.8, -0.3]])
    solution = root(lambda z, a: z**3 + 2 * z - a, torch.zeros(2, 2), (a,), batch_dims=1, solver=ScipyRoot(method))
    contracts.assert_close(solution.value**3 + 2 * solution.value, a, 1e-7)
    assert (solution.stats["evaluations"] > 0).all()


@pytest.mark.parametrize("method", [*METHODS, "linearmixing", "excitingmixing"])
def test_scipy_methods_never_call_a_failure_success(method):
    solver = ScipyRoot(method, max_steps=30)
    solution = root(lambda z: z**2 + 1, torch.ones(2), solver=solver, on_failure="ignore")
    assert solution.status.item() != Status.SUCCESS


@pytest.mark.parametrize("solver", [Picard(), Anderson(), Newton(), ScipyRoot()], ids=repr)
def test_pytrees(solver):
    def flat(z, shift):
        return {"a": 0.5 * torch.cos(z["b"][0].sum()) + shift, "b": (0.3 * z["a"].sum() * torch.ones(2),)}

    shift = torch.tensor([0.1, 0.2, 0.3], requires_grad=True)
    z0 = {"a": torch.zeros(3), "b": (torch.zeros(2),)}
    value = fixed_point(flat, z0, (shift,), solver=solver).value
    contracts.assert_close(flat(value, shift), value)
    value["b"][0].sum().backward()
    assert shift.grad.abs().min() > 0


def test_scalar_leaves_and_nested_parameters():
    params = {"w": [torch.tensor(2.0, requires_grad=True)], "power": 2}
    z = root(lambda z, p: z ** p["power"] - p["w"][0], torch.tensor(1.0), (params,)).value
    z.backward()
    contracts.assert_close(params["w"][0].grad, 1 / (2 * z.detach()))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numpy_in_numpy_out(dtype):
    solution = root(lambda z, a: z**2 - a, np.ones(3, dtype), (np.array([1, 4, 9], dtype),), batch_dims=1)
    assert isinstance(solution.value, np.ndarray)
    assert solution.value.dtype == dtype
    assert isinstance(solution.status, np.ndarray)
    np.testing.assert_allclose(solution.value, [1, 2, 3], rtol=1e-4)
    with pytest.raises(ProblemError, match="init is a NumPy array, but a parameter requires grad"):
        root(lambda z, a: z - a, np.ones(2), (torch.ones(2, requires_grad=True),))


def test_float32_stays_float32():
    weight, x = (p.float() for p in problems.TANH.params())
    for solver in (Anderson(), Picard(), Newton(), ScipyRoot()):
        solution = fixed_point(
            problems.tanh_cell, torch.zeros(3, 4, dtype=torch.float32), (weight, x), batch_dims=1, solver=solver
        )
        assert solution.value.dtype == torch.float32


def test_warm_start_takes_fewer_steps():
    params = problems.TANH.params()
    first = fixed_point(problems.tanh_cell, torch.zeros(3, 4), params, batch_dims=1)
    for init in (first, first.value):
        again = fixed_point(problems.tanh_cell, torch.zeros(3, 4), params, batch_dims=1, init=init)
        assert again.stats["steps"].max() == 0


@pytest.mark.parametrize("numpy", [False, True])
def test_samples_without_an_answer_start_afresh(numpy):
    def fn(z, x):
        return {"u": 0.5 * torch.cos(z["v"]) + x, "v": 0.5 * torch.sin(z["u"])}

    x = torch.tensor([[0.1], [torch.nan], [0.3]])
    z0 = {"u": torch.full((3, 1), 0.2), "v": torch.full((3, 1), 0.4)}
    if numpy:
        x, z0 = x.numpy(), {name: leaf.numpy() for name, leaf in z0.items()}
    first = fixed_point(fn, z0, (x,), batch_dims=1, on_failure="ignore")
    assert first.status.tolist() == [0, 3, 0]
    healed = np.full((3, 1), 0.2) if numpy else torch.full((3, 1), 0.2)
    again = fixed_point(fn, z0, (healed,), batch_dims=1, init=first)
    cold = fixed_point(fn, z0, (healed,), batch_dims=1)
    assert again.status.tolist() == [0] * 3
    assert isinstance(again.value["u"], np.ndarray) == numpy
    contracts.assert_close(torch.as_tensor(again.value["u"]), torch.as_tensor(cold.value["u"]))
    assert again.stats["steps"][1] == cold.stats["steps"][1]


def test_implicit_function_has_nowhere_else_to_start():
    solve = ImplicitFunction(RootProblem(lambda z, a: z**2 - a, 1), Newton(), on_failure="ignore")
    first = solve(torch.tensor([4.0, -1.0]), init=torch.tensor([1.0, 1.0]))
    assert first.status.tolist()[0] == 0
    again = solve(torch.tensor([4.0, 9.0]), init=replace(first, value=torch.tensor([2.0, torch.nan])))
    assert again.status.tolist() == [Status.SUCCESS, Status.NONFINITE]


@settings(max_examples=30, deadline=None)
@given(
    samples=st.integers(1, 5), n=st.integers(1, 6), radius=st.floats(0.0, 0.95), seed=st.integers(0, 10_000),
    solver=st.sampled_from([Anderson(max_steps=500), Newton(), Picard(max_steps=2000)]),
)  # fmt: skip
def test_affine_contractions_have_their_fixed_point(samples, n, radius, seed, solver):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(samples, n, n, generator=generator, dtype=torch.float64)
    a = a * (radius / torch.linalg.matrix_norm(a, 2)[:, None, None])
    b = torch.randn(samples, n, generator=generator, dtype=torch.float64)
    value = fixed_point(problems.affine, torch.zeros(samples, n), (a, b), batch_dims=1, solver=solver).value
    torch.testing.assert_close(value, problems.solved(a, b), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(
    ("solver", "status"),
    [
        (Picard(), Status.STALLED),
        (Anderson(), Status.STALLED),
        (Newton(), Status.SINGULAR),
        (ScipyRoot(), Status.STALLED),
    ],
    ids=repr,
)
def test_no_fixed_point(solver, status):
    solution = fixed_point(lambda z: z + 1, torch.zeros(3), solver=solver, on_failure="ignore")
    assert solution.status.item() == status
    with pytest.raises(SolverError, match=status.name):
        fixed_point(lambda z: z + 1, torch.zeros(3), solver=solver)
    with pytest.warns(ConvergenceWarning, match=status.name):
        fixed_point(lambda z: z + 1, torch.zeros(3), solver=solver, on_failure="warn")


@pytest.mark.parametrize("solver", [Picard(), Anderson(), ScipyRoot()], ids=repr)
def test_divergent_map_next_to_a_contraction(solver):
    slope = torch.tensor([[0.5], [3.0]], requires_grad=True)

    def fn(z, s):  # two fixed points for s < 2, none above
        return s * z**2 / 2 + 0.25

    solution = fixed_point(fn, torch.zeros(2, 1), (slope,), batch_dims=1, solver=solver, on_failure="ignore")
    assert solution.ok.tolist() == [True, False]
    alone = fixed_point(fn, torch.zeros(1, 1), (slope[:1],), batch_dims=1, solver=solver)
    contracts.assert_close(solution.value[:1], alone.value, 1e-12)
    solution.value[solution.ok].sum().backward()
    assert slope.grad[1].item() == 0
    assert slope.grad[0].isfinite()


def test_singular_jacobian():
    solution = root(
        lambda z: z**2,
        torch.tensor([0.5, 0.0]) * torch.tensor([1.0, 0.0]),
        solver="newton",
        batch_dims=1,
        on_failure="ignore",
    )
    assert solution.status[1] == Status.SUCCESS  # at the root itself nothing needs a Jacobian
    flat = root(lambda z: z**2 + 1, torch.zeros(1), batch_dims=1, on_failure="ignore")
    assert flat.status.tolist() == [Status.SINGULAR]
    assert flat.value.isnan().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: root(lambda z: z[:2], torch.ones(3)), r"residual returned shape \(2,\), but the unknown has \(3,\)"),
        (lambda: fixed_point(lambda z: z[:2], torch.ones(3)), r"the map returned shape \(2,\)"),
        (lambda: root(lambda z: (z, z), torch.ones(3)), "structure"),
        (lambda: root(lambda z: 3.0, torch.ones(3)), "returned float; write it with torch operations"),
        (lambda: root(lambda z: z, torch.ones(3, dtype=torch.int64)), r"torch.int64.*try init.double\(\)"),
        (lambda: root(lambda z: z, torch.ones(3, dtype=torch.complex128)), "complex128"),
        (lambda: root(lambda z, a: z - a, torch.ones(3, dtype=torch.float32), (torch.ones(3),)),
         "torch.float64, but the unknown is torch.float32"),
        (lambda: root(lambda z, a: z - a, torch.ones(3), (torch.ones(3, device="meta"),)),
         r"parameter 0 of shape \(3,\) is on meta"),
        (lambda: root(lambda z, a: a, torch.ones(3), (torch.ones(3),)), "doesn't depend on its unknown"),
        (lambda: root(lambda z: z.detach() ** 2, torch.ones(3)), "doesn't depend on its unknown"),
        (lambda: root(lambda z: z, torch.tensor(1.0), batch_dims=1), "no 1 batch dimensions"),
        (lambda: root(lambda z: z, [torch.ones(2), torch.ones(2).float()]), "init mixes"),
        (lambda: root(lambda z: z, [torch.ones(2), torch.ones(3)], batch_dims=1), "init mixes batch shapes"),
        (lambda: root(lambda z: z, None), "init is missing"),
        (lambda: root(lambda z: z, torch.ones(3), solver="newtn"), "unknown solver 'newtn'; did you mean 'newton'"),
        (lambda: root(lambda z: z, torch.ones(3), solver=Newton), r"did you forget \(\)"),
        (lambda: ScipyRoot("hybrid"), "unknown method 'hybrid'; did you mean 'hybr'"),
        (lambda: available_solvers("fixpoint"), "did you mean 'fixedpoint'"),
        (lambda: root(lambda z: z - z.mean(0) + z**3, torch.ones(3, 2), batch_dims=1), "promises independent samples"),
    ],
)  # fmt: skip
def test_wrong_calls_name_the_argument(call, message):
    with pytest.raises(ProblemError, match=message):
        call()


def test_unknown_option_is_refused_by_the_solver():
    with pytest.raises(TypeError, match="tolerance"):
        Anderson(tolerance=1e-3)


def test_solvers_by_name():
    for name, cls in available_solvers("fixedpoint").items():
        if "fixed_point" not in cls.serves:  # descends an objective, which a fixed point hasn't
            advice = f"{cls.__name__} serves least_squares, minimize, not fixed_point; use Anderson"
            with pytest.raises(TypeError, match=advice):
                fixed_point(torch.cos, torch.tensor(1.0), solver=name)
            continue
        value = fixed_point(torch.cos, torch.tensor(1.0), solver=name).value
        contracts.assert_close(value, torch.tensor(0.7390851332151607), 1e-7)
        assert cls() == cls()
