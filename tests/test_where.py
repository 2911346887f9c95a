"""Which tiles are selected: the same words for commands and configs, and what is said of those that select none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ldm.data.cohort import merge_index, write_store
from ldm.data.collection import read_pictures
from ldm.data.datasets import NoTiles, TileDataset
from ldm.data.where import Clause, parse_where
from ldm.errors import UserError


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two slides of four tiles: `he.svs` with stain, grade and share, `ki.svs` of which the grade is unknown."""
    folder = tmp_path_factory.mktemp("cohort")
    tile = np.zeros((16, 16, 3), np.uint8)
    share = np.array([0.1, 0.4, 0.6, 0.9], np.float32)
    for slide in ("he.svs", "ki.svs"):
        attrs = {"tile_size": 16, "slide": slide}
        write_store(folder, Path(slide).stem, lambda i: tile, 4, attrs=attrs, labels={"share": share})
    rows = pd.DataFrame({"slide": ["he.svs"] * 4 + ["ki.svs"] * 4, "row": [*range(4)] * 2})
    merge_index(folder, rows.assign(stain=["he"] * 4 + ["ki67"] * 4, grade=[1, 1, 2, 3] + [np.nan] * 4))
    return folder


def selected(cohort: Path, where) -> list[str]:
    data = TileDataset(str(cohort), where=where)
    names = [f"{item['slide'][:2]}{item['row']}" for item in (data[i] for i in range(len(data)))]
    pictures = read_pictures(cohort, where)
    assert [f"{own['slide'][:2]}{own['row']}" for own in pictures.about] == names  # commands and configs select alike
    return names


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ("share>0.5", "he2 he3 ki2 ki3"),
        ("share >= 0.4", "he1 he2 he3 ki1 ki2 ki3"),  # float32 holds it as 0.4000000059
        ("share > 0.4", "he2 he3 ki2 ki3"),
        ("share = 0.4", "he1 ki1"),
        ("share<0.3", "he0 ki0"),
        (["share<=0.6", "share>0.2"], "he1 he2 ki1 ki2"),
        ("slide!=ki.svs", "he0 he1 he2 he3"),
        ("slide = ki.svs", "ki0 ki1 ki2 ki3"),
        ("stain in he,ki67", "he0 he1 he2 he3 ki0 ki1 ki2 ki3"),
        ("stain not in he", "ki0 ki1 ki2 ki3"),
        ("grade==1", "he0 he1"),
        ("grade != 1", "he2 he3 ki0 ki1 ki2 ki3"),  # what is unknown is not 1
        ("grade in 2, 3.0", "he2 he3"),
        ("grade>1", "he2 he3"),
        ({"stain": "he", "share": {"min": 0.5, "max": 0.7}}, "he2"),
        ({"grade": [1, "3"]}, "he0 he1 he3"),
        (None, "he0 he1 he2 he3 ki0 ki1 ki2 ki3"),
    ],
)
def test_what_is_selected(cohort, where, kept):
    assert selected(cohort, where) == kept.split()


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("stain=hee", r"no tile has stain=hee; did you mean 'he'\? Known: he, ki67\."),
        ("stain in he,ki57", r"no tile has stain=ki57; did you mean 'ki67'\?"),
        ("slide!=he.sv", r"no tile has slide=he\.sv; did you mean 'he\.svs'\?"),
        ("grade=7", r"no tile has grade=7\. Known: 1, 2, 3\."),
        ("grade=high", "'grade' is a number; it is never 'high'"),
        ("share>high", "'share' is a number; it is never 'high'"),
        ("share>5", r"no tile has share>5; it is from 0\.1 to 0\.9\."),
        ("stain>3", "'stain' holds text, as 'he', which > does not compare"),
        ("stian=he", "have no 'stian'; did you mean 'stain'"),
        ("stain", r"label=value.* or 'label in a,b'; got 'stain'\. In a shell, < and > stand in quotes"),
        ("stain in ,", "lists values"),
        ({"share": {"least": 1}}, "takes a value, a list, or min and max; got"),
        ({"share": []}, r"takes a value, a list of values, or min and max; got \[\]"),
    ],
)
def test_mistakes_are_told_with_what_there_is(cohort, where, message):
    with pytest.raises(UserError, match=message):
        TileDataset(str(cohort), where=where)
    message = message.replace("no tile", "no image of .*").replace(
        "have no 'stian'", "says the 'stian' of the images.*"
    )
    with pytest.raises(UserError, match=message):
        read_pictures(cohort, where)


def test_nothing_selected_is_told_apart_from_a_mistake(cohort):
    """A split that a cohort lacks may be left out by who reads it; a value among others that is none may not."""
    with pytest.raises(NoTiles, match=r"none of the 8 tiles .* is selected by stain=hee; no tile has stain=hee"):
        TileDataset(str(cohort), where="stain=hee")
    with pytest.raises(NoTiles, match=r"selected by stain=he and slide=ki\.svs"):
        TileDataset(str(cohort), where=["stain=he", "slide=ki.svs"])
    with pytest.raises(UserError) as told:
        TileDataset(str(cohort), where={"stain": ["he", "hee"]})
    assert not isinstance(told.value, NoTiles)


def test_values_may_hold_what_selections_are_made_of():
    assert parse_where("class=carcinoma in situ") == (Clause("class", "=", ("carcinoma in situ",)),)
    assert parse_where("name=a>b") == (Clause("name", "=", ("a>b",)),)
    assert [str(clause) for clause in parse_where({"a": 1, "b": ["x", "y"]})] == ["a=1", "b in x,y"]
    clauses = parse_where(["a!=x", "b not in x,y", "c<=1.5"])
    assert parse_where([str(clause) for clause in clauses]) == clauses
