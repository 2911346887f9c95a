"""Docstrings of public functions end with an example; pytest runs the examples themselves (`--doctest-modules`)."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from conftest import ROOT


def public_functions() -> Iterator[tuple[str, str]]:
    """Dotted name and docstring of each; not of commands: docstrings in ldm.cli are help texts, which show how to call
    them, and the functions in ldm.commands are their bodies."""
    for path in sorted(ROOT.glob("ldm/**/*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if module.startswith(("ldm.cli", "ldm.commands")):
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                yield f"{module}.{node.name}", ast.get_docstring(node) or ""


def test_docstrings_of_public_functions_end_with_an_example():
    lacking = [name for name, doc in public_functions() if not doc.rpartition("\n\n")[2].startswith(">>> ")]
    assert not lacking, "end the docstrings of these functions with an example"
