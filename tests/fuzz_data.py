"""Images, stores, features and tables that are damaged, and what the commands read them with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import h5py
import nibabel
import numpy as np
import pandas as pd
import tifffile
import torch
from fuzzing import Kind
from PIL import Image

from data_prep.slide_table import read_slides
from data_prep.verify import verify
from ldm.commands.describe import describe
from ldm.data.cohort import merge_index, read_index, write_store
from ldm.data.collection import read_pictures
from ldm.data.datasets import TileDataset
from ldm.data.features import read_features
from ldm.data.omics import join_omics
from ldm.data.slide_files import find_slide_files
from ldm.data.store_writers import ArrayWriter
from ldm.data.tile_store import TileStore, open_cohort
from ldm.data.volumes import Volume
from ldm.encoders.feature_files import FeatureSet, read_feature_file, write_feature_file
from ldm.errors import UserError
from ldm.images.pictures import Picture
from ldm.images.plain import read_gray_values
from ldm.images.write import save_bigtiff, save_ome_zarr, save_png
from ldm.scorers.labelled import read_labelled
from ldm.scorers.ratings import parse_scale, read_ratings, write_rating_folder
from ldm.tables.annotations import read_crops, read_midog, read_sliderunner
from ldm.tables.captions import drop_unreadable, read_captions
from ldm.tables.gene_lists import read_genes, read_scaler
from ldm.tables.genes import read_gene_table
from ldm.tables.patients import patients_of
from ldm.viewer.pictures import find
from ldm.viewer.server import Gallery

GENES = ["TP53", "EGFR", "MKI67", "KRAS"]


def each(*readings: Callable[[], object]) -> None:
    """Read in several ways. A UserError of one does not keep the others from being tried; the first is raised."""
    refused: list[UserError] = []
    for read in readings:
        try:
            read()
        except UserError as error:
            refused.append(error)
    if refused:
        raise refused[0]


@cache
def pixels(height: int = 40, width: int = 56) -> np.ndarray:
    """(height,width,3) uint8 that is no noise."""
    y, x = np.mgrid[:height, :width]
    return np.stack([(x * 4) % 256, (y * 5) % 256, (x * y) % 256], -1).astype(np.uint8)


# --- images ---------------------------------------------------------------------------------------------------------


def view(gallery: Gallery) -> None:
    """What the page asks for of each of a few pictures that can be shown."""
    json.dumps(gallery.told, allow_nan=False)
    shown = [(number, told) for number, told in enumerate(gallery.told) if "why" not in told][:6]
    for number, told in shown:
        last = (max(told["width"], told["height"]) - 1).bit_length()
        each(lambda n=number: gallery.thumbnail(n), lambda n=number, last=last: gallery.tile(n, last, 0, 0))


def look(path: Path) -> None:
    """An image as commands read it and as the viewer shows it."""

    def shown() -> None:
        view(Gallery(find([path.parent if path.is_file() else path])))

    def read() -> None:
        picture = Picture.of_file(path)
        _ = picture.mpp, picture.notes, picture.suffix, picture.mark()
        picture.pixels()

    each(shown, read)


def plain(name: str, **options: Any) -> Kind:
    def make(folder: Path) -> None:
        Image.fromarray(pixels()).save(folder / f"a.{name}", **options)

    def enter(folder: Path, out: Path) -> None:
        path = folder / f"a.{name}"
        each(lambda: look(path), lambda: read_gray_values(path))

    return Kind(name, make, enter)


def _exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, 'SYNTHETIC: generated\n{"seed": 0, "mpp": 0.5}'
    return exif.tobytes()


ABOUT = {"model": "demo", "seed": 0, "mpp": 0.499, "region": [0, 0, 8, 8], "grid": [2, 3], "tile_px": 4, "slide": "a"}


def _png(folder: Path) -> None:
    save_png(folder / "a.png", pixels(), ABOUT)


def _look_png(folder: Path, out: Path) -> None:
    each(lambda: look(folder / "a.png"), lambda: read_gray_values(folder / "a.png"))


def _pyramid(folder: Path) -> None:
    save_bigtiff(folder / "a.tif", pixels(600, 700), 0.5, ABOUT)


def _ome_tiff(folder: Path) -> None:
    about = {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5, "PhysicalSizeXUnit": "µm", "PhysicalSizeYUnit": "µm"}
    tifffile.imwrite(folder / "a.ome.tif", pixels(64, 80), tile=(32, 32), ome=True, photometric="rgb", metadata=about,
                     compression="deflate")  # fmt: skip


def _svs(folder: Path) -> None:
    told = "Aperio Image Library v11.2.1\r\n200x180 (64x64) JPEG/RGB Q=70|AppMag = 20|MPP = 0.4990|Filename = a"
    tifffile.imwrite(folder / "a.svs", pixels(180, 200), tile=(64, 64), compression="jpeg", description=told,
                     metadata=None)  # fmt: skip


def _dicom(folder: Path) -> None:
    from test_dicom import Series

    series = Series(folder)
    series.write("0.dcm", pixels(300, 400), 0.5)
    series.write("1.dcm", pixels(150, 200), 1.0)


def _ome_zarr(folder: Path) -> None:
    save_ome_zarr(folder / "a.ome.zarr", pixels(300, 400), 0.5, ABOUT)


def of_file(name: str) -> Callable[[Path, Path], None]:
    return lambda folder, out: look(folder / name)


def _look_dicom(folder: Path, out: Path) -> None:
    each(lambda: look(folder / "0.dcm"), lambda: read_slides([folder]))


# --- stores, cohorts, features --------------------------------------------------------------------------------------


def cohort(folder: Path) -> None:
    for slide in ("a", "b"):
        about = {"tile_size": 16, "stride": 16, "mpp": 0.5, "level0_size": [32, 32], "licence": "CC0"}
        coords = np.array([[0, 0], [16, 0], [0, 16], [16, 16]])
        store = write_store(folder, slide, lambda i: pixels()[:16, i : i + 16], 4, attrs=about, coords=coords,
                            labels={"tissue": np.arange(4.0)})  # fmt: skip
        with ArrayWriter(store.path, "features/e", (6,), "float16", {"encoder": "e"}) as writer:
            writer.append(np.arange(24.0).reshape(4, 6))
        with ArrayWriter(store.path, "latents/f", (4, 2, 2), "float16", {"first_stage": "f"}) as writer:
            writer.append(np.zeros((4, 4, 2, 2)))
    table = pd.DataFrame({"slide": list("aaaabbbb"), "row": [0, 1, 2, 3] * 2, "grade": list("lhlhlhlh"), "score": 0.5})
    merge_index(folder, table)


def _read_store(folder: Path, out: Path) -> None:
    path = folder / "slides" / "a.zarr"

    def read() -> None:
        store = TileStore.open(path)
        each(
            lambda: verify(path), lambda: repr(store), lambda: store.tile(0), lambda: store.grid(None, "e"),
            lambda: store.picture(1).pixels(), lambda: store.labels("tissue"), lambda: store.latents("f")[:],
        )  # fmt: skip

    def shown() -> None:
        view(Gallery(find([folder / "slides", path])))

    each(
        read, lambda: read_features(path), shown, lambda: open_cohort(folder), lambda: describe(folder),
        lambda: TileDataset([folder], ["image", "ssl", "latent"], feature="e", latents="f")[0, 0],
    )  # fmt: skip


def _joined(folder: Path) -> None:
    cohort(folder)
    _expression(folder)
    join_omics(folder, folder / "m.tsv", folder / "e.csv", unit="log2")


def _read_cohort(folder: Path, out: Path) -> None:
    conditions = {"grade": "grade", "score": "score", "omics": "omics/expression", "mutation": "omics/mutation"}

    def train_on() -> None:
        dataset = TileDataset([folder], ["image"], conditions=conditions, where={"split": "train"}, missing="skip")
        dataset[0, 0]
        repr(dataset.metadata)

    each(
        lambda: read_index(folder), train_on, lambda: read_pictures(folder),
        lambda: read_labelled(folder, label="grade", positive="h"),
        lambda: merge_index(folder, pd.DataFrame({"slide": ["a"], "row": [0], "new": [1]})),
        lambda: read_scaler(folder / "omics" / "expression.json"),
        lambda: read_genes(folder / "omics" / "expression.json", "genes"),
    )  # fmt: skip


def _h5(folder: Path) -> None:
    with h5py.File(folder / "s1.h5", "w") as file:
        file["features"] = np.arange(32.0, dtype=np.float32).reshape(4, 8)
        coords = file.create_dataset("coords", data=np.array([[0, 0], [512, 0], [0, 512], [512, 512]]), chunks=(2, 2))
        coords.attrs.update({"patch_size": 256, "patch_size_level0": 512, "overlap": 0, "name": "s1"})


def _read_h5(folder: Path, out: Path) -> None:
    each(
        lambda: read_features(folder / "s1.h5").grid(), lambda: read_feature_file(folder / "s1.h5"),
        lambda: [found.read() for found in find_slide_files([folder]).values()],
    )  # fmt: skip


def _pt(folder: Path) -> None:
    coords = torch.tensor([[0, 0], [512, 0], [0, 512], [512, 512]])
    torch.save({"features": torch.arange(32.0).reshape(4, 8), "coords": coords}, folder / "s1.pt")


def _read_pt(folder: Path, out: Path) -> None:
    each(
        lambda: read_features(folder / "s1.pt").grid(),
        lambda: [found.read() for found in find_slide_files([folder]).values()],
    )


def _npy(folder: Path) -> None:
    np.save(folder / "grid.npy", np.arange(24.0).reshape(2, 3, 4))


def _feature_set(folder: Path) -> None:
    table = pd.DataFrame({"name": ["a", "b", "c"], "grade": [1.0, 2.0, 3.0]})
    about = {"data": {"path": "a", "kind": "images", "count": 3}, "extractor": "e", "dim": 4}
    write_feature_file(folder / "f.h5", FeatureSet(np.arange(12.0, dtype=np.float32).reshape(3, 4), table, about))


# --- tables ---------------------------------------------------------------------------------------------------------


def _expression(folder: Path) -> None:
    frame = pd.DataFrame(np.arange(12.0).reshape(3, 4), index=["a", "b", "c"], columns=GENES)
    frame.to_csv(folder / "e.csv", index_label="sample")
    (frame > 5).astype(int).T.to_csv(folder / "m.tsv", sep="\t", index_label="gene")
    lines = [f"{gene}\t{sample}\tMissense_Mutation" for gene in GENES for sample in "ab"]
    lines = ["Hugo_Symbol\tTumor_Sample_Barcode\tVariant_Classification", *lines]
    (folder / "l.maf").write_text("\n".join(lines))
    frame.to_parquet(folder / "e.parquet")
    (folder / "genes.txt").write_text("\n".join(GENES))


def _read_genes(folder: Path, out: Path) -> None:
    each(
        lambda: read_gene_table(folder / "e.csv", "expression"), lambda: read_gene_table(folder / "m.tsv", "mutation"),
        lambda: read_gene_table(folder / "l.maf", "mutation"), lambda: read_genes(folder / "genes.txt", "genes"),
        lambda: read_gene_table(folder / "e.parquet", "expression", orient="samples"),
    )  # fmt: skip


def _to_join(folder: Path) -> None:
    cohort(folder)
    _expression(folder)
    (folder / "samples.csv").write_text("slide,sample\na,a\nb,b\n")


def _join(folder: Path, out: Path) -> None:
    shutil.copytree(folder, out, dirs_exist_ok=True)
    join_omics(out, out / "m.tsv", out / "e.csv", unit="log2", gene_list=out / "genes.txt", samples=out / "samples.csv",
               duplicates="mean")  # fmt: skip


def _h5ad(folder: Path) -> None:
    with h5py.File(folder / "t.h5ad", "w") as file:
        for axis, names in {"obs": list("abc"), "var": GENES}.items():
            file.create_group(axis).attrs["_index"] = "name"
            file[f"{axis}/name"] = names
        sparse = file.create_group("X")
        sparse.attrs.update({"encoding-type": "csr_matrix", "shape": np.array([3, 4])})
        for name, values in {"data": [1.0, 2.5, 3.0], "indices": [0, 1, 2], "indptr": [0, 1, 2, 3]}.items():
            sparse[name] = np.array(values)
        file["layers/counts"] = np.arange(12).reshape(3, 4)
        file.create_group("uns/log1p")


def _read_h5ad(folder: Path, out: Path) -> None:
    each(
        lambda: read_gene_table(folder / "t.h5ad", "expression", orient="samples"),
        lambda: read_gene_table(folder / "t.h5ad", "expression", orient="samples", layer="counts"),
    )


def _images(folder: Path, count: int = 4) -> None:
    for i in range(count):
        Image.fromarray(pixels()[:16, i : i + 16]).save(folder / f"{i}.png")


def _captions(folder: Path) -> None:
    _images(folder)
    (folder / "captions.csv").write_text(
        'path,text,modality\n0.png,"one, two",CT\n1.png,a lymph node,CT\n2.png,skin,MR\n3.png,"more ""words""",MR\n'
    )
    (folder / "plain.csv").write_text("path,text\n0.png,one, two\n1.png,a lymph node\n2.png,skin, left\n")
    (folder / "patients.csv").write_text("file,patient\n0.png,a\n1.png,b\n2.png,a\n3.png,c\n")


