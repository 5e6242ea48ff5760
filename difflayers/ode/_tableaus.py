"""Coefficients of explicit Runge–Kutta methods, with their embedded error estimates and interpolants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from numpy.polynomial import polynomial
from torch import Tensor

Row = Sequence[float]
Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, eq=False)
class Tableau:
    """An explicit method: ``kᵢ = f(t + cᵢh, y + h Σ aᵢⱼkⱼ)``, then ``y₁ = y + h Σ bⱼkⱼ``.

    The row of ``b`` is one of ``rows``: its stage is the slope at ``y₁``, the first one of the next step. Stages after
    it are evaluated only where a step has outputs inside.

    Attributes:
        order: of ``y₁``.
        rows: ``aᵢⱼ`` from the second stage on.
        stages: how many stages make ``y₁``; the next one is the slope at ``y₁``.
        error: one estimate ``h Σ eⱼkⱼ`` of the local error over ``stages + 1`` stages, or two of them, the second of
            lower order; none for methods of fixed step.
        error_order: of the solution that the estimate compares with, plus one: the estimate is ``O(h^error_order)``.
        interpolant: ``bⱼ(s)`` as coefficients of ``s, s², …``, ``(all stages, degree)``.
        interpolant_order: of ``y(t + sh) = y + h Σ bⱼ(s) kⱼ``.
    """

    order: int
    rows: tuple[Row, ...]
    stages: int
    error: tuple[Row, ...] = ()
    error_order: int = 0
    interpolant: Array = field(default_factory=lambda: np.zeros((0, 0)))
    interpolant_order: int = 0

    @property
    def b(self) -> Row:
        return self.rows[self.stages - 1]

    @cached_property
    def c(self) -> list[float]:
        """Where in the step the stages are; without the rounding of sums."""
        return [0.0, *(round(sum(row), 13) for row in self.rows)]

    @property
    def total(self) -> int:
        """How many stages there are, with those for outputs inside a step."""
        return len(self.rows) + 1

    def weights(self, s: float) -> Array:
        """``bⱼ(s)``."""
        weights: Array = self.interpolant @ s ** np.arange(1, self.interpolant.shape[1] + 1)
        return weights

    @cached_property
    def damped(self) -> float:
        """The largest ``z`` up to which a step ``h`` damps ``y' = -(z/h) y``, the method's border of stability."""
        A = np.zeros((self.stages, self.stages))
        for i, row in enumerate(self.rows[: self.stages - 1], 1):
            A[i, : len(row)] = row
        moments = [1.0, *(np.asarray(self.b) @ np.linalg.matrix_power(A, k).sum(1) for k in range(self.stages))]
        z = np.linspace(0, 20, 20_001)
        return float(z[np.argmax(np.abs(polynomial.polyval(-z, moments)) > 1 + 1e-9)])


@dataclass(frozen=True, eq=False)
class ImplicitTableau(Tableau):
    """A method whose stages solve equations: ``rows`` are below the diagonal, and no stage is the slope at ``y₁``.

    Attributes:
        gamma: ``γ``, the diagonal.
        times: ``cᵢ``.
        last: ``bⱼ``.
    """

    gamma: float = 1.0
    times: Row = ()
    last: Row = ()

    @property
    def b(self) -> Row:
        return self.last

    @cached_property
    def c(self) -> list[float]:
        return list(self.times)

    def speeds(self, s: float) -> Array:
        """``bⱼ'(s)``, the weights of ``dy/dt``."""
        powers = np.arange(1, self.interpolant.shape[1] + 1)
        weights: Array = self.interpolant @ (powers * s ** (powers - 1.0))
        return weights


@dataclass(frozen=True, eq=False)
class Coefficients:
    """A tableau as tensors: what the loops multiply by."""

    places: Tensor  # cᵢ in double precision, (stages, 1, 1)
    square: Tensor  # all aᵢⱼ
    rows: tuple[Tensor, ...]  # those of one i, and
    columns: tuple[Tensor, ...]  # aᵢⱼ of one j, for all i up to the last stage
    b: Tensor
    error: Tensor | None
    interpolant: Tensor


@lru_cache(maxsize=64)
def coefficients(tableau: Tableau, dtype: torch.dtype, device: torch.device) -> Coefficients:
    """Made once per dtype and device."""

    def tensor(values: Any) -> Tensor:
        return torch.tensor(np.array(values), dtype=dtype, device=device)

    size = tableau.total
    square = np.zeros((size, size))
    for i, row in enumerate(tableau.rows, 1):
        square[i, : len(row)] = row
    with torch.inference_mode(False):
        return Coefficients(
            torch.tensor(tableau.c, dtype=torch.float64, device=device).view(-1, 1, 1),
            tensor(square),
            tuple(tensor(square[i, :i]) for i in range(size)),
            tuple(tensor(square[j + 1 :, j]) for j in range(size)),
            tensor(list(tableau.b)),
            tensor(tableau.error) if tableau.error else None,
            tensor(tableau.interpolant),
        )


def hermite(b: Row) -> Array:
    """The cubic through both ends of the step with their slopes, of order 3."""
    value, first, last = np.array([0, 3, -2.0]), np.array([1, -2, 1.0]), np.array([0, -1, 1.0])
    interpolant = np.outer([*b, 0.0], value)
    interpolant[0] += first
    interpolant[-1] += last
    return interpolant


