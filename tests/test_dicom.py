"""DICOM slides: a series is a slide, whatever files it lies in; labels and overviews are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from data_prep.slide_table import find_slides, read_slides, slide_names
from data_prep.tile_slides import main, tile_slide
from ldm.data.cohort import read_index
from ldm.data.collection import read_pictures
from ldm.data.tile_store import TileStore
from ldm.errors import UserError
from ldm.images.kinds import images_in
from ldm.images.slides import open_image, open_slide

SIDE, FRAME = 512, 256
SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
TISSUE = np.full((SIDE, SIDE, 3), 245, np.uint8)
TISSUE[64:448, 64:448] = (200, 90, 160)
TISSUE[64:128, 64:128] = (64, 20, 128)


def items(**values) -> Sequence:
    """A sequence of one item."""
    item = Dataset()
    for name, value in values.items():
        setattr(item, name, value)
    return Sequence([item])


class Series:
    """Writes the files of one series into a folder, as IDC's are: a file for each level, TILED_FULL, not compressed."""

    def __init__(self, folder: Path, patient: str = "P1") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.patient = folder, patient
        self.study, self.series, self.frame, self.dimension = (generate_uid() for _ in range(4))

    def write(self, name: str, pixels: np.ndarray, mpp: float, kind: str = "VOLUME") -> Path:
        height, width = pixels.shape[:2]
        down, across = -(-height // FRAME), -(-width // FRAME)
        padded = np.full((down * FRAME, across * FRAME, 3), 255, np.uint8)
        padded[:height, :width] = pixels
        frames = padded.reshape(down, FRAME, across, FRAME, 3).swapaxes(1, 2)
        file = Dataset()
        meta = file.file_meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = SLIDE, generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        known = {
            "SOPClassUID": SLIDE, "SOPInstanceUID": meta.MediaStorageSOPInstanceUID, "StudyInstanceUID": self.study,
            "SeriesInstanceUID": self.series, "FrameOfReferenceUID": self.frame, "Modality": "SM", "InstanceNumber": 1,
            "PatientID": self.patient, "PatientName": "A", "ImageType": ["ORIGINAL", "PRIMARY", kind, "NONE"],
            "DimensionOrganizationType": "TILED_FULL", "SamplesPerPixel": 3, "PhotometricInterpretation": "RGB",
            "DimensionOrganizationSequence": items(DimensionOrganizationUID=self.dimension), "PlanarConfiguration": 0,
            "NumberOfFrames": down * across, "Rows": FRAME, "Columns": FRAME, "BitsAllocated": 8, "BitsStored": 8,
            "HighBit": 7, "PixelRepresentation": 0, "TotalPixelMatrixColumns": width, "TotalPixelMatrixRows": height,
            "TotalPixelMatrixFocalPlanes": 1, "ImagedVolumeWidth": width * mpp / 1000,
            "ImagedVolumeHeight": height * mpp / 1000, "ImagedVolumeDepth": 1.0, "PixelData": frames.tobytes(),
            "SharedFunctionalGroupsSequence": items(
                PixelMeasuresSequence=items(PixelSpacing=[mpp / 1000] * 2, SliceThickness=1.0)
            ),
            "OpticalPathSequence": items(OpticalPathIdentifier="1", ObjectiveLensPower=20.0),
        }  # fmt: skip
        for key, value in known.items():
            setattr(file, key, value)
        file.save_as(self.folder / name, enforce_file_format=True)
        return self.folder / name


def slide_of_levels(folder: Path, patient: str = "P1", prefix: str = "level") -> Path:
    series = Series(folder, patient)
    for level in range(3):
        step = 2**level
        series.write(f"{prefix}{level}.dcm", TISSUE[::step, ::step], 0.5 * step)
    return folder


def split_in_two(folder: Path) -> list[Path]:
    """The finest level as two parts of a concatenation."""
    whole = Series(folder).write("whole.dcm", TISSUE, 0.5)
    file = dcmread(whole)
    frames, size, source = int(file.NumberOfFrames), FRAME * FRAME * 3, file.SOPInstanceUID
    pixels, file.ConcatenationUID, parts = file.PixelData, generate_uid(), []
    for part in range(2):
        first, end = part * frames // 2, (part + 1) * frames // 2
        file.NumberOfFrames, file.PixelData = end - first, pixels[first * size : end * size]
        file.SOPInstanceUID = file.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        file.InConcatenationNumber, file.InConcatenationTotalNumber = part + 1, 2
        file.ConcatenationFrameOffsetNumber, file.SOPInstanceUIDOfConcatenationSource = first, source
        parts.append(folder / f"part{part}.dcm")
        file.save_as(parts[-1], enforce_file_format=True)
    whole.unlink()
    return parts


def test_a_series_of_levels_is_one_slide_of_one_patient(tmp_path, capsys):
    slides = slide_of_levels(tmp_path / "slides")
    assert images_in(slides) == [slides / "level0.dcm"]
    assert [picture.file for picture in read_pictures(slides)] == ["level0.dcm"]
    assert find_slides(sorted(slides.iterdir())) == [slides / "level0.dcm"]
    for path in slides.iterdir():
        image = open_image(path)
        assert (image.dimensions, len(image._levels), image.mpp, image.patient) == ((SIDE, SIDE), 3, 0.5, "P1")
        assert np.array_equal(image.read(0, 0, SIDE, SIDE), TISSUE)
    slide_of_levels(slides, "P2", "other")
    slide_of_levels(slides, "P1", "again")
    main(["--slides", str(slides), "--out", str(tmp_path / "cohort"), "--tile-size", "128", "--min-tissue", "0"])
    index = pd.read_parquet(tmp_path / "cohort" / "index.parquet")
    assert index.groupby("slide").size().to_dict() == {"again0.dcm": 16, "level0.dcm": 16, "other0.dcm": 16}
    assert index.groupby("slide")["patient"].first().tolist() == ["P1", "P1", "P2"]
    assert index.groupby("patient")["split"].nunique().max() == 1
    said = capsys.readouterr().out
    assert "source of the micrometres per pixel: header (dicom) (again0.dcm, level0.dcm, other0.dcm)" in said


def test_series_whose_files_have_one_name_are_called_by_folder(tmp_path, capsys):
    for name, patient in (("left", "P1"), ("right", "P2")):
        slide_of_levels(tmp_path / "export" / name, patient)
    out, both = tmp_path / "cohort", [str(tmp_path / "export" / name) for name in ("left", "right")]
    main(["--slides", *both, "--out", str(out), "--tile-size", "128", "--min-tissue", "0"])
    assert "2 DICOM series have files of one name; they are called by folder, as " in capsys.readouterr().err
    index = read_index(out)
    assert index.groupby("slide")["patient"].first().to_dict() == {"left_level0.dcm": "P1", "right_level0.dcm": "P2"}
    assert sorted(path.name for path in (out / "slides").iterdir()) == ["left_level0.zarr", "right_level0.zarr"]
    main(["--slides", *both, "--out", str(out), "--tile-size", "128", "--min-tissue", "0"])
    assert len(read_index(out)) == len(index)


def test_a_slide_does_not_come_in_twice_under_another_name(tmp_path):
    for name in ("left", "right"):
        slide_of_levels(tmp_path / "export" / name)
    out, both = tmp_path / "cohort", [str(tmp_path / "export" / name) for name in ("left", "right")]
    main(["--slides", both[0], "--out", str(out), "--tile-size", "128", "--min-tissue", "0"])
    with pytest.raises(UserError, match=r"level0\.zarr is of a slide whose file has the name of others given now"):
        main(["--slides", *both, "--out", str(out), "--tile-size", "128", "--min-tissue", "0"])


def test_folders_are_told_as_far_as_they_differ(tmp_path):
    slides = [tmp_path / name / "DCM_0.dcm" for name in ("a/x", "b/x")]
    assert list(slide_names(slides).values()) == ["a_x_DCM_0.dcm", "b_x_DCM_0.dcm"]
    with pytest.raises(UserError, match=r"would both become DCM_0\.zarr; rename one"):
        slide_names([tmp_path / "DCM_0.dcm", tmp_path / "DCM_0.tif"])


def test_labels_and_overviews_are_no_slides(tmp_path):
    slides = slide_of_levels(tmp_path / "slides")
    for kind in ("LABEL", "OVERVIEW", "THUMBNAIL"):
        Series(slides).write(f"a-{kind}.dcm", TISSUE[::8, ::8], 4.0, kind)
    assert images_in(slides) == [slides / "level0.dcm"]


def test_a_label_that_is_named_is_told_to_be_none_of_the_levels(tmp_path):
    series = Series(tmp_path / "slides")  # as in public archives: one series has the levels and what lies beside them
    series.write("level0.dcm", TISSUE, 0.5)
    for kind in ("LABEL", "OVERVIEW"):
        path = series.write(f"a-{kind}.dcm", TISSUE[::8, ::8], 4.0, kind)
        for opens in (open_image, lambda path: find_slides([path])):
            with pytest.raises(UserError, match=rf"a-{kind}\.dcm is the {kind} of a slide in DICOM, not the slide"):
                opens(path)
    assert find_slides(sorted((tmp_path / "slides").iterdir())) == [tmp_path / "slides" / "level0.dcm"]


def test_what_a_table_says_of_a_level_is_not_lost(tmp_path):
    slides, table = slide_of_levels(tmp_path / "slides"), tmp_path / "t.csv"
    table.write_text("path,patient\nslides/level1.dcm,X\n")
    assert [(each.path.name, each.patient) for each in read_slides([table])] == [("level1.dcm", "X")]
    with pytest.raises(UserError, match=r"level1\.dcm is a file of the DICOM series for which .*level0\.dcm stands"):
        read_slides([table, slides])
    table.write_text("path,patient\nslides/level1.dcm,X\nslides/level0.dcm,X\n")
    assert [(each.path.name, each.patient) for each in read_slides([table, slides])] == [("level0.dcm", "X")]


def test_parts_of_a_level_are_one_slide(tmp_path):
    first, second = split_in_two(tmp_path)
    assert find_slides([tmp_path]) == find_slides([second, first]) == [first]
    for path in (first, second):
        assert np.array_equal(open_image(path).read(0, 0, SIDE, SIDE), TISSUE)
    assert len(TileStore.open(tile_slide(first, tmp_path / "cohort", tile_size=128, min_tissue=0))) == 16
    first.unlink()
    with pytest.raises(UserError, match=r"part1\.dcm, a slide of the format dicom: Missing SOP instance 1/2 in concat"):
        open_image(second)


def test_what_is_no_slide_is_named(tmp_path):
    path = Series(tmp_path).write("a.dcm", TISSUE, 0.5)
    file = dcmread(path)
    file.SOPClassUID = file.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    file.Modality, file.ImageType = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
    file.save_as(path)
    with pytest.raises(UserError, match=r"is a DICOM file but no slide \(modality CT, ORIGINAL PRIMARY AXIAL\)"):
        open_image(path)


def test_a_header_is_not_overridden(tmp_path, capsys):
    path = Series(tmp_path).write("coarse.dcm", TISSUE, 15.8)
    slide = open_slide(path, mpp=0.5)
    assert slide.mpp == pytest.approx(15.8)
    Image.fromarray(TISSUE).save(tmp_path / "plain.png")
    out, slides = tmp_path / "cohort", [str(path), str(tmp_path / "plain.png")]
    main(["--slides", *slides, "--slide-mpp", "0.5", "--out", str(out), "--tile-size", "128", "--min-tissue", "0"])
    said = capsys.readouterr().out
    assert "source of the micrometres per pixel: header (dicom) (coarse.dcm)" in said
    assert "source of the micrometres per pixel: given by hand (plain.png)" in said
    assert (
        "note: its header (dicom) says 15.8 um per pixel, which holds; the 0.5 given is for files that say none "
        "(coarse.dcm)" in said
    )
    attrs = TileStore.open(out / "slides" / "coarse.zarr").attrs
    assert (attrs["mpp"], attrs["mpp_source"], attrs["patient"]) == (pytest.approx(15.8), "header (dicom)", "P1")
    before = (out / "slides" / "plain.zarr" / "zarr.json").read_bytes()
    main(["--slides", *slides, "--slide-mpp", "0.5", "--out", str(out), "--tile-size", "128", "--min-tissue", "0"])
    assert (out / "slides" / "plain.zarr" / "zarr.json").read_bytes() == before