def _read_captions(folder: Path, out: Path) -> None:
    def read(name: str, **options: Any) -> None:
        table = read_captions(folder / name, **options)
        drop_unreadable(table, workers=1)

    each(
        lambda: read("captions.csv"), lambda: read("plain.csv"),
        lambda: patients_of(["0.png", "1.png"], str(folder / "patients.csv")),
    )  # fmt: skip


def _labelled(folder: Path) -> None:
    _images(folder)
    (folder / "labels.csv").write_text("path,label,patient,score\n0.png,a,p,1\n1.png,b,p,2\n2.png,a,q,3\n3.png,b,r,4\n")
    rows = ["path,mpp,patient,split,stain", "0.png,0.5,p,train,he", "1.png,0.25,q,test,he", "2.png,,r,,ihc"]
    (folder / "slides.csv").write_text("\n".join(rows))


def _read_labelled(folder: Path, out: Path) -> None:
    each(
        lambda: read_labelled(folder / "labels.csv", positive="a"),
        lambda: read_labelled(folder / "labels.csv", label="score"),
        lambda: read_slides([folder / "slides.csv"]),
    )


def _ratings(folder: Path) -> None:
    _images(folder)
    write_rating_folder(read_pictures(folder), folder / "r", 4, parse_scale("1-3"), seed=0)
    table = pd.read_csv(folder / "r" / "ratings.csv", dtype=str).assign(rating=["1", "2", "3", "1"])
    table.to_csv(folder / "r" / "ratings.csv", index=False)


