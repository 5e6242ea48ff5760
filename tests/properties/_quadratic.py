"""Quadratic programs with a known solution, badly scaled, degenerate, or with a sample that has none."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import Tensor

from difflayers import Status
from difflayers.qp import QPLayer, closest_feasible, solve_qp
from properties import _core as core

NAMES = ("P", "q", "G", "h", "A", "b", "lb", "ub")
SOLVERS = ["auto", "auto", "interior_point", "clarabel", "daqp", "highs", "osqp", "piqp", "proxqp"]
SICK = ["none", "nan", "infinite", "infeasible", "unbounded", "huge"]


@dataclass(frozen=True)
class Program:
    """A batch around known solutions; ``odd`` says what is degenerate, ``sick`` what its second sample is."""

    objective: str
    n: int
    m: int
    p: int
    box: bool
    odd: str
    objective_exponent: int
    row_exponent: int
    uneven: bool
    solver: str
    batch: int
    dtype: str
    sick: str
    numpy: bool
    flaw: bool
    seed: int

    def data(self) -> dict[str, Tensor]:
        """The blocks, in the dtype; those that aren't there are left out."""
        normal, batch, n = core.random(self), max(self.batch, 1), self.n
        m, p = self.m, min(self.p, n - 1)
        L, G, A, x = normal(batch, n, n), normal(batch, m, n), normal(batch, p, n), normal(batch, n)
        P = L @ L.mT + 0.1 * torch.eye(n).double()
        if self.objective == "semidefinite":
            P = L[..., :1] @ L[..., :1].mT
        if self.odd == "zero rows" and m:
            G[:, 0] = 0
        slack, z, y = normal(batch, m).abs(), normal(batch, m).abs(), normal(batch, p)
        active = normal(batch, m) > 0.3
        z, slack = torch.where(active, z, 0), torch.where(active, 0, slack)
        h = (G @ x[..., None])[..., 0] + (0 * slack if self.odd == "touching" else slack)
        lb, ub, box = x - normal(batch, n).abs(), x + normal(batch, n).abs(), torch.zeros(batch, n).double()
        if self.box:
            at = normal(batch, n) > 1
            ub, box = torch.where(at, x, ub), torch.where(at, normal(batch, n).abs(), box)
            if self.odd == "fixed":
                lb[:, 0], ub[:, 0] = x[:, 0], x[:, 0]
            lb[:, -1] = -torch.inf
        given = 0 if self.objective == "linear" else (P @ x[..., None])[..., 0]
        q = -given - (z[:, None] @ G)[:, 0] - (y[:, None] @ A)[:, 0] - (box if self.box else 0)
        b = (A @ x[..., None])[..., 0]
        # By powers of two, so that copies stay copies.
        if self.odd == "copies":
            G, h, A, b = (torch.cat([t, 2 * t], 1) for t in (G, h, A, b))
        rows = 4.0**self.row_exponent
        uneven = 2.0 ** (8 * normal(1, G.shape[1])).round().clamp(-30, 30) if self.uneven else 1
        blocks = {"P": P * 4.0**self.objective_exponent, "q": q * 4.0**self.objective_exponent}
        blocks |= {"G": G * rows * (uneven[..., None] if self.uneven else 1), "h": h * rows * uneven}
        blocks |= {"A": A * rows, "b": b * rows, "lb": lb, "ub": ub}
        for names, wanted in ((("P",), self.objective != "linear"), (("G", "h"), m), (("A", "b"), p),
                              (("lb", "ub"), self.box)):  # fmt: skip
            blocks = {name: block for name, block in blocks.items() if wanted or name not in names}
        self.spoil(blocks)
        return {name: block[: self.batch].to(core.DTYPES[self.dtype], copy=True) for name, block in blocks.items()}

    @property
    def spoils(self) -> bool:
        return self.batch > 1 and self.sick != "none"

    def spoil(self, blocks: dict[str, Tensor]) -> None:
        if not self.spoils:
            return
        if self.sick in ("nan", "infinite", "huge"):
            blocks["q"][1, 0] = {"nan": torch.nan, "infinite": torch.inf, "huge": 1e30}[self.sick]
        if self.sick == "infeasible" and "G" in blocks:
            blocks["G"][1, 0], blocks["h"][1, 0] = 0, -1
        if self.sick == "unbounded":
            for name in ("P", "G", "A"):
                if name in blocks:
                    blocks[name][1, :, -1] = 0
            if "P" in blocks:
                blocks["P"][1, -1, :] = 0
            blocks["q"][1, -1] = 1

    @property
    def known(self) -> bool:
        """Whether healthy samples have a solution, rounding or not."""
        return self.dtype == "float64" and self.odd in ("no", "zero rows")

    @property
    def regular(self) -> bool:
        """Whether the solution moves smoothly with the data, in units that are fine."""
        exponents = abs(self.objective_exponent) + abs(self.row_exponent)
        return self.objective == "definite" and self.odd == "no" and not self.uneven and exponents <= 2


