"""Which stages a method has."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from difflayers.ode._esdirk import EsdirkStages, swept_esdirk
from difflayers.ode._implicit import ImplicitStages
from difflayers.ode._kvaerno import Esdirk
from difflayers.ode._rodas5p import Rosenbrock
from difflayers.ode._rosenbrock import RosenbrockStages, swept_rosenbrock
from difflayers.ode._stages import Evaluate, Stages, Time, TracedStages
from difflayers.ode._tableaus import ImplicitTableau, Tableau

AnyStages = Stages | TracedStages | ImplicitStages


def stages_of(tableau: Tableau, evaluate: Evaluate, like: Tensor, inner: bool) -> Stages | ImplicitStages:
    """The stages of a method, for numbers; ``inner`` outputs may come."""
    return _implicit(tableau, evaluate, like, inner) or Stages(tableau, evaluate, like)


def traced_stages_of(
    tableau: Tableau, evaluate: Evaluate, like: Tensor, inner: bool = False
) -> TracedStages | ImplicitStages:
    """The stages of a method, on the graph."""
    return _implicit(tableau, evaluate, like, inner) or TracedStages(tableau, evaluate, like)


def _implicit(tableau: Tableau, evaluate: Evaluate, like: Tensor, inner: bool) -> ImplicitStages | None:
    if isinstance(tableau, Rosenbrock):
        return RosenbrockStages(tableau, evaluate, like, inner)
    return EsdirkStages(tableau, evaluate, like, inner) if isinstance(tableau, Esdirk) else None


def swept_implicit(
    tableau: ImplicitTableau,
    evaluate: Evaluate,
    t: Time,
    h: Time,
    y: Tensor,
    direct: Tensor,
    wanted: Sequence[Tensor],
    gradients: list[Tensor | None],
) -> Tensor:
    """What the stages of an implicit step give to its start, for the cotangents from outside, ``direct``."""
    if isinstance(tableau, Rosenbrock):
        return swept_rosenbrock(tableau, evaluate, t, h, y, direct, wanted, gradients)
    if isinstance(tableau, Esdirk):
        return swept_esdirk(tableau, evaluate, t, h, y, direct, wanted, gradients)
    raise TypeError(f"nobody knows the stages of {type(tableau).__name__}")
