"""How `make docs` builds the pages in this directory; every warning is an error there.

The API reference (api.md) is built from the docstrings of the package as it is imported, so torch has to be there.
"""

import re
from pathlib import Path

project = "statedict_io"
author = "the statedict_io authors"
VERSION = Path(__file__).parents[1] / "statedict_io" / "version.py"
release = re.search(r'^VERSION = "(.*)"', VERSION.read_text(), re.MULTILINE)[1]

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_parser"]
html_theme = "furo"
html_title = f"statedict_io {release}"
html_copy_source = False

myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
python_maximum_signature_line_length = 100

# A reference to a name of this package that there is not is a warning. Others are not looked up: that takes a network.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!statedict_io\b|_|[A-Z]).*"), ("py:.*", "(torch|os|collections|typing)\\..*")]
