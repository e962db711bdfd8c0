"""Sphinx settings. Nothing here needs the network: MathJax is fetched by the reader's browser, not by the build."""

import re

from sphinx.pycode.parser import VariableCommentPicker

from sdeflow import __version__

project = "sdeflow"
author = "the sdeflow authors"
version = release = __version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]

exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"sdeflow {version}"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_use_ivar = True  # attributes as fields: they need no separate index entries
python_maximum_signature_line_length = 100
# Where a function has overloads, the signature of the function itself is shown: it lists every option.
VariableCommentPicker.is_overload = lambda self, decorators: False

# `sphinx -b doctest docs docs/_build` runs every >>> on the pages.
doctest_global_setup = "import torch; from sdeflow.nets import UNet; torch.set_num_threads(1)"


def escape_docstring(app, what, name, obj, options, lines):
    """Docstrings are written for reading in Python: (batch, *event) and |dt/dr| mean themselves there, not markup."""
    for i, line in enumerate(lines):
        line = re.sub(
            r"(?<![\w*`\\])\*(?=(?:event|size|new size|t\.shape|shape|parameters|leading|batch|points|last)\b)",
            r"\\*",
            line,
        )
        lines[i] = re.sub(r"(?<!\S)\|(?=[\w/]+\|)([\w/]+)\|", r"\\|\1\\|", line)


def setup(app):
    """Sphinx's hook; before napoleon, which reads what this leaves."""
    app.connect("autodoc-process-docstring", escape_docstring, priority=100)
