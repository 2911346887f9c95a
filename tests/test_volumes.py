"""Volumes and image folders to slices, and pairs of modalities."""

from __future__ import annotations

import shutil
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from conftest import ROOT
from data_prep import slice_volumes
from data_prep.slice_volumes import PERCENTILES, main, tell_window
from ldm.data import dihedral
from ldm.data.bending import Bending
from ldm.data.cohort import read_index
from ldm.data.pairs import PairDataset
from ldm.data.tile_store import TileStore
from ldm.data.volumes import Volume, cut_slice, to_tile, window_of
from ldm.errors import UserError, run_command

SHAPE = (12, 10, 8)


def write(path, values=None, affine=None, axes="RAS"):
    """A volume whose voxels are written in the orientation `axes`."""
    if values is None:
        values = np.random.default_rng(0).uniform(100, 900, SHAPE)
    image = nibabel.Nifti1Image(np.asarray(values, np.float32), np.eye(4) if affine is None else affine)
    turn = nibabel.orientations.ornt_transform(
        nibabel.orientations.axcodes2ornt("RAS"), nibabel.orientations.axcodes2ornt(axes)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image.as_reoriented(turn), path)
    return path


@pytest.fixture
def folder(tmp_path):
    """Two subjects with t1 and t2, one with t1 alone."""
    rng = np.random.default_rng(1)
    for name in ("a", "b", "c"):
        write(tmp_path / "in" / f"{name}_t1.nii.gz", rng.uniform(0, 900, SHAPE))
        if name != "c":
            axes = "LPS" if name == "a" else "PSR"
            write(tmp_path / "in" / f"{name}_t2.nii.gz", rng.uniform(0, 900, SHAPE), axes=axes)
    return tmp_path / "in"


def run(source, out, *options):
    named = [] if "--modality" in options else ["--modality", "t1=*_t1.nii.gz", "t2=*_t2.nii.gz"]
    main(["--volumes", str(source), *named, "--out", str(out), "--size", "16", "--least-foreground", "0", *options])


def test_slices_of_each_subject_and_modality(folder, tmp_path, capsys):
    run(folder, tmp_path / "out", "--range", "2,6", "--window", "0,900")
    assert "1 left out:\n  c (no t2)" in capsys.readouterr().out
    index = read_index(tmp_path / "out")
    assert len(index) == 2 * 2 * 4
    assert set(index["slide"]) == {"a_t1", "a_t2", "b_t1", "b_t2"}
    assert index.query("slide == 'b_t2'")["slice"].tolist() == [2, 3, 4, 5]
    assert index["patient"].tolist() == index["subject"].tolist()
    store = TileStore.open(tmp_path / "out" / "slides" / "a_t2.zarr")
    assert store.mpp is None
    about = {"subject": "a", "modality": "t2", "window": [0.0, 900.0], "axis": 2, "spacing_mm": [0.75, 0.75],
             "slice_spacing_mm": 1.0, "slices": [2, 3, 4, 5], "percentiles": None, "source": "a_t2.nii.gz"}  # fmt: skip
    assert {key: store.attrs[key] for key in about} == about
    values = Volume(folder / "a_t2.nii.gz").values()
    assert np.array_equal(store.tile(1), to_tile(cut_slice(values, 2, 3) / 900, 16))


def test_the_same_body_is_the_same_in_any_orientation(tmp_path):
    values = np.random.default_rng(2).uniform(0, 1, SHAPE)
    affine = np.diag([2.0, 2.0, 5.0, 1.0])
    turned = [Volume(write(tmp_path / f"{axes}.nii", values, affine, axes)) for axes in ("RAS", "LPS", "PSR", "IAL")]
    for volume in turned:
        volume.check_same_grid(turned[0])
        assert volume.spacing == pytest.approx((2, 2, 5))
        np.testing.assert_allclose(volume.values(), values, atol=1e-6)


@pytest.mark.parametrize(
    ("axis", "shape", "place"), [(2, (10, 12), (0, 11)), (1, (8, 12), (7, 11)), (0, (8, 10), (7, 9))]
)
def test_slices_are_seen_with_anterior_or_superior_up_and_left_on_the_left(axis, shape, place):
    values = np.zeros(SHAPE)
    values[-1, -1, 0] = 1  # right, anterior, inferior
    found = cut_slice(values, axis, -1 if axis != 2 else 0)
    assert found.shape == shape
    assert np.argwhere(found).tolist() == [list(place)]


