"""Regions drawn on slides: read in every dialect alike, laid over the right slide, and the tiles that lie in them."""

from __future__ import annotations

import gzip
import json
import shutil
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import shapely
import tifffile
from skimage.color import rgb2gray
from skimage.draw import polygon2mask

from conftest import ROOT
from data_prep import prepare
from data_prep.tile_slides import main, tile_slide
from ldm.data.cohort import write_store
from ldm.data.datasets import TileDataset
from ldm.data.tile_store import TileStore
from ldm.errors import UserError
from ldm.images.slides import Slide, open_image
from ldm.images.source import Source
from ldm.tables.geojson import Region, RegionFile, read_geojson
from ldm.tables.regions import SlideRegions, find_regions

REAL = ROOT / "tests/data/regions"
SQUARE = [[100, 200], [400, 200], [400, 500], [100, 500], [100, 200]]
HOLE = [[200, 300], [300, 300], [300, 400], [200, 400], [200, 300]]
HOLED = {"type": "Polygon", "coordinates": [SQUARE, HOLE]}  # 300 px less 100 px
TUMOUR = {"objectType": "annotation", "classification": {"name": "Tumour", "color": [200, 0, 0]}}


def feature(geometry: Any, properties: Any = TUMOUR) -> dict[str, Any]:
    return {"type": "Feature", "geometry": geometry, "properties": properties}


