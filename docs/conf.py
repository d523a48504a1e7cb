"""How `make docs` builds the site: Sphinx, MyST and furo; nothing is fetched, and the reference is made from the code first."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import reference_pages  # noqa: E402

import vir_hf  # noqa: E402

project = "vir_hf"
author = "the vir_hf developers"
copyright = f"2026, {author}"
version = release = vir_hf.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence", "deflist", "attrs_inline"]
# Docstrings use single backticks for code, as Markdown does.
default_role = "code"
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"vir_hf {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False

# `make links` asks other hosts; `make docs` does not.
linkcheck_timeout = 20
linkcheck_retries = 2

reference_pages.write(HERE / "reference")
