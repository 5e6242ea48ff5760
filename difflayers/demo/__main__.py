"""``python -m difflayers.demo``."""

from difflayers.demo._cli import main

main()
