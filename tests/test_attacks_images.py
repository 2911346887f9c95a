"""Images that strangers send: no larger than their file and the machine, without other files, without programs."""

from __future__ import annotations

import gzip
import os
import resource
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
from attacks import SECRET, refused
from PIL import Image
from pydicom import dcmread
from pydicom.uid import DeflatedExplicitVRLittleEndian
from test_dicom import TISSUE, Series

from ldm.data.cohort import read_index
from ldm.data.volumes import Volume
from ldm.images.dicom import why_no_slide
from ldm.images.marks import read_mark
from ldm.images.pictures import Picture
from ldm.images.plain import read_gray_values
from ldm.images.slides import open_image
from ldm.tables.genes import read_gene_table
from ldm.tables.text import read_table

ROOM = 3 << 30  # bytes that an attack may take before it fails


@contextmanager
def limited(room: int) -> Iterator[None]:
    """More than so many bytes end in a MemoryError, and count as what the machine does not have."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(autouse=True)
def _bounded() -> Iterator[None]:
    with limited(ROOM):
        yield


def png(path: Path, width: int, height: int) -> Path:
    """A PNG of a few bytes that says it is so large."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def bmp(path: Path, width: int, height: int) -> Path:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 2835, 2835, 0, 0)
    path.write_bytes(b"BM" + struct.pack("<IHHI", 54 + 40, 0, 0, 54) + header + bytes(40))
    return path


def gif(path: Path, width: int, height: int) -> Path:
    path.write_bytes(b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6)
                     + b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x01\x44\x00;")  # fmt: skip
    return path


@pytest.mark.parametrize("write", [png, bmp, gif])
def test_plain_images_are_no_larger_than_can_be_decoded(tmp_path, write):
    path = write(tmp_path / f"a.{write.__name__}", 50_000, 50_000)
    picture = Picture.of_file(path)
    for read in (open_image, read_gray_values, lambda _: picture.pixels(), lambda _: picture.size):
        said = refused(lambda read=read: read(path), "too large for a plain image: it has 2500 million px")
        assert "pyramidal TIFF" in said
    assert read_mark(path) == {}


def test_a_jpeg_is_not_drawn_over_and_over(tmp_path):
    path = tmp_path / "a.jpg"
    for progressive in (False, True):
        Image.new("RGB", (64, 64), "red").save(path, progressive=progressive)
        assert open_image(path).read(0, 0, 64, 64).shape == (64, 64, 3)
    data = path.read_bytes()
    last = data[data.rindex(b"\xff\xda") : -2]
    path.write_bytes(data[:-2] + 3000 * last + data[-2:])
    refused(lambda: open_image(path), "drawn in 30.. passes")


def test_pillow_runs_no_other_program(tmp_path, monkeypatch):
    mark = tmp_path / "ran"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {mark}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    header = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n"
    for name in ("a.png", "a.eps"):
        (tmp_path / name).write_bytes(header + b"showpage\n\0%%EOF\n")
        refused(lambda name=name: open_image(tmp_path / name).read(0, 0, 64, 64), "is not a slide or image that")
    assert not mark.exists()


# --- TIFF -----------------------------------------------------------------------------------------------------------


