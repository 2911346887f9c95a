r"""Write the features of captions into tile stores, so that training need not run the text model.

Each store gets features/<name> (N,tokens,D) float16 of the captions in the cohort's index.parquet. A model reads them
by `conditions: {text: features/<name>}`; its conditioner takes the same settings, and the empty caption, its null, from
its own text model. When a run was interrupted, the same command goes on where it stopped; finished arrays are left as
they are.

Examples:

    python -m data_prep.encode_captions --store cohort --model plip
    python -m data_prep.encode_captions --store cohort --model plip \
        --chunks 2 --prompt "{modality}: {text}" --name plip-154
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
from tqdm import tqdm

from data_prep.options import (
    BatchOption,
    DeviceOption,
    StoreOption,
    WeightsOption,
    choices,
    inputs,
    number,
    output,
)
from ldm.cli.script import script
from ldm.data.store_writers import ArrayWriter
from ldm.data.tile_store import TileStore, open_cohort
from ldm.devices import pick_device
from ldm.encoders.text_registry import LAYERS, LAYOUTS, PADS, REGISTRY
from ldm.errors import UserError, note, suggest

if TYPE_CHECKING:
    from ldm.conditioners.text import TextEmbedder

tower = partial(typer.Option, rich_help_panel="Text model")
Layout = choices("Layout", LAYOUTS)
Pad = choices("Pad", PADS)
Layer = choices("Layer", LAYERS)


def prompts_of(store: TileStore, embedder: TextEmbedder, text_column: str, modality_column: str) -> list[str]:
    """What the tower reads for every tile of a store. UserError where a tile has no caption."""
    from ldm.data.conditions import index_rows

    index = index_rows(store)
    columns = {embedder.keys[0]: text_column}
    if embedder.modality_key:
        columns[embedder.modality_key] = modality_column
    for column in columns.values():
        if column not in index:
            raise UserError(f"the table of tiles has no column '{column}' for {store.path}{suggest(column, index)}")
    lacking = index[text_column].isna() | (index[text_column].astype(str).str.strip() == "")
    if lacking.any():
        raise UserError(
            f"{lacking.sum()} of {len(index)} tiles of {store.path} have no {text_column} (the first is row "
            f"{int(index['row'][lacking].iloc[0])}); write their captions into index.parquet"
        )
    return embedder.prompts({key: index[column].tolist() for key, column in columns.items()})


def encode(
    stores: Sequence[TileStore],
    embedder: TextEmbedder,
    name: str,
    text_column: str = "text",
    modality_column: str = "modality",
    batch_size: int = 64,
) -> str:
    """Write `features/<name>` into the stores; everything is checked first. Returns what was cut, in words, or ""."""
    import torch

    if batch_size < 1:
        raise UserError(f"a batch has at least 1 caption; got a batch size of {batch_size}")
    embedder.check_data({})
    captions = [prompts_of(store, embedder, text_column, modality_column) for store in stores]
    about = {"kind": "text", "licence": embedder.source.licence, **embedder.settings()}
    embedder.cut_told = True  # of all captions, at the end
    shape, long = (embedder.length, embedder.tower.width), []
    with tqdm(total=sum(map(len, captions)), desc=f"features {name}", unit="caption") as bar:
        for store, texts in zip(stores, captions):
            digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
            long += map(embedder.words.ids, texts)
            attrs = about | {"captions_sha256": digest}
            with ArrayWriter(store.path, f"features/{name}", shape, "f2", attrs) as writer:
                bar.update(writer.rows)
                for start in range(writer.rows, len(texts), batch_size):
                    with torch.inference_mode():
                        features = embedder.encode(*embedder.tokens(texts[start : start + batch_size]))
                    rows = features.float().cpu().numpy().astype(np.float16)
                    if not np.isfinite(rows).all():
                        raise UserError(
                            f"float16 cannot hold what the text model gives in {store.path}; train on captions"
                        )
                    writer.append(rows)
                    bar.update(len(rows))
    return embedder.told_cut(long)


@script("data_prep.encode_captions", __doc__, f"Text models known by name: {', '.join(REGISTRY)}.")
def main(
    store: StoreOption,
    model: Annotated[
        str,
        inputs("--model", help="Text model: its name, a folder, a JSON model config, or an architecture of open_clip."),
    ],
    weights: WeightsOption = None,
    tokenizer: Annotated[
        str | None, inputs("--tokenizer", help="File tokenizer.json of a BERT (default: in the model's folder).")
    ] = None,
    text_column: Annotated[
        str, inputs("--text-column", help="Column of index.parquet that holds the captions.")
    ] = "text",
    modality_column: Annotated[
        str, inputs("--modality-column", help="Column of index.parquet that holds the modality, for --prompt.")
    ] = "modality",
    name: Annotated[
        str | None, output("--name", help="Name of the features in the stores (default: that of the text model).")
    ] = None,
    chunks: Annotated[
        int, tower("--chunks", help="Contexts of 77 tokens that a caption may fill; what is longer is cut.")
    ] = 1,
    layout: Annotated[
        Layout, tower("--layout", help="Several chunks share one start and end token, or have their own each.")
    ] = Layout.joint,
    mask_padding: Annotated[
        bool, tower("--mask-padding/--no-mask-padding", help="Keep tokens from attending to the padding.")
    ] = True,
    pad: Annotated[Pad, tower("--pad", help="Token that fills up a caption: the end token again, or zero.")] = Pad.eos,
    layer: Annotated[Layer, tower("--layer", help="Layer whose output is taken.")] = Layer.last,
    prompt: Annotated[
        str, tower("--prompt", help="Text that the model reads of a tile, as '{modality}: {text}'.")
    ] = "{text}",
    batch_size: BatchOption = 64,
    device: DeviceOption = "auto",
) -> None:
    from ldm.conditioners.text import TextEmbedder

    stores = open_cohort(store)
    asked = {"chunks": chunks, "layout": layout.value, "mask_padding": mask_padding, "pad": pad.value}
    asked |= {"layer": layer.value, "prompt": prompt}
    embedder = TextEmbedder(model, str(weights) if weights else None, tokenizer, **asked)
    embedder = embedder.to(pick_device(device)).eval()
    name = name or embedder.source.name
    cut = encode(stores, embedder, name, text_column, modality_column, batch_size)
    total = sum(map(len, stores))
    print(f"features/{name} of {total} captions in {number(len(stores), 'store')}; licence {embedder.source.licence}")
    if cut:
        note(f"{cut} (--chunks)")


if __name__ == "__main__":
    main.run()
