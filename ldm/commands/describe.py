"""Body of `histoldm describe`: what a model takes, and what a tile store or a cohort of them holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from ldm.conditioners.compose import ConditionerSet
from ldm.convert import load_model
from ldm.data.cohort import counted
from ldm.data.conditions import index_path, index_rows, lost_index
from ldm.data.extent import tell_scales
from ldm.data.tile_store import GROUPS, TileStore, holds_stores, open_cohort
from ldm.errors import printable
from ldm.networks.takes import declared


def describe(path: Path) -> None:
    """`histoldm describe`: a model, or stores of tiles."""
    if path.is_dir() and holds_stores(path):
        describe_stores(path)
    else:
        describe_model(path)


def describe_model(model_path: Path) -> None:
    """What a model is, and every condition that it takes with an example of how to give it."""
    model = load_model(model_path)
    side = model.tile_size
    count = sum(p.numel() for p in model.model.parameters()) / 1e6
    network, first = model.model.diffusion_model, type(model.first_stage_model).__name__
    kind = type(getattr(network, "network", network) if model.student else network).__name__
    makes = f"sequences of {side} tokens" if declared(network).sequence else f"tiles of {side} px"
    if model.makes == "fields":
        makes = f"fields of features, by crops of {side} x {side} tiles"
    _say(f"{model_path}: {makes}; {kind} of {count:.1f} M parameters over {first}, {model.parameterization}")
    if model.student is not None:
        _say(f"  student: {model.student.words()}")
    if model.small_decoder is not None:
        _say("  small decoder: --decoder small")
    for name in ("mpp", "licence", "slide_licence"):
        if name in model.metadata:
            _say(f"  {name}: {model.metadata[name]}")
    if "field" in model.metadata:
        _say(f"  stride of a field: {model.metadata['field']['stride']} px")
    if "encoder" in model.metadata:
        encoder = model.metadata["encoder"]
        _say(f"  features: {encoder.get('encoder')} ({encoder.get('licence', 'licence not recorded')})")
    conditioner = model.cond_stage_model
    _say("conditions:" if conditioner is not None else "  unconditional")
    for key, about in ({} if conditioner is None else conditioner.describe()).items():
        _say(f"  {key:<12} {about.words()}")
    if isinstance(conditioner, ConditionerSet):
        guiding = {part.partition("/")[0] for part in model.null_condition()}
        _say(f"guidance scales by name: {', '.join(name for name in conditioner.members if name in guiding)}")


def describe_stores(path: Path) -> None:
    """How many tiles of which size and scale stores hold, where their scale is from, what lies beside the tiles."""
    stores = open_cohort(path)
    _say(f"{path}: {sum(map(len, stores))} tiles in {len(stores)} store{'s' if len(stores) > 1 else ''}")
    sizes = Counter(f"{store.tile_size} px at {_scale(store.mpp)}{_pixels(store)}" for store in stores)
    lines = [f"tiles of {size}{_of(count, stores)}" for size, count in sizes.items()]
    lines += [*tell_scales(stores), *_arrays(stores), *_index(stores)]
    if licences := sorted({store.attrs["licence"] for store in stores if store.attrs.get("licence")}):
        lines.append(f"licence: {'; '.join(licences)}")
    _say("\n".join(f"  {line}" for line in lines))


def _say(text: str) -> None:
    print(printable(text))  # names and licences are whatever others wrote


def _pixels(store: TileStore) -> str:
    told = {"jpeg": f", as JPEG of quality {store.attrs.get('jpeg_quality')}", "none": ", read from the slide"}
    return told.get(store.attrs["pixels"], "")


def _scale(mpp: float | None) -> str:
    return "an unknown scale" if mpp is None else f"{mpp:.4g} um per pixel"


def _of(count: int, stores: Sequence[TileStore]) -> str:
    return f" ({count} of {len(stores)} stores)" if count < len(stores) else ""


def _arrays(stores: Sequence[TileStore]) -> Iterator[str]:
    for group in GROUPS:
        for name, count in Counter(name for store in stores for name in store.names(group)).items():
            array = next(store.array(f"{group}/{name}") for store in stores if name in store.names(group))
            shape = f" {' x '.join(map(str, array.shape[1:]))}" if array.ndim > 1 else ""
            licence = f", {array.attrs['licence']}" if array.attrs.get("licence") else ""
            yield f"{group}/{name}{shape}{licence}{_of(count, stores)}"


def _index(stores: Sequence[TileStore]) -> Iterator[str]:
    for lost in dict.fromkeys(map(lost_index, stores)):
        if lost:
            yield f"note: {lost}"
    for path in dict.fromkeys(map(index_path, stores)):
        rows = [index_rows(store) for store in stores if index_path(store) == path]
        if any(len(own) for own in rows):
            splits = counted(split for own in rows for split in own["split"])
            patients = len({patient for own in rows for patient in own["patient"].unique()})
            yield f"{patients} patient{'s' if patients > 1 else ''}; splits: {splits}"
            yield f"columns of {path.name}: {', '.join(map(str, rows[0].columns))}"
