"""Pairs of images of the same place in two modalities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset

from ldm.data.bending import Bending
from ldm.data.cohort import read_index
from ldm.data.datasets import Key, TileDataset
from ldm.data.where import Clause, Where, parse_where
from ldm.errors import UserError, suggest


class PairDataset(Dataset):
    """Slices of one modality with the same slices of another, matched by subject and slice number.

    Items: `image` (C,H,W), the target, and `source` (C,H,W), both in [-1, 1] and turned alike; `subject`, `slice`, and
    what tiles have anyway (of the target). Asked for as those of `ldm.data.datasets.TileDataset`.

    Args:
        cohort: folder that `data_prep.slice_volumes` wrote.
        source, image: modalities, the image's is the target; several sources are pairs of each with it.
        gray: one channel, else three.
        where: keeps targets, as `TileDataset`'s. dihedral: show each pair in a random one of eight orientations.
        geometry, intensity: how much pairs are turned and scaled, and the grey levels of sources changed, each in a
            way drawn anew, so that a model meets more heads and scanners than its data hold: see `Bending`.
        in_memory: hold the slices in memory.
    Raises:
        UserError: a modality that is not there, two slices of one name, no pair left.
    """

    def __init__(
        self,
        cohort: str,
        source: str | Sequence[str],
        image: str,
        gray: bool = True,
        where: Where = None,
        dihedral: bool = False,
        geometry: float = 0.0,
        intensity: float = 0.0,
        in_memory: bool = False,
    ) -> None:
        names = [source] if isinstance(source, str) else list(source)
        self.bending = Bending(geometry, intensity)
        index = read_index(cohort)
        if missing := {"subject", "modality", "slice"} - set(index):
            raise UserError(
                f"the tiles of {cohort} have no {', '.join(sorted(missing))}; make pairs with "
                "`python -m data_prep.slice_volumes`."
            )
        for modality in (*names, image):
            if modality not in (known := index["modality"].dropna().unique()):
                raise UserError(f"{cohort} has no modality '{modality}'{suggest(modality, known)}")
        named = {"subject": "subject", "slice": "slice"}

        def tiles(modality: str, chosen: Where) -> TileDataset:
            chosen = [*parse_where(chosen), Clause("modality", "=", (modality,))]
            return TileDataset(
                cohort, where=chosen, conditions=named, gray=gray, dihedral=dihedral, in_memory=in_memory
            )

        self.source, self.target = " ".join(names), image
        self.targets, self.sources = tiles(image, where), [tiles(name, None) for name in names]
        self.pairs = [  # place among the targets, which source, place among its slices
            (i, number, place)
            for number, (name, own) in enumerate(zip(names, self.sources))
            for i, place in _matched(cohort, self.targets, image, own, name)
        ]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        index, *draw = key if isinstance(key, tuple) else (key,)
        target, number, source = self.pairs[int(index)]
        item = self.targets[(target, *draw)] if draw else self.targets[target]
        other = self.sources[number][(source, *draw)] if draw else self.sources[number][source]
        image, told = item["image"], other["image"]
        if draw:
            image, told = self.bending(image, told, draw[0])
        return item | {"image": image, "source": told}

    @property
    def metadata(self) -> dict[str, Any]:
        """What a model trained on these pairs must remember."""
        known = {key: value for key, value in self.targets.metadata.items() if key != "conditions"}
        return known | {"source_modality": self.source, "target_modality": self.target}


def _matched(
    cohort: str, targets: TileDataset, target: str, sources: TileDataset, source: str
) -> list[tuple[int, int]]:
    """Places of targets and sources of the same subject and slice."""
    places: dict[tuple[str, int], int] = {}
    for place, key in enumerate(_places(sources)):
        if key in places:
            raise UserError(f"{cohort} has slice {key[1]} of {key[0]} in {source} twice; delete one of the stores.")
        places[key] = place
    found = [(i, places[key]) for i, key in enumerate(_places(targets)) if key in places]
    if not found:
        raise UserError(
            f"{cohort} has {len(targets)} slices of {target}, and for none a slice of {source} of the same subject and "
            "number."
        )
    return found


def _places(tiles: TileDataset) -> list[tuple[str, int]]:
    return list(zip(tiles.values("subject").tolist(), tiles.values("slice").astype(int).tolist()))
