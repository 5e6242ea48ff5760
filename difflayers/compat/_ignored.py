"""What is said of options that mean nothing here."""

from __future__ import annotations

import warnings


def ignored(option: str, instead: str) -> None:
    """Warn, from one place, so that Python shows each message once."""
    warnings.warn(f"{option} has no meaning here and was ignored; {instead}", stacklevel=2)
