"""The entry point of ``difflayers``."""

import sys

from difflayers.errors import MissingBackendError


def main() -> None:
    """Run the command line; without the demo's packages, say which command installs them."""
    try:
        from difflayers.demo._commands import app
    except ModuleNotFoundError as error:
        sys.exit(str(MissingBackendError(error.name or "a package", "demo")))
    app()
