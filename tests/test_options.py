"""Options that no solver could use are refused where the solver is made, by name."""

import dataclasses
import math
import pickle

import pytest

from difflayers import Adjoint, Solver, fixedpoint, linear, ode, qp
from difflayers._options import _RANGES
from difflayers.errors import ProblemError

NONSENSE = (-1, -0.5, math.nan, "many")


def offered():
    names = [(area, name) for area in (fixedpoint, linear, ode, qp) for name in area.__all__]
    kinds = {getattr(area, name) for area, name in names}
    bases = Solver | Adjoint | linear.LinearSolver
    kinds = {kind for kind in kinds if isinstance(kind, type) and issubclass(kind, bases)}
    return sorted((kind for kind in kinds if _made(kind)), key=lambda kind: f"{kind.__module__}.{kind.__name__}")


def _made(kind):
    try:
        kind()
    except TypeError:  # abstract
        return False
    return True


@pytest.mark.parametrize("kind", offered(), ids=lambda kind: kind.__name__)
def test_nonsense_is_refused(kind):
    for field in dataclasses.fields(kind):
        for value in NONSENSE if field.name in _RANGES else ():
            with pytest.raises(ProblemError, match=f"{field.name} of {kind.__name__} must be .*, got {value!r}"):
                kind(**{field.name: value})
        kind(**{field.name: field.default})


def test_numbers_have_a_range_or_a_reason():
    free = {"front", "inequalities", "unknowns"}  # sizes from which on another backend is chosen
    numbers = {
        field.name
        for kind in offered()
        for field in dataclasses.fields(kind)
        if isinstance(field.default, int | float) and not isinstance(field.default, bool)
    }
    assert numbers - free <= set(_RANGES)


def test_what_is_made_again_is_checked_again():
    solver = fixedpoint.Anderson(rtol=1e-3, memory=3)
    assert pickle.loads(pickle.dumps(solver)) == solver
    with pytest.raises(ProblemError, match="memory of Anderson must be an integer of at least 1, got 0"):
        dataclasses.replace(solver, memory=0)