def test_tiles_have_square_pixels_in_black():
    tile = to_tile(np.ones((10, 20)), 32, (1.0, 0.5))  # as high as wide
    assert (tile == 255).all()
    tile = to_tile(np.ones((5, 20)), 32)
    assert (tile[12:20] == 255).all()
    assert not tile[:12].any()
    assert not tile[20:].any()


def test_fine_patterns_are_averaged_when_they_shrink():
    stripes = np.tile([0.0, 1.0], (64, 32))
    assert to_tile(stripes, 16)[:, 1:-1].std() < 8


@pytest.mark.parametrize("air", [0.3, 0.6, 0.9])
def test_the_window_is_that_of_the_head_however_much_air_there_is(tmp_path, air, capsys):
    rng = np.random.default_rng(0)
    head = rng.uniform(200, 600, 20_000)
    head[:400] = rng.uniform(900, 1000, 400)  # a bright lesion, 2% of the head
    count = round(len(head) / (1 - air) / 100)
    values = rng.uniform(0, 10, (count, 10, 10))
    values.reshape(-1)[: len(head)] = head
    low, high, white, _ = window_of(values, PERCENTILES)
    assert 195 < low < 215
    assert 985 < high < 1000
    assert white == pytest.approx(0.001, abs=2e-4)
    assert (head[:400] >= high).mean() < 0.1
    tell_window(Path("a.nii"), values, PERCENTILES)
    told = capsys.readouterr()
    assert "is black" in told.out
    assert not told.err
    tell_window(Path("a.nii"), values, (0.5, 95))
    assert "a.nii has values up to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((4, 4, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")]), "holds colours; slices are gray: write one"),
        (np.zeros((4, 4, 4), np.complex64), "holds complex64 values; slices are gray: write their magnitude"),
    ],
)
def test_volumes_of_colours_and_complex_numbers_are_refused(tmp_path, values, message):
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / "a.nii")
    with pytest.raises(UserError, match=message):
        Volume(tmp_path / "a.nii")


def test_absurd_sizes_are_refused_before_anything_is_read(tmp_path):
    path = write(tmp_path / "a.nii")
    content = bytearray(path.read_bytes())
    content[42:48] = np.array([32767] * 3, "<i2").tobytes()
    path.write_bytes(content)
    with pytest.raises(UserError, match="32767 x 32767 x 32767 voxels; its header is broken"):
        Volume(path)


@pytest.mark.parametrize(
    ("side", "message"),
    [(0, "its affine is broken"), (np.nan, "its affine is broken"), (np.inf, "its affine is broken"),
     (1e-12, "says that its voxels are .* mm large; correct"), (1e9, "says that its voxels are .* mm large; correct")],
)  # fmt: skip
def test_voxels_without_a_place_or_of_absurd_size_are_told(tmp_path, side, message):
    content = bytearray(write(tmp_path / "b.nii").read_bytes())
    content[280:296] = np.array([side, 0, 0, 0], "<f4").tobytes()  # srow_x
    (tmp_path / "b.nii").write_bytes(content)
    with pytest.raises(UserError, match=message):
        Volume(tmp_path / "b.nii")


def test_voxels_that_are_not_finite_are_counted(tmp_path, capsys):
    values = np.arange(512, dtype=np.float32).reshape(8, 8, 8) + 5
    values[0, 0, :3] = (np.nan, np.inf, -np.inf)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / "a.nii")
    read = Volume(tmp_path / "a.nii").values()
    assert read[0, 0].tolist() == [8, 8, 8, *range(8, 13)]
    told = f"note: 3 of 512 voxels of {tmp_path / 'a.nii'} are NaN or infinite and count as 8, its least."
    assert told in capsys.readouterr().err


def test_slices_of_little_foreground_are_dropped_in_all_modalities(folder, tmp_path):
    values = np.random.default_rng(3).uniform(500, 900, SHAPE)
    values[..., :3] = 0
    write(folder / "a_t1.nii.gz", values)
    run(folder, tmp_path / "out", "--least-foreground", "0.5")
    index = read_index(tmp_path / "out")
    assert index.query("subject == 'a'")["slice"].tolist() == [3, 4, 5, 6, 7] * 2


def test_a_second_run_changes_nothing_and_other_settings_are_refused(folder, tmp_path):
    run(folder, tmp_path / "out", "--validation", "0.5")
    before = read_index(tmp_path / "out")
    assert set(before.groupby("subject")["split"].nunique()) == {1}
    run(folder, tmp_path / "out", "--validation", "0.5")
    pd.testing.assert_frame_equal(read_index(tmp_path / "out"), before)
    with pytest.raises(UserError, match=r"no subject could be sliced:(.|\n)*percentiles was"):
        run(folder, tmp_path / "out", "--percentiles", "1,99")