def fitting(case: Program) -> Program:
    """HiGHS is for linear programs."""
    return replace(case, solver="auto") if case.solver == "highs" and case.objective != "linear" else case


CASES = st.builds(
    Program, st.sampled_from(["definite", "definite", "semidefinite", "linear"]), st.integers(1, 6), st.integers(0, 8),
    st.integers(0, 3), st.booleans(), st.sampled_from(["no", "no", "copies", "touching", "zero rows", "fixed"]),
    st.sampled_from([0, 0, -8, -1, 1, 8]), st.sampled_from([0, 0, -8, -1, 1, 8]), st.sampled_from([False, False, True]),
    st.sampled_from(SOLVERS), st.integers(0, 4), core.PRECISIONS,
    st.sampled_from(SICK), st.booleans(), core.FLAWS, core.SEEDS,
).map(fitting)  # fmt: skip


def check(case: Program) -> Counter:
    blocks = case.data()
    if case.flaw:
        return core.refused(lambda: solve_qp(**flawed(case, blocks), solver=case.solver, on_failure="ignore"))
    layer = QPLayer(solver=case.solver, on_failure="ignore")
    leaves = {name: block.requires_grad_() for name, block in blocks.items()}
    found = layer.solve(*[leaves.get(name) for name in NAMES])
    ok = core.check_answers(core.check_like(found.x, (case.batch, case.n), core.DTYPES[case.dtype]), found.status)
    for name in ("x", "y", "z", "z_box"):
        core.check_answers(getattr(found, name), found.status)
    check_optimal(case, blocks, found, ok)
    check_claims(case, found)
    if case.numpy:
        arrays = {name: block.detach().numpy() for name, block in blocks.items()}
        plain = solve_qp(arrays.pop("P", None), **arrays, solver=case.solver, on_failure="ignore")
        core.check_like(plain.x, (case.batch, case.n), core.DTYPES[case.dtype], numpy=True)
        core.expect((torch.as_tensor(plain.status) == found.status).all(), "NumPy in has another status")
    gradients = torch.autograd.grad(found.x[ok].sum() + 0 * finite_sum(leaves), list(leaves.values()))
    core.check_gradients(gradients, ok)
    core.expect(all(g.isfinite().all() for g in gradients), "a gradient isn't finite")
    if case.spoils:
        check_others(case, leaves, found, gradients)
    return core.counted(found.status)


def check_layer(case: Program) -> Counter:
    """The layer's call gives what its solve gives, for blocks that all samples share too."""
    blocks = case.data()
    healthy = replace(case, sick="none").data()
    for name in set(healthy) & {"P", "G", "A"}:
        blocks[name] = healthy[name][0] if case.batch else healthy[name].new_zeros(healthy[name].shape[1:])
    layer = QPLayer(solver=case.solver, on_failure="ignore")
    leaves = {name: block.requires_grad_() for name, block in blocks.items()}
    arguments = [leaves.get(name) for name in NAMES]
    x, found = layer(*arguments), layer.solve(*arguments)
    ok = core.check_answers(core.check_like(x, (case.batch, case.n), core.DTYPES[case.dtype]), found.status)
    rounding = 1e-9 if case.solver == "proxqp" else 0  # ProxQP's number of steps isn't the same every time
    core.check_close(x.nan_to_num(7), found.x.nan_to_num(7), rounding, "what forward() and solve() give")
    whole = {name: block.expand(case.batch, *block.shape) if name in "PGA" else block for name, block in blocks.items()}
    check_optimal(case, whole, found, ok)
    gradients = torch.autograd.grad(x[ok].sum() + 0 * finite_sum(leaves), list(leaves.values()))
    core.expect(all(g.isfinite().all() for g in gradients), "a gradient isn't finite")
    return core.counted(found.status)


def finite_sum(leaves: dict[str, Tensor]) -> Tensor:
    return sum(leaf.nan_to_num(0, 0, 0).sum() for leaf in leaves.values())


