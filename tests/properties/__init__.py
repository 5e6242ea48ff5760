"""What every public function promises of any input, for ``test_properties.py`` and ``benchmarks/soak.py``."""

from properties import _cones, _differential, _equations, _layers, _projections, _quadratic
from properties._core import Property, Violation, replayed

MODULES = (_equations, _layers, _projections, _quadratic, _cones, _differential)
PROPERTIES: dict[str, Property] = {one.name: one for module in MODULES for one in module.PROPERTIES}

__all__ = ["PROPERTIES", "Property", "Violation", "replayed"]
