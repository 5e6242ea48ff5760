"""Linearly implicit methods, and the coefficients of Rodas5P."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from difflayers.ode._tableaus import Array, ImplicitTableau, Row


@dataclass(frozen=True, eq=False)
class Rosenbrock(ImplicitTableau):
    """A linearly implicit method, with ``J = ∂f/∂y`` and ``∂f/∂t`` at the start of the step.

    ``(M/γ - hJ) kᵢ = f(t + cᵢh, y + h Σ aᵢⱼkⱼ) + M Σ cᵢⱼkⱼ + h dᵢ ∂f/∂t``, then ``y₁ = y + h Σ bⱼkⱼ`` and so on as for
    explicit methods: this is the form by Hairer, Wanner 1996, section IV.7, (7.25), with ``u = hk``, in which a step of
    zero length is fine. There is no slope at ``y₁``: the next step starts with a Jacobian of its own.

    Attributes:
        couplings: ``cᵢⱼ`` from the second stage on.
        drifts: ``dᵢ``.
    """

    couplings: tuple[Row, ...] = ()
    drifts: Row = ()


@dataclass(frozen=True)
class Couplings:
    """``cᵢⱼ`` as tensors: rows for the stages forward, columns backward."""

    rows: tuple[Tensor, ...] = field(repr=False)
    columns: tuple[Tensor, ...] = field(repr=False)


@lru_cache(maxsize=64)
def couplings(tableau: Rosenbrock, dtype: torch.dtype, device: torch.device) -> Couplings:
    """Made once per dtype and device."""
    square = np.zeros((tableau.stages, tableau.stages))
    for i, row in enumerate(tableau.couplings, 1):
        square[i, : len(row)] = row
    with torch.inference_mode(False):
        whole = torch.tensor(square, dtype=dtype, device=device)
        size = range(tableau.stages)
        return Couplings(tuple(whole[i, :i].clone() for i in size), tuple(whole[j + 1 :, j].clone() for j in size))


def _interpolant(b: Row, extra: Sequence[Row]) -> Array:
    """``(1-s)y + s(y₁ + (1-s)(F₁ + s(F₂ + sF₃)))`` with ``F`` linear in the stages."""
    value, terms = np.array([1.0, 0, 0, 0]), [np.array([1, -1.0, 0, 0]), np.array([0, 1, -1.0, 0]),
                                              np.array([0, 0, 1, -1.0])]  # fmt: skip
    return np.outer(b, value) + sum(np.outer(row, term) for row, term in zip(extra, terms, strict=True))


_A = (-7.502846399306121, 2.561846144803919, -11.627539656261098, -0.18268767659942256, 0.030198172008377946)

# Steinebach 2023, "Construction of Rosenbrock-Wanner method Rodas5P and numerical benchmarks within the Julia
# Differential Equations package", BIT Numer. Math. 63.
RODAS5P = Rosenbrock(
    order=5,
    rows=(
        (3.0,),
        (2.849394379747939, 0.45842242204463923),
        (-6.954028509809101, 2.489845061869568, -10.358996098473584),
        (2.8029986275628964, 0.5072464736228206, -0.3988312541770524, -0.04721187230404641),
        _A,
        (*_A, 1.0),
        (*_A, 1.0, 1.0),
    ),
    stages=8,
    error=((0, 0, 0, 0, 0, 0, 0, 1.0),),
    error_order=5,
    interpolant=_interpolant(
        (*_A, 1.0, 1.0, 1.0),
        (
            (
                25.948786856663858,
                -2.5579724845846235,
                10.433815404888879,
                -2.3679251022685204,
                0.524948541321073,
                1.1241088310450404,
                0.4272876194431874,
                -0.17202221070155493,
            ),
            (
                -9.91568850695171,
                -0.9689944594115154,
                3.0438037242978453,
                -24.495224566215796,
                20.176138334709044,
                15.98066361424651,
                -6.789040303419874,
                -6.710236069923372,
            ),
            (
                11.419903575922262,
                2.8879645146136994,
                72.92137995996029,
                80.12511834622643,
                -52.072871366152654,
                -59.78993625266729,
                -0.15582684282751913,
                4.883087185713722,
            ),
        ),
    ),
    interpolant_order=4,
    gamma=0.21193756319429014,
    couplings=(
        (-14.155112264123755,),
        (-17.97296035885952, -2.859693295451294),
        (147.12150275711716, -1.41221402718213, 71.68940251302358),
        (165.43517024871676, -0.4592823456491126, 42.90938336958603, -5.961986721573306),
        (24.854864614690072, -3.0009227002832186, 47.4931110020768, 5.5814197821558125, -0.6610691825249471),
        (
            30.91273214028599,
            -3.1208243349937974,
            77.79954646070892,
            34.28646028294783,
            -19.097331116725623,
            -28.087943162872662,
        ),
        (
            37.80277123390563,
            -3.2571969029072276,
            112.26918849496327,
            66.9347231244047,
            -40.06618937091002,
            -54.66780262877968,
            -9.48861652309627,
        ),
    ),
    drifts=(
        0.21193756319429014,
        -0.42387512638858027,
        -0.3384627126235924,
        1.8046452872882734,
        2.325825639765069,
        0,
        0,
        0,
    ),
    times=(0.0, 0.6358126895828704, 0.4095798393397535, 0.9769306725060716, 0.4288403609558664, 1.0, 1.0, 1.0),
    last=(*_A, 1.0, 1.0, 1.0),
)
