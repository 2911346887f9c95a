"""verify finds what is wrong in stores and names it; --repair makes exactly that again, to the byte."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from conftest import ROOT
from data_prep.extract_features import extract
from data_prep.prepare import prepare
from data_prep.repair import Sources, repair
from data_prep.verify import main, verify
from ldm.data.store_faults import ARRAY, FILE, HALF, INDEX, LEFT, STORE, TABLE, check_store, find_faults
from ldm.data.store_writers import ArrayWriter
from ldm.data.tile_store import TileStore
from ldm.errors import UserError, run_command

MODELS = ROOT / "data" / "models"
ENCODER, STAGE = MODELS / "demo-encoder", MODELS / "demo-ssl"
ARRAYS = ["tiles", "coords", "labels/tissue", "labels/blur", "features/demo-encoder", "latents/demo-ssl"]
SHARDS = 16  # rows


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory, demo_slide: Path) -> Path:
    """Two small slides of real tissue."""
    import openslide

    folder = tmp_path_factory.mktemp("source")
    slide = openslide.OpenSlide(str(demo_slide))
    for i in range(2):
        region = slide.read_region(((600, 1900), (1500, 100))[i], 0, (320, 256)[:: 1 - 2 * i]).convert("RGB")
        Image.fromarray(np.asarray(region)).save(folder / f"s{i}.png")
    return folder


@pytest.fixture(scope="module")
def prepared(slides: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cohort of two stores of 20 tiles, in shards of 16."""
    out = tmp_path_factory.mktemp("prepared") / "cohort"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ldm.data.shards.SHARD_ROWS", SHARDS)
        prepare(
            [slides], out, tiling={"tile_size": 64, "min_tissue": 0.0, "slide_mpp": 0.499, "previews": False},
            encoder={"encoder": ENCODER, "any_mpp": True}, first_stage={"first_stage_folder": STAGE},
        )  # fmt: skip
    assert [len(TileStore.open(path)) for path in sorted((out / "slides").glob("*"))] == [20, 20]
    return out