def tiff(path: Path, width: int, height: int, tile: int = 0, text: bytes = b"") -> Path:
    """A TIFF of one strip or tile of a few bytes that says it is so large."""
    tags = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 8), (262, 3, 1), (277, 3, 1)]
    tags += (
        [(322, 4, tile), (323, 4, tile), (324, 4, 8), (325, 4, 40)]
        if tile
        else [(273, 4, 8), (278, 4, height), (279, 4, 40)]
    )
    start = 8 + 40
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in sorted(tags))
    if text:
        place = start + 2 + 12 * (len(tags) + 1) + 4
        entry = struct.pack("<HHII", 270, 2, len(text) + 1, place)
        at = 12 * sum(tag < 270 for tag, _, _ in tags)
        entries = entries[:at] + entry + entries[at:]
    directory = struct.pack("<H", len(entries) // 12) + entries + bytes(4)
    path.write_bytes(
        struct.pack("<2sHI", b"II", 42, start) + zlib.compress(bytes(64)).ljust(40, b"\0") + directory + text + b"\0"
    )
    return path


@pytest.mark.parametrize("name", ["a.tif", "a.svs"])
def test_tiff_is_no_larger_than_its_parts(tmp_path, name):
    text = b"Aperio Image Library v1\r\n|AppMag = 20|MPP = 0.5" if name == "a.svs" else b""
    side = 2_000_000_000
    path = tiff(tmp_path / name, side, side, 256, text)
    refused(lambda: open_image(path), f"is {side} x {side} px in \\d+ tiles, of which it lists 1")
    path = tiff(tmp_path / name, side, side, 0, text)
    refused(lambda: open_image(path), f"{side} x {side} px")
    path = tiff(tmp_path / name, 60_000, 60_000, 60_000, text)
    refused(lambda: open_image(path), "60000 x 60000 px")
    path = tiff(tmp_path / name, 12_000, 12_000, 0, text)  # which a file of so many bytes may be
    refused(lambda: open_image(path).read(0, 0, 256, 256), "cannot be decoded|a slide of the format")


def test_big_tiff_lists_no_more_entries_than_it_has(tmp_path):
    (tmp_path / "a.tif").write_bytes(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 16) + struct.pack("<Q", 2**62) + bytes(64))
    refused(lambda: open_image(tmp_path / "a.tif"), "is cut off")


def test_ome_tiff_gives_the_pixels_of_its_own_file(tmp_path):
    private = tmp_path / "private"
    private.mkdir()
    tifffile.imwrite(private / "secret.ome.tif", np.full((64, 64), 77, np.uint8), metadata={"axes": "YX"})
    secret = tifffile.TiffFile(private / "secret.ome.tif").ome_metadata
    uuid = secret.split('UUID="')[1].split('"')[0] if 'UUID="' in secret else "urn:uuid:0"
    xml = (
        '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:1">'
        '<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" SizeX="64" SizeY="64" SizeC="1" '
        'SizeZ="1" SizeT="1"><Channel ID="Channel:0:0" SamplesPerPixel="1"/><TiffData IFD="0" PlaneCount="1">'
        f'<UUID FileName="private/secret.ome.tif">{uuid}</UUID></TiffData></Pixels></Image></OME>'
    )
    tifffile.imwrite(tmp_path / "a.ome.tif", np.full((64, 64), 5, np.uint8), description=xml, metadata=None)
    assert open_image(tmp_path / "a.ome.tif").read(0, 0, 64, 64).tolist() == np.full((64, 64, 3), 5).tolist()


@pytest.mark.parametrize("name", ["../private/secret.jpg", "/etc/passwd", "..\\private"])
def test_lists_of_a_slides_files_name_those_beside_them(tmp_path, name):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "Slidedat.ini").write_text(f"[GENERAL]\nSLIDE_VERSION = 01.02\n[DATAFILE]\nFILE_0 = {name}\n")
    (tmp_path / "a.mrxs").write_bytes(b"\xff\xd8\xff\xe0" + bytes(64))
    (tmp_path / "a.vms").write_text(f"[Virtual Microscope Specimen]\nNoLayers=1\nImageFile={name}\n")
    refused(lambda: open_image(tmp_path / "a.mrxs"), "names a file of another folder as its FILE_0|no folder a with")
    refused(lambda: open_image(tmp_path / "a.vms"), "names a file of another folder as its ImageFile|is not a slide")


# --- DICOM ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [
    {"TotalPixelMatrixColumns": 2**32 - 1, "TotalPixelMatrixRows": 2**32 - 1},
    {"TotalPixelMatrixColumns": 3_000_000, "TotalPixelMatrixRows": 3_000_000, "NumberOfFrames": 2**31 - 1},
    {"Rows": 65_535, "Columns": 65_535, "TotalPixelMatrixColumns": 10**7, "TotalPixelMatrixRows": 10**7},
])  # fmt: skip
def test_dicom_is_no_larger_than_its_files(tmp_path, changes):
    Series(tmp_path).write("a.dcm", TISSUE, 0.5)
    file = dcmread(tmp_path / "a.dcm")
    for name, value in changes.items():
        setattr(file, name, value)
    file.save_as(tmp_path / "a.dcm")
    refused(
        lambda: open_image(tmp_path / "a.dcm").thumbnail(8),
        "more than its files can hold|OpenSlide cannot open|no slide",
    )


