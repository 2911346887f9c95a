r"""Check that tile stores are whole: every file of every array, what made them, and the cohort's table of tiles.

Names each fault in one line: a shard that is missing, cut, changed or another's; an array that was left half made;
features or latents of other weights than in the other stores, or than those of --encoder and --first-stage; tiles that
the table of tiles places otherwise. Exits with 2 if anything is wrong. With --repair exactly that is made again, from
the slides, the encoder and the first stage that are given, and compared with the digest that was recorded; what is
whole is not touched.

Examples:

    python -m data_prep.verify --store cohort
    python -m data_prep.verify --store cohort --repair --slides slides/ \
        --encoder uni2-h --first-stage models/vq-f4
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from data_prep.options import (
    DeviceOption,
    FeatureBatchOption,
    Precision,
    PrecisionOption,
    RegionsOption,
    WeightsOption,
    inputs,
    number,
    output,
)
from data_prep.repair import Sources, repair
from data_prep.slide_stages import size_of
from ldm.cli.script import script
from ldm.data.cohort import read_index
from ldm.data.store_faults import ARRAY, INDEX, TABLE, Fault, find_faults
from ldm.data.tile_store import TileStore, is_finished, store_paths
from ldm.errors import UserError
from ldm.locks import clear_dead

_MAKER = {"weights_sha256": "weights", "preprocessing": "preprocessing", "dihedral": "orientations"}


def verify(
    stores: Path | str | Sequence[Path | str],
    made_by: Sequence[Mapping[str, Any]] = (),
    slides: Sequence[Path | str] = (),
) -> list[Fault]:
    """All faults of stores, or of cohorts of stores.

    slides: where the slides of stores without pixels are looked for, see `ldm.data.slide_tiles.find_slide`.
    made_by: attributes of the arrays of an encoder or a first stage, see `feature_attrs` and `latent_attrs`, which
    those of its name are to have. UserError: there is no store at all.

    >>> verify(store.path.parent.parent)[0].what
    'there is no table of tiles: give the data_prep command that made the tiles again'
    """
    paths = store_paths(stores)
    bar = tqdm(paths, desc="checking", unit="store", leave=None)
    faults = [fault for path in bar for fault in find_faults(path, slides)]
    whole = [TileStore.open(path) for path in paths if _opens(path)]
    lost = {fault.store for fault in faults if fault.array == "coords"}
    return [*faults, *maker_faults(whole, made_by), *index_faults(whole, lost)]


def _opens(path: Path) -> bool:
    try:
        return is_finished(path)
    except UserError:
        return False


# --- what made the arrays ---------------------------------------------------------------------------------------------


def maker_faults(stores: Sequence[TileStore], made_by: Sequence[Mapping[str, Any]] = ()) -> Iterator[Fault]:
    """Features and latents of other makers than those of the most stores, or than `made_by`; and stores without them.

    >>> list(maker_faults([store]))
    []
    """
    names = dict.fromkeys(f"{group}/{name}" for store in stores for group in _TOLD for name in store.names(group))
    for name in names:
        told = {store: attrs for store in stores if (attrs := _attrs(store, name)) is not None}
        usual = Counter(map(_maker, told.values())).most_common(1)
        given = next((each for each in made_by if any(_same_name(each, attrs) for attrs in told.values())), None)
        for store in stores:
            if name.partition("/")[2] not in store.names(name.partition("/")[0]):
                others = "the other store has" if len(stores) == 2 else f"{number(len(told), 'store')} have"
                yield Fault(store.path, f"is not there, and {others} it", ARRAY, name)
            elif store in told and given is not None and _same_name(given, told[store]):
                if what := _differs(told[store], given):
                    yield Fault(store.path, f"{what} than those given", ARRAY, name)
            elif store in told and _maker(told[store]) != usual[0][0]:
                reference = next(each for each in told.values() if _maker(each) == usual[0][0])
                yield Fault(store.path, f"{_differs(told[store], reference)} than in {usual[0][1]} others", ARRAY, name)


_TOLD = {"features": "encoder", "latents": "first_stage"}  # group -> the attribute that names what made its arrays


def _attrs(store: TileStore, name: str) -> dict[str, Any] | None:
    """What an array says of itself; None where it is not there, or broken."""
    group, _, leaf = name.partition("/")
    try:
        return store.array(name).attrs if leaf in store.names(group) else None
    except UserError:
        return None


def _maker(attrs: Mapping[str, Any]) -> str:
    return str([attrs.get(key) for key in _MAKER])


def _same_name(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return any(one.get(key) is not None and one.get(key) == other.get(key) for key in _TOLD.values())


def _differs(attrs: Mapping[str, Any], reference: Mapping[str, Any]) -> str:
    """In what the maker of an array is another, in words; "" where it is the same."""
    for key, noun in _MAKER.items():
        if key in reference and attrs.get(key) != reference[key]:
            if key == "weights_sha256":
                return f"made by other weights ({str(attrs.get(key))[:12]}..., not {str(reference[key])[:12]}...)"
            return f"made with other {noun} ({attrs.get(key)}, not {reference[key]})"
    return ""


# --- the table of tiles -----------------------------------------------------------------------------------------------


def index_faults(stores: Sequence[TileStore], lost: Container[Path] = ()) -> Iterator[Fault]:
    """Where the table of tiles of a cohort does not fit its stores. lost: those whose coordinates are damaged.

    >>> list(index_faults([]))
    []
    """
    cohorts: dict[Path, list[TileStore]] = {}
    for store in stores:
        if store.path.absolute().parent.name == "slides":
            cohorts.setdefault(store.path.parent.parent, []).append(store)
    for cohort, own in cohorts.items():
        fault = partial(Fault, cohort, array="index.parquet")
        if not (cohort / "index.parquet").is_file():
            yield fault("there is no table of tiles: give the data_prep command that made the tiles again", TABLE)
            continue
        try:
            index = read_index(cohort)
        except UserError as error:
            yield fault(str(error).rstrip("."), TABLE)
            continue
        rows = dict(list(index.groupby("slide", sort=False)))
        for store in own:
            yield from _misfits(store, rows.pop(store.slide, index[:0]), store.path in lost, fault)
        if len(own) == len(list((cohort / "slides").glob("*.zarr"))):
            for slide, others in rows.items():
                yield fault(f"has {number(len(others), 'tile')} of {slide}, which has no store", INDEX)


def _misfits(store: TileStore, rows: pd.DataFrame, lost: bool, fault: Callable[[str, str], Fault]) -> Iterator[Fault]:
    """How the rows of a store's slide in the table of tiles do not fit it."""
    if len(rows) != len(store):
        yield fault(f"has {number(len(rows), 'tile')} of {store.slide}, whose store has {len(store)}", INDEX)
    elif not np.array_equal(np.sort(rows["row"]), np.arange(len(store))):
        yield fault(f"does not have each tile of {store.slide} once", TABLE)
    elif not lost:
        moved = (rows[["x", "y"]].to_numpy() != store.coords[rows["row"]]).any(1)
        if count := int(moved.sum()):
            yield fault(f"places {number(count, 'tile')} of {store.slide} elsewhere than its store", TABLE)