def flawed(case: Program, blocks: dict[str, Tensor]) -> dict[str, Any]:
    blocks = {"P": None, **blocks}
    return [
        blocks | {"q": blocks["q"][..., :-1]} if case.n > 1 or "G" in blocks else blocks | {"q": None},
        blocks | {"q": blocks["q"].long()}, blocks | {"G": blocks["q"][..., None, :], "h": None},
        blocks | {"P": -torch.eye(case.n, dtype=core.DTYPES[case.dtype])}, blocks | {"q": None},
        blocks | {"P": torch.ones(case.n + 1, case.n, dtype=core.DTYPES[case.dtype])},
    ][case.seed % 6]  # fmt: skip


def check_optimal(case: Program, blocks: dict[str, Tensor], found: Any, ok: Tensor) -> None:
    """The conditions of Karush, Kuhn and Tucker, every row in its own units."""
    tolerance = 1e-6 if case.dtype == "float64" else 2e-4
    x, y, z, box = (getattr(found, name).detach()[ok].double() for name in ("x", "y", "z", "z_box"))
    data = {name: block.detach()[ok].double() for name, block in blocks.items()}
    q = data["q"]
    gradient, size = q + box, q.abs() + box.abs() + 1e-9
    gap = (q * x).abs().sum(-1)
    for name, v in (("P", x), ("G", z), ("A", y)):
        if name in data:
            M = data[name].mT
            gradient = gradient + (M @ v[..., None])[..., 0]
            size = size + (M.abs() @ v.abs()[..., None])[..., 0]
    core.expect((gradient.abs() <= tolerance * size.amax(-1, keepdim=True)).all(), "success, but not stationary")
    core.expect((z >= 0).all(), "a multiplier is negative")
    top = x.abs().amax(-1, keepdim=True) if x.numel() else x.sum(-1, keepdim=True)
    for name, side, equal in (("G", "h", False), ("A", "b", True)):
        if name in data:
            over = (data[name] @ x[..., None])[..., 0] - data[side]
            units = data[name].abs().sum(-1) * top + data[side].abs() + 1e-9
            core.expect(
                ((over.abs() if equal else over) <= tolerance * units).all(), f"success, but {name} x isn't right"
            )
            if not equal:
                gap = gap + (z * data[side]).abs().sum(-1)
                core.expect(
                    ((z * over).abs().sum(-1) <= tolerance * (gap + 1e-9)).all(), "success, but not complementary"
                )
    if "lb" in data:
        slack = torch.minimum(x - data["lb"], data["ub"] - x)
        core.expect((slack >= -tolerance * (1 + top)).all(), "success, but out of bounds")


def check_claims(case: Program, found: Any) -> None:
    """Proofs that there is no solution where there is one, or answers where there is none."""
    status = found.status.clone()
    if case.spoils:
        if case.sick in ("nan", "infinite"):
            core.expect(status[1] == Status.NONFINITE, f"NaN in, {Status(int(status[1])).name} out")
        if case.sick == "infeasible" and case.m:
            core.expect(status[1] != Status.SUCCESS, "success of an infeasible sample")
        if case.sick == "unbounded":
            core.expect(status[1] != Status.SUCCESS or case.box, "success of an unbounded sample")
        status = core.without(status, 1)
    if case.known:
        wrong = (status == Status.INFEASIBLE) | (status == Status.UNBOUNDED) | (status == Status.NONFINITE)
        core.expect(not wrong.any(), f"{[Status(int(s)).name for s in status]}, but there is a solution")
    if case.known and case.regular and case.solver in ("auto", "interior_point", "clarabel", "daqp", "piqp"):
        core.expect((status == Status.SUCCESS).all(), f"{[Status(int(s)).name for s in status]} of an easy problem")


def check_others(case: Program, blocks: dict[str, Tensor], found: Any, gradients: Any) -> None:
    """The healthy samples, solved without the sick one."""
    alone = {name: core.without(block.detach(), 1).requires_grad_() for name, block in blocks.items()}
    other = QPLayer(solver=case.solver, on_failure="ignore").solve(*[alone.get(name) for name in NAMES])
    kept = core.without(found.status, 1)
    # Rounded to single precision a semidefinite matrix may be indefinite, which luck decides whether a solver notices.
    if case.objective != "semidefinite" or case.dtype == "float64":
        core.expect((other.status == kept).all(), f"a sick sample turns {other.status.tolist()} into {kept.tolist()}")
    if case.objective != "definite" or not case.regular:
        return
    tolerance = 1e-7 if case.dtype == "float64" else 1e-3
    core.check_close(core.without(found.x, 1)[other.ok], other.x[other.ok], tolerance, "a healthy value")
    margin = other.stats["margin"][other.ok]
    if case.dtype == "float64" and (margin > 1e-4).all() and not other.stats["degenerate"].any():
        own = torch.autograd.grad(other.x[other.ok].sum() + 0 * finite_sum(alone), list(alone.values()))
        for mine, expected in zip(gradients, own, strict=True):
            core.check_close(core.without(mine, 1), expected, 1e-5, "a healthy gradient")


