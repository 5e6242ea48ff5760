"""``difflayers demo`` and ``difflayers doctor``."""
