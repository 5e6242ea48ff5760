"""How the documentation is built: ``sphinx-build -W -b html docs docs/_build``. Nothing here needs a network."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

project = "difflayers"
author = "the difflayers authors"
project_copyright = "the difflayers authors"
try:
    release = metadata.version("difflayers")
except metadata.PackageNotFoundError:  # built from a checkout that isn't installed
    release = ""
version = release

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build"]
nitpicky = True
# Without intersphinx, which would fetch inventories, names of other projects have nowhere to point.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|np|numpy|scipy|collections|contextlib|dataclasses|typing|types|abc|enum)\..*"),
    (r"py:.*", r"(bool|bytes|callable|dict|float|frozenset|int|list|object|set|slice|str|tuple|type|None|\.\.\.)"),
    (r"py:.*", r"(.*Error|.*Warning|Any|Callable|Iterator|Literal|Mapping|NDArray|Self|Sequence|Tensor|TypeVar)"),
]

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
autosummary_generate = False
maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
python_use_unqualified_type_names = True

# One file, glyphs included: formulas render without a network, and from file://, where Firefox refuses web fonts.
mathjax_path = "mathjax/tex-svg.js"
# The menu is the one part that would load further files.
mathjax3_config = {"options": {"enableMenu": False}}

html_theme = "pydata_sphinx_theme"
html_title = "difflayers"
html_static_path = ["_static"]
html_css_files = ["difflayers.css"]
html_show_sourcelink = False
html_copy_source = False
html_sidebars = {"index": [], "gradients": [], "extending": [], "design": [], "benchmarks": [], "changelog": []}
html_theme_options: dict[str, Any] = {
    "logo": {"text": "difflayers"},
    "header_links_before_dropdown": 8,
    "show_prev_next": False,
    "navbar_end": ["theme-switcher"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"/plot_",
    "ignore_pattern": r"__init__\.py",
    "abort_on_example_error": True,
    "download_all_examples": False,
    "min_reported_time": 3600,
    "plot_gallery": True,
    "remove_config_comments": True,
    "show_memory": False,
    "show_signature": False,
    "write_computation_times": False,
}


def find_public_name(app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.Node) -> nodes.Node | None:
    """Where a type hint points: classes live in private modules and are documented under their public names."""
    if node.get("refdomain") != "py":
        return None
    domain = env.domains["py"]
    target = node["reftarget"]
    public = ".".join(part for part in target.split(".") if not part.startswith("_"))
    known = [name for name in domain.objects if name == public or ("." not in target and name.endswith("." + public))]
    if len(known) != 1 or known[0] == target:
        return None
    node["reftarget"] = known[0]
    return domain.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], known[0], node, content)


def setup(app: Sphinx) -> None:
    app.connect("missing-reference", find_public_name)
