"""Fixed points, roots, minima, least squares and implicit functions: systems of a few unknowns, good and bad."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from difflayers import CallableSolver, ImplicitAdjoint, ImplicitFunction, RootProblem
from difflayers.errors import ProblemError
from difflayers.fixedpoint import fixed_point, least_squares, minimize, root
from difflayers.linear import LeastSquares
from properties import _core as core

# (z, W, x) with samples first; W is shared and orthogonal.
FUNCTIONS = {
    "fixed_point": {
        "contraction": lambda z, W, x: 0.5 * torch.tanh(z @ W + x),
        "affine": lambda z, W, x: 0.8 * z @ W + x,
        "expanding": lambda z, W, x: 3 * z @ W + x,
        "constant": lambda z, W, x: x + 0 * z @ W,
        "kinked": lambda z, W, x: torch.relu(0.7 * z @ W + x),
        "identity": lambda z, W, x: z + 0 * x @ W,
        "no answer": lambda z, W, x: z + 1 + x.square() + 0 * z @ W,
        "overflowing": lambda z, W, x: z.exp() + x.square() @ W.square(),
    },
    "root": {
        "cubic": lambda z, W, x: z**3 + z - x @ W,
        "linear": lambda z, W, x: z @ W - x,
        "coupled": lambda z, W, x: z + 0.5 * torch.tanh(z @ W) - x,
        "singular": lambda z, W, x: z.sum(-1, keepdim=True) * W[0] - x,
        "no answer": lambda z, W, x: z.square() + 1 + x.square() + 0 * z @ W,
        "double": lambda z, W, x: (z - x @ W).square(),
        "flat": lambda z, W, x: 0 * z @ W + 1 + x.square(),
        "pole": lambda z, W, x: 1 / z - x @ W,
    },
    "minimize": {
        "quadratic": lambda z, W, x: ((z @ W).square() * 0.5 - z * x).sum(-1),
        "quartic": lambda z, W, x: (z @ W - x).pow(4).sum(-1),
        "curved": lambda z, W, x: ((1 + (z @ W).square()).sqrt() + 0.1 * (z - x).square()).sum(-1),
        "valley": lambda z, W, x: (z[:, :1] - x[:, :1] ** 2).square().sum(-1) + 100 * (z @ W)[:, -1].square(),
        "unbounded": lambda z, W, x: ((z @ W) * x).sum(-1),
        "saddle": lambda z, W, x: (z[:, :1].square() - z[:, -1:].square() + 0 * x @ W).sum(-1),
        "flat": lambda z, W, x: (0 * z @ W * x).sum(-1),
        "logarithm": lambda z, W, x: (z.exp() @ W.square() - z * x).sum(-1),
    },
    "least_squares": {
        "linear": lambda z, W, x: torch.cat([z @ W - x, z], -1),
        "deficient": lambda z, W, x: z.sum(-1, keepdim=True) @ W[:1] - x,
        "rosenbrock": lambda z, W, x: torch.cat([10 * (z[:, -1:] - z[:, :1] ** 2), (1 - z) @ W + x], -1),
        "exponential": lambda z, W, x: torch.cat([z.exp() - x, z @ W], -1),
        "far from zero": lambda z, W, x: (1 + (z @ W - x).square()).sqrt(),
        "flat": lambda z, W, x: 0 * z @ W + x,
    },
}
CALLS = {"fixed_point": fixed_point, "root": root, "minimize": minimize, "least_squares": least_squares}
SOLVERS = {
    "fixed_point": ["anderson", "picard", "broyden", "newton", "dogleg", "lm", "scipy"],
    "root": ["newton", "dogleg", "lm", "broyden", "scipy", "scipy_least_squares"],
    "minimize": ["lbfgs", "newton", "scipy_minimize"],
    "least_squares": ["lm", "dogleg", "lbfgs", "scipy_least_squares", "scipy_minimize"],
}
SICK = {"nan": torch.nan, "infinite": torch.inf, "huge": 1e30, "none": None}


@dataclass(frozen=True)
class System:
    """A batch of systems of one kind; ``sick`` is what the data of its second sample are."""

    form: str
    kind: str
    solver: str
    batch: int
    n: int
    dtype: str
    exponent: int
    sick: str
    numpy: bool
    flaw: bool
    seed: int

    @property
    def fn(self) -> Any:
        return FUNCTIONS[self.form][self.kind]

    def data(self) -> tuple[Tensor, Tensor, Tensor]:
        """Start, ``W`` and ``x``, in float64 but exact in the dtype."""
        normal, dtype = core.random(self), core.DTYPES[self.dtype]
        W, x = torch.linalg.qr(normal(self.n, self.n)).Q, normal(self.batch, self.n) * 10.0**self.exponent
        if self.batch > 1 and SICK[self.sick] is not None:
            x[1] = SICK[self.sick]
        return tuple(t.to(dtype).double() for t in (normal(self.batch, self.n), W, x))


def cases(form: str) -> st.SearchStrategy:
    return st.builds(
        System, st.just(form), st.sampled_from(list(FUNCTIONS[form])), st.sampled_from(SOLVERS[form]),
        st.integers(0, 4), st.integers(1, 5), st.sampled_from(["float64", "float32"]),
        st.sampled_from([0, 0, 0, -6, -2, 2, 6]), st.sampled_from(list(SICK)), st.booleans(),
        core.FLAWS, core.SEEDS,
    )  # fmt: skip


def condition(case: System, z: Tensor, W: Tensor, x: Tensor) -> Tensor:
    """What vanishes at an answer, for one sample."""

    def value(z):
        return case.fn(z[None], W, x[None])[0]

    if case.form == "fixed_point":
        return z - value(z)
    if case.form == "root":
        return value(z)
    if case.form == "minimize":
        return torch.func.grad(value)(z)
    residuals, pull = torch.func.vjp(value, z)
    return pull(residuals)[0]


def called(case: System, z0: Any, args: tuple[Any, ...]) -> Any:
    call = CALLS[case.form]
    return call(case.fn, z0, args, batch_dims=1, solver=case.solver, on_failure="ignore")


def check(case: System) -> Counter:
    try:
        return solved(case)
    except ProblemError as error:
        if "doesn't depend on its unknown" in str(error) and case.kind in ("flat", "unbounded"):
            return Counter({"refused: ProblemError": 1})  # by who needs a Hessian, which there is none of
        raise


def solved(case: System) -> Counter:
    start, W, x = case.data()
    dtype = core.DTYPES[case.dtype]
    z0, W_, x_ = (t.to(dtype, copy=True) for t in (start, W, x))
    if case.flaw:
        wrong = [(z0.int(), case), (z0.to(torch.complex64), case), (z0, replace(case, solver="newtn"))][case.seed % 3]
        return core.refused(lambda: called(wrong[1], wrong[0], (W_, x_)))
    if case.numpy:
        found = called(case, z0.numpy(), (W_.numpy(), x_.numpy()))
        value = core.check_like(found.value, start.shape, dtype, numpy=True)
        ok = core.check_answers(value, found.status)
        check_conditions(case, value, ok, start, W, x)
        return core.counted(found.status)
    W_.requires_grad_()
    x_.requires_grad_()
    found = called(case, z0, (W_, x_))
    ok = core.check_answers(core.check_like(found.value, start.shape, dtype), found.status)
    steep = check_conditions(case, found.value, ok, start, W, x)
    gradients = gradient(found.value, ok, W_, x_)
    core.check_gradients(gradients[1:], ok)
    if steep.all() and ok.any() and case.kind != "kinked":
        check_derivatives(case, found.value, ok, W, x, gradients)
    if case.batch > 1 and SICK[case.sick] is not None:
        check_others(case, found, (z0, W_, x_), gradients, bool(steep.all()))
    return core.counted(found.status)


def check_conditions(case: System, value: Tensor, ok: Tensor, start: Tensor, W: Tensor, x: Tensor) -> Tensor:
    """That success is one; of the samples ``ok``, whether the Jacobian is so regular that answers are close too."""
    tolerance, regular = core.EPS[core.DTYPES[case.dtype]] ** (2 / 3), []
    for i in ok.nonzero().reshape(-1).tolist():
        z = value[i].detach().double()
        F = condition(case, z, W, x[i])
        first = condition(case, start[i], W, x[i]).norm()
        jacobian = torch.func.jacrev(lambda z, i=i: condition(case, z, W, x[i]))(z)
        scale = z.norm() if case.form == "fixed_point" else first
        limit = 2 * tolerance * (1 + scale)
        if case.solver.startswith("scipy"):
            limit = torch.maximum(limit, max(tolerance, 1e-8) ** 0.5 * first) + 1e-8 * (1 + start[i].norm())
        rounding = 100 * core.EPS[core.DTYPES[case.dtype]] * (jacobian.norm() * z.norm() + x[i].norm() + scale)
        core.expect(F.norm() <= limit + rounding, f"success, but ‖F‖ = {F.norm():.2e} where {limit:.2e} is asked for")
        values = torch.linalg.svdvals(jacobian) if jacobian.isfinite().all() else torch.zeros(1)
        exact = float(F.norm() / values[-1].clamp_min(1e-300)) <= 1e3 * tolerance * (1 + float(z.norm()))
        regular.append(exact and bool(values[-1] > 1e-2 * values[0]) and bool(1e-3 < values[0] < 1e3))
    return torch.tensor(regular, dtype=torch.bool)


def gradient(value: Tensor, ok: Tensor, *params: Tensor) -> tuple[Tensor, ...]:
    """Of the sum over the samples ``ok``."""
    return torch.autograd.grad(value[ok].sum() + 0 * sum(p.nan_to_num(0, 0, 0).sum() for p in params), params)


def check_derivatives(case: System, value: Tensor, ok: Tensor, W: Tensor, x: Tensor, gradients: Any) -> None:
    """Against dense solves, sample by sample."""
    shared = torch.zeros_like(W)
    for i in ok.nonzero().reshape(-1).tolist():
        z = value[i].detach().double()
        in_z, in_W, in_x = torch.func.jacrev(lambda *p: condition(case, *p), (0, 1, 2))(z, W, x[i])
        u = torch.linalg.solve(in_z.mT, torch.ones_like(z))
        shared -= torch.einsum("i,ijk->jk", u, in_W)
        scale = 1e-5 if case.dtype == "float64" and not case.solver.startswith("scipy") else 3e-2
        curvature = 1 + float(x[i].norm())
        core.check_close(gradients[1][i], -u @ in_x, scale * curvature, "the gradient of x")
    if case.exponent <= 0:
        core.check_close(gradients[0], shared, 10 * scale, "the gradient of W")


def check_others(case: System, found: Any, data: tuple[Tensor, ...], gradients: Any, regular: bool) -> None:
    """The healthy samples, solved without the sick one."""
    z0, W, x = data
    z0, x = core.without(z0, 1), core.without(x.detach(), 1).requires_grad_()
    alone = called(case, z0, (W, x))
    kept = core.without(found.status, 1)
    if case.kind in ("contraction", "affine", "cubic", "coupled", "quadratic") and case.exponent <= 0:
        core.expect((alone.status == kept).all(), f"a sick sample turns {alone.status.tolist()} into {kept.tolist()}")
    if not regular or not alone.ok.equal(kept == 0):
        return
    tolerance = 1e-6 if case.dtype == "float64" and not case.solver.startswith("scipy") else 1e-2
    if case.kind in ("pole", "rosenbrock", "expanding"):
        return  # which of several answers is found, rounding may decide
    core.check_close(core.without(found.value, 1)[alone.ok], alone.value[alone.ok], tolerance, "a healthy value")
    if not bool(found.ok[1]):
        own = gradient(alone.value, alone.ok, W, x)
        core.check_close(core.without(gradients[1], 1), own[1], 10 * tolerance, "a healthy gradient")
        if case.kind != "kinked":
            core.check_close(gradients[0], own[0], 10 * tolerance, "the gradient of healthy samples in W")


def newton(residual: Any, z: np.ndarray) -> np.ndarray:
    """Somebody's own routine, which knows nothing of failures."""
    for _ in range(60):
        jacobian = residual.jacobian(z)
        if not np.isfinite(jacobian).all():
            break
        z = z - np.linalg.lstsq(jacobian, residual(z), rcond=None)[0]
        if not np.isfinite(z).all():
            break
    return z


