"""The entry point of ``difflayers``."""

import sys

from difflayers.errors import MissingBackendError


def main() -> None:
    """Run the command line; without the demo's packages, only ``doctor``, which says what installs them."""
    try:
        from difflayers.demo._commands import app
    except ModuleNotFoundError as error:
        if sys.argv[1:] == ["doctor"]:
            from difflayers.demo import _doctor

            sys.exit(_doctor.run_plainly(sys.stdout))
        sys.exit(f"{MissingBackendError(error.name or 'a package', 'demo')}\nWhat else is missing: difflayers doctor")
    app()
