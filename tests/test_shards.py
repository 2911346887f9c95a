"""The files of arrays: as zarr itself writes and reads them; damage is told, and each file has its digest recorded."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zarr

from ldm.data.shard_files import digest_of
from ldm.data.shards import GrowingArray, create_array
from ldm.data.store_writers import ArrayWriter, TileStoreWriter
from ldm.data.stored_array import StoredArray
from ldm.data.tile_store import TileStore
from ldm.errors import UserError

COUNT, SIDE = 1500, 16  # two shards, the last one not full
_RNG = np.random.default_rng(0)
TILES = _RNG.integers(0, 256, (COUNT, SIDE, SIDE, 3), dtype=np.uint8)
TILES[7] = 0
KINDS = {
    "tiles": (TILES, False),
    "features": (_RNG.standard_normal((COUNT, 384)).astype(np.float16), False),  # 32 rows a chunk
    "latents": (_RNG.standard_normal((COUNT, 2, 9, 9)).astype(np.float16), False),
    "single": (_RNG.standard_normal((COUNT, 9000)).astype(np.float32)[:40], False),  # a row is more than a chunk
    "coords": (_RNG.integers(0, 9999, (COUNT, 2), dtype=np.int32), True),
    "labels": (_RNG.random(COUNT).astype(np.float32), True),
}
ATTRS = {"slide": "a.svs", "mpp": 0.5, "tile_size": SIDE, "stride": SIDE, "level0_size": [999, 999], "downsample": 1.0}


def written(folder: Path, name: str) -> Path:
    values, whole_chunk = KINDS[name]
    array = create_array(folder, name, values.shape, str(values.dtype), whole_chunk)
    for start in range(0, len(values), 77):
        array.append(values[start : start + 77])
    array.flush()
    array.describe()
    return folder / name


def files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted((path / "c").rglob("*")) if p.is_file()}


@pytest.mark.parametrize("name", KINDS)
def test_zarr_reads_the_same_and_writes_the_same_bytes(tmp_path: Path, name: str):
    path, (values, _) = written(tmp_path, name), KINDS[name]
    assert np.array_equal(zarr.open_array(str(path), mode="r")[:], values)
    assert np.array_equal(StoredArray(path)[:], values)
    ours = files(path)
    shutil.rmtree(path / "c")
    with zarr.config.set({"array.write_empty_chunks": True}):
        array = zarr.open_array(str(path), mode="r+")
        step = (array.shards or array.chunks)[0]
        for start in range(0, len(values), step):
            array[start : start + step] = values[start : start + step]
    assert files(path) == ours


@pytest.mark.parametrize(
    "settings",
    [
        {"chunks": (1, SIDE, SIDE, 3), "shards": (1024, SIDE, SIDE, 3), "compressors": zarr.codecs.ZstdCodec(level=1)},
        {"chunks": (8, SIDE, SIDE, 3), "shards": (64, SIDE, SIDE, 3), "compressors": None},
        {"chunks": (8, SIDE, SIDE, 3)},
        {"chunks": (8, SIDE, 4, 3)},
        {"chunks": (8, SIDE, SIDE, 3), "compressors": zarr.codecs.BloscCodec()},
    ],
    ids=["older stores", "plain shards", "zarr's own", "not whole rows", "blosc"],
)
def test_arrays_of_older_versions_and_of_others_are_read(tmp_path: Path, settings: dict):
    zarr.create_array(str(tmp_path / "a"), shape=TILES.shape, dtype="u1", **settings)[:] = TILES
    array = StoredArray(tmp_path / "a")
    assert array.digests is None
    assert (array.shape, array.chunks, array.dtype) == (TILES.shape, settings["chunks"], np.uint8)
    assert np.array_equal(array[1100], TILES[1100])
    assert np.array_equal(array[3:20], TILES[3:20])


KEYS = [
    0, -1, np.int64(1030), slice(None), slice(3, 3), slice(5, 2), slice(1020, 1030), slice(-5, None), slice(0, 90, 7),
    slice(None, None, -300), [4, 1400, 4], np.array([3, -2]), TILES[:, 0, 0, 0] > 250, (5, 2), (slice(2, 4), 1), ...,
    (..., 0), (3, ..., 1), (slice(1, 3), slice(None), 2), [],
]  # fmt: skip


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_indexing_is_that_of_numpy(tmp_path_factory, key):
    path = tmp_path_factory.getbasetemp() / "indexed"
    array = StoredArray(path / "tiles" if path.is_dir() else written(path, "tiles"))
    got = array[key]
    assert np.array_equal(got, TILES[key])
    assert got.dtype == np.uint8
    assert got.flags.writeable


def test_beyond_the_end_is_an_index_error(tmp_path: Path):
    array = StoredArray(written(tmp_path, "labels"))
    for row in (COUNT, -COUNT - 1):
        with pytest.raises(IndexError):
            array[row]


@pytest.mark.parametrize("name", ["tiles", "features", "coords"])
def test_no_bit_can_flip_unseen(tmp_path: Path, name: str):
    path, (values, _) = written(tmp_path, name), KINDS[name]
    file = next((path / "c" / "0").rglob("*")) if (path / "c" / "0").is_dir() else path / "c" / "0"
    file = file if file.is_file() else next(each for each in file.rglob("*") if each.is_file())
    whole = file.read_bytes()
    places = [*_RNG.integers(0, len(whole), 60), 0, len(whole) - 1]
    for place in map(int, places):
        broken = bytearray(whole)
        broken[place] ^= 1 << int(_RNG.integers(8))
        file.write_bytes(broken)
        with pytest.raises(UserError, match=r"cannot be read: .*copy the whole store again"):
            StoredArray(path)[:1024]
    for cut in (0, 3, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"cannot be read: "):
            StoredArray(path)[:1024]
    file.write_bytes(whole)
    assert np.array_equal(StoredArray(path)[:], values)


@pytest.mark.parametrize("fill", [0, 2.5, np.nan])
def test_chunks_that_others_left_out_have_the_value_that_they_say(tmp_path: Path, fill: float):
    kind = {"shape": (8, 2), "dtype": "f4", "chunks": (2, 2), "shards": (8, 2), "fill_value": fill}
    zarr.create_array(str(tmp_path / "a"), **kind)[:4] = 1
    want = np.repeat(np.array([1, fill], "f4"), [4, 4])
    assert np.array_equal(StoredArray(tmp_path / "a")[:, 1], want, equal_nan=True)


def test_a_file_that_is_replaced_is_read_anew(tmp_path: Path):
    path = written(tmp_path, "tiles")
    array = StoredArray(path)
    assert np.array_equal(array[3], TILES[3])
    again = create_array(tmp_path, "other", TILES.shape, "u1")
    again.append(TILES[::-1])
    again.flush()
    for name in files(path):
        os.replace(tmp_path / "other" / name, path / name)
    assert np.array_equal(array[3], TILES[-4])


def test_threads_read_beside_each_other(tmp_path: Path):
    array = StoredArray(written(tmp_path, "tiles"))
    rows = _RNG.integers(0, COUNT, 2000)
    with ThreadPoolExecutor(8) as pool:
        for row, tile in zip(rows, pool.map(lambda row: array[int(row)], rows)):
            assert np.array_equal(tile, TILES[row])


def write_store(path: Path, batch: int, stop_at: int | None = None) -> None:
    with TileStoreWriter.create(path, COUNT, ATTRS, {"tissue": "f4"}) as writer:
        for start in range(writer.rows, COUNT, batch):
            if start >= (stop_at or COUNT):
                raise KeyboardInterrupt
            part = slice(start, min(start + batch, COUNT))
            writer.append(TILES[part], KINDS["coords"][0][part], {"tissue": KINDS["labels"][0][part]})


def digests_fit(path: Path) -> bool:
    """Whether every array says the digests of all of its files, as hashlib computes them."""
    arrays = [file.parent for file in path.rglob("zarr.json") if "shape" in file.read_text()]
    return bool(arrays) and all(
        json.loads((array / "zarr.json").read_text())["attributes"]["digests"]
        == [hashlib.blake2b(content, digest_size=16).hexdigest() for content in files(array).values()]
        for array in arrays
    )


@pytest.mark.parametrize("stop_at", [1, 700, 1024, 1100, 1400])
def test_digests_are_exact_after_an_interruption(tmp_path: Path, stop_at: int):
    path = tmp_path / "a.zarr"
    write_store(tmp_path / "whole.zarr", 90)
    with pytest.raises(KeyboardInterrupt):
        write_store(path, 77, stop_at)
    assert digests_fit(path)
    write_store(path, 111)
    assert digests_fit(path)
    for name in ("tiles", "coords", "labels/tissue"):
        assert files(path / name) == files(tmp_path / "whole.zarr" / name)
    assert "digests" not in TileStore.open(path).tiles.attrs


def test_digests_are_exact_after_a_kill_between_data_and_digest(tmp_path: Path):
    """Each state that a kill may leave: files written and not recorded, digests recorded and the rows not."""
    write_store(tmp_path / "whole.zarr", 90)
    for stop_at in (700, 1100):
        before = tmp_path / f"{stop_at}.zarr"
        with pytest.raises(KeyboardInterrupt):
            write_store(before, 77, stop_at)
        states = [("c",), ("c", "zarr.json")]
        for arrays in (["tiles"], ["tiles", "coords"], ["tiles", "coords", "labels/tissue"]):
            for parts in states:
                killed = tmp_path / "killed.zarr"
                shutil.copytree(before, killed)
                for array in arrays:
                    for part in parts:
                        source = tmp_path / "whole.zarr" / array / part
                        copy = shutil.copytree if source.is_dir() else shutil.copy
                        copy(source, killed / array / part, **({"dirs_exist_ok": True} if source.is_dir() else {}))
                write_store(killed, 111)
                assert digests_fit(killed)
                assert files(killed / "tiles") == files(tmp_path / "whole.zarr" / "tiles")
                shutil.rmtree(killed)


def test_digests_are_exact_after_a_kill_between_the_last_rows_and_the_name(tmp_path: Path):
    path = tmp_path / "a.zarr"
    write_store(path, 90)
    asked = (path, "features/e", (3,), "f2")
    killed = ArrayWriter(*asked)
    killed.append(np.ones((COUNT, 3)))
    killed.flush()
    killed._lock.release()
    with ArrayWriter(*asked) as writer:
        assert writer.rows == COUNT
    assert digests_fit(path)


def test_what_is_recorded_as_written_is_there_for_large_tiles_too(tmp_path: Path, monkeypatch):
    """Shards of large tiles hold fewer rows than those of their coordinates; a kill comes without a close."""
    monkeypatch.setattr("ldm.data.shards.SHARD_BYTES", 256 * SIDE * SIDE * 3)
    write_store(tmp_path / "whole.zarr", 90)
    assert (TileStore.open(tmp_path / "whole.zarr").tiles.shards or ())[0] == 256
    writer = TileStoreWriter.create(tmp_path / "a.zarr", COUNT, ATTRS, {"tissue": "f4"})
    for start in (0, 300):
        part = slice(start, start + 300)
        writer.append(TILES[part], KINDS["coords"][0][part], {"tissue": KINDS["labels"][0][part]})
    shutil.copytree(tmp_path / "a.zarr", tmp_path / "killed.zarr")
    writer.close(complete=False)
    for name in ("killed.zarr", "a.zarr"):
        (tmp_path / name / ".lock-tiles").unlink(missing_ok=True)
        assert len(TileStore.open(tmp_path / name, allow_incomplete=True)) == (512 if name == "killed.zarr" else 600)
        write_store(tmp_path / name, 111)
        assert digests_fit(tmp_path / name)
        for array in ("tiles", "coords", "labels/tissue"):
            assert files(tmp_path / name / array) == files(tmp_path / "whole.zarr" / array)


def test_an_array_that_an_older_version_began_goes_on_with_digests(tmp_path: Path):
    write_store(tmp_path / "a.zarr", 500)
    values = KINDS["features"][0]
    partial = tmp_path / "a.zarr" / "features" / "begun"
    old = zarr.create_array(
        str(partial), shape=values.shape, dtype="f2", chunks=(16, 384), shards=(1024, 384), compressors=None
    )
    old[:1024] = values[:1024]
    old.update_attributes({"rows": 1024})
    with ArrayWriter(tmp_path / "a.zarr", "features/new", (384,), "f2") as writer:
        shutil.rmtree(writer.partial)
        partial.rename(writer.partial)
        writer._buffer = None  # as if it had not begun
        writer._lock.release()
    with ArrayWriter(tmp_path / "a.zarr", "features/new", (384,), "f2") as writer:
        assert writer.rows == 1024
        writer.append(values[1024:])
    array = TileStore.open(tmp_path / "a.zarr").features("new")
    assert np.array_equal(array[:], values)
    assert array.digests == [digest_of(file) for file in array.files()]


def test_what_an_interrupted_run_left_damaged_is_told(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        write_store(tmp_path / "a.zarr", 77, 700)
    (file,) = (file for file in (tmp_path / "a.zarr" / "tiles" / "c").rglob("*") if file.is_file())
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(UserError, match=r"what an interrupted run left of .*tiles is damaged"):
        write_store(tmp_path / "a.zarr", 77)
    file.unlink()
    with pytest.raises(UserError, match=r"what an interrupted run left of .*tiles is damaged"):
        GrowingArray(tmp_path / "a.zarr" / "tiles", 700)