def check_implicit(case: System) -> Counter:
    """``ImplicitFunction`` around somebody's routine: its four methods agree."""
    start, W, x = (t.to(core.DTYPES[case.dtype], copy=True) for t in case.data())
    adjoint = ImplicitAdjoint(LeastSquares()) if case.seed % 2 else ImplicitAdjoint()
    solver = CallableSolver(newton)
    function = ImplicitFunction(RootProblem(case.fn, batch_dims=1), solver, adjoint, on_failure="ignore")
    W.requires_grad_()
    x.requires_grad_()
    found, plain = function(W, x, init=start), function.solve(W, x, init=start)
    ok = core.check_answers(core.check_like(found.value, start.shape, start.dtype), found.status)
    core.expect(not plain.value.requires_grad, "solve() has a graph")
    core.expect(torch.equal(plain.value.nan_to_num(1), found.value.detach().nan_to_num(1)), "solve() has another value")
    scipy = replace(case, solver="scipy")
    regular = check_conditions(scipy, found.value, ok, *(t.detach().double() for t in (start, W, x)))
    cotangent = torch.ones_like(start) * ok[:, None]
    pulled = function.vjp((W, x), plain, cotangent)
    core.check_gradients([pulled[1]], ok)
    if case.numpy:
        answer = function(W.detach().numpy(), x.detach().numpy(), init=start.numpy()).value
        core.check_like(answer, start.shape, start.dtype, numpy=True)
    if regular.all() and ok.any():
        tolerance = 1e-6 if case.dtype == "float64" else 1e-2
        core.check_close(pulled[1], gradient(found.value, ok, x)[0], tolerance, "vjp()")
        moved = function.jvp((W, x), plain, (torch.ones_like(W), ok[:, None] * torch.ones_like(x)))
        pushed, pull = (moved[ok].sum(), pulled[0].sum() + pulled[1][ok].sum())
        scale = float(pulled[0].abs().sum() + pulled[1].abs().sum() + 1)
        core.expect((pushed - pull).abs() <= tolerance * scale, f"jvp() is {pushed:.6e}, vjp() {pull:.6e}")
    return core.counted(found.status)


PROPERTIES = [
    *[core.Property(form, "fixedpoint", System, cases(form), check) for form in FUNCTIONS],
    core.Property("ImplicitFunction", "fixedpoint", System, cases("root"), check_implicit),
]