def written(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def slide_of(width: int, height: int, bounds: tuple[int, int, int, int] | None = None) -> Slide:
    read = lambda level, x, y, w, h: np.full((h, w, 3), 255, np.uint8)  # noqa: E731
    return Slide(Path("a.mrxs"), Source([(width, height)], read, bounds=bounds), 0.5)


def regions_of(*named: tuple[str, shapely.Geometry]) -> RegionFile:
    return RegionFile(Path("a.geojson"), "", tuple(Region(*each) for each in named))


FEATURE = feature(HOLED)
DIALECTS = {
    "FeatureCollection": {"type": "FeatureCollection", "features": [FEATURE]},
    "list of Features": [FEATURE],
    "Feature": FEATURE,
    "MultiPolygon": feature({"type": "MultiPolygon", "coordinates": [HOLED["coordinates"]]}),
    "GeometryCollection": feature({"type": "GeometryCollection", "geometries": [HOLED]}),
    "with a z": feature({"type": "Polygon", "coordinates": [[[*xy, 0] for xy in ring] for ring in (SQUARE, HOLE)]}),
    "open rings": feature({"type": "Polygon", "coordinates": [SQUARE[:-1], HOLE[:-1]]}),
    "turned": feature({"type": "Polygon", "coordinates": [SQUARE[::-1], HOLE]}),
    "a corner that is no number": feature({"type": "Polygon", "coordinates": [[*SQUARE, [float("nan"), 3]], HOLE]}),
    "class as text": feature(HOLED, {"classification": "Tumour"}),
    "QuPath 0.2": feature(HOLED, {"classification": {"name": "Tumour", "colorRGB": -3670016}, "isLocked": True})
    | {"id": "PathAnnotationObject"},
    "QuPath 0.6": feature(HOLED, {"classification": {"names": ["Tumour"], "color": [200, 0, 0]}}),
    "named only": feature(HOLED, {"objectType": "annotation", "name": "Tumour"}),
    "hierarchy": {
        "type": "FeatureCollection",
        "features": [feature(None, {"objectType": "root", "childObjects": [FEATURE]})],
    },
    "darwin 2": {
        "version": "2.0",
        "item": {"name": "a.svs", "slots": [{"width": 1000, "height": 800}]},
        "annotations": [
            {"name": "Tumour", "polygon": {"paths": [[{"x": x, "y": y} for x, y in r[:-1]] for r in (SQUARE, HOLE)]}}
        ],
    },
    "darwin 1": {
        "image": {"filename": "a.svs", "width": 1000, "height": 800},
        "annotations": [
            {
                "name": "Tumour",
                "polygon": {
                    "path": [{"x": x, "y": y} for x, y in SQUARE[:-1]],
                    "additional_paths": [[{"x": x, "y": y} for x, y in HOLE[:-1]]],
                },
            }
        ],
    },
}


@pytest.mark.parametrize("name", DIALECTS)
def test_every_dialect_says_the_same(tmp_path, name):
    file = read_geojson(written(tmp_path / "a.geojson", DIALECTS[name]))
    (region,) = file.regions
    assert region.name == "Tumour"
    assert region.shape.equals(shapely.Polygon(SQUARE, [HOLE]))
    assert bool(file.notes) == (name in ("open rings", "a corner that is no number"))


def test_a_bare_geometry_has_no_class(tmp_path):
    (region,) = read_geojson(written(tmp_path / "a.json", HOLED)).regions
    assert region.name == "unclassified"
    assert region.shape.area == 300**2 - 100**2


def test_packed_files_are_the_same(tmp_path):
    plain = written(tmp_path / "a.geojson", FEATURE)
    with gzip.open(tmp_path / "a.geojson.gz", "wb") as stream:
        stream.write(plain.read_bytes())
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        packed.write(plain, "a.geojson")
    files = [read_geojson(plain), read_geojson(tmp_path / "a.geojson.gz"), read_geojson(tmp_path / "a.zip")]
    assert len({file.sha256 for file in files}) == 1
    assert len({file.regions[0].shape.wkt for file in files}) == 1


def test_an_ellipse_is_the_one_in_its_box_as_qupath_reads_it(tmp_path):
    box = {"type": "Polygon", "coordinates": [[[0, 0], [200, 0], [200, 100], [0, 100], [0, 0]]], "isEllipse": True}
    (region,) = read_geojson(written(tmp_path / "a.geojson", feature(box))).regions
    assert region.shape.area == pytest.approx(np.pi * 100 * 50, rel=2e-4)
    (drawn,) = read_geojson(REAL / "qupath-ellipse.json").regions  # QuPath 0.2 writes its corners, and no mark
    x0, y0, x1, y1 = drawn.shape.bounds
    assert drawn.shape.area == pytest.approx(np.pi * (x1 - x0) * (y1 - y0) / 4, rel=1e-3)


@pytest.mark.parametrize(
    ("rings", "area"),
    [
        ([[[0, 0], [2, 2], [2, 0], [0, 2], [0, 0]]], 2),  # a bow-tie: both of its triangles
        ([[[0, 0], [6, 0], [6, 4], [2, 4], [2, -2], [4, -2], [4, 6], [0, 6], [0, 0]]], 36),  # crossed, as by a brush
        ([[[0, 0], [4, 0], [4, 4], [0, 4], [0, 0]], [[3, 1], [6, 1], [6, 3], [3, 3], [3, 1]]], 14),  # a hole's own part
        ([[[0, 0], [4, 0], [4, 4], [0, 4], [0, 0], [9, 9], [0, 0]]], 16),  # a spike
    ],
)
def test_outlines_that_cross_themselves_are_repaired_and_told(tmp_path, rings, area):
    file = read_geojson(written(tmp_path / "a.geojson", feature({"type": "Polygon", "coordinates": rings})))
    (region,) = file.regions
    assert region.shape.is_valid
    assert region.shape.area == pytest.approx(area)
    assert file.notes == ("1 outlines of regions crossed themselves, were open or lacked corners, and are repaired",)


def test_what_has_no_area_is_told(tmp_path):
    tile = feature(HOLED, {"objectType": "tile", "measurements": {"tissue": 1}})
    kinds = [{"type": "Point", "coordinates": [1, 2]}, {"type": "LineString", "coordinates": [[0, 0], [5, 5]]}]
    kinds += [{"type": "MultiPoint", "coordinates": [[1, 2]]}, {"type": "Polygon", "coordinates": [SQUARE[:2]]}]
    flat = {"type": "Polygon", "coordinates": [[[0, 0], [9, 0], [4, 0], [0, 0]]]}
    missing = feature(HOLED, {"objectType": "tma_core", "isMissing": True})
    content = [FEATURE, tile, *map(feature, kinds), feature(flat), feature(None), missing]
    file = read_geojson(written(tmp_path / "a.geojson", content))
    assert len(file.regions) == 1
    told = file.notes[0]
    assert told.startswith("7 drawn objects are no regions (")
    for what in ("2 outline without an area", "1 Point", "1 LineString", "1 MultiPoint", "1 tile without a class"):
        assert what in told


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is no JSON, or not all of it"),
        ('{"type": "FeatureCollection", "features": [', "is no JSON, or not all of it"),
        ("[" * 100_000, "nested too deep"),
        ("3", "is no GeoJSON: where features should be is 3; QuPath writes one"),
        ('{"slides": []}', "an object with slides"),
        ('{"type": "FeatureCollection"}', "not laid out as GeoJSON is"),
        (json.dumps(feature({"type": "Polygon"})), "not laid out as GeoJSON is"),
        (json.dumps(feature({"type": "Circle"})), "geometry of the type 'Circle'; known are Polygon"),
        (
            json.dumps(feature({"type": "Polygon", "coordinates": [["a", "b"]]})),
            "no pairs of numbers, as \\['a', 'b'\\]",
        ),
        (json.dumps(feature({"type": "Polygon", "coordinates": [[[1], [2], [3], [4]]]})), "no pairs of numbers"),
        (json.dumps(feature({"type": "Polygon", "coordinates": SQUARE})), "no pairs of numbers"),
        (json.dumps(feature({"type": "Polygon", "coordinates": [[[0, 0], [1e9, 0], [0, 9]]]})), r"up to 1e\+09 px"),
        (
            json.dumps(feature({"type": "Polygon", "coordinates": [[[0, 0], [10**400, 0], [0, 9]]]})),
            "no pairs of numbers",
        ),
    ],
)
def test_what_is_no_geojson_is_refused_in_a_line(tmp_path, content, message):
    path = tmp_path / "a.geojson"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as told:
        read_geojson(path)
    assert len(str(told.value)) < 400