def test_dicom_that_is_packed_as_a_whole_is_not_unpacked(tmp_path):
    Series(tmp_path).write("a.dcm", TISSUE, 0.5)
    file = dcmread(tmp_path / "a.dcm")
    file.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    file.PatientComments = "x" * 10_000
    file.save_as(tmp_path / "a.dcm")
    assert why_no_slide(tmp_path / "a.dcm") == ""
    refused(lambda: open_image(tmp_path / "a.dcm"), "OpenSlide cannot open|is not a slide")


# --- volumes and tables ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_volumes_are_no_larger_than_their_file(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    for side, message in ((32_000, "says that it has 32000 x 32000 x 32000 voxels"), (1200, "would take [\\d.]+ GB")):
        image = nibabel.Nifti1Image(np.zeros((4, 4, 4), np.float32), np.eye(4))
        image.header.set_data_shape((side,) * 3)
        data = image.header.binaryblock + bytes(4) + bytes(100)
        (gzip.open if ending.endswith("gz") else open)(path, "wb").write(data)
        refused(lambda: Volume(path), message)


def test_volumes_of_other_forms_are_not_opened(tmp_path):
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["image"] = np.full((4, 4, 4), 7.0)
    with h5py.File(tmp_path / "a.mnc", "w") as file:
        file["minc-2.0/image/0/image"] = h5py.ExternalLink(str(tmp_path / "secret.h5"), "image")
    refused(lambda: Volume(tmp_path / "a.mnc"), "is no NIfTI")


def test_parquet_has_no_more_rows_than_there_is_memory_for(tmp_path):
    path = tmp_path / "index.parquet"
    part = pa.table({name: pa.array(np.zeros(1_000_000, np.int8)) for name in ("slide", "row")})
    with pq.ParquetWriter(path, part.schema) as writer:
        for _ in range(40):
            writer.write_table(part)
    assert path.stat().st_size < 500_000
    refused(lambda: read_index(tmp_path), "the table .* of 40000000 rows would take .* GB")
    refused(lambda: read_gene_table(path, "expression"), "would take .* GB")


def test_texts_of_parquet_that_are_one_long_text_are_counted(tmp_path):
    path, text = tmp_path / "index.parquet", pa.array(["x" * 1_000_000] * 1000)
    for name, values in (("slide", text), ("list", pa.ListArray.from_arrays(list(range(1001)), text))):
        part = pa.table({name: values, "row": pa.array(range(1000))})
        with pq.ParquetWriter(path, part.schema, compression="zstd") as writer:
            for _ in range(12):
                writer.write_table(part)
        assert path.stat().st_size < 500_000
        refused(lambda: read_index(tmp_path), "the table .* of 12000 rows would take .* GB")
    pq.write_table(pa.table({"slide": ["x" * 9_000_000] * 4, "row": range(4)}), path)
    refused(lambda: read_index(tmp_path), "has no column")  # read


def test_texts_of_parquet_that_are_no_text_are_told(tmp_path):
    names = pa.array([b"a", b"caf\xe9"]).view(pa.string())
    pq.write_table(pa.table({"slide": names, "row": [0, 1]}), tmp_path / "index.parquet")
    refused(lambda: read_index(tmp_path), "is broken .*UTF8")


def test_packed_tables_become_no_larger_than_the_memory(tmp_path):
    with gzip.open(tmp_path / "a.csv.gz", "wb") as stream:
        stream.write(b"a,b\n")
        for _ in range(150):
            stream.write(b"1,1\n" * 250_000)
    assert (tmp_path / "a.csv.gz").stat().st_size < 1_000_000
    with limited(500 << 20):
        refused(lambda: read_table(tmp_path / "a.csv.gz"), "unpacked, would take")
        pd.DataFrame({"a": [1], "b": [SECRET]}).to_csv(tmp_path / "b.csv.gz", index=False)
        assert read_table(tmp_path / "b.csv.gz")["b"].tolist() == [SECRET]