def test_volumes_of_different_grids_are_refused_before_anything_is_written(folder, tmp_path):
    write(folder / "b_t2.nii.gz", np.zeros((12, 10, 9)))
    with pytest.raises(UserError, match=r"\(12, 10, 8\).*resample"):
        run(folder, tmp_path / "out")
    moved = np.eye(4)
    moved[0, 3] = 0.5
    write(folder / "b_t2.nii.gz", affine=moved)
    with pytest.raises(UserError, match=r"affines of .* differ by 0\.5"):
        run(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bad_subject_does_not_stop_the_others(folder, tmp_path, capsys):
    write(folder / "a_t1.nii.gz", np.full(SHAPE, 7.0))
    run(folder, tmp_path / "out")
    assert "is 7 nearly everywhere" in capsys.readouterr().out
    assert set(read_index(tmp_path / "out")["subject"]) == {"b"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--range", "4,9"], r"has slices 0\.\.7; the range 4,9"),
        (["--least-foreground", "1"], "of foreground in every modality"),
        (["--modality", "t1=*_t3.nii.gz"], "no file is called"),
        (["--modality", "t1=*_t1.nii.gz", "pd=*.gz"], "is both t1 and pd"),
        (["--modality", "t1=*_t1.nii.gz", "t1=x"], "names the modality 't1' twice"),
        (["--modality", "t1=x/*_t1.nii.gz"], "is that of a file's name, as"),
        (["--patient", r"\d+"], "finds no patient in 'a'"),
        (["--size", "2"], "at least 8"),
    ],
)
def test_mistakes_are_told(folder, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        run(folder, tmp_path / "out", *options)


def test_unreadable_files_are_told(tmp_path, capsys):
    (tmp_path / "a_t1.nii.gz").write_bytes(b"no volume")
    with pytest.raises(UserError, match="cannot read the volume"):
        Volume(tmp_path / "a_t1.nii.gz")
    whole = write(tmp_path / "b.nii").read_bytes()
    (tmp_path / "b.nii").write_bytes(whole[:1000])
    with pytest.raises(UserError, match="cannot read the"):
        Volume(tmp_path / "b.nii").values()
    with pytest.raises(UserError, match="4 dimensions"):
        Volume(write(tmp_path / "c.nii", np.zeros((*SHAPE, 2))))
    assert run_command(lambda: main(["--volumes", str(tmp_path / "x"), "--modality", "t1=*", "--out", "y"])) == 2
    assert "there is nothing at" in capsys.readouterr().err


def test_subjects_are_named_by_wildcards_or_folders(tmp_path):
    for name in ("s1/s1_t1.nii", "s2/s2_t1.nii", "s3/t1.nii"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert set(slice_volumes.find_subjects([tmp_path], {"t1": "*t1.nii"})) == {"s1", "s2", "s3"}
    (tmp_path / "s1" / "again").mkdir()
    (tmp_path / "s1" / "again" / "s1_t1.nii").touch()
    with pytest.raises(UserError, match="are both t1 of 's1'"):
        slice_volumes.find_subjects([tmp_path], {"t1": "*_t1.nii"})


def test_pairs_are_the_same_slices_turned_alike(folder, tmp_path):
    run(folder, tmp_path / "out", "--range", "1,4")
    pairs = PairDataset(str(tmp_path / "out"), source="t1", image="t2", dihedral=True, where={"slice": {"min": 2}})
    assert len(pairs) == 2 * 2
    for index in range(len(pairs)):
        item = pairs[index]
        assert item["image"].shape == item["source"].shape == (1, 16, 16)
        row = int(item["slice"]) - 1
        for key, modality in (("source", "t1"), ("image", "t2")):
            tile = TileStore.open(tmp_path / "out" / "slides" / f"{item['subject']}_{modality}.zarr").tile(row)
            torch.testing.assert_close(item[key][0], torch.from_numpy(tile[..., 0] / 127.5 - 1).float())
        turned = pairs[(index, 5)]
        for key in ("image", "source"):
            assert not torch.equal(turned[key], item[key])
            assert torch.equal(turned[key], _turned(item[key], 5))
    assert pairs.metadata["source_modality"] == "t1"
    assert PairDataset(str(tmp_path / "out"), "t1", "t2", gray=False)[0]["source"].shape == (3, 16, 16)


def test_pairs_of_several_sources_are_bent_as_the_draw_says(folder, tmp_path):
    run(folder, tmp_path / "out", "--range", "1,4")
    given = {"source": ["t2", "t1"], "image": "t1", "in_memory": True}
    plain = PairDataset(str(tmp_path / "out"), **given)
    pairs = PairDataset(str(tmp_path / "out"), **given, geometry=1, intensity=1)
    assert len(pairs) == len(plain) == 2 * 2 * 3
    for index in range(len(pairs)):
        item, same = pairs[index], plain[index]  # without a draw, as an evaluation reads them
        for key in ("image", "source"):
            torch.testing.assert_close(item[key], same[key])
        bent, again, other = pairs[(index, 5)], pairs[(index, 5)], pairs[(index, 6)]
        torch.testing.assert_close(bent["source"], again["source"])
        assert not torch.equal(bent["source"], other["source"])
        assert bent["source"].abs().max() <= 1
    assert plain[len(plain) - 1]["source"].equal(plain[len(plain) - 1]["image"])  # t1 of t1
    assert pairs.metadata["source_modality"] == "t2 t1"
    assert pairs.metadata["volumes"]["axis"] == 2
    assert pairs.metadata["volumes"]["modality"] == "t1"


def test_bending_keeps_black_and_moves_both_alike():
    rows = torch.linspace(-1, 1, 32)
    head = torch.where((rows[:, None] ** 2 + rows**2) < 0.5, rows[:, None].expand(32, 32) / 2, -1.0)[None]
    image, source = Bending(geometry=0.6)(head, head, 3)
    torch.testing.assert_close(image, source)
    assert (image - head).abs().mean() > 0.05
    image, source = Bending(intensity=0.6)(head, head, 3)
    torch.testing.assert_close(image, head)
    assert (source[head == -1] == -1).all()
    assert (source - head)[head > -1].abs().mean() > 0.02
    stripes = torch.where(torch.arange(32) % 3 < 1, 0.5, -0.5).expand(1, 32, 32)
    turned = torch.stack([Bending(geometry=0.2)(stripes, stripes, draw)[0][:, 8:24, 8:24] for draw in range(20)])
    assert turned.std((1, 2, 3)).mean() > 0.8 * stripes.std()  # fine structure stays
    with pytest.raises(UserError, match=r"intensity of pairs is a number from 0 \(off\) to 1; got 2"):
        Bending(intensity=2)


def _turned(image, variant):
    return torch.from_numpy(np.ascontiguousarray(dihedral.apply(image.numpy(), variant)))


def test_pairs_that_are_not_there_are_told(folder, tmp_path):
    run(folder, tmp_path / "out", "--range", "1,3")
    with pytest.raises(UserError, match=r"no modality 'pd'\. Known: t1, t2"):
        PairDataset(str(tmp_path / "out"), "pd", "t2")
    main(["--volumes", str(folder), "--modality", "x=c_t1.nii.gz", "--out", str(tmp_path / "out"), "--size", "16",
          "--least-foreground", "0"])  # fmt: skip
    with pytest.raises(UserError, match="for none a slice of x"):
        PairDataset(str(tmp_path / "out"), "x", "t2")


def images(folder, names, size=(20, 16), mode="L", top=255):
    folder.mkdir(parents=True)
    for i, name in enumerate(names):
        values = np.random.default_rng(i).integers(0, top, (size[1], size[0]))
        Image.fromarray(values.astype(np.uint16 if mode == "I;16" else np.uint8)).save(folder / f"{name}.png")
    return folder


def test_folders_of_images_are_matched_by_name(tmp_path, capsys):
    t1, pd_ = images(tmp_path / "T1", ["p1_3", "p1_4", "p2_3"]), images(tmp_path / "PD", ["p1_3", "p2_3"])
    given = ["--images", f"t1={t1}", f"pd={pd_}", "--out", str(tmp_path / "out"), "--size", "16"]
    main([*given, "--patient", "^(p[0-9]+)_"])
    assert "p1_4 (no pd)" in capsys.readouterr().out
    index = read_index(tmp_path / "out")
    assert index["patient"].tolist() == ["p1", "p2"] * 2
    assert set(index["slide"]) == {"T1_t1", "PD_pd"}
    assert len(PairDataset(str(tmp_path / "out"), "t1", "pd")) == 2
    images(tmp_path / "X", ["p1_3"], size=(9, 9))
    with pytest.raises(UserError, match="'p1_3' differ in size"):
        main(["--images", f"t1={t1}", f"x={tmp_path / 'X'}", "--out", str(tmp_path / "new")])


def test_deep_images_need_a_window(tmp_path):
    deep = images(tmp_path / "CT", ["a"], mode="I;16", top=4000)
    with pytest.raises(UserError, match="more than 8 bits"):
        main(["--images", f"ct={deep}", "--out", str(tmp_path / "out")])
    main(["--images", f"ct={deep}", "--out", str(tmp_path / "again"), "--window", "0,4000", "--size", "20"])
    tile = TileStore.open(tmp_path / "again" / "slides" / "CT_ct.zarr").tile(0)
    assert tile.max() > 240
    assert not tile[:2].any()


def test_a_brain_of_three_modalities(tmp_path):
    brain = ROOT / "data" / "samples" / "slices"
    given = [f"{name}=*_{name}.nii.gz" for name in ("t1", "t2", "fla")]
    main(["--volumes", str(brain), "--modality", *given, "--range", "10,12", "--out", str(tmp_path), "--size", "64",
          "--window", "0,900"])  # fmt: skip
    index = read_index(tmp_path)
    assert index["subject"].unique().tolist() == ["TCGA-FG-6692"]
    assert len(index) == 6
    assert TileStore.open(tmp_path / "slides" / "TCGA-FG-6692_t2.zarr").attrs["spacing_mm"] == [3.75, 3.75]
    item = PairDataset(str(tmp_path), "t1", "t2")[0]
    correlation = np.corrcoef(item["source"].flatten() > -0.8, item["image"].flatten() > -0.8)[0, 1]
    assert correlation > 0.8  # the same head
    assert (item["image"][0, [0, -1]] == -1).all()


def test_spinal_cords_of_any_orientation_and_spacing(tmp_path):
    cords = ROOT / "tests" / "data" / "sct"
    given = ["mt0=*_mt0.nii.gz", "mt1=*_mt1.nii.gz", "t1w=*_t1w.nii.gz"]
    main(["--volumes", str(cords), "--modality", *given, "--out", str(tmp_path), "--size", "32"])
    assert len(read_index(tmp_path)) == 15
    for name, axis in (("t2", "sagittal"), ("t2s", "coronal")):
        main(["--volumes", str(cords), "--modality", f"{name}=*_{name}.nii.gz", "--axis", axis, "--out", str(tmp_path),
              "--size", "32"])  # fmt: skip
    store = TileStore.open(tmp_path / "slides" / "t2s_t2s.zarr")
    assert store.attrs["spacing_mm"][0] == pytest.approx(9 * 7.5 / 32, rel=1e-5)  # 9 slices of 7.5 mm are the long side
    assert not store.tile(0)[:, :10].any()


def test_a_pair_of_png_slices(tmp_path):
    for folder, name in (("t1", "BrainT1Slice"), ("pd", "BrainProtonDensitySlice")):
        (tmp_path / folder).mkdir()
        shutil.copy(ROOT / "tests" / "data" / f"{name}.png", tmp_path / folder / "brain.png")
    main(["--images", f"t1={tmp_path / 't1'}", f"pd={tmp_path / 'pd'}", "--out", str(tmp_path / "out")])
    item = PairDataset(str(tmp_path / "out"), "t1", "pd")[0]
    assert item["image"].shape == (1, 128, 128)
    assert not torch.equal(item["image"], item["source"])
    assert ((item["image"] > -0.8) == (item["source"] > -0.8)).float().mean() > 0.9


def test_patients_and_fractions_are_checked_first(folder, tmp_path):
    with pytest.raises(UserError, match=r"--patient '\(' is no regular expression"):
        run(folder, tmp_path / "out", "--patient", "(")
    with pytest.raises(UserError, match="finds no patient in 'a'"):
        run(folder, tmp_path / "out", "--patient", "a(x)?")
    with pytest.raises(UserError, match="fractions from 0 to 1"):
        run(folder, tmp_path / "out", "--validation", "2")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["text", "cut"])
def test_a_broken_slice_is_named(tmp_path, content):
    for name in ("A", "B"):
        (tmp_path / name).mkdir()
        noise = np.random.default_rng(0).integers(0, 255, (90, 90), np.uint8)
        Image.fromarray(noise).save(tmp_path / name / "1.png")
    broken = tmp_path / "B" / "1.png"
    broken.write_bytes(broken.read_bytes()[:3000] if content == "cut" else b"no image")
    images = [f"t1={tmp_path / 'A'}", f"t2={tmp_path / 'B'}"]
    with pytest.raises(UserError, match=r"1.png (holds text|cannot be read)"):
        main(["--images", *images, "--size", "16", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