def test_files_that_unpack_to_too_much_or_to_none_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.tables.geojson.MOST_BYTES", 1 << 20)
    with gzip.open(tmp_path / "a.geojson.gz", "wb") as stream:
        stream.write(b" " * (2 << 20))
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("a.geojson", b" " * (2 << 20))
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as packed:
        packed.writestr("a.geojson", "[]")
        packed.writestr("b.geojson", "[]")
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04 and no more")
    (tmp_path / "cut.json.gz").write_bytes(gzip.compress(b"[]" * 1000)[:-9])
    for name, message in {
        "a.geojson.gz": "too large for regions of a slide",
        "a.zip": "too large for regions of a slide",
        "two.zip": "holds 2 GeoJSON files",
        "broken.zip": "cannot unpack",
        "cut.json.gz": "cannot unpack",
        "none.geojson": "cannot read regions from .*No such file",
    }.items():
        with pytest.raises(UserError, match=message):
            read_geojson(tmp_path / name)


# ---- laid over a slide


def test_shares_of_tiles_are_those_of_geometry():
    """Squares in rectangles and discs have closed forms."""
    regions = SlideRegions(regions_of(("R", shapely.box(10.5, 20, 310.25, 240))), slide_of(1000, 800))
    coords = np.array([[0, 0], [100, 100], [256, 128], [300, 230], [310, 0], [700, 700]])
    want = [
        max(0, min(x + 64, 310.25) - max(x, 10.5)) * max(0, min(y + 64, 240) - max(y, 20)) / 64**2 for x, y in coords
    ]
    assert regions.inside(coords, 64, ["R"], []) == pytest.approx(want, abs=1e-6)
    assert want[1] == 1
    assert 0 < want[3] < 0.2
    disc = shapely.Point(500, 400).buffer(300, quad_segs=4096)  # many corners: cut into pieces
    regions = SlideRegions(regions_of(("D", disc)), slide_of(1000, 800))
    coords = np.array([[0, 0], [500, 400], [500 - 350, 400 - 350]])
    quarter = np.pi * 300**2 / 4
    assert regions.inside(coords[1:2], 350, ["D"], [])[0] == pytest.approx(quarter / 350**2, rel=1e-5)
    lattice = np.stack(np.meshgrid(np.arange(0, 1000, 50), np.arange(0, 800, 50)), -1).reshape(-1, 2)
    assert regions.inside(lattice, 50, ["D"], []).sum() * 50**2 == pytest.approx(np.pi * 300**2, rel=1e-5)


