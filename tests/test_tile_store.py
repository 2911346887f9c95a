"""Tile stores: what is written is what is read, whatever interrupts the writing; two writers never meet."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import zarr

from ldm.data import dihedral
from ldm.data.cohort import merge_index
from ldm.data.datasets import TileDataset
from ldm.data.module import collate
from ldm.data.sampler import ResumableBatchSampler, ResumableDataLoader
from ldm.data.store_faults import check_store
from ldm.data.store_writers import ArrayWriter, TileStoreWriter
from ldm.data.tile_store import TileStore, open_cohort
from ldm.errors import UserError
from ldm.locks import Lock

COUNT, SIDE = 2500, 16  # three shards, the last one not full
ATTRS = {
    "slide": "a.svs",
    "mpp": 0.5,
    "tile_size": SIDE,
    "stride": SIDE,
    "level0_size": [50 * SIDE * 2, 50 * SIDE * 2],
    "downsample": 2.0,
}
_RNG = np.random.default_rng(0)
TILES = _RNG.integers(0, 256, (COUNT, SIDE, SIDE, 3), dtype=np.uint8)
TILES[7] = 0  # an empty chunk is a tile like any other
CELLS = np.stack(np.divmod(np.arange(COUNT), 50)[::-1], 1)  # (col, row) on a lattice of 50 columns
COORDS = (CELLS * SIDE * 2).astype(np.int32)
LABELS = _RNG.random(COUNT).astype(np.float32)
FEATURES = _RNG.standard_normal((COUNT, 8, 12)).astype(np.float16)


def write_store(path: Path, batch: int = 77, stop_at: int | None = None, pause: float = 0) -> None:
    with TileStoreWriter.create(path, COUNT, ATTRS, {"tissue": "f4"}) as writer:
        for start in range(writer.rows, COUNT, batch):
            if stop_at is not None and start >= stop_at:
                raise KeyboardInterrupt
            part = slice(start, min(start + batch, COUNT))
            writer.append(TILES[part], COORDS[part], {"tissue": LABELS[part]})
            time.sleep(pause)


def write_features(path: Path, batch: int = 100, stop_at: int | None = None) -> None:
    with ArrayWriter(path, "features/toy", FEATURES.shape[1:], "f2", {"dihedral": True}) as writer:
        for start in range(writer.rows, COUNT, batch):
            if stop_at is not None and start >= stop_at:
                raise KeyboardInterrupt
            writer.append(FEATURES[start : start + batch])


def contents(path: Path) -> dict[str, bytes]:
    """Every file of a store, bitwise."""
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TileStore:
    path = tmp_path_factory.mktemp("whole") / "slides" / "a.zarr"
    write_store(path)
    write_features(path)
    return TileStore.open(path)


def test_round_trip(store: TileStore):
    check_store(store.path)
    assert len(store) == COUNT
    assert np.array_equal(store.tiles[:], TILES)
    assert np.array_equal(store.tile(2048), TILES[2048])
    assert np.array_equal(store.coords, COORDS)
    assert np.array_equal(store.labels("tissue"), LABELS)
    assert np.array_equal(store.features("toy")[:], FEATURES)
    assert (store.feature_names, store.latent_names, store.label_names) == (["toy"], [], ["tissue"])
    assert store.tiles.chunks == (1, SIDE, SIDE, 3)
    assert store.tiles.shards == (1024, SIDE, SIDE, 3)
    for row in (-1, COUNT):
        with pytest.raises(IndexError):
            store.tile(row)


def test_readable_without_this_package(store: TileStore):
    group = zarr.open_group(str(store.path), mode="r")
    assert group["tiles"].shape == TILES.shape
    assert {"tiles", "coords", "features", "latents", "labels"} == set(group)
    assert group.attrs["histoldm"]["mpp"] == 0.5


@pytest.mark.parametrize("stop_at", [1, 700, 1100, 2400])
@pytest.mark.slow
def test_interrupted_and_resumed_is_bitwise_the_same(tmp_path: Path, store: TileStore, stop_at: int):
    path = tmp_path / "a.zarr"
    with pytest.raises(KeyboardInterrupt):
        write_store(path, stop_at=stop_at)
    with pytest.raises(UserError, match="not finished"):
        TileStore.open(path)
    kept = len(TileStore.open(path, allow_incomplete=True))
    assert stop_at <= kept < stop_at + 77  # nothing that was given is lost
    write_store(path, batch=111)
    with pytest.raises(KeyboardInterrupt):
        write_features(path, stop_at=stop_at)
    assert TileStore.open(path).feature_names == []  # not there until it is whole
    write_features(path, batch=130)
    assert contents(path) == contents(store.path)


@pytest.mark.slow
def test_killed_and_resumed_is_bitwise_the_same(tmp_path: Path, store: TileStore):
    path = tmp_path / "a.zarr"
    code = f"import test_tile_store as t, pathlib; t.write_store(pathlib.Path({str(path)!r}), batch=50, pause=0.05)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent)
    try:
        for _ in range(600):
            rows = len(TileStore.open(path, allow_incomplete=True)) if (path / "zarr.json").exists() else 0
            if rows >= 1024:
                break
            time.sleep(0.05)
        assert rows == 1024
        with pytest.raises(UserError, match=f"process {process.pid}"):
            write_store(path)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (path / ".lock-tiles").exists()  # the dead writer's lock is taken over
    write_store(path)
    write_features(path)
    assert contents(path) == contents(store.path)


@pytest.mark.slow
def test_two_writers_are_refused(tmp_path: Path):
    path = tmp_path / "a.zarr"
    first = TileStoreWriter.create(path, COUNT, ATTRS, {"tissue": "f4"})
    with pytest.raises(UserError, match=f"process {os.getpid()}"):
        TileStoreWriter.create(path, COUNT, ATTRS, {"tissue": "f4"})
    first.close(complete=False)
    write_store(path)
    first = ArrayWriter(path, "features/toy", (8, 12), "f2")
    with pytest.raises(UserError, match="being written"):
        ArrayWriter(path, "features/toy", (8, 12), "f2")
    with ArrayWriter(path, "features/other", (12,), "f2") as other:  # another array is another shard
        other.append(FEATURES[:, 0])
    first.close(complete=False)
    assert TileStore.open(path).feature_names == ["other"]
    assert not list(path.glob(".lock*"))


def test_lock_of_another_host_is_respected(tmp_path: Path):
    (tmp_path / ".lock").write_text('{"pid": 1, "host": "elsewhere"}')
    with pytest.raises(UserError, match=r"process 1 on elsewhere.*delete"):
        Lock(tmp_path / ".lock").acquire()


def test_other_settings_are_refused(store: TileStore):
    with pytest.raises(UserError, match=r"mpp was 0.5, now 0.25"):
        TileStoreWriter.create(store.path, COUNT, {**ATTRS, "mpp": 0.25}, {"tissue": "f4"})
    with pytest.raises(UserError, match="encoder was None, now 'b'"):
        ArrayWriter(store.path, "features/toy", (8, 12), "f2", {"dihedral": True, "encoder": "b"})
    with pytest.raises(UserError, match="shape was"):
        ArrayWriter(store.path, "features/toy", (8, 13), "f2", {"dihedral": True})
    with ArrayWriter(store.path, "features/toy", (8, 12), "f2", {"dihedral": True}) as writer:
        assert writer.finished
        assert writer.rows == COUNT


@pytest.mark.slow
def test_too_few_or_too_many_rows(tmp_path: Path):
    path = tmp_path / "a.zarr"
    writer = TileStoreWriter.create(path, COUNT, ATTRS)
    writer.append(TILES[:5], COORDS[:5])
    with pytest.raises(ValueError, match="wants 2500 tiles but 5"):
        writer.close(complete=True)
    with pytest.raises(UserError, match="not finished"):
        TileStore.open(path)
    with TileStoreWriter.create(path, COUNT, ATTRS) as writer:
        writer.append(TILES[writer.rows :], COORDS[writer.rows :])
        with pytest.raises(ValueError, match="2501 rows"):
            writer.append(TILES[:1], COORDS[:1])


@pytest.mark.slow
def test_a_shard_of_black_tiles_is_a_shard(tmp_path: Path):
    with TileStoreWriter.create(tmp_path / "a.zarr", COUNT, ATTRS) as writer:
        writer.append(np.zeros_like(TILES), COORDS)
    check_store(tmp_path / "a.zarr")


def test_damage_is_told(tmp_path: Path):
    path = tmp_path / "a.zarr"
    write_store(path)
    shard = path / "tiles" / "c" / "1" / "0" / "0" / "0"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"tiles\[.*cannot be read: .*copy the whole store again"):
        TileStore.open(path).tile(1500)
    shard.unlink()
    with pytest.raises(UserError, match=r"tiles lacks 1 of 3 shards \(c/1/0/0/0"):
        TileStore.open(path).tile(0)


@pytest.mark.parametrize("name", ["tiles", "coords", "features/toy", "labels/tissue"])
def test_a_missing_shard_is_never_zeros(tmp_path: Path, store: TileStore, name: str):
    path = tmp_path / "slides" / "a.zarr"
    shutil.copytree(store.path, path)
    shutil.rmtree(path / name / "c" / "0") if (path / name / "c" / "0").is_dir() else (path / name / "c" / "0").unlink()
    with pytest.raises(UserError, match=rf"{name} lacks 1 of \d shards .*copy the whole store again"):
        TileStore.open(path).array(name)


def _edited(path: Path, **changes: object) -> None:
    """Other attributes of a store; None leaves one out."""
    content = json.loads((path / "zarr.json").read_text())
    own = {**content["attributes"]["histoldm"], **changes}
    content["attributes"]["histoldm"] = {name: value for name, value in own.items() if value is not None}
    (path / "zarr.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "zarr.json").write_text('{"zarr_format": 3, "node'), "not a Zarr v3 group, .* copy all"),
        (lambda path: (path / "zarr.json").write_text('{"zarr_format": 4, "node_type": "group"}'), "not a Zarr v3"),
        (lambda path: (path / "zarr.json").write_text("[]"), "not a Zarr v3 group"),
        (lambda path: _edited(path, format=3, version="9.0"), "layout 3 of histoldm 9.0; this is .* update it"),
        (lambda path: _edited(path, pixels="webp"), "pixels is 'webp', not one of zstd, jpeg, none"),
        (lambda path: _edited(path, pixels="none"), "which slide its pixels are read from"),
        (lambda path: _edited(path, pixels="none", slide_file={"name": "a"}), "slide_file.path is missing"),
        (lambda path: _edited(path, tile_size=None), "does not say its tile_size"),
        (lambda path: shutil.rmtree(path / "tiles"), "the array .*tiles cannot be opened"),
        (lambda path: (path / "coords" / "zarr.json").write_text("{"), "the array .*coords cannot be opened"),
        (lambda path: (path / "features" / "toy" / "zarr.json").write_text('{"shape": [3]}'), "toy cannot be opened"),
        (lambda path: (path.parent.parent / "index.parquet").write_bytes(b"PAR1x"), "index.parquet is broken"),
        (lambda path: pd.DataFrame({"a": [1]}).to_parquet(path.parent.parent / "index.parquet"), "has no column slide"),
    ],
)
def test_a_broken_store_is_one_message(tmp_path: Path, store: TileStore, damage, message: str):
    path = tmp_path / "slides" / "a.zarr"
    shutil.copytree(store.path, path)
    merge_index(tmp_path, pd.DataFrame({"slide": "a.svs", "row": range(COUNT)}))
    damage(path)

    def read() -> None:
        TileDataset(str(tmp_path), ("image", "ssl"), feature="toy", conditions={"split": "split"}, missing="skip")[0]

    with pytest.raises(UserError, match=message) as told:
        read()
    assert "\n" not in str(told.value)


def test_what_is_not_a_store(tmp_path: Path, store: TileStore):
    with pytest.raises(UserError, match="no tile store at"):
        TileStore.open(tmp_path / "none.zarr")
    (tmp_path / "empty.zarr").mkdir()
    with pytest.raises(UserError, match="not a Zarr"):
        TileStore.open(tmp_path / "empty.zarr")
    zarr.create_group(str(tmp_path / "group.zarr"))
    with pytest.raises(UserError, match="histoldm"):
        TileStore.open(tmp_path / "group.zarr")
    with pytest.raises(UserError, match="did you mean 'toy'"):
        store.features("toi")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write"):
        TileStoreWriter.create(tmp_path / "file" / "a.zarr", COUNT, ATTRS)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="no tile store in"):
        open_cohort(tmp_path / "nothing")
    cohort = store.path.parent.parent
    for given in (store.path, store.path.parent, cohort, [cohort]):
        assert [s.path for s in open_cohort(given)] == [store.path]


@pytest.mark.slow
def test_wrong_row_count(tmp_path: Path):
    path = tmp_path / "a.zarr"
    write_store(path)
    zarr.create_array(str(path / "features" / "short"), data=FEATURES[:10, 0])
    with pytest.raises(UserError, match="10 rows but the store has 2500"):
        TileStore.open(path).features("short")


@pytest.mark.slow
def test_grid_is_row_then_column(store: TileStore):
    step = SIDE * 2
    grid, mask = store.grid((3 * step, 5 * step, 4 * step, 2 * step), "toy")
    assert grid.shape == (2, 4, 12)
    assert mask.all()
    for row in range(2):
        for col in range(4):
            assert np.array_equal(grid[row, col], FEATURES[(5 + row) * 50 + 3 + col, 0])
    grid, mask = store.grid((49 * step, 49 * step, 2 * step, 2 * step), "toy")
    assert mask.tolist() == [[True, False], [False, False]]
    assert np.isnan(grid[0, 1]).all()
    assert store.grid(None, "toy")[1].all()
    with pytest.raises(UserError, match=r"no tile .* lies on the lattice.*\(128, 192\)"):
        store.grid((3 * step + 7, 5 * step + 7, 4 * step, 4 * step), "toy")
    with pytest.raises(UserError, match="smaller than one tile"):
        store.grid((0, 0, 5, 5), "toy")


def _read_many(store: TileStore, queue: object) -> None:
    queue.put(int(store.tiles[0:300].sum()))


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.slow
def test_child_processes_read(store: TileStore, method: str):
    want = int(store.tiles[0:300].sum())
    context = get_context(method)
    queue = context.Queue()
    child = context.Process(target=_read_many, args=(store, queue))
    child.start()
    try:
        assert queue.get(timeout=30) == want
    finally:
        child.kill()
        child.join()


def _elements() -> Iterator[np.ndarray]:
    x = np.arange(2 * 3 * 3).reshape(2, 3, 3)
    return (dihedral.apply(x, k) for k in range(dihedral.COUNT))


def test_dihedral_is_the_group_of_the_square():
    import torch

    elements = list(_elements())
    assert len({e.tobytes() for e in map(np.ascontiguousarray, elements)}) == 8
    for k, element in enumerate(elements):
        assert np.array_equal(dihedral.apply(element, k if k >= 4 else -k % 4), elements[0])  # a flip undoes itself
        assert torch.equal(dihedral.apply(torch.from_numpy(elements[0]), k), torch.from_numpy(element.copy()))
    assert np.array_equal(elements[1], np.rot90(elements[0], 1, (-2, -1)))  # counter-clockwise
    assert np.array_equal(elements[5], np.rot90(elements[0][..., ::-1], 1, (-2, -1)))  # the flip comes first
    with pytest.raises(ValueError, match=r"0\.\.7"):
        dihedral.apply(elements[0], 8)


def test_a_training_holds_no_pixels_however_large_its_stores_are(tmp_path: Path):
    rng, peaks = np.random.default_rng(0), {}
    for count in (1024, 4096):
        attrs = ATTRS | {"tile_size": 64, "stride": 64}
        with TileStoreWriter.create(tmp_path / f"{count}.zarr", count, attrs) as writer:
            for first in range(0, count, 512):
                tiles = rng.integers(0, 256, (512, 64, 64, 3), np.uint8)  # 50 MB in all of the larger store
                writer.append(tiles, np.arange(first, first + 512)[:, None].repeat(2, 1))
        tracemalloc.start()
        data = TileDataset(str(tmp_path / f"{count}.zarr"), ("image",))
        tracemalloc.reset_peak()
        loader = ResumableDataLoader(data, ResumableBatchSampler(len(data), 16, seed=1), collate_fn=collate)
        seen = [int(row) for batch in loader for row in batch["row"]]
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert sorted(seen) == [*range(count)]
    assert peaks[4096] - peaks[1024] < 100 * 3072  # bytes a tile, of 12288
    assert peaks[4096] < 5e6
