"""The card of a model, the README.md of its folder: what it is, its figures, what it must not be used for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

HEADINGS = ("What it is", "Data", "Training", "Figures", "Use", "Must not be used for", "Licence")
FIGURES = "| measure | value | 95% interval | on |\n|---|---|---|---|"


def begun_card(name: str, config: Mapping[str, Any], metadata: Mapping[str, Any], steps: int) -> str:
    """The card of a model as its training knows it; what only a person can say stands in brackets.

    Args:
        name: of its folder. config: of the training, whole. metadata: of the folder. steps: that it was trained for.

    >>> node = {"target": "ldm.latent_diffusion.LatentDiffusion"}
    >>> text = begun_card("lymphoid", {"model": node, "data": {"stores": "/data/cohort"}}, {"tile_size": 64}, 1000)
    >>> text.splitlines()[4]
    'A LatentDiffusion for tiles of 64 px. [what it makes, under which conditions]'
    """
    kind = str(config["model"]["target"]).rpartition(".")[2]
    tiles = f"tiles of {metadata['tile_size']} px" if "tile_size" in metadata else "tiles"
    at = f" at {metadata['mpp']:g} µm per px" if metadata.get("mpp") else ""
    stores = dict.fromkeys(Path(store).name for store in _named(config.get("data", {}), "stores"))  # places are private
    listed = "".join(f"- `{store}`\n" for store in stores)
    data = f"{listed}\n[sources and their licences; how many slides and patients; what was held out]"
    licence = metadata.get("licence") or "[of the model]"
    if metadata.get("slide_licence"):
        licence += f" The slides: {metadata['slide_licence']}."
    if encoder := metadata.get("encoder"):
        licence += f" Its features: {encoder.get('encoder')}, {encoder.get('licence', 'licence not recorded')}."
    parts = (
        f"A {kind} for {tiles}{at}. [what it makes, under which conditions]",
        data.strip(),
        f"{steps} steps, by the settings in `configs/` of its run. [command, hardware, minutes]",
        f"{FIGURES}\n\n[of `histoldm evaluate` against held-out tiles; on how many, of how many patients]",
        f"    histoldm describe {name}",
        "Decisions on a patient or a specimen: its images are no evidence of anything. [what else]",
        licence,
    )
    return f"# {name}\n" + "".join(f"\n## {title}\n\n{text}\n" for title, text in zip(HEADINGS, parts))


def _named(node: Any, name: str) -> Iterator[str]:
    """Every text under the key `name` within a config."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            if key == name:
                yield from map(str, value if isinstance(value, list) else [value])
            else:
                yield from _named(value, name)
    elif isinstance(node, list):
        for value in node:
            yield from _named(value, name)