def test_inside_outside_and_the_class_of_a_tile():
    named = regions_of(
        ("Tumour", shapely.box(0, 0, 600, 400)),
        ("Pen", shapely.box(100, 0, 200, 100)),
        ("Stroma", shapely.box(600, 0, 800, 400)),
    )
    regions = SlideRegions(named, slide_of(1000, 400))
    coords = np.array([[0, 0], [100, 0], [150, 50], [550, 0], [580, 0], [780, 0], [900, 300]])
    share = lambda inside, outside: regions.inside(coords, 100, inside, outside).astype(float).round(3).tolist()  # noqa: E731
    assert share(["Tumour"], []) == [1, 1, 1, 0.5, 0.2, 0, 0]
    assert share(["Tumour"], ["Pen"]) == [1, 0, 0.75, 0.5, 0.2, 0, 0]
    assert share(["Tumour", "Stroma"], []) == [1, 1, 1, 1, 1, 0.2, 0]
    assert share([], ["Pen"]) == [1, 0, 0.75, 1, 1, 1, 1]
    assert share([], []) == [1, 1, 1, 1, 1, 0.2, 0]
    label = regions.labels(coords, 100).tolist()  # Pen within Tumour counts as Pen
    assert label == ["Tumour", "Pen", "Tumour", "Stroma", "Stroma", "none", "none"]


def test_regions_of_another_slide_are_refused_with_numbers(tmp_path):
    with pytest.raises(UserError, match=r"100% of the area .* x 26356 to 26376 .*, and the slide has 1000 x 800 px"):
        SlideRegions(regions_of(("T", shapely.box(26356, 15357, 26376, 15400))), slide_of(1000, 800))
    with pytest.raises(UserError, match=r"of an image of 63488 x 40064 px, and a\.mrxs has 1000 x 800"):
        SlideRegions(read_geojson(REAL / "darwin-v7.json"), slide_of(1000, 800))
    over = SlideRegions(regions_of(("T", shapely.box(0, 0, 1010, 800))), slide_of(1000, 800))
    assert over.notes == ("1 regions reach beyond the slide's edge",)


def test_coordinates_relative_to_the_bounds_of_an_mrxs():
    """QuPath counts from the corner of the bounds, others from the slide's: found out where only one fits."""
    slide = slide_of(10_000, 20_000, bounds=(3000, 9000, 4000, 5000))
    near = SlideRegions(regions_of(("T", shapely.box(100, 100, 500, 400))), slide)
    assert near.origin == "bounds"
    assert near.shapes["T"].bounds == (3100, 9100, 3500, 9400)
    assert near.notes == ("coordinates of regions count from the corner of the slide's bounds, as QuPath does",)
    far = SlideRegions(regions_of(("T", shapely.box(5000, 9100, 6500, 9400))), slide)
    assert (far.origin, far.shapes["T"].bounds) == ("slide", (5000, 9100, 6500, 9400))
    slide = slide_of(10_000, 20_000, bounds=(1000, 2000, 8000, 15_000))
    both = regions_of(("T", shapely.box(3000, 4000, 3500, 4500)))
    with pytest.raises(
        UserError,
        match=r"may count from the slide's corner.*8000 x 15000 px at 1000, 2000\).*--region-origin slide or bounds",
    ):
        SlideRegions(both, slide)
    assert SlideRegions(both, slide, "slide").shapes["T"].bounds == (3000, 4000, 3500, 4500)
    assert SlideRegions(both, slide, "bounds").shapes["T"].bounds == (4000, 6000, 4500, 6500)
    with pytest.raises(UserError, match="is of another slide"):
        SlideRegions(regions_of(("T", shapely.box(0, 16_000, 50, 19_000))), slide)
    with pytest.raises(UserError, match="has no bounds"):
        SlideRegions(both, slide_of(10_000, 20_000), "bounds")


