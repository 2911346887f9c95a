"""Bodies of `histoldm describe` and `convert`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.conditioners.compose import ConditionerSet
from ldm.convert import convert, export_as, load_model
from ldm.errors import UserError
from ldm.tables.text import read_text


def describe_model(model_path: Path) -> None:
    """`histoldm describe`: what a model is, and every condition that it takes with an example of how to give it."""
    model = load_model(model_path)
    side = model.tile_size
    count = sum(p.numel() for p in model.model.parameters()) / 1e6
    first = type(model.first_stage_model).__name__
    print(f"{model_path}: tiles of {side} px; UNet of {count:.1f} M parameters over {first}, {model.parameterization}")
    for name in ("mpp", "licence", "slide_licence"):
        if name in model.metadata:
            print(f"  {name}: {model.metadata[name]}")
    if "encoder" in model.metadata:
        encoder = model.metadata["encoder"]
        print(f"  features: {encoder.get('encoder')} ({encoder.get('licence', 'licence not recorded')})")
    conditioner = model.cond_stage_model
    print("conditions:" if conditioner is not None else "  unconditional")
    for key, about in ({} if conditioner is None else conditioner.describe()).items():
        print(f"  {key:<12} {about.words()}")
    if isinstance(conditioner, ConditionerSet):
        print(f"guidance scales by name: {', '.join(conditioner.members)}")


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
