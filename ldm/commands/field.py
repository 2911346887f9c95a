"""Body of `histoldm field`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ldm.commands.outputs import provenance
from ldm.conditioners.compose import parse_conditions
from ldm.convert import load_model, weights_of
from ldm.data.field_files import extent_of, write_field
from ldm.errors import UserError, note
from ldm.files import owns
from ldm.images.write import save_png, to_uint8
from ldm.requests.sampling import AskedSampler
from ldm.sampling.feature_fields import feature_field

SHOWN = 512  # pixels that the longer side of a picture has, at least


@owns(beside=True)
def generate_field(
    model_path: Path, out: Path, size: tuple[int, ...], conditions: Sequence[str], device: str, sampler: AskedSampler
) -> None:
    """`histoldm field`: a field of features, what is known of it, and a picture. size: (width, height) in tiles."""
    if out.suffix != ".npy":
        raise UserError(f"--out of a field ends in .npy; got {out}.")
    model = load_model(model_path, device)
    chosen = sampler.loaded(model)
    about = sampler.record(chosen, model, "field")
    field = feature_field(model, size[::-1], chosen, parse_conditions(model.cond_stage_model, conditions))
    known = ~field.isnan().any(-1)
    if not known.any():
        note("the field is of holes alone: no tile of it has tissue; try another --seed or condition.")
    lattice = model.metadata.get("field", {})
    place = {"grid": [*field.shape[:2]], **lattice}
    place |= {name: model.metadata[name] for name in ("tile_size", "mpp") if model.metadata.get(name)}
    place |= {"features": model.metadata.get("encoder", {})}
    codec = model.first_stage_model
    if codec.glass is not None:
        place["glass"] = [float(f"{value:.5g}") for value in codec.glass.tolist()]
    text = provenance(model_path, model, " ".join(conditions), about | {"model_sha256": weights_of(model_path)})
    beside = write_field(out, field.numpy(), text | place)
    picture = to_uint8(codec.picture(field.permute(2, 0, 1)[None].to(model.device)).cpu())[0]
    times = max(1, -(-SHOWN // max(field.shape[:2])))
    shown = save_png(out.with_suffix(".png"), np.repeat(np.repeat(picture, times, 0), times, 1), text)
    pixels = extent_of(place, tuple(field.shape[:2]))
    told = f", of an image of {pixels[1]} x {pixels[0]} px" if pixels else ""
    print(
        f"wrote {out} ({field.shape[1]} x {field.shape[0]} tiles, {known.float().mean():.0%} tissue{told}), "
        f"with {beside.name} and {shown.name}"
    )