@pytest.fixture
def cohort(prepared: Path, tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setattr("ldm.data.shards.SHARD_ROWS", SHARDS)
    return Path(shutil.copytree(prepared, tmp_path / "cohort"))


@pytest.fixture(scope="module")
def sources(slides: Path) -> Sources:
    return Sources([slides], encoder=ENCODER, first_stage=STAGE)


def contents(cohort: Path) -> dict[str, bytes]:
    files = {p.relative_to(cohort).as_posix(): p for p in cohort.rglob("*") if p.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name.startswith(("slides", "index"))}


def file_of(cohort: Path, array: str, i: int = 1, slide: str = "s0") -> Path:
    return zarr_files(cohort / "slides" / f"{slide}.zarr" / array)[i]


def zarr_files(array: Path) -> list[Path]:
    return sorted(path for path in (array / "c").rglob("*") if path.is_file())


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def from_the_other_shard(path: Path) -> None:
    shutil.copy(next(p for p in zarr_files(array_of(path)) if p != path), path)


def from_another_store(path: Path) -> None:
    shutil.copy(Path(str(path).replace("s0.zarr", "s1.zarr")), path)


def array_of(path: Path) -> Path:
    return next(parent for parent in path.parents if (parent / "zarr.json").is_file())


def test_a_whole_cohort_has_no_fault(prepared: Path, capsys, sources: Sources):
    assert verify(prepared, sources.makers) == []
    main(["--store", str(prepared), "--encoder", str(ENCODER), "--first-stage", str(STAGE)])
    assert "2 stores, " in (told := capsys.readouterr().out)
    assert "all are whole" in told


DAMAGE = {
    "missing": (Path.unlink, "is missing"),
    "cut": (cut, "cut short|damaged|checksum|instead of"),
    "flipped": (flip, "checksum|decompressed|not what was written"),
    "the other shard": (from_the_other_shard, "holds the rows of shard 0"),
    "another store": (from_another_store, "is readable, and not what was written"),
}


@pytest.mark.parametrize("array", ARRAYS)
@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_made_again_to_the_byte(cohort: Path, prepared: Path, sources: Sources, array, kind):
    damage, what = DAMAGE[kind]
    damage(file_of(cohort, array))
    (fault,) = verify(cohort)
    assert (fault.store, fault.array, fault.file, fault.kind) == (cohort / "slides/s0.zarr", array, 1, FILE)
    assert re.search(what, fault.what), fault.what
    assert str(fault).startswith(f"{cohort}/slides/s0.zarr, {array}, shard 1 (c/1")
    with pytest.raises(UserError, match=r"s0\.zarr, .*, shard 1"):
        check_store(cohort / "slides" / "s0.zarr")
    before = {path: path.stat().st_mtime_ns for path in cohort.rglob("*") if path.is_file()}
    ((line, mended),) = repair([fault], sources)
    assert mended
    assert line.endswith("shard 1: made again, as it was")
    assert contents(cohort) == contents(prepared)
    changed = {path for path in cohort.rglob("*") if path.is_file() and path.stat().st_mtime_ns != before.get(path)}
    assert changed == {file_of(cohort, array)}


def test_faults_of_several_kinds_are_all_named_and_mended(cohort: Path, prepared: Path, sources: Sources, capsys):
    cut(file_of(cohort, "features/demo-encoder", 0))
    file_of(cohort, "tiles", 0, "s1").unlink()
    flip(file_of(cohort, "latents/demo-ssl", 1, "s1"))
    stray = cohort / "slides/s0.zarr/tiles/c/7/0/0/0"
    stray.parent.mkdir(parents=True)
    stray.write_bytes(b"of nobody")
    (cohort / "slides/s1.zarr/coords/c/.0.1f.partial").write_bytes(b"cut")
    words = ["--store", str(cohort), "--slides", str(next(iter(sources.entries.values())).path.parent)]
    assert run_command(lambda: main(["--store", str(cohort)])) == 2
    told = capsys.readouterr()
    assert told.out.count(f"{cohort}/slides/s") == 5
    assert "tiles: c/7/0/0/0 is no file of this array" in told.out
    assert told.err.endswith("error: 5 faults; --repair makes again what it can from --slides and the like\n")
    assert run_command(lambda: main([*words, "--repair"])) == 2
    told = capsys.readouterr()
    assert "features/demo-encoder, shard 0: not repaired: it was made by demo-encoder; give that by" in told.out
    assert "s1.zarr, tiles, shard 0: made again, as it was" in told.out
    assert told.err.endswith("error: 2 of 5 faults could not be repaired\n")
    main([*words, "--repair", "--encoder", str(ENCODER), "--first-stage", str(STAGE)])
    assert "2 stores, " in capsys.readouterr().out
    assert verify(cohort) == []
    assert contents(cohort) == contents(prepared)


def test_features_and_latents_of_other_weights(cohort: Path, prepared: Path, sources: Sources):
    def other(described: dict) -> None:
        described["attributes"]["weights_sha256"] = "0" * 64

    for array in ("features/demo-encoder", "latents/demo-ssl"):
        edit_json(cohort / "slides/s1.zarr" / array / "zarr.json", other)
    own = TileStore.open(prepared / "slides/s0.zarr").features("demo-encoder").attrs["weights_sha256"]
    told = f"made by other weights (000000000000..., not {own[:12]}...)"
    for faults, than in ((verify(cohort), "in 1 others"), (verify(cohort, sources.makers), "those given")):
        assert [(fault.store.name, fault.array, fault.kind) for fault in faults] == [
            ("s1.zarr", "features/demo-encoder", ARRAY), ("s1.zarr", "latents/demo-ssl", ARRAY),
        ]  # fmt: skip
        assert faults[0].what == f"{told} than {than}"
    flip(file_of(cohort, "features/demo-encoder", 1, "s1"))
    lines = dict(repair([fault for fault in verify(cohort) if fault.kind == FILE], sources))
    assert [*lines.values()] == [False]
    assert "it was made by other weights (000000000000...) than those of --encoder" in next(iter(lines))
    assert all(mended for _, mended in repair(faults, sources))
    assert verify(cohort, sources.makers) == []
    assert contents(cohort) == contents(prepared)


def test_arrays_that_lack_or_are_broken_are_made_again(cohort: Path, prepared: Path, sources: Sources):
    shutil.rmtree(cohort / "slides/s0.zarr/features/demo-encoder")
    (cohort / "slides/s1.zarr/latents/demo-ssl/zarr.json").write_text("{")
    faults = verify(cohort)
    assert [(fault.array, fault.kind) for fault in faults] == [
        ("latents/demo-ssl", ARRAY), ("features/demo-encoder", ARRAY),
    ]  # fmt: skip
    assert faults[1].what == "is not there, and the other store has it"
    assert all(mended for _, mended in repair(faults, sources))
    assert contents(cohort) == contents(prepared)


def test_half_made_arrays(cohort: Path, prepared: Path, sources: Sources):
    path = cohort / "slides/s0.zarr"
    features = path / "features/demo-encoder"
    array = TileStore.open(path).features("demo-encoder")
    values = array[:]
    shutil.copytree(features, path / "features/.partial-demo-encoder")  # as versions before called it
    shutil.rmtree(features)

    def interrupted() -> None:
        with ArrayWriter(path, "features/demo-encoder", (512,), "f2", array.attrs) as writer:
            writer.append(values[:18])
            (fault,) = [fault for fault in find_faults(path) if fault.kind == HALF]
            assert "is being written by process" in fault.what
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    left, half, lacks = sorted(verify(cohort), key=lambda fault: [LEFT, HALF, ARRAY].index(fault.kind))
    assert (left.array, left.kind) == ("features/.partial-demo-encoder", LEFT)
    assert left.what == "was left half made by another version, and nothing goes on with it"
    assert half.what == "half made, 18 of 20 rows of demo-encoder: the command that was writing it goes on"
    assert all(mended for _, mended in repair([left, half], sources))
    assert lacks.array == "features/demo-encoder"
    assert verify(cohort) == []
    assert contents(cohort) == contents(prepared)


def test_arrays_without_digests_are_decoded(cohort: Path, sources: Sources):
    for path in (cohort / "slides").glob("*/*/**/zarr.json"):
        edit_json(path, lambda described: described.get("attributes", {}).pop("digests", None))
    assert verify(cohort) == []
    damaged = [file_of(cohort, "tiles"), file_of(cohort, "features/demo-encoder", 0)]
    for file in damaged:
        flip(file)
    faults = verify(cohort)
    assert [fault.path for fault in faults] == damaged
    assert all("checksum" in fault.what or "decompressed" in fault.what for fault in faults)
    assert [line.partition(", shard")[2] for line, _ in repair(faults, sources)] == [" 1: made again", " 0: made again"]
    assert verify(cohort) == []


def test_what_cannot_be_made_as_it_was(cohort: Path, slides: Path, tmp_path: Path, demo_slide: Path):
    flip(file_of(cohort, "tiles"))
    faults = verify(cohort)

    def told(*given: Path) -> str:
        ((line, mended),) = repair(faults, Sources(given))
        assert not mended or "not byte for byte" in line
        return line

    other = tmp_path / "other"
    other.mkdir()
    assert "give its slide by --slides" in told()
    assert "--slides has no slide s0.png" in told(slides / "s1.png")
    shutil.copy(slides / "s1.png", other / "s0.png")
    assert "s0.png is another file than the slide that the tiles are of" in told(other)
    edit_json(cohort / "slides/s0.zarr/tiles/zarr.json", lambda d: d["attributes"]["digests"].__setitem__(1, "0" * 32))
    assert "made again; not byte for byte as it was: the slide is read otherwise" in told(slides)
    assert verify(cohort) == []  # with the digest of what is there now


def test_stores_that_are_none_or_not_finished(cohort: Path):
    edit_json(
        cohort / "slides/s0.zarr/zarr.json", lambda d: d["attributes"]["histoldm"].update(complete=False, rows=16)
    )
    (cohort / "slides/s1.zarr/zarr.json").write_text("[]")
    faults = verify(cohort)
    assert [(fault.store.name, fault.kind) for fault in faults] == [("s0.zarr", STORE), ("s1.zarr", STORE)]
    assert faults[0].what.startswith("not finished: 16 of 20 tiles are written")
    with pytest.raises(UserError, match="there is no tile store in"):
        verify(cohort / "slides" / "s0.zarr" / "features")


@pytest.mark.parametrize(
    ("change", "kind", "what"),
    [
        (lambda index: index[3:], INDEX, "has 17 tiles of s0.png, whose store has 20"),
        (lambda index: index[index["slide"] != "s0.png"], INDEX, "has 0 tiles of s0.png, whose store has 20"),
        (
            lambda index: pd.concat([index, index[:2].assign(slide="s9.png")]),
            INDEX,
            "has 2 tiles of s9.png, which has no",
        ),
        (
            lambda index: index.assign(x=index["x"].where(index.index != 4, 999)),
            TABLE,
            "places 1 tile of s0.png elsewhere",
        ),
        (lambda index: index.assign(row=index["row"].where(index.index != 4, 5)), TABLE, "each tile of s0.png once"),
        (lambda index: index.drop(columns="split"), TABLE, "has no column split"),
    ],
)
def test_a_table_of_tiles_that_does_not_fit(cohort: Path, prepared: Path, change, kind, what):
    path = cohort / "index.parquet"
    change(pd.read_parquet(path)).to_parquet(path)
    (fault,) = verify(cohort)
    assert fault.kind == kind
    assert what in fault.what
    ((line, mended),) = repair([fault], Sources())
    assert mended == (kind == INDEX), line
    if mended:
        assert pd.read_parquet(path).equals(pd.read_parquet(prepared / "index.parquet"))
    path.unlink()
    assert [fault.what.partition(":")[0] for fault in verify(cohort)] == ["there is no table of tiles"]


def test_features_of_several_makers_keep_to_their_own(cohort: Path, sources: Sources):
    """Features with patch tokens, in eight orientations, and under a name of their own, are made again as they were."""
    path = cohort / "slides/s0.zarr"
    extract([TileStore.open(path)], ENCODER, name="mine", any_mpp=True, with_dihedral=True, tokens=2)
    before = contents(cohort)
    flip(file_of(cohort, "features/mine", 0))
    cut(file_of(cohort, "features/mine-tokens2", 1))
    faults = [fault for fault in verify(cohort) if fault.kind == FILE]
    assert [fault.array for fault in faults] == ["features/mine", "features/mine-tokens2"]
    assert all(line.endswith("as it was") for line, _ in repair(faults, sources))
    assert contents(cohort) == before