def _midog(folder: Path) -> None:
    boxes = [{"id": i, "image_id": 1, "category_id": 1 + i % 2, "bbox": [10 * i, 0, 10 * i + 50, 50], "labels": [1, 2]}
             for i in range(4)]  # fmt: skip
    names = [{"id": 1, "name": "mitotic figure"}, {"id": 2, "name": "other"}]
    images = [{"id": 1, "file_name": "001.tiff", "tumor_type": "skin", "width": 100, "height": 100}]
    (folder / "m.json").write_text(json.dumps({"images": images, "categories": names, "annotations": boxes}))


def _sliderunner(folder: Path) -> None:
    from test_annotations import SlideRunner

    made = SlideRunner(folder / "s.sqlite", ["a.svs", "b.svs"])
    made.cell([(100, 200)], 1, [(1, 1), (2, 2)])
    made.cell([(10, 10), (20, 30)], 2, [(1, 2)], slide=2, kind=2)
    made.database.close()


def _crops(folder: Path) -> None:
    for name in ("atypical", "normal"):
        (folder / name).mkdir()
        for i in range(2):
            Image.fromarray(pixels()[:16, :16]).save(folder / name / f"{name}{i}.png")
    rows = "image,Majority,Ada,Ben,patient\natypical0.png,atypical,atypical,normal,p\nnormal0.png,normal,normal,,q\n"
    (folder / "votes.csv").write_text(rows)


