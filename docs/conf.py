"""Sphinx configuration. Build with `make docs`."""

from __future__ import annotations

import inspect
import re
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # the extensions `offline_mathjax` and `reference`

project = "innerloop"
author = "The innerloop authors"
copyright = "2026, the innerloop authors"
release = metadata.version("innerloop")
version = release

extensions = [
    "myst_nb",
    "offline_mathjax",
    "reference",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]

# Single backticks in docstrings are names of ours where there is such a name, and code where there
# is none.
default_role = "py:obj"
python_maximum_signature_line_length = 100

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_type_aliases = {name: name for name in ("Grads", "Hyper", "Params")}
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Cost"]
napoleon_use_rtype = False
napoleon_use_ivar = True  # else a documented field of a dataclass is described twice

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "fieldlist"]
myst_heading_anchors = 3
# The notebook is stored executed: what the pages show is what its author saw, and a test executes
# it again.
nb_execution_mode = "off"

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_title = f"innerloop {release}"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# The notebooks live with the other examples; Sphinx reads only below this folder.
for notebook in (HERE.parent / "examples").glob("*.ipynb"):
    shutil.copyfile(notebook, HERE / "examples" / notebook.name)


def without_last_empty_line(app: Sphinx, doctree: nodes.document) -> None:
    """Drop the empty line before a closing fence: doctest needs it, a reader does not."""
    for block in doctree.findall(nodes.literal_block):
        text = block.astext().rstrip("\n")
        block.rawsource = text
        block.children = [nodes.Text(text)]


def readable_signature(
    app: Sphinx,
    what: str,
    name: str,
    obj: Any,
    options: Any,
    signature: str | None,
    returns: str | None,
) -> tuple[str | None, str | None]:
    """Show a type alias inside of another type by its name; a rule, documented as the function that
    makes one, makes an Optimizer."""
    shown = signature and re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", signature)
    return shown, "Optimizer" if what == "function" and inspect.isclass(obj) else returns


def field_of_named_tuple(
    app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any
) -> bool | None:
    """Its class describes it; what Python writes there by itself ("Alias for field number 0") says
    nothing."""
    return True if str(getattr(obj, "__doc__", "")).startswith("Alias for field number") else None


def setup(app: Sphinx) -> None:
    app.connect("doctree-read", without_last_empty_line)
    app.connect("autodoc-process-signature", readable_signature)
    app.connect("autodoc-skip-member", field_of_named_tuple)
