"""Projections: points of any shape, scale and dtype, and sets that are almost nothing."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from difflayers.qp import projections as p
from properties import _core as core

Set = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Point:
    """Points ``(batch, n)``, or matrices for the semidefinite cone; ``alike`` makes their entries equal."""

    function: str
    batch: int
    n: int
    dtype: str
    exponent: int
    radius: int
    alike: str
    sick: str
    numpy: bool
    flaw: bool
    seed: int

    def data(self) -> Tensor:
        normal = core.random(self)
        x = normal(self.batch, self.n, *([self.n] if self.function == "project_psd" else []))
        if self.alike == "equal":
            x = torch.ones_like(x)
        if self.alike == "zero":
            x = torch.zeros_like(x)
        if self.alike == "tied":
            x = x.round()
        x = (x * 10.0**self.exponent).to(core.DTYPES[self.dtype])
        if self.batch > 1 and self.sick != "none":
            x[1].reshape(-1)[-1:] = float(self.sick)
        return x


def cases(function: str) -> st.SearchStrategy:
    return st.builds(
        Point, st.just(function), st.integers(0, 4), st.integers(1, 7),
        st.sampled_from(["float64"] * 3 + list(core.DTYPES)), st.sampled_from([0, 0, 0, -3, 3]),
        st.sampled_from([0, 0, -2, 2]), st.sampled_from(["no", "no", "equal", "zero", "tied"]),
        st.sampled_from(["none", "nan", "inf", "-inf"]), st.booleans(), core.FLAWS, core.SEEDS,
    )  # fmt: skip


def call(case: Point) -> Set:
    """The projection with its parameters, which are the same for all samples."""
    radius, dtype = 10.0**case.radius, core.DTYPES[case.dtype]
    normal = core.random(replace(case, seed=case.seed + 1))
    normal, A = normal(case.n).to(dtype), normal(min(2, case.n), case.n).to(dtype)
    return {
        "project_box": lambda x: p.project_box(x, -radius, 2 * radius),
        "project_halfspace": lambda x: p.project_halfspace(x, normal, radius),
        "project_affine": lambda x: p.project_affine(x, A, (radius * A.double().sum(-1)).to(dtype)),
        "project_l2_ball": lambda x: p.project_l2_ball(x, radius),
        "project_l1_ball": lambda x: p.project_l1_ball(x, radius),
        "project_simplex": lambda x: p.project_simplex(x, radius),
        "project_second_order_cone": p.project_second_order_cone,
        "project_psd": p.project_psd,
        "sparsemax": p.sparsemax,
        "entmax": lambda x: p.entmax(x, (1, 1.2, 1.5, 1.9, 2, 3)[case.seed % 6]),
    }[case.function]


def outside(case: Point, y: Tensor) -> Tensor:
    """How far ``y`` is from the set, at least in order of magnitude, ``(batch,)``."""
    radius = 10.0**case.radius
    normal = core.random(replace(case, seed=case.seed + 1))
    normal, A = (t.to(core.DTYPES[case.dtype]).double() for t in (normal(case.n), normal(min(2, case.n), case.n)))
    if case.function in ("sparsemax", "entmax", "project_simplex"):
        total = radius if case.function == "project_simplex" else 1
        return torch.maximum((y.sum(-1) - total).abs(), -y.amin(-1))
    if case.function == "project_box":
        return torch.maximum(y.amax(-1) - 2 * radius, -radius - y.amin(-1))
    if case.function == "project_halfspace":
        return (y @ normal - radius) / normal.norm()
    if case.function == "project_affine":
        offset = (radius * A.sum(-1)).to(core.DTYPES[case.dtype]).double()
        return ((y @ A.mT - offset).norm(dim=-1)) / A.norm()
    if case.function == "project_psd":
        return -torch.linalg.eigvalsh((y + y.mT) / 2)[..., 0]
    if case.function == "project_second_order_cone":
        return y[..., 1:].norm(dim=-1) - y[..., 0]
    return y.norm(p=1 if case.function == "project_l1_ball" else 2, dim=-1) - radius


def further(case: Point, x: Tensor, y: Tensor) -> Tensor:
    """By how much a known point of the set is nearer than the projection, squared, ``(batch,)``."""
    radius, best = 10.0**case.radius, torch.full((len(x),), -torch.inf, dtype=torch.float64)
    directions = torch.cat([torch.eye(case.n), -torch.eye(case.n)]).double()
    known = {
        "project_box": [torch.full((case.n,), v * radius, dtype=torch.float64) for v in (-1, 0, 2)],
        "project_l2_ball": list(radius * directions), "project_l1_ball": list(radius * directions),
        "project_simplex": list(radius * directions[: case.n]), "sparsemax": list(directions[: case.n]),
        "project_second_order_cone": [torch.zeros(case.n).double(), directions[0]],
        "project_affine": [torch.full((case.n,), radius, dtype=torch.float64)],
        "project_psd": [torch.zeros(case.n, case.n).double(), torch.eye(case.n).double()],
    }.get(case.function, [])  # fmt: skip
    # (x - y)ᵀ(v - y) <= 0 for all v of the set: the projection's own condition.
    for v in known:
        best = torch.maximum(best, ((x - y) * (v - y)).flatten(1).sum(-1))
    return best


def check(case: Point) -> Counter:
    x, project = case.data(), call(case)
    if case.flaw:
        return core.refused(lambda: project([x.long(), x.tolist(), None][case.seed % 3]))
    if case.numpy and case.dtype != "bfloat16":
        if case.function in ("project_halfspace", "project_affine"):
            return Counter()
        core.check_like(project(x.numpy()), x.shape, x.dtype, numpy=True)
    leaf = x.clone().requires_grad_()
    value = core.check_like(project(leaf), x.shape, x.dtype)
    finite = x.isfinite().flatten(1).all(1)
    rows = value.detach().flatten(1)
    box = case.function == "project_box"  # each entry on its own
    core.expect(rows[finite].isfinite().all(), "the projection of a finite point isn't finite")
    core.expect(box or rows[~finite].isnan().all(), "a point that isn't finite has a projection")
    points, answers = x[finite].double(), value.detach()[finite].double()
    eps, scale = core.EPS[x.dtype], 10.0**case.radius + points.flatten(1).norm(dim=-1)
    scale = scale + 1 if case.function in ("sparsemax", "entmax") else scale
    slack = {"project_affine": 1e4, "project_psd": 100}.get(case.function, 30)
    core.expect((outside(case, answers) <= slack * eps * scale).all(), f"outside by {outside(case, answers).tolist()}")
    if case.function == "project_psd":
        points = (points + points.mT) / 2
    near = further(case, points, answers)
    core.expect((near <= slack * eps * (1 + scale) ** 2).all(), f"not the nearest point: {near.tolist()}")
    (gradient,) = torch.autograd.grad(value[finite].sum(), leaf)
    core.expect(gradient[finite].isfinite().all(), "the gradient of a finite point isn't finite")
    core.expect(box or (gradient[~finite] == 0).all(), "a masked sample has a gradient that isn't zero")
    if case.batch > 1 and case.sick != "none":
        check_others(case, project, x, value, gradient)
    return Counter({"finite": int(finite.sum()), "not finite": int((~finite).sum())})


def check_others(case: Point, project: Set, x: Tensor, value: Tensor, gradient: Tensor) -> None:
    """The healthy samples without the sick one, to rounding."""
    leaf = core.without(x, 1).requires_grad_()
    alone = project(leaf)
    tolerance = 1e3 * core.EPS[x.dtype]
    core.check_close(core.without(value, 1), alone, tolerance, "a healthy value")
    if case.alike == "no":
        (own,) = torch.autograd.grad(alone.sum(), leaf)
        # Where entries have a fixed sum, its gradient is rounding.
        size = 1 + float(own.double().abs().amax()) if own.numel() else 1
        moved = (core.without(gradient, 1).double() - own.double()).abs()
        core.expect((moved <= 100 * tolerance * size).all(), "a healthy gradient moves")


PROPERTIES = [core.Property(function, "projections", Point, cases(function), check) for function in p.__all__]
