"""``difflayers.compat.qpth.qp`` stands for ``qpth.qp`` of qpth 0.0.18; its names are here too."""

from difflayers.compat.qpth.qp import QPFunction, QPSolvers

__all__ = ["QPFunction", "QPSolvers"]
