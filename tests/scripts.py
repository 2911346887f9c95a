"""Every script of data_prep and demo, and the commands that documentation gives of them."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

from ldm.cli.script import Script

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    for folder in ("data_prep", "demo")
    for path in (ROOT / folder).rglob("*.py")
    if "main.run()" in path.read_text(encoding="utf-8")
)


def script_of(module: str) -> Script:
    """The command line of a module of MODULES."""
    return importlib.import_module("demo.__main__" if module == "demo" else module).main


def commands_in(text: str, module: str) -> list[list[str]]:
    """The words that follow `python -m module` where a text gives the command; shell variables are 1, remarks gone."""
    return words_after(text, f"python -m {module}")


def words_after(text: str, program: str) -> list[list[str]]:
    """The same of any program."""
    text = re.sub(r"\$\w+", "1", re.sub(r"\\\n[#\s]*", " ", text))
    found = re.findall(rf"{re.escape(program)}(?![\w.])([^\n`;|]*)", text)
    return [shlex.split(re.sub(r"\s2?>.*|\s\(.*?\)(?=\s|$)", "", words), comments=True) for words in found]


def examples_of(module: str) -> list[list[str]]:
    """The examples in the help of a script."""
    return commands_in(script_of(module).command.help, module)
