"""Layers of fixed points: cells of any gain, images of any size, inputs of any scale."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

from difflayers.fixedpoint import DEQ, MonotoneConvDEQ, MonotoneDEQ, MultiscaleDEQ
from properties import _core as core

SICK = {"nan": torch.nan, "infinite": torch.inf, "none": None}
SOLVERS = {
    "DEQ": ["anderson", "picard", "broyden", "newton"],
    "MultiscaleDEQ": ["anderson", "broyden"],
    "MonotoneDEQ": ["peaceman_rachford", "forward_backward", "anderson", "newton"],
    "MonotoneConvDEQ": ["peaceman_rachford", "forward_backward", "anderson"],
}


@dataclass(frozen=True)
class Input:
    """A batch for a layer whose weights are ``gain`` times those that it starts with."""

    layer: str
    solver: str
    batch: int
    size: int
    dtype: str
    gain: float
    exponent: int
    sick: str
    flaw: bool
    seed: int

    def data(self) -> Tensor:
        shape = {"DEQ": (4,), "MonotoneDEQ": (3,)}.get(self.layer, (2, self.size, self.size + 1))
        x = core.random(self)(self.batch, *shape) * 10.0**self.exponent
        if self.batch > 1 and SICK[self.sick] is not None:
            x[1].reshape(-1)[0] = SICK[self.sick]
        return x.to(core.DTYPES[self.dtype])

    def made(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            options: dict[str, Any] = {"solver": self.solver, "on_failure": "ignore"}
            layer = {
                "DEQ": lambda: DEQ(Cell(), **options),
                "MultiscaleDEQ": lambda: MultiscaleDEQ(2, (4, 8), groups=2, **options),
                "MonotoneDEQ": lambda: MonotoneDEQ(3, 5, margin=min(self.gain, 1), **options),
                "MonotoneConvDEQ": lambda: MonotoneConvDEQ(2, 3, margin=min(self.gain, 1), **options),
            }[self.layer]().to(core.DTYPES[self.dtype])
        with torch.no_grad():
            for name, weight in layer.named_parameters():
                if "norm" not in name and "stem" not in name:
                    weight *= self.gain
        return layer


class Cell(nn.Module):
    """A contraction while weights are small."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(z) + x)


def cases(layer: str) -> st.SearchStrategy:
    return st.builds(
        Input, st.just(layer), st.sampled_from(SOLVERS[layer]), st.integers(0, 3), st.integers(3, 6),
        st.sampled_from(["float64", "float32"]), st.sampled_from([0.1, 1.0, 1.0, 3.0]),
        st.sampled_from([0, 0, -4, 3]), st.sampled_from(list(SICK)), core.FLAWS,
        core.SEEDS,
    )  # fmt: skip


def applied(layer: nn.Module, z: Any, x: Tensor) -> tuple[Tensor, ...]:
    """The cell at ``z``, from its definition."""
    if isinstance(layer, MonotoneConvDEQ):
        margin = layer.A.shape[-1] // 2

        def product(kernel: Tensor, u: Tensor) -> Tensor:
            return conv2d(pad(u, (margin,) * 4, mode="circular"), kernel)

        def transposed(kernel: Tensor, u: Tensor) -> Tensor:
            return torch.func.vjp(lambda v: product(kernel, v), u)[1](u)[0]

        (image, pull) = torch.func.vjp(lambda v: product(layer.A, v), z)
        rotated = product(layer.B, z) - transposed(layer.B, z)
        return (torch.relu((1 - layer.margin) * z - pull(image)[0] + rotated + layer.injection(x)),)
    if isinstance(layer, MonotoneDEQ):
        return (torch.relu(z @ layer.weight.mT + layer.injection(x)),)
    if isinstance(layer, MultiscaleDEQ):
        return tuple(layer.deq.fn(z, layer.stem(x)))
    return (layer.fn(z, x),)


def parts(z: Any) -> tuple[Tensor, ...]:
    return z if isinstance(z, tuple) else (z,)