def check_closest(case: Program) -> Counter:
    """What comes out can be satisfied, and what could be is as it was."""
    blocks = {name: block for name, block in case.data().items() if name not in ("P", "q")}
    if not {"G", "A"} & set(blocks):
        return core.refused(lambda: closest_feasible(**blocks))
    if case.sick == "infeasible" and case.spoils and "h" in blocks:
        # x below -1 and above 1.
        blocks["G"] = torch.cat([blocks["G"], blocks["G"][:, -1:], -blocks["G"][:, -1:]], 1)
        unit = torch.ones_like(blocks["h"][:, :1]) * blocks["G"][:, -1:].norm(dim=-1)
        blocks["h"] = torch.cat([blocks["h"], -unit, -unit], 1)
    leaves = {name: block.requires_grad_() for name, block in blocks.items()}
    solver = "auto" if case.solver == "highs" else case.solver
    sides = closest_feasible(**leaves, solver=solver, on_failure="ignore")
    dtype, fine, counts = core.DTYPES[case.dtype], torch.ones(case.batch, dtype=torch.bool), Counter()
    for name, side in (("h", sides.h), ("b", sides.b)):
        if name in leaves:
            core.check_like(side, leaves[name].shape, dtype)
            fine = fine & side.isfinite().flatten(1).all(1)
    counts += Counter({"SUCCESS": int(fine.sum()), "without an answer": int((~fine).sum())})
    moved = {name: getattr(sides, name)[fine].detach() for name in ("h", "b") if name in leaves}
    rest = {name: block.detach()[fine] for name, block in leaves.items() if name not in moved}
    if case.odd != "copies" and case.dtype == "float64" and not case.uneven and abs(case.row_exponent) <= 1:
        for i in range(int(fine.sum())):
            excess = least_excess({name: block[i] for name, block in {**rest, **moved}.items()})
            core.expect(excess <= 1e-6, f"no point satisfies the sides; the nearest is off by {excess:.1e}")
        if not case.spoils and case.known:
            core.expect(fine.all(), "a feasible problem without an answer")
            for name, side in moved.items():
                scale = 1 + leaves[name].detach().abs()
                unmoved = (side - leaves[name].detach()).abs() <= 1e-6 * scale
                core.expect(unmoved.all(), f"{name} was moved, but could be satisfied")
    total = sum(side[fine].sum() for side in sides if side is not None) + 0 * finite_sum(leaves)
    gradients = torch.autograd.grad(total, list(leaves.values()))
    core.check_gradients(gradients, fine)
    return counts


def least_excess(blocks: dict[str, Tensor]) -> float:
    """By how much constraints have to be loosened until a point satisfies them."""
    arrays = {name: block.numpy() for name, block in blocks.items()}
    n = arrays["G" if "G" in arrays else "A"].shape[-1]
    upper, right = [np.zeros((0, n + 1))], [np.zeros(0)]
    for matrix, side, signs in (("G", "h", (1,)), ("A", "b", (1, -1))):
        for sign in signs if matrix in arrays else ():
            upper.append(np.c_[sign * arrays[matrix], -np.ones(len(arrays[matrix]))])
            right.append(sign * arrays[side])
    low, high = (arrays.get(name, np.full(n, bound)) for name, bound in (("lb", -np.inf), ("ub", np.inf)))
    cost = np.r_[np.zeros(n), 1]
    found = linprog(
        cost, np.concatenate(upper), np.concatenate(right), bounds=[*zip(low, high, strict=True), (0, None)]
    )
    return float(found.fun) if found.fun is not None else np.inf


PROPERTIES = [
    core.Property("solve_qp", "qp", Program, CASES, check),
    core.Property("QPLayer", "qp", Program, CASES, check_layer),
    core.Property("closest_feasible", "qp", Program, CASES, check_closest),
]
