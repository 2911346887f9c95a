"""Which sample of a table a slide is of: by TCGA barcodes, by names, or by a table that says it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from ldm.errors import UserError, suggest
from ldm.tables.genes import barcode
from ldm.tables.parquet import read_parquet
from ldm.tables.text import read_table

LEVELS = ("auto", "patient", "sample")


def one_row_each(index: pd.DataFrame) -> pd.DataFrame:
    """The index's first row of every slide, by slide.

    >>> one_row_each(pd.DataFrame({"slide": ["a", "a", "b"], "row": [0, 1, 0]})).index.tolist()
    ['a', 'b']
    """
    return index.drop_duplicates("slide").set_index("slide")


def join_keys(
    index: pd.DataFrame, tables: Sequence[Sequence[str]], level: str = "auto", samples: str | None = None
) -> tuple[dict[str, str | None], Callable[[str], str | None], str, str]:
    """How slides meet the samples that tables name.

    Returns: slide -> the name by which it is looked for, name -> the part of it that joins, the level, and how all this
    was decided.

    >>> index = pd.DataFrame({"slide": ["TCGA-CR-7395-01Z-00-DX1.svs"], "row": [0], "patient": ["TCGA-CR-7395"]})
    >>> ids, key, level, _ = join_keys(index, [["TCGA-CR-7395-01A"]])
    >>> level, key("TCGA-CR-7395-01A"), [key(name) for name in ids.values()]
    ('sample', 'TCGA-CR-7395-01', ['TCGA-CR-7395-01'])
    """
    slides = one_row_each(index)
    ids, by = _slide_ids(slides, tables, None if samples is None else mapped(slides, index, samples))
    level, key, why = _level(ids, tables, level)
    return ids, key, level, f"{why}; {by}"


def _slide_ids(
    slides: pd.DataFrame, tables: Sequence[Sequence[str]], mapped: Mapping[str, str | None] | None
) -> tuple[dict[str, str | None], str]:
    """The name by which each slide is looked for in the tables, and where it is from."""
    if mapped is not None:
        return dict(mapped), "samples as --samples names them"
    patients = slides["patient"].astype(str)
    if any(barcode(name) for name in [*slides.index, *patients]):
        named = {s: s if barcode(s) else patients[s] if barcode(patients[s]) else None for s in slides.index}
        return named, "TCGA barcodes"
    found = {name for table in tables for name in table}
    choices = {
        "names of slides": {slide: slide for slide in slides.index},
        "names of slides without their ending": {slide: Path(slide).stem for slide in slides.index},
        "patients": patients.to_dict(),
    }
    by = max(choices, key=lambda name: sum(sample in found for sample in choices[name].values()))
    return choices[by], by


def mapped(slides: pd.DataFrame, index: pd.DataFrame, samples: str) -> dict[str, str | None]:
    """Slide -> sample, of a column of the index or of a table with columns slide, sample.

    >>> index = pd.DataFrame({"slide": ["a.svs", "b.svs"], "row": [0, 0], "case": ["p1", None]})
    >>> mapped(one_row_each(index), index, "case")
    {'a.svs': 'p1', 'b.svs': None}
    """
    if samples in index.columns:
        several = index.groupby("slide")[samples].nunique()
        if (several > 1).any():
            raise UserError(f"'{samples}' differs between tiles of {several.idxmax()}; a slide has one sample.")
        values = slides[samples]
        return {slide: None if pd.isna(values[slide]) else str(values[slide]) for slide in slides.index}
    path = Path(samples)
    if not path.is_file():
        raise UserError(
            f"--samples is a column of the index or a CSV file; '{samples}' is neither{suggest(samples, index.columns)}"
        )
    frame = read_table(path)
    if not {"slide", "sample"} <= set(frame.columns):
        raise UserError(f"{path} needs the columns slide and sample; it has {', '.join(frame.columns)}.")
    if frame["slide"].duplicated().any():
        raise UserError(f"{path} names the slide {frame['slide'][frame['slide'].duplicated()].iloc[0]} twice.")
    known = frame.dropna(subset=["slide", "sample"])
    given = dict(zip(known["slide"], known["sample"]))
    return {slide: given.get(slide, given.get(Path(slide).stem)) or None for slide in slides.index}


def _level(
    ids: Mapping[str, str | None], tables: Sequence[Sequence[str]], level: str
) -> tuple[str, Callable[[str], str | None], str]:
    """The level, how names become join keys at it, and why it is that one."""
    names = [name for name in ids.values() if name]
    if not (any(map(barcode, names)) and all(any(map(barcode, table)) for table in tables)):
        if level != "auto":
            raise UserError(f"--level {level} is a part of TCGA barcodes, which the slides or the tables do not have.")
        return "name", lambda name: name, "names as they are"
    everything = (name for source in (names, *tables) for name in source)
    short = next((name for name in everything if (found := barcode(name)) and found[1] is None), None)
    why = "as told"
    if level == "auto":
        level = "sample" if short is None else "patient"
        why = "all barcodes have a sample" if short is None else f"{short} names no sample"
    part = LEVELS.index(level) - 1
    how = f"{level} (the first {'12' if level == 'patient' else '15'} characters; {why})"
    return level, lambda name: (barcode(name) or (None, None))[part], how


def kept_samples(
    cohort: Path, index: pd.DataFrame, sample_of: Mapping[str, str | None], joined: Mapping[str, set[str]]
) -> dict[str, str]:
    """Samples of slides that have none now, by which tables of earlier runs know them.

    joined: source -> samples of the tables that are joined now. UserError if slides would get other samples than those
    tables know them by, or rows of the new tables that are not theirs.

    >>> kept_samples(Path("cohort"), pd.DataFrame({"slide": ["a"], "row": [0]}), {"a": None}, {"mutation": set()})
    {}
    """
    kept: dict[str, str] = {}
    if "sample" not in index:
        return kept
    now = set().union(*joined.values())
    for path in sorted((cohort / "omics").glob("*.parquet")):
        if path.stem in joined:
            continue
        known = set(read_parquet(path, "the omics table", columns=[]).index)
        for slide, sample in one_row_each(index)["sample"].items():
            if sample not in known or sample_of[slide] == sample:
                continue
            if sample_of[slide] is not None or sample in now:
                raise UserError(
                    f"{path} knows {slide} as {sample}, and it would become {sample_of[slide] or 'no sample'}. Give "
                    "both tables in one command, or the same --level and --samples as then."
                )
            kept[slide] = sample
    return kept
