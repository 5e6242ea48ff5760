"""How the documentation is built: ``sphinx-build -W -b html docs docs/_build``. Nothing here needs a network."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

import difflayers

project = "difflayers"
author = "the difflayers authors"
project_copyright = "the difflayers authors"
release = difflayers.__version__
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
    # Types in signatures that are nobody's business outside: whatever is public is found under its public name first.
    (r"py:.*", r"difflayers\.(\w+\.)*_\w+\.\w+|View|Explain"),
    (r"py:.*", r"(.*Error|.*Warning|Any|Callable|Iterator|Literal|Mapping|NDArray|Self|Sequence|Tensor|TypeVar)"),
    (r"py:.*", r"(Axes|Figure)"),  # matplotlib's
]

add_module_names = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
autosummary_generate = False
maximum_signature_line_length = 120
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
# Pages that aren't part of a section have nothing to show beside them.
_ALONE = (
    "index", "benchmarks", "changelog", "choosing", "design", "extending", "gradients", "mathematics", "monitoring",
    "quickstart/*", "troubleshooting",
)  # fmt: skip
html_sidebars = {page: [] for page in _ALONE}
html_theme_options: dict[str, Any] = {
    "logo": {"text": "difflayers"},
    "header_links_before_dropdown": 6,
    "show_prev_next": False,
    "show_toc_level": 2,
    "navbar_end": ["theme-switcher"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "auto_examples",
    "filename_pattern": r"/plot_",
    "ignore_pattern": r"/(?!plot_)[^/]*\.py$",
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


def hide_factories(
    app: Sphinx, what: str, name: str, obj: object, options: object, signature: str | None, returns: str | None
) -> tuple[str, str | None] | None:
    """A dataclass shows ``<factory>`` for a default made on call, which isn't Python and garbles what follows."""
    return None if signature is None else (signature.replace("<factory>", "..."), returns)


def read_markdown(app: Sphinx, path: Path, parent: str, content: list[str]) -> None:
    """Turn an included Markdown file into reStructuredText, as far as files of this repository use Markdown."""
    if path.suffix != ".md":
        return
    lines: list[str] = []
    fenced = False
    for line in content[0].splitlines():
        if line.startswith("```"):
            fenced = not fenced
            lines += ["", f".. code-block:: {line[3:] or 'text'}", ""] if fenced else [""]
        elif fenced:
            lines.append("   " + line)
        elif heading := re.fullmatch(r"(#+) (.*)", line):
            title = _inline(heading[2])
            lines += [title, "=-~^"[len(heading[1]) - 1] * len(title)]
        elif line.startswith("|"):
            cells = [_inline(cell.strip()) for cell in line.strip("|").split("|")]
            if not re.fullmatch(r"[|: -]+", line):
                if not lines[-1].startswith("  "):
                    lines += [".. list-table::", "   :header-rows: 1", ""]
                lines += [f"   {'  ' if i else '* '}- {cell}".rstrip() for i, cell in enumerate(cells)]
        elif line.startswith("    "):
            lines += [line] if lines[-1].startswith("    ") else ["::", "", line]
        else:
            lines.append(_inline(line))
    content[0] = "\n".join(lines)


def _inline(text: str) -> str:
    text = re.sub(r"`([^`]+)`", r"``\1``", text)
    text = re.sub(r"\[([^]]+)\]\((https?://[^)]+)\)", r"`\1 <\2>`__", text)
    return re.sub(r"\[`*([^]`]+)`*\]\([^)]+\)", r"``\1``", text)  # a file of the repository: no page to link to


def setup(app: Sphinx) -> None:
    app.connect("include-read", read_markdown)
    app.connect("autodoc-process-signature", hide_factories)
    app.connect("missing-reference", find_public_name)
