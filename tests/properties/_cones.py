"""Cone programs with strictly feasible points on both sides, and CVXPY problems with closed-form answers."""

from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from difflayers import Status
from difflayers.qp import Cones, CvxpyLayer, solve_cone
from properties import _core as core

KINDS = ("zero", "nonnegative", "second_order", "semidefinite", "exponential", "power")
EXPONENT = 0.3


@dataclass(frozen=True)
class ConeCase:
    """A batch of programs on a product of cones of two kinds; ``sick`` is what its second sample is."""

    kinds: tuple[str, ...]
    quadratic: bool
    n: int
    batch: int
    dtype: str
    exponent: int
    solver: str
    sick: str
    numpy: bool
    flaw: bool
    seed: int

    @property
    def cones(self) -> Cones:
        sizes = {"zero": 1, "nonnegative": 2, "second_order": (3,), "semidefinite": (2,), "exponential": 1,
                 "power": (EXPONENT,)}  # fmt: skip
        return Cones(**{kind: sizes[kind] for kind in KINDS if kind in self.kinds})

    def data(self) -> dict[str, Tensor]:
        normal, batch = core.random(self), max(self.batch, 1)
        m, n, scale = self.cones.rows, self.n, 4.0**self.exponent
        L, C, x = normal(batch, n, n), normal(batch, m, n), normal(batch, n)
        P = L @ L.mT + 0.1 * torch.eye(n).double()
        kinds = [kind for kind in KINDS if kind in self.kinds]
        s = torch.cat([inside(kind, normal(batch, 3), dual=False) for kind in kinds], 1)
        y = torch.cat([inside(kind, normal(batch, 3), dual=True) for kind in kinds], 1)
        d = (C @ x[..., None])[..., 0] + s
        given = (P @ x[..., None])[..., 0] if self.quadratic else 0
        blocks = {"P": P * scale, "q": -(given + (y[:, None] @ C)[:, 0]) * scale, "C": C, "d": d}
        if self.batch > 1 and self.sick != "none":
            if self.sick in ("nan", "inf"):
                blocks["d"][1, -1] = float(self.sick)
            elif self.sick == "infeasible":  # -1 in the first entry of the last cone, or -1 on a diagonal
                blocks["C"][1], blocks["d"][1] = 0, -1
            else:
                blocks["P"][1], blocks["C"][1], blocks["q"][1] = 0, 0, -1
        if not self.quadratic:
            del blocks["P"]
        return {name: block[: self.batch].to(core.DTYPES[self.dtype], copy=True) for name, block in blocks.items()}


def inside(kind: str, r: Tensor, *, dual: bool) -> Tensor:
    """Points of the interior of a cone or its dual."""
    a, b, c = r.unbind(-1)
    if kind == "zero":
        return a[:, None] if dual else 0 * a[:, None]
    if kind == "nonnegative":
        return r[:, :2].abs() + 0.1
    if kind == "second_order":
        return torch.stack([(a.square() + b.square()).sqrt() + c.abs() + 0.1, a, b], 1)
    if kind == "semidefinite":  # the upper triangle by columns
        return torch.stack([a.square() + 0.1, 2**0.5 * a * b, b.square() + c.square() + 0.1], 1)
    if kind == "exponential":
        u = a.abs() + 0.3
        b = b.clamp(-2, 2)
        if dual:
            return torch.stack([-u, b, u * (-b / u - 1).exp() + c.abs() + 0.1], 1)
        return torch.stack([b, u, u * (b / u).exp() + c.abs() + 0.1], 1)
    u, v = a.abs() + 0.1, b.abs() + 0.1
    if dual:
        bound = (u / EXPONENT) ** EXPONENT * (v / (1 - EXPONENT)) ** (1 - EXPONENT)
    else:
        bound = u**EXPONENT * v ** (1 - EXPONENT)
    return torch.stack([u, v, 0.9 * torch.tanh(c) * bound], 1)