def _nifti(folder: Path) -> None:
    image = nibabel.Nifti1Image(np.arange(960, dtype=np.int16).reshape(12, 10, 8), np.diag([1, 2, 3, 1]))
    nibabel.save(image, folder / "a.nii")
    nibabel.save(image, folder / "b.nii.gz")


def _read_nifti(folder: Path, out: Path) -> None:
    def read(name: str) -> None:
        volume = Volume(folder / name)
        volume.check_same_grid(volume)
        volume.values()

    each(lambda: read("a.nii"), lambda: read("b.nii.gz"))


KINDS = [
    Kind("png", _png, _look_png),
    plain("jpg", exif=_exif(), comment=b'SYNTHETIC: generated\n{"seed": 0}'),
    plain("webp", exif=_exif(), lossless=True),
    plain("bmp"),
    Kind("tiff", _pyramid, of_file("a.tif")),
    Kind("ome-tiff", _ome_tiff, of_file("a.ome.tif")),
    Kind("svs", _svs, of_file("a.svs")),
    Kind("dicom", _dicom, _look_dicom),
    Kind("ome-zarr", _ome_zarr, of_file("a.ome.zarr"), ("**/*",)),
    Kind("tile-store", cohort, _read_store, ("slides/a.zarr/**/*",)),
    Kind("cohort", _joined, _read_cohort, ("index.parquet", "omics/*")),
    Kind("features-h5", _h5, _read_h5),
    Kind("features-pt", _pt, _read_pt),
    Kind("features-npy", _npy, lambda folder, out: read_features(folder / "grid.npy").grid()),
    Kind("feature-set", _feature_set, lambda folder, out: read_feature_file(folder / "f.h5")),
    Kind("genes", _expression, _read_genes),
    Kind("omics-join", _to_join, _join, ("*.csv", "*.tsv", "*.txt", "*.parquet")),
    Kind("h5ad", _h5ad, _read_h5ad),
    Kind("captions", _captions, _read_captions, ("*.csv",)),
    Kind("labels", _labelled, _read_labelled, ("*.csv",)),
    Kind("ratings", _ratings, lambda folder, out: read_ratings(folder / "r" / "ratings.csv"), ("r/*.csv", "r/*.json")),
    Kind("midog", _midog, lambda folder, out: read_midog(folder / "m.json")),
    Kind("sliderunner", _sliderunner, lambda folder, out: read_sliderunner(folder / "s.sqlite")),
    Kind("votes", _crops, lambda folder, out: read_crops(folder, folder / "votes.csv"), ("*.csv",)),
    Kind("nifti", _nifti, _read_nifti),
]
