"""The examples of the README and of the documentation run, and print what they show."""

import doctest
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
GENERATED = {"_build", "auto_examples"}
GUIDES = {f"docs/fixedpoint/{name}.rst" for name in ("roots", "fixed_points", "minimize", "deq", "choosing")}
GUIDES |= {f"docs/qp/{name}.rst" for name in ("index", "solve_qp", "degenerate", "choosing")} | {"docs/monitoring.rst"}
GUIDES |= {f"docs/{name}.rst" for name in ("choosing", "mathematics", "troubleshooting")}
GUIDES |= {f"docs/quickstart/{name}.rst" for name in ("layers", "solvers")}
WITH_EXAMPLES = {"README.md", "docs/index.rst", "docs/gradients.rst", "docs/extending.rst"} | GUIDES
PAGES = {
    path.relative_to(ROOT).as_posix()
    for path in [ROOT / "README.md", *DOCS.rglob("*.rst")]
    if GENERATED.isdisjoint(path.relative_to(ROOT).parts)
}


@pytest.mark.parametrize("page", sorted(PAGES | WITH_EXAMPLES))
def test_examples(page):
    torch.set_default_dtype(torch.float32)  # what a reader has
    result = doctest.testfile(str(ROOT / page), module_relative=False, optionflags=doctest.ELLIPSIS, encoding="utf-8")
    assert result.failed == 0
    assert result.attempted > 5 or page not in WITH_EXAMPLES, f"{page} has lost its examples"