def violation(kind: str, s: Tensor, *, dual: bool) -> Tensor:
    """By how much inequalities of the cone, or of its dual, are violated."""
    a, *others = s.unbind(-1)
    if kind == "zero":
        return 0 * a if dual else a.abs()
    if kind == "nonnegative":
        return -s.amin(-1)
    b, c = others
    if kind == "second_order":
        return (b.square() + c.square()).sqrt() - a
    if kind == "semidefinite":
        off = b / 2**0.5
        return -torch.linalg.eigvalsh(torch.stack([torch.stack([a, off], -1), torch.stack([off, c], -1)], -2))[..., 0]
    if kind == "exponential" and dual:
        a, b, c = b, -a, torch.e * c  # v >= ..., -u exp(v/u) <= e w
        inner = torch.where(b > 0, b * (-a / b.clamp_min(1e-300)).clamp(max=600).exp() - c, torch.maximum(-a, -c))
        return torch.maximum(inner, -b)
    if kind == "exponential":
        inner = torch.where(b > 0, b * (a / b.clamp_min(1e-300)).clamp(max=600).exp() - c, torch.maximum(a, -c))
        return torch.maximum(inner, -b)
    shares = (EXPONENT, 1 - EXPONENT) if dual else (1, 1)
    bound = (a.clamp_min(0) / shares[0]) ** EXPONENT * (b.clamp_min(0) / shares[1]) ** (1 - EXPONENT)
    return torch.maximum(c.abs() - bound, -torch.minimum(a, b))


CASES = st.builds(
    ConeCase, st.lists(st.sampled_from(KINDS), min_size=1, max_size=2, unique=True).map(tuple), st.booleans(),
    st.integers(1, 5), st.integers(0, 3), core.PRECISIONS,
    st.sampled_from([0, 0, -3, 3]), st.sampled_from(["clarabel", "clarabel", "scs"]),
    st.sampled_from(["none", "nan", "inf", "infeasible", "unbounded"]), st.booleans(),
    core.FLAWS, core.SEEDS,
)  # fmt: skip


def called(case: ConeCase, blocks: dict[str, Any]) -> Any:
    linear = not set(case.kinds) & set(KINDS[2:])
    solver = "clarabel" if linear else case.solver
    P, q, C, d = (blocks.get(name) for name in ("P", "q", "C", "d"))
    return solve_cone(P, q, C, d, case.cones, solver=solver, on_failure="ignore")


def check(case: ConeCase) -> Counter:
    blocks, dtype = case.data(), core.DTYPES[case.dtype]
    if case.flaw:
        wrong = [{"d": blocks["d"][..., :-1]}, {"q": blocks["q"].long()}, {"C": None}][case.seed % 3]
        return core.refused(lambda: called(case, blocks | wrong))
    leaves = {name: block.requires_grad_() for name, block in blocks.items()}
    found = called(case, leaves)
    ok = core.check_answers(core.check_like(found.x, (case.batch, case.n), dtype), found.status)
    for part in (found.y, found.s):
        core.check_answers(core.check_like(part, (case.batch, case.cones.rows), dtype), found.status)
    check_optimal(case, {name: block.detach().double() for name, block in blocks.items()}, found, ok)
    check_claims(case, found.status)
    if case.numpy:
        plain = called(case, {name: block.detach().numpy() for name, block in blocks.items()})
        core.check_like(plain.x, (case.batch, case.n), dtype, numpy=True)
    gradients = gradients_of(found.x, ok, leaves)
    core.check_gradients(gradients, ok)
    core.expect(all(g.isfinite().all() for g in gradients), "a gradient isn't finite")
    if case.batch > 1 and case.sick != "none":
        check_others(case, blocks, found, gradients)
    return core.counted(found.status)


