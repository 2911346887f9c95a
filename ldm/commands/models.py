"""Body of `histoldm convert`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.convert import convert, export_as
from ldm.errors import UserError
from ldm.tables.text import read_text


def convert_model(source: Path, out: Path, asked: Mapping[str, Any], form: str | None, half: bool) -> None:
    """`histoldm convert`: a published model as a model folder, or a model folder in a form of others."""
    options = {name: value for name, value in asked.items() if value not in (None, False, [])}
    if form is not None:
        if options:
            raise UserError(f"--{next(iter(options)).replace('_', '-')} does not go with --to.")
        for line in export_as(form, source, out, half):
            print(line)
    else:
        if "classes" in options:
            options["classes"] = class_names(options["classes"])
        convert(source, out, half, **options)
    print(f"wrote {out}")


def class_names(text: str) -> list[str]:
    """Names of "a,b,c", or of a file that holds one a line."""
    lines = read_text(text, "--classes").splitlines() if Path(text).is_file() else text.split(",")
    names = [line.strip() for line in lines if line.strip()]
    if len(set(names)) < len(names) or not names:
        raise UserError(f"--classes takes different names, a,b,c, or a file of them; got '{text[:80]}'.")
    return names