def rows(parts: Any) -> Tensor:
    """One row per sample."""
    return torch.cat([part.flatten(1) for part in parts], dim=1)


def check(case: Input) -> Counter:
    layer, x = case.made(), case.data()
    if case.flaw:
        wrong = [x[:, :1], x.reshape(-1)[:1], x[..., :1]][case.seed % 3]
        return core.refused(lambda: layer(wrong)) if case.layer == "MultiscaleDEQ" and case.batch else Counter()
    x.requires_grad_()
    found = layer.solve(x)
    weights = list(layer.parameters())
    check_shapes(case, parts(found.value))
    values = rows(parts(found.value))
    ok = core.check_answers(values, found.status)
    check_equilibria(case, layer, found, x, ok)
    gradients = torch.autograd.grad(
        values[ok].sum() + 0 * x.nan_to_num(0, 0, 0).sum(), [x, *weights], allow_unused=True
    )
    core.check_gradients(gradients[:1], ok)
    if case.batch > 1 and SICK[case.sick] is not None:
        check_others(case, layer, found, x, gradients)
    return core.counted(found.status)


def check_shapes(case: Input, values: tuple[Tensor, ...]) -> None:
    h, w, b = case.size, case.size + 1, case.batch
    shapes = {
        "DEQ": [(b, 4)], "MonotoneDEQ": [(b, 5)], "MonotoneConvDEQ": [(b, 3, h, w)],
        "MultiscaleDEQ": [(b, 4, h, w), (b, 8, -(-h // 2), -(-w // 2))],
    }[case.layer]  # fmt: skip
    for value, shape in zip(values, shapes, strict=True):
        core.check_like(value, shape, core.DTYPES[case.dtype])


def check_equilibria(case: Input, layer: nn.Module, found: Any, x: Tensor, ok: Tensor) -> None:
    with torch.no_grad():
        z = tuple(part[ok].double() for part in parts(found.value))
        layer.double()
        again = rows(applied(layer, z if isinstance(found.value, tuple) else z[0], x[ok].double()))
        layer.to(core.DTYPES[case.dtype])
    error, size = (again - rows(z)).norm(dim=1), rows(z).norm(dim=1)
    eps = core.EPS[core.DTYPES[case.dtype]]
    limit = 2 * eps ** (2 / 3) * (1 + size) + 1e3 * eps * (1 + size + 10.0**case.exponent)
    core.expect(
        (error <= limit).all(), f"success, but ‖f(z) - z‖ is {error.tolist()} where {limit.tolist()} is asked for"
    )


def check_others(case: Input, layer: nn.Module, found: Any, x: Tensor, gradients: Any) -> None:
    """The healthy samples, solved without the sick one."""
    alone = layer.solve(core.without(x.detach(), 1).requires_grad_())
    kept = core.without(found.status, 1)
    # Cells of large weights may have several equilibria, or none.
    if case.gain > 1 and not case.layer.startswith("Monotone"):
        return
    if case.solver != "anderson" and case.layer != "DEQ":
        core.expect((alone.status == kept).all(), f"a sick sample turns {alone.status.tolist()} into {kept.tolist()}")
    if not alone.ok.equal(kept == 0):
        return
    tolerance = 1e-6 if case.dtype == "float64" else 1e-2
    values, own = core.without(rows(parts(found.value)), 1), rows(parts(alone.value))
    core.check_close(values[alone.ok], own[alone.ok], tolerance, "a healthy value")
    if bool(found.ok[1]) or case.dtype == "float32":
        return
    grads = torch.autograd.grad(own[alone.ok].sum() + 0 * sum(w.sum() for w in layer.parameters()), layer.parameters())
    scale = max(float(g.abs().max()) for g in grads)
    for mine, expected in zip(gradients[1:], grads, strict=True):
        mine = torch.zeros_like(expected) if mine is None else mine
        core.expect(
            (mine - expected).abs().max() <= 1e-5 * (1 + scale), "a sick sample changes the gradient of weights"
        )


PROPERTIES = [core.Property(layer, "fixedpoint", Input, cases(layer), check) for layer in SOLVERS]