def nested(b: Row, slope: int, extra: Sequence[Row]) -> Array:
    """The interpolant of DOP853, ``y + s(F₀ + (1-s)(F₁ + s(F₂ + …)))`` with ``F`` linear in the stages."""
    size = len(extra[0])
    step, first, last = np.zeros(size), np.eye(size)[0], np.eye(size)[slope]
    step[: len(b)] = b
    terms = [step, first - step, 2 * step - first - last, *np.array(extra)]
    factor, total = np.array([1.0]), np.zeros((size, len(terms) + 1))
    for index, term in enumerate(terms):
        factor = polynomial.polymul(factor, [0, 1] if index % 2 == 0 else [1, -1])
        total[:, : len(factor)] += np.outer(term, factor)
    return total[:, 1:]


EULER = Tableau(order=1, rows=((1.0,),), stages=1, interpolant=hermite((1.0,)), interpolant_order=1)

MIDPOINT = Tableau(order=2, rows=((0.5,), (0.0, 1.0)), stages=2, interpolant=hermite((0.0, 1.0)), interpolant_order=2)

# Kutta 1901.
RK4 = Tableau(
    order=4,
    rows=((0.5,), (0, 0.5), (0, 0, 1.0), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
    stages=4,
    interpolant=hermite((1 / 6, 1 / 3, 1 / 3, 1 / 6)),
    interpolant_order=3,
)

# Bogacki and Shampine 1989, "A 3(2) pair of Runge-Kutta formulas", Appl. Math. Lett. 2.
BOSH3 = Tableau(
    order=3,
    rows=((1 / 2,), (0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
    stages=3,
    error=((-5 / 72, 1 / 12, 1 / 9, -1 / 8),),
    error_order=3,
    interpolant=hermite((2 / 9, 1 / 3, 4 / 9)),
    interpolant_order=3,
)

# Dormand and Prince 1980, "A family of embedded Runge-Kutta formulae", J. Comput. Appl. Math. 6; the interpolant is
# that of Shampine 1986, "Some practical Runge-Kutta formulas", Math. Comp. 46.
DOPRI5 = Tableau(
    order=5,
    rows=(
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    stages=6,
    error=((71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),),
    error_order=5,
    interpolant=np.array(
        [
            [1, -8048581381 / 2820520608, 8663915743 / 2820520608, -12715105075 / 11282082432],
            [0, 0, 0, 0],
            [0, 131558114200 / 32700410799, -68118460800 / 10900136933, 87487479700 / 32700410799],
            [0, -1754552775 / 470086768, 14199869525 / 1410260304, -10690763975 / 1880347072],
            [0, 127303824393 / 49829197408, -318862633887 / 49829197408, 701980252875 / 199316789632],
            [0, -282668133 / 205662961, 2019193451 / 616988883, -1453857185 / 822651844],
            [0, 40617522 / 29380423, -110615467 / 29380423, 69997945 / 29380423],
        ]
    ),
    interpolant_order=4,
)


def _tsit5_interpolant() -> Array:
    """``b₁(s)`` to ``b₇(s)`` of Tsitouras 2011, section 5, whose quartics are given by their factors."""
    quartics = (
        (-1.0530884977290216, (0, 1), (-1.3299890189751412, 1), (0.7139816917074209, -1.4364028541716351, 1)),
        (0.1017, (0, 0, 1), (1.2949852507374631, -2.1966568338249754, 1)),
        (2.490627285651252793, (0, 0, 1), (1.57803468208092486, -2.38535645472061657, 1)),
        (-16.54810288924490272, (0, 0, 1), (-1.21712927295533244, 1), (-0.61620406037800089, 1)),
        (47.37952196281928122, (0, 0, 1), (-1.203071208372362603, 1), (-0.658047292653547382, 1)),
        (-34.87065786149660974, (0, 0, 1), (-1.2, 1), (-2 / 3, 1)),
        (2.5, (0, 0, 1), (-1, 1), (-0.6, 1)),
    )
    rows = []
    for scale, *factors in quartics:
        product = np.array([scale])
        for factor in factors:
            product = polynomial.polymul(product, factor)
        rows.append(product[1:])
    return np.array(rows)


# Tsitouras 2011, "Runge-Kutta pairs of order 5(4) satisfying only the first column simplifying assumption", Comput.
# Math. Appl. 62.
TSIT5 = Tableau(
    order=5,
    rows=(
        (0.161,),
        (-0.008480655492356989, 0.335480655492357),
        (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
        (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
        (5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.028269050394068383),
        (
            0.09646076681806523,
            0.01,
            0.4798896504144996,
            1.379008574103742,
            -3.290069515436081,
            2.324710524099774,
        ),
    ),
    stages=6,
    error=(
        (
            -0.00178001105222577714,
            -0.0008164344596567469,
            0.007880878010261995,
            -0.1447110071732629,
            0.5823571654525552,
            -0.45808210592918697,
            1 / 66,
        ),
    ),
    error_order=5,
    interpolant=_tsit5_interpolant(),
    interpolant_order=4,
)
