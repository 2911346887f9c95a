"""Cache the features of captions, so that training does not run the text tower.

    python -m data_prep.encode_captions --store cohort --model plip --chunks 2 --name plip-154

writes `features/<name>` (N, tokens, D) float16 into each store, of the captions in the cohort's index.parquet. A model
reads them with `conditions: {text: features/<name>}`; its conditioner takes the same settings, and its null, the empty
caption, from its own tower. A stopped run continues; a finished array is left as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ldm.conditioners.text import PADS, TextEmbedder
from ldm.conditioners.text_tokens import LAYOUTS
from ldm.conditioners.text_towers import LAYERS
from ldm.data.conditions import index_rows
from ldm.data.tile_store import ArrayWriter, TileStore, open_cohort
from ldm.devices import pick_device
from ldm.encoders.text_models import REGISTRY
from ldm.errors import UserError, run_command, suggest


def prompts_of(store: TileStore, embedder: TextEmbedder, text_column: str, modality_column: str) -> list[str]:
    """What the tower reads for every tile of a store. UserError where a tile has no caption."""
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
            f"{int(index['row'][lacking].iloc[0])}); write them into index.parquet"
        )
    return embedder.prompts({key: index[column].tolist() for key, column in columns.items()})


@torch.inference_mode()
def encode(
    stores: Sequence[TileStore], embedder: TextEmbedder, name: str, text_column: str = "text",
    modality_column: str = "modality", batch_size: int = 64,
) -> int:  # fmt: skip
    """Write `features/<name>` into the stores; everything is checked first. Returns how many captions were cut."""
    embedder.check_data({})
    captions = [prompts_of(store, embedder, text_column, modality_column) for store in stores]
    about = {"kind": "text", "licence": embedder.source.licence, **embedder.settings()}
    shape, cut = (embedder.length, embedder.tower.width), 0
    with tqdm(total=sum(map(len, captions)), desc=f"features {name}", unit="caption") as bar:
        for store, texts in zip(stores, captions):
            digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
            cut += sum(len(embedder.words.ids(text)) > embedder.capacity for text in texts)
            attrs = about | {"captions_sha256": digest}
            with ArrayWriter(store.path, f"features/{name}", shape, "f2", attrs) as writer:
                bar.update(writer.rows)
                for start in range(writer.rows, len(texts), batch_size):
                    features = embedder.encode(*embedder.tokens(texts[start : start + batch_size]))
                    rows = features.float().cpu().numpy().astype(np.float16)
                    if not np.isfinite(rows).all():
                        raise UserError(f"the text model gives values that float16 cannot hold in {store.path}")
                    writer.append(rows)
                    bar.update(len(rows))
    return cut


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.encode_captions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"Text models known by name: {', '.join(REGISTRY)}.",
    )
    add = parser.add_argument
    add("--store", type=Path, nargs="+", required=True, help="cohort folder, or tile stores of one")
    add("--model", required=True, help="name of a text model, folder, JSON model config or open_clip architecture")
    add("--weights", help="weight file (default: in the folder, or $HISTOLDM_WEIGHTS/<model>/)")
    add("--tokenizer", help="tokenizer.json of a BERT (default: in the folder)")
    add("--name", help="features/<name> (default: that of the model)")
    add("--chunks", type=int, default=1, help="context lengths of 77 tokens (default %(default)s)")
    add("--layout", choices=LAYOUTS, default="joint", help="of several chunks (default %(default)s)")
    add("--mask-padding", action=argparse.BooleanOptionalAction, default=True, help="tokens do not look at padding")
    add("--pad", choices=PADS, default="eos", help="(default %(default)s)")
    add("--layer", choices=LAYERS, default="last", help="(default %(default)s)")
    add("--prompt", default="{text}", help="what the tower reads, such as '{modality}: {text}'")
    add("--text-column", default="text", help="column of index.parquet (default %(default)s)")
    add("--modality-column", default="modality", help="column of index.parquet (default %(default)s)")
    add("--batch-size", type=int, default=64)
    add("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda, cuda:1, mps")
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: must be at least 1")
    stores = open_cohort(args.store)
    embedder = TextEmbedder(
        args.model, args.weights, args.tokenizer, chunks=args.chunks, layout=args.layout,
        mask_padding=args.mask_padding, pad=args.pad, layer=args.layer, prompt=args.prompt,
    ).to(pick_device(args.device)).eval()  # fmt: skip
    name = args.name or embedder.source.name
    cut = encode(stores, embedder, name, args.text_column, args.modality_column, args.batch_size)
    total = sum(map(len, stores))
    print(f"features/{name} of {total} captions in {len(stores)} store{'s' * (len(stores) > 1)}, licence of the model: "
          f"{embedder.source.licence}")  # fmt: skip
    if cut:
        print(f"note: {cut} captions are longer than {embedder.capacity} tokens and were cut; more --chunks take more",
              file=sys.stderr)  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(run_command(main))
