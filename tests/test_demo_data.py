"""The scripts that make the demo models' data and the sample files: captions that are true, samples that are cuts."""

from __future__ import annotations

import nibabel
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from skimage.color import rgb2hed

from conftest import ROOT
from data_prep.import_captions import main as import_captions
from demo.build import cut_samples
from demo.build.demo_captions import SIZE, main
from ldm.data.cohort import read_index
from ldm.errors import UserError

SLICES = ROOT / "data" / "samples" / "slices"
TISSUE = ROOT / "data" / "samples" / "stains" / "ihc.png"


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    out = tmp_path_factory.mktemp("captioned")
    values = nibabel.load(SLICES / "TCGA-FG-6692_t1.nii.gz")
    volume = np.zeros((*values.shape[:2], 40), np.float32)  # slices 30 to 39 are looked at
    volume[..., 30:40] = values.get_fdata()[..., :10]
    labels = np.zeros_like(volume)
    labels[100:120, 100:120, 35:] = 1
    for name, array in (("t1", volume), ("tumour", labels)):
        nibabel.save(nibabel.Nifti1Image(array, values.affine), out / f"{name}.nii.gz")
    (out / "images").mkdir()
    Image.new("L", (90, 70), 120).save(out / "images" / "chest.png")
    (out / "notes.csv").write_text('filename,clinical_notes\nchest.png,"Hazy,  both sides"\n')
    main(["--tissue", f"IHC: FHL2={TISSUE}", "--mpp", "0.5", "--volumes", f"T1={out / 't1.nii.gz'}", "--tumour",
          str(out / "tumour.nii.gz"), "--radiographs", str(out / "notes.csv"), "--out", str(out)])  # fmt: skip
    return out


def test_captions_tell_what_is_in_the_image(captioned):
    table = pd.read_csv(captioned / "captions.csv")
    assert set(table["modality"]) == {"IHC", "MRI", "X-ray"}
    (notes,) = table.loc[table["modality"] == "X-ray", "text"]
    assert notes == "Hazy, both sides"
    slices = table[table["modality"] == "MRI"]
    assert list(slices["text"]) == ["T1, without tumour"] * 5 + ["T1, with tumour"] * 5
    stained = {}
    for text, rows in table[table["modality"] == "IHC"].groupby("text"):
        images = [np.asarray(Image.open(captioned / path)) for path in rows["path"]]
        assert {image.shape for image in images} == {(SIZE, SIZE, 3)}
        stained[text] = [rgb2hed(image)[..., 0].mean() for image in images]
    assert set(stained) == {"FHL2", "FHL2, many nuclei", "FHL2, few nuclei"}
    assert max(stained["FHL2, few nuclei"]) <= min(stained["FHL2"])
    assert max(stained["FHL2"]) <= min(stained["FHL2, many nuclei"])


def test_captioned_images_become_a_cohort_whose_splits_share_no_block(captioned, tmp_path):
    import_captions(["--table", str(captioned / "captions.csv"), "--patient", "patient", "--size", str(SIZE),
                     "--validation", "0.4", "--out", str(tmp_path)])  # fmt: skip
    index = read_index(tmp_path)
    blocks = pd.read_csv(captioned / "captions.csv").set_index("path")["patient"]
    splits = index.assign(block=index["source"].map(blocks)).groupby("block")["split"].nunique()
    assert (splits == 1).all()
    assert index["split"].nunique() == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ([], "nothing to write"),
        (["--tissue", "H&E: skin"], "given as NAME=FILE"),
        (["--tissue", "H&E: skin=no.svs"], "given as NAME=FILE"),
        (["--volumes", f"T1={SLICES / 'TCGA-FG-6692_t1.nii.gz'}"], "needs --tumour"),
    ],
)
def test_what_cannot_be_captioned_is_said_before_anything_is_written(call, message, tmp_path):
    with pytest.raises(UserError, match=message):
        main([*call, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_the_sample_head_is_the_published_one_of_which_two_voxels_are_one(shared):
    kept = ROOT / "data" / "samples" / "heads" / "patient19"
    there = shared("data/more/mr") / "ms_crosssectional_2mm" / "patient19"
    assert len(list(kept.iterdir())) == 4
    assert all(path.read_bytes() == (there / path.name).read_bytes() for path in kept.iterdir())


def test_the_sample_files_are_cuts_of_the_published_ones(shared, tmp_path):
    cut_samples.main(["--sources", str(shared("data/he").parent), "--out", str(tmp_path)])
    made = {path.relative_to(tmp_path): path for path in tmp_path.rglob("*") if path.is_file()}
    kept = ROOT / "data" / "samples"
    there = {path.relative_to(kept) for path in kept.rglob("*") if path.is_file()}
    others = ("cells-held-out", "heads")  # made in other ways: data/README.md
    assert set(made) == {path for path in there if path.parts[0] not in others}
    for name, path in made.items():
        if name.suffixes[-2:] == [".nii", ".gz"]:
            assert (nibabel.load(path).get_fdata() == nibabel.load(kept / name).get_fdata()).all()
        elif name.suffix == ".png" and name.parts[0] == "cancers":
            assert (np.asarray(Image.open(path)) == np.asarray(Image.open(kept / name))).all()
        else:
            assert path.read_bytes() == (kept / name).read_bytes(), name
