"""Singly diagonally implicit methods with an explicit first stage, and the coefficients of Kværnø's 5(4)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from difflayers.ode._tableaus import Array, ImplicitTableau, Row


@dataclass(frozen=True, eq=False)
class Esdirk(ImplicitTableau):
    """``M kᵢ = f(t + cᵢh, y + h Σ aᵢⱼkⱼ)`` with ``aᵢᵢ = γ`` but in the first stage, whose ``k`` is ``dy/dt``.

    The last row is that of ``b``, so that ``y₁`` satisfies algebraic equations like every other stage.

    Attributes:
        guesses: where Newton's method starts, ``kᵢ ≈ Σ guessesᵢⱼkⱼ``: what the polynomial through the stages before
            extrapolates to, from the second stage on.
        rtol: with
        atol: the tolerance of a step, and
        newton: the part of it that may be left of the equations of a stage.
    """

    guesses: tuple[Row, ...] = ()
    rtol: float = 0.0
    atol: float = 0.0
    newton: float = 0.03


@lru_cache(maxsize=64)
def kvaerno5(rtol: float, atol: float, newton: float) -> Esdirk:
    """Kværnø's method for these tolerances."""
    return replace(KVAERNO5, rtol=rtol, atol=atol, newton=newton)


def _extrapolated(c: Row) -> tuple[Row, ...]:
    """Lagrange's polynomials of the stages before, of degree 2 at most, at every later one."""

    def weights(i: int) -> Row:
        known = list(range(max(0, i - 3), i))
        row = [0.0] * i
        for j in known:
            row[j] = float(np.prod([(c[i] - c[m]) / (c[j] - c[m]) for m in known if m != j]))
        return row

    return tuple(weights(i) for i in range(1, len(c)))


_ROWS = (
    (0.26,),
    (0.13, 0.84033320996790809),
    (0.22371961478320505, 0.47675532319799699, -0.06470895363112615),
    (0.16648564323248321, 0.10450018841591720, 0.03631482272098715, -0.13090704451073998),
    (0.13855640231268224, 0, -0.04245337201752043, 0.02446657898003141, 0.61943039072480676),
    (0.13659751177640291, 0, -0.05496908796538376, -0.04118626728321046, 0.62993304899016403, 0.06962479448202728),
)
_GAMMA = 0.26
_C = (0.0, 0.52, 1.230333209967908, 0.895765984350076, 0.436393609858648, 1.0, 1.0)
_BEFORE, _LAST = (*_ROWS[-2], _GAMMA, 0.0), (*_ROWS[-1], _GAMMA)

# Ours. Of order 4; bounded where stiffness is infinite, as its weights vanish along what the coefficients map to
# nothing; of what these leave, the one of small errors of order 5
# and of small values at stiff decay.
_INTERPOLANT: Array = np.array([
    (0.974925383009054, -2.056906030215457, 1.761202853074209, -0.5426246940914025),
    (0.0, 0.0, 0.0, 0.0),
    (-0.1602063912954433, 0.9394026609756503, -1.453369126602816, 0.6192037689572243),
    (-0.840383851944513, -0.1594466618208631, 3.53922072101473, -2.580576474532564),
    (0.1344384122100091, 3.175800448190476, -4.373387634369252, 1.693081822958933),
    (-1.100516382649808, 1.229979491607548, 3.625222482832063, -3.685060797307771),
    (1.991742830670699, -3.128829908737381, -3.098889295948951, 4.495976374015632),
])  # fmt: skip

# Kværnø 2004, "Singly diagonally implicit Runge-Kutta methods with an explicit first stage", BIT Numer. Math. 44.
KVAERNO5 = Esdirk(
    order=5,
    rows=_ROWS,
    stages=7,
    error=(tuple(last - before for last, before in zip(_LAST, _BEFORE, strict=True)),),
    error_order=5,
    interpolant=_INTERPOLANT,
    interpolant_order=4,
    gamma=_GAMMA,
    times=_C,
    last=_LAST,
    guesses=_extrapolated(_C),
)
