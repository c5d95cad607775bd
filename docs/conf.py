"""Configuration of the documentation: ``sphinx-build -W -b html docs docs/_build``."""

import os
import sys
from pathlib import Path

import landscape

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(Path(__file__).parent))  # for extension.py
os.environ.setdefault("MPLBACKEND", "agg")

project = "landscape"
author = "the landscape developers"
project_copyright = f"2026, {author}"
version = release = landscape.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "extension",
]
exclude_patterns = ["_build", "jupyter_execute"]

myst_enable_extensions = ["deflist", "dollarmath", "smartquotes"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_execution_cache_path = str(Path(__file__).parent / "_build/.jupyter_cache")

default_role = "py:obj"  # `name` in a docstring
autodoc_mock_imports = ["accelerate", "lightning", "transformers"]  # the page needs none of them
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_admonition_for_examples = False

html_theme = "pydata_sphinx_theme"
html_title = "landscape"
html_theme_options = {
    "navbar_align": "left",
    "header_links_before_dropdown": 9,
    "secondary_sidebar_items": ["page-toc"],
    "show_prev_next": True,
    "logo": {"text": "landscape"},
    "footer_start": ["copyright"],
    "footer_end": [],
}
html_sidebars = {"*": []}  # pages of howto/ and api/ have one
html_static_path = ["static"]
html_css_files = ["landscape.css"]
html_show_sourcelink = False