def test_real_exports(shared):
    """Outlines lie where the nuclei of their images are, and are those of the label map that they were made from."""
    folder = shared("data/more/geojson")
    puma = read_geojson(folder / "puma/training_set_metastatic_roi_094_nuclei.geojson")
    assert (len(puma.regions), len(puma.classes), puma.notes) == (671, 6, ())
    image = open_image(folder / "puma/training_set_metastatic_roi_094.tif")
    gray = rgb2gray(image.read(0, 0, 1024, 1024))
    inner, ring = [], []
    for region in puma.regions:
        if not region.shape.within(shapely.box(8, 8, 1016, 1016)):
            continue
        around = shapely.difference(region.shape.buffer(6), region.shape.buffer(1))
        x, y = np.round(shapely.get_coordinates(region.shape.buffer(-2))).astype(int).T
        a, b = np.round(shapely.get_coordinates(around)).astype(int).T
        if len(x):
            inner.append(gray[y, x].mean())
            ring.append(gray[b, a].mean())
    assert np.mean(np.array(inner) < np.array(ring)) > 0.95
    holes = read_geojson(folder / "puma/training_set_primary_roi_102_nuclei.geojson")
    assert sum(len(part.interiors) for region in holes.regions for part in shapely.get_parts(region.shape)) == 45
    cells = read_geojson(folder / "qurad_breast/cell_detections.geojson")
    labels = tifffile.imread(folder / "qurad_breast/ytma10_010704_benign1_ccd_labels.tif")
    assert (len(cells.regions), cells.classes) == (410, ["unclassified"])
    covered = np.zeros(labels.shape, bool)
    for region in cells.regions:
        for part in shapely.get_parts(region.shape):
            covered |= polygon2mask(labels.shape, np.array(part.exterior.coords)[:, ::-1])
    assert (covered & (labels > 0)).sum() / (covered | (labels > 0)).sum() > 0.97
    kinds = {path.stem: read_geojson(path) for path in (folder / "wsidicom_qupath_bare").glob("*.json")}
    assert sorted(name for name, file in kinds.items() if not file.regions) == [
        "qupath-line", "qupath-multipoint", "qupath-point", "qupath-polyline",
    ]  # fmt: skip
    assert kinds["qupath-rectangle"].regions[0].shape.area == 210 * 176


def test_real_files_of_two_programs():
    listed = read_geojson(REAL / "qupath-polygon-cell-classified.json")
    assert Counter(region.name for region in listed.regions) == {"Cell": 2, "Nucleus": 2}
    named = read_geojson(REAL / "qupath-0.5.geojson")
    assert Counter(region.name for region in named.regions) == {"I": 2, "UT": 1}
    darwin = read_geojson(REAL / "darwin-v7.json")
    assert darwin.size == (63488, 40064)
    assert darwin.notes == ("5 drawn objects are no regions (5 keypoint)",)
    (box,) = [r.shape for r in darwin.regions if r.name == "ROI (segmentation)"]
    assert box.bounds == pytest.approx((15291.49, 18094.48, 15291.49 + 5122.94, 18094.48 + 4597.51))
    stroma = next(r.shape for r in darwin.regions if r.name == "stroma (area)")
    paths = json.loads((REAL / "darwin-v7.json").read_text())["annotations"][1]["polygon"]["paths"]
    corner, mask = np.array([15000, 18000]), np.zeros((600, 600), bool)
    for path in paths:  # a path within another is a hole, one within that is an island
        mask ^= polygon2mask(mask.shape, (np.array([(at["y"], at["x"]) for at in path]) - corner[::-1]) / 10)
    assert stroma.area == pytest.approx(mask.sum() * 100, rel=0.01)
    assert sum(len(part.interiors) for part in shapely.get_parts(stroma)) == 3


