"""The documentation site: Sphinx with MyST Markdown and the theme Furo. `make docs` builds it into docs/_build/html."""

from __future__ import annotations

import re
import shutil
import sys
from importlib.metadata import version as version_of
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # data_prep is read from the checkout

import reference_pages  # noqa: E402
from docstrings import plain_to_rest  # noqa: E402

project = "HistoLDM"
author = "the HistoLDM authors"
copyright = "the HistoLDM authors, MIT licence"
release = version = version_of("histoldm")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
exclude_patterns = [
    "_build",
    "images",
    "jupyter_execute",
    "reference/commands.md",
    "reference/defaults.md",
    "reference/encoders.md",
]
nb_execution_mode = "off"  # notebooks are kept with their outputs; `make notebooks` runs them
nb_merge_streams = True
suppress_warnings = ["misc.highlighting_failure"]  # %%bash cells are no Python
html_theme = "furo"
html_title = f"HistoLDM {release}"
html_copy_source = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#7a3b69", "color-brand-content": "#7a3b69"},
    "dark_css_variables": {"color-brand-primary": "#d59bc4", "color-brand-content": "#d59bc4"},
}
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
default_role = "literal"
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
toc_object_entries = False

TUTORIALS = HERE / "tutorials"  # copies of notebooks/, whose links start from there
CARDS = HERE / "cards"  # copies of data/models/*/README.md


def copy_outside_pages() -> None:
    """What the site shows and the repository keeps elsewhere: notebooks, and the cards of the demo models."""
    for folder in (TUTORIALS, CARDS):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    for path in sorted((HERE.parent / "notebooks").glob("*.ipynb")):
        text = path.read_text(encoding="utf-8").replace("](../", "](../../").replace("](../../docs/", "](../")
        (TUTORIALS / path.name).write_text(text, encoding="utf-8")
    for path in sorted((HERE.parent / "data" / "models").glob("*/README.md")):
        text = re.sub(r"\]\(\.\./([\w-]+)/README\.md\)", r"](\1.md)", path.read_text(encoding="utf-8"))
        (CARDS / f"{path.parent.name}.md").write_text(text.replace("](../../../docs/", "](../"), encoding="utf-8")


def link_copies(app, name, source):
    """Pages link to notebooks and cards where they are read in the repository, to the site's copies here."""
    text = source[0].replace("../notebooks/", "tutorials/")
    source[0] = re.sub(r"\.\./data/models/([\w-]+)/README\.md", r"cards/\1.md", text)


def setup(app):
    copy_outside_pages()
    reference_pages.main()
    app.connect("source-read", link_copies)
    app.connect("autodoc-process-docstring", plain_to_rest, priority=100)