def gradients_of(x: Tensor, ok: Tensor, leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
    nothing = 0 * sum(leaf.nan_to_num(0, 0, 0).sum() for leaf in leaves.values())
    return torch.autograd.grad(x[ok].sum() + nothing, list(leaves.values()))


def check_optimal(case: ConeCase, blocks: dict[str, Tensor], found: Any, ok: Tensor) -> None:
    tolerance = 1e-5 if case.dtype == "float64" and case.solver == "clarabel" else 1e-3
    x, y, s = (part.detach()[ok].double() for part in (found.x, found.y, found.s))
    data = {name: block[ok] for name, block in blocks.items()}
    gradient, size = data["q"] + (y[:, None] @ data["C"])[:, 0], data["q"].abs() + 1e-9
    size = size + (y.abs()[:, None] @ data["C"].abs())[:, 0]
    if case.quadratic:
        gradient = gradient + (data["P"] @ x[..., None])[..., 0]
        size = size + (data["P"].abs() @ x.abs()[..., None])[..., 0]
    core.expect((gradient.abs() <= tolerance * size.amax(-1, keepdim=True)).all(), "success, but not stationary")
    reached = (data["C"] @ x[..., None])[..., 0] + s - data["d"]
    units = 1 + (data["C"].abs() @ x.abs()[..., None])[..., 0] + data["d"].abs()
    core.expect((reached.abs() <= tolerance * units.amax(-1, keepdim=True)).all(), "success, but Cx + s isn't d")
    gap = (y * s).sum(-1).abs() / ((y * data["d"]).abs().sum(-1) + (x * data["q"]).abs().sum(-1) + 1e-6)
    core.expect((gap <= 10 * tolerance).all(), f"success, but yᵀs isn't zero: {gap.tolist()}")
    first = 0
    for kind in [kind for kind in KINDS if kind in case.kinds]:
        rows = slice(first, first + {"zero": 1, "nonnegative": 2}.get(kind, 3))
        first = rows.stop
        for part, dual in ((s, False), (y, True)):
            size = part.abs().amax(-1) + (1 if dual is False else 4.0**case.exponent)
            over = violation(kind, part[:, rows], dual=dual)
            core.expect(
                (over <= 10 * tolerance * size).all(), f"success, but outside of the {kind} cone: {over.tolist()}"
            )


def check_claims(case: ConeCase, status: Tensor) -> None:
    if case.batch > 1 and case.sick != "none":
        if case.sick in ("nan", "inf"):
            core.expect(status[1] == Status.NONFINITE, f"NaN in, {Status(int(status[1])).name} out")
        elif case.sick == "infeasible" and set(case.kinds) - {"exponential"}:
            core.expect(status[1] != Status.SUCCESS, "success of an infeasible sample")
        elif case.sick == "unbounded":
            core.expect(status[1] != Status.SUCCESS, "success of an unbounded sample")
        status = core.without(status, 1)
    wrong = (status == Status.INFEASIBLE) | (status == Status.UNBOUNDED) | (status == Status.NONFINITE)
    if case.dtype == "float64":
        core.expect(not wrong.any(), f"{[Status(int(s)).name for s in status]}, but there is a solution")
        if case.exponent == 0 and case.solver == "clarabel" and case.quadratic:
            names = [Status(int(s)).name for s in status]
            core.expect((status == Status.SUCCESS).all(), f"{names} of an easy problem")


def check_others(case: ConeCase, blocks: dict[str, Tensor], found: Any, gradients: Any) -> None:
    """The healthy samples, solved without the sick one."""
    alone = {name: core.without(block.detach(), 1).requires_grad_() for name, block in blocks.items()}
    other, kept = called(case, alone), core.without(found.status, 1)
    core.expect((other.status == kept).all(), f"a sick sample turns {other.status.tolist()} into {kept.tolist()}")
    if not case.quadratic or case.dtype == "float32" or case.solver == "scs":
        return
    core.check_close(core.without(found.x, 1)[other.ok], other.x[other.ok], 1e-6, "a healthy value")
    own = gradients_of(other.x, other.ok, alone)
    scale = 1 + max(float(g.abs().max()) for g in own)
    for mine, expected in zip(gradients, own, strict=True):
        core.expect(((core.without(mine, 1) - expected).abs() <= 1e-3 * scale).all(), "a healthy gradient moves")


@dataclass(frozen=True)
class Values:
    """Parameters of a CVXPY problem."""

    problem: str
    batch: int
    dtype: str
    exponent: int
    sick: str
    numpy: bool
    flaw: bool
    seed: int


@cache
def made(problem: str) -> Any:
    """A layer from a point ``a`` of three entries to ``x``."""
    import cvxpy as cp

    x, a = cp.Variable(3), cp.Parameter(3)
    distance = cp.sum_squares(x - a)
    stated = {
        "ball": cp.Problem(cp.Minimize(distance), [cp.norm(x) <= 1]),
        "box": cp.Problem(cp.Minimize(distance), [x >= -1, x <= 2]),
        "simplex": cp.Problem(cp.Minimize(distance), [x >= 0, cp.sum(x) == 1]),
        "softmax": cp.Problem(cp.Maximize(a @ x + cp.sum(cp.entr(x))), [cp.sum(x) == 1]),
        # Infeasible where an entry of a is above one.
        "between": cp.Problem(cp.Minimize(cp.sum_squares(x)), [x >= a, x <= 1]),
    }[problem]
    return CvxpyLayer(stated, parameters=[a], variables=[x], on_failure="ignore")


def answer(problem: str, a: Tensor) -> Tensor:
    from difflayers.qp.projections import project_simplex

    if problem == "ball":
        return a / a.norm(dim=-1, keepdim=True).clamp_min(1)
    if problem == "simplex":
        return project_simplex(a)
    return {"box": a.clamp(-1, 2), "softmax": a.softmax(-1), "between": a.clamp_min(0)}[problem]


def check_cvxpy(case: Values) -> Counter:
    layer, dtype = made(case.problem), core.DTYPES[case.dtype]
    a = (core.random(case)(case.batch, 3) * 10.0**case.exponent).to(dtype)
    if case.batch > 1 and case.sick != "none":
        a[1, 0] = float(case.sick)
    if case.flaw:
        return core.refused(lambda: layer(*[(a[..., :2],), (a.long(),), (a, a), ()][case.seed % 4]))
    if case.numpy:
        core.check_like(layer(a.numpy())[0], (case.batch, 3), dtype, numpy=True)
    a.requires_grad_()
    found = layer.solve(a)
    (x,) = found.value
    ok = core.check_answers(core.check_like(x, (case.batch, 3), dtype), found.status)
    good = a.detach()[ok].double()
    tolerance = 1e-5 if case.dtype == "float64" else 1e-3
    expected = answer(case.problem, good)
    core.expect((x.detach()[ok].double() - expected).abs().le(tolerance * (1 + good.abs().amax())).all()
           if ok.any() else True, "success, but another answer than the closed form")  # fmt: skip
    finite = a.detach().isfinite().all(-1)
    core.expect(not (ok & ~finite).any(), "success of a sample that isn't finite")
    if case.problem == "between":
        core.expect(not (ok & (a.detach() > 1 + 1e-6).any(-1)).any(), "success of an infeasible sample")
    elif case.exponent <= 0:
        core.expect(ok[finite].all(), f"{found.status.tolist()} of an easy problem")
    (gradient,) = torch.autograd.grad(x[ok].sum() + 0 * a.nan_to_num(0, 0, 0).sum(), a)
    core.check_gradients([gradient], ok)
    core.expect(gradient.isfinite().all(), "a gradient isn't finite")
    if case.batch > 1 and not bool(finite[1]):
        b = core.without(a.detach(), 1).requires_grad_()
        alone = layer.solve(b)
        core.expect(alone.status.equal(core.without(found.status, 1)), "a sick sample changes a status")
        (own,) = torch.autograd.grad(alone.value[0][alone.ok].sum() + 0 * b.sum(), b)
        core.check_close(alone.value[0][alone.ok], core.without(x, 1)[alone.ok], tolerance, "a healthy value")
        scale = 1 + float(own.abs().amax())
        core.expect((own - core.without(gradient, 1)).abs().amax() <= 1e-3 * scale, "a healthy gradient moves")
    return core.counted(found.status)


VALUES = st.builds(
    Values, st.sampled_from(["ball", "box", "simplex", "softmax", "between"]), st.integers(0, 3),
    core.PRECISIONS, st.sampled_from([0, 0, -2, 2]),
    st.sampled_from(["none", "nan", "inf"]), st.booleans(), core.FLAWS,
    core.SEEDS,
)  # fmt: skip


@dataclass(frozen=True)
class Scaled:
    """A program whose objective, right-hand side, unknowns and rows are in other units, by powers of ten."""

    kinds: tuple[str, ...]
    quadratic: bool
    objective: int
    side: int
    unknowns: int
    rows: int
    sick: str
    seed: int

    def blocks(self) -> tuple[dict[str, Tensor], dict[str, Tensor], Cones]:
        """The program in plain units, the same in others."""
        # Linear programs of few rows have many solutions.
        quadratic = self.quadratic or not set(self.kinds) & set(KINDS[2:])
        plain = ConeCase(self.kinds, quadratic, 3, 3, "float64", 0, "clarabel", self.sick, False, False, self.seed)
        blocks, other = plain.data(), plain.data()
        a, b, u, r = (10.0**power for power in (self.objective, self.side, self.unknowns, self.rows))
        if "P" in blocks:
            other["P"] *= a * u * u
        other["q"] *= a * u * (b if "P" in blocks else 1)
        other["C"] *= r * u
        other["d"] *= r * b
        return blocks, other, plain.cones


def check_scaled(case: Scaled) -> Counter:
    blocks, other, cones = case.blocks()
    solved, gradients = [], []
    for given in (blocks, other):
        leaves = {name: block.requires_grad_() for name, block in given.items()}
        P, q, C, d = (leaves.get(name) for name in ("P", "q", "C", "d"))
        found = solve_cone(P, q, C, d, cones, on_failure="ignore")
        solved.append(found)
        gradients.append(dict(zip(leaves, gradients_of(found.x, found.ok, leaves), strict=True)))
    one, two = solved
    core.expect(one.status.equal(two.status), f"{one.status.tolist()}, but in other units {two.status.tolist()}")
    x, y = (part.detach()[one.ok] for part in (one.x, two.x))
    unit = 10.0 ** (case.side - case.unknowns)
    core.check_close(y / unit, x, 1e-6, "an answer in other units")
    for name, gradient in gradients[0].items():
        back = gradients[1][name] * scale_of(case, name) / unit
        size = 1 + float(gradient.abs().amax())
        core.expect(
            ((back - gradient).abs() <= 1e-5 * size).all(), f"the gradient in {name} is another one in other units"
        )
    return core.counted(two.status)


def scale_of(case: Scaled, name: str) -> float:
    """What a block was multiplied by."""
    quadratic = case.side if "P" in case.blocks()[0] else 0
    powers = {
        "P": case.objective + 2 * case.unknowns,
        "q": case.objective + case.unknowns + quadratic,
        "C": case.rows + case.unknowns,
        "d": case.rows + case.side,
    }
    return 10.0 ** powers[name]


DECADES = st.integers(-6, 6)
SCALES = st.builds(
    Scaled, st.lists(st.sampled_from(KINDS), min_size=1, max_size=2, unique=True).map(tuple), st.booleans(),
    DECADES, DECADES, DECADES, DECADES, st.sampled_from(["none", "nan", "infeasible"]), core.SEEDS,
)  # fmt: skip

PROPERTIES = [
    core.Property("solve_cone in any units", "cone", Scaled, SCALES, check_scaled),
    core.Property("solve_cone", "cone", ConeCase, CASES, check),
    core.Property("CvxpyLayer", "cone", Values, VALUES, check_cvxpy),
]