@script("data_prep.verify", __doc__)
def main(
    store: Annotated[list[Path], inputs("--store", help="Tile stores, or cohorts of stores: one or several.")],
    slides: Annotated[
        list[Path] | None,
        inputs("--slides", help="The slides that the tiles are of, as files, folders, patterns or a table (CSV)."),
    ] = None,
    regions: RegionsOption = None,
    encoder: Annotated[
        str | None,
        inputs("--encoder", help="Encoder that features of its name are to be of, as extract_features takes it."),
    ] = None,
    weights: WeightsOption = None,
    first_stage: Annotated[
        Path | None, inputs("--first-stage", help="Model folder that latents of its name are to be of.")
    ] = None,
    repair_them: Annotated[
        bool, output("--repair", help="Make again what is wrong, and only that, from what is given.")
    ] = False,
    batch_size: FeatureBatchOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = Precision.fp32,
) -> None:
    sources = Sources(slides or (), regions, encoder, weights, first_stage, device, precision.value, batch_size)
    paths, started = store_paths(store), time.monotonic()
    for path in paths if repair_them else ():
        clear_dead(path)  # of a repair that was killed
    faults = verify(store, sources.makers, [entry.path for entry in sources.entries.values()])
    seconds, size = time.monotonic() - started, sum(map(size_of, paths))
    for fault in faults:
        print(fault)
    print(f"{number(len(paths), 'store')}, {size / 1e6:.0f} MB in {seconds:.1f} s ({size / 1e6 / seconds:.0f} MB/s)")
    if not faults:
        print("all are whole")
        return
    if not repair_them:
        raise UserError(f"{number(len(faults), 'fault')}; --repair makes again what it can from --slides and the like")
    left = 0
    for line, done in repair(faults, sources):
        print(line)
        left += not done
    if left:
        raise UserError(f"{left} of {number(len(faults), 'fault')} could not be repaired")


if __name__ == "__main__":
    main.run()