# ---- tiled


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Regions of the demo slide: a Tumour of 1024 x 1280 px over tissue with a Fold in it, named as the slide."""
    folder = tmp_path_factory.mktemp("regions")
    boxes = {"Tumour": (512, 1024, 1536, 2304), "Fold": (768, 1536, 1024, 2048)}
    features = [
        feature(shapely.geometry.mapping(shapely.box(*box)), {"classification": {"name": name, "color": [9, 9, 9]}})
        for name, box in boxes.items()
    ]
    return written(folder / "CMU-1-Small-Region.geojson", {"type": "FeatureCollection", "features": features})


def test_tiles_lie_inside_and_not_outside(demo_slide, drawn, tmp_path):
    store = TileStore.open(tile_slide(demo_slide, tmp_path, regions=drawn, inside=["Tumour"], outside=["Fold"]))
    x, y = store.coords.T
    assert ((x >= 512) & (x < 1536) & (y >= 1024) & (y < 2304)).all()
    assert not ((x == 768) & (y >= 1536) & (y < 2048)).any()
    everything = TileStore.open(tile_slide(demo_slide, tmp_path / "plain"))
    x, y = everything.coords.T
    there = (x >= 512) & (x < 1536) & (y >= 1024) & (y < 2304) & ~((x == 768) & (y >= 1536) & (y < 2048))
    assert np.array_equal(store.coords, everything.coords[there])  # and the tissue in them is chosen as ever
    assert len(store) == 13
    assert set(store.labels("region")) == {"Tumour"}
    about = store.attrs["regions"]
    assert (about["file"], about["inside"], about["outside"]) == (drawn.name, ["Tumour"], ["Fold"])
    assert about["sha256"] == read_geojson(drawn).sha256
    assert tile_slide(demo_slide, tmp_path, regions=drawn, inside=["Tumour"], outside=["Fold"]) == store.path
    for other in (
        {},
        {"regions": drawn},
        {"regions": drawn, "inside": ["Tumour"], "outside": ["Fold"], "min_inside": 1},
    ):
        with pytest.raises(UserError, match=r"made with other settings.*regions was"):
            tile_slide(demo_slide, tmp_path, **other)


def test_regions_as_labels_alone(demo_slide, drawn, tmp_path):
    plain = TileStore.open(tile_slide(demo_slide, tmp_path / "plain"))
    main(
        [
            "--slides",
            str(demo_slide),
            "--out",
            str(tmp_path / "cohort"),
            "--regions",
            str(drawn.parent),
            "--min-inside",
            "0",
        ]
    )
    store = TileStore.open(tmp_path / "cohort/slides/CMU-1-Small-Region.zarr")
    assert np.array_equal(store.coords, plain.coords)  # regions choose nothing, and background is drawn alike
    labels = dict(zip(map(tuple, store.coords.tolist()), store.labels("region")))
    assert labels[768, 1536] == labels[768, 1792] == "Fold"
    assert labels[1024, 1792] == "Tumour"
    assert labels[768, 2304] == "none"
    index = pd.read_parquet(tmp_path / "cohort/index.parquet")
    assert index["region"].tolist() == store.labels("region").tolist()
    chosen = TileDataset(str(tmp_path / "cohort"), where="region in Tumour,Fold", conditions={"class": "region"})
    assert set(chosen.values("class")) == {"Tumour", "Fold"}
    assert len(chosen) == (index["region"] != "none").sum()


def test_mistakes_with_regions(demo_slide, drawn, tmp_path, capsys):
    ask = ["--slides", str(demo_slide), "--out", str(tmp_path / "out")]
    for options, message in (
        (
            ["--regions", str(drawn), "--inside", "Tumor"],
            "has no region 'Tumor'; did you mean 'Tumour'. Known: Fold, Tumour",
        ),
        (["--regions", str(drawn), "--outside", "Pen"], "has no region 'Pen'"),
        (["--regions", str(drawn), "--inside", "Fold", "--outside", "Fold"], "to be tiled and to be left out"),
        (
            ["--regions", str(tmp_path)],
            "has no regions of CMU-1-Small-Region.svs; put them into CMU-1-Small-Region.geojson",
        ),
        (["--inside", "Tumour"], "classes of regions need a file of them"),
        (["--regions", str(tmp_path / "none")], "there is no file or folder of regions at"),
        (["--regions", str(drawn), "--min-inside", "1", "--tile-size", "1100"], "no tile lies in the regions"),
        (["--regions", str(drawn), "--region-origin", "bounds"], "has no bounds"),
        (["--regions", str(REAL / "qupath-0.5.geojson")], "lies outside CMU-1-Small-Region.svs"),
    ):
        with pytest.raises(UserError, match=message):
            main([*ask, *options])
    assert not (tmp_path / "out/slides").exists()
    written(drawn.parent / "CMU-1-Small-Region.svs.json", [])
    with pytest.raises(UserError, match="has several files of regions"):
        find_regions(drawn.parent, demo_slide.name)
    (drawn.parent / "CMU-1-Small-Region.svs.json").unlink()


def test_a_table_names_the_regions_of_each_slide(demo_slide, drawn, tmp_path, capsys):
    """A slide without a class to leave out is tiled, and it is told; a class that no slide has is a mistake."""
    slides = [tmp_path / name for name in ("a.svs", "b.svs")]
    for slide in slides:
        shutil.copy(demo_slide, slide)
    shutil.copy(drawn, tmp_path / "a.geojson")
    written(tmp_path / "b.geojson", [])
    table = tmp_path / "slides.csv"
    table.write_text("path,roi\na.svs,a.geojson\nb.svs,b.geojson\n")
    main(["--slides", str(table), "--out", str(tmp_path / "out"), "--outside", "Fold"])
    stores = [TileStore.open(tmp_path / f"out/slides/{slide.stem}.zarr") for slide in slides]
    assert len(stores[1]) - len(stores[0]) == 2
    assert "note: no region Fold is drawn (drawn are: none) (b.svs)" in capsys.readouterr().out
    with pytest.raises(UserError, match="none of 2 files of regions has no region 'Folt'; did you mean 'Fold'"):
        main(["--slides", str(table), "--out", str(tmp_path / "out"), "--outside", "Folt"])


def test_labels_that_are_text_are_copied_and_resumed_as_they_are(demo_slide, drawn, tmp_path):
    """A store holds numbers and says which text each stands for; what copies tiles needs to know nothing of it."""
    store = TileStore.open(tile_slide(demo_slide, tmp_path, regions=drawn, min_inside=0, previews=False))
    kept = np.flatnonzero(store.labels("region") != "none")
    attrs = {name: value for name, value in store.attrs.items() if name not in ("rows", "count", "complete", "version")}
    labels = {name: store.labels(name)[kept] for name in store.label_names}
    copied = {"attrs": attrs, "coords": store.coords[kept], "labels": labels}
    with pytest.raises(ZeroDivisionError):
        write_store(tmp_path, "part", lambda i: store.tile(int(kept[i])) if i < 9 else 1 / 0, len(kept), **copied)
    new = write_store(tmp_path, "part", lambda i: store.tile(int(kept[i])), len(kept), **copied)
    assert new.labels("region").tolist() == labels["region"].tolist()
    assert set(new.labels("region")) == {"Tumour", "Fold"}
    assert np.array_equal(new.labels("blur"), labels["blur"])


def test_the_cohort_command_takes_regions_too(demo_slide, drawn, tmp_path, capsys):
    features = [*json.loads(drawn.read_text())["features"], feature({"type": "Point", "coordinates": [1, 2]})]
    written(tmp_path / drawn.name, features)
    ask = ["--slides", str(demo_slide), "--out", str(tmp_path / "out"), "--regions", str(tmp_path)]
    with pytest.raises(UserError, match="has no region 'Tumor'; did you mean 'Tumour'"):
        prepare.main([*ask, "--inside", "Tumor"])
    prepare.main([*ask, "--inside", "Tumour", "Fold", "--min-inside", "0.9"])
    store = TileStore.open(tmp_path / "out/slides/CMU-1-Small-Region.zarr")
    assert store.attrs["regions"]["inside"] == ["Fold", "Tumour"]
    assert set(store.labels("region")) == {"Tumour", "Fold"}
    told = "1 drawn objects are no regions (1 Point)"
    assert f"note: {told} (CMU-1-Small-Region.svs)" in capsys.readouterr().err
    page = (tmp_path / "out/summary.html").read_text()
    assert told in page
    assert "<th>pen</th><th>blur</th><th>dark</th>" in page
    assert "previews/CMU-1-Small-Region.png" in page
