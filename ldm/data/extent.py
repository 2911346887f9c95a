"""Whether images and a model have the same micrometres per pixel, and what to say where they do not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ldm.data.tile_store import TileStore
from ldm.errors import some

FAR = 0.15  # relative difference that nobody needs to know of


def extent_differs(store: TileStore, trained: Mapping[str, Any]) -> str:
    """That tiles of a store cover another extent than those that a model was trained on; "" where they do not.

    trained: the model's metadata, `mpp` and `tile_size`.

    >>> extent_differs(store, {"mpp": 0.499, "tile_size": store.tile_size})
    ''
    >>> extent_differs(store, {"mpp": 0.25, "tile_size": 256})
    'tiles of ...CMU-1-Small-Region.zarr cover 128 um (256 px at 0.499 um/px), those that the model was trained on...'
    """
    own, side = trained.get("mpp"), trained.get("tile_size")
    if not (own and side and store.mpp) or abs(store.tile_size * store.mpp / (side * own) - 1) <= FAR:
        return ""
    given = f"{store.tile_size * store.mpp:.0f} um ({store.tile_size} px at {store.mpp:.3g} um/px)"
    known = f"{side * own:.0f} um ({side} px at {own:.3g} um/px)"
    return f"tiles of {store.path} cover {given}, those that the model was trained on {known}"


def scale_differs(images: Mapping[str, float | None], trained: Mapping[str, Any], model: str) -> str:
    """That images have other micrometres per pixel than those that a model was trained on; "" where they do not.

    images: what each is called -> its micrometres per pixel, None where unknown. trained: the model's metadata.

    >>> scale_differs({"a.tif": 0.5, "b.png": None}, {"mpp": 1.0}, "models/stains")
    'a.tif has 0.5 um/px, and models/stains was trained at 1 um/px: what it makes is of another magnification'
    """
    own = trained.get("mpp")
    far = {name: mpp for name, mpp in images.items() if mpp and own and abs(mpp / own - 1) > FAR}
    if not far:
        return ""
    name, mpp = next(iter(far.items()))
    others = f" (and {len(far) - 1} more are off)" if len(far) > 1 else ""
    given = f"{name} has {mpp:.3g} um/px{others}"
    return f"{given}, and {model} was trained at {own:.3g} um/px: what it makes is of another magnification"


def tell_scales(stores: Sequence[TileStore]) -> list[str]:
    """Lines on where the micrometres per pixel of the slides of stores stand, and what else is to know of the slides.

    >>> tell_scales([store])
    ['source of the micrometres per pixel: header (aperio) (CMU-1-Small-Region.svs)']
    """
    found: dict[str, list[str]] = {}
    for store in stores:
        source = store.attrs.get("mpp_source") or "unknown"
        found.setdefault(f"source of the micrometres per pixel: {source}", []).append(store.slide)
        for note in store.attrs.get("notes", ()):
            found.setdefault(f"note: {note}", []).append(store.slide)
    return [f"{line} ({some(slides, 3)})" for line, slides in found.items()]


def tell(notes: Iterable[str]) -> None:
    """Print what is not "" as notes.

    >>> tell(["", "it is gray"])
    note: it is gray
    """
    for note in notes:
        if note:
            print(f"note: {note}")
