"""The documentation site: Sphinx with MyST Markdown and the theme Furo. `make docs` builds it into docs/_build/html."""

from __future__ import annotations

import re
import shutil
import sys
from importlib.metadata import version as version_of
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # data_prep is read from the checkout

project = "HistoLDM"
author = "the HistoLDM authors"
copyright = "the HistoLDM authors, MIT licence"
release = version = version_of("histoldm")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "images", "jupyter_execute"]
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

HERE = Path(__file__).resolve().parent
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


LITERAL = re.compile(r"(`[^`]+`)")
SECTION = re.compile(r"^\s*(Args|Attributes|Raises|Returns|Yields|Errors):\s*$")


def plain_to_rest(app, what, name, obj, options, lines):
    """Docstrings are written for people: indented blocks are code, and * and | mean themselves."""
    out, in_block = [], False
    for i, line in enumerate(lines):
        indented, before = line.startswith("    "), out[-1] if out else ""
        inside_section = any(SECTION.match(earlier) for earlier in lines[:i])
        if indented and not in_block and not before.strip() and out and not inside_section:
            out += ["::", ""]
            in_block = True
        elif line.strip() and not indented:
            in_block = False
        if in_block:
            out.append(line)
            continue
        parts = LITERAL.split(line)
        escaped = [re.sub(r"([*|])", r"\\\1", re.sub(r"(\w)_(?!\w)", r"\1\\_", part)) for part in parts[::2]]
        parts[::2] = escaped
        out.append("".join(parts))
    lines[:] = out


def setup(app):
    copy_outside_pages()
    app.connect("source-read", link_copies)
    app.connect("autodoc-process-docstring", plain_to_rest, priority=100)
