"""Regions on a slide: outlines of a file laid over it, which tiles lie in them, and of which class a tile is.

QuPath shows slides that have bounds (MRXS, some SCN) cut to these, and counts pixels from the corner of what it shows;
other programs count from the slide's. See `SlideRegions`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import shapely

from ldm.errors import UserError, some, suggest
from ldm.images.slides import Slide
from ldm.tables.geojson import SUFFIXES, RegionFile, read_geojson

LABEL, NONE = "region", "none"  # the label of tiles, and what it is of a tile that lies mostly in no region
_OUTSIDE = 0.05  # of the area that regions of a slide may have beyond its edge, as outlines drawn by hand have
_SLACK = 0.01  # of the sides of a slide's bounds
_CORNERS = 256  # of a piece of a region: what cutting a tile out of it costs


class SlideRegions:
    """The regions of a file on a slide, in its level-0 pixels.

    Args:
        origin: what the file's coordinates count from: the corner of the `slide`, or of its `bounds`, as QuPath does;
            None is found out: as the file says, else where all of them fit.
    Attributes:
        classes: their names, sorted. origin: as found. notes: what a user should know.
    Raises:
        UserError: unreadable file, of another slide, bounds that a slide does not have or that cannot be found out.

    >>> _ = Path("a.json").write_text('{"type": "Polygon", "coordinates": [[[0, 0], [144, 0], [144, 128], [0, 128]]]}')
    >>> regions = SlideRegions(read_geojson("a.json"), Slide.of_pixels(tile))
    >>> regions.inside(np.array([[0, 0], [128, 0]]), 128, [], []).tolist()
    [1.0, 0.125]
    """

    def __init__(self, file: RegionFile, slide: Slide, origin: str | None = None) -> None:
        self.file, self.classes = file, file.classes
        if file.size is not None and file.size != slide.dimensions:
            raise UserError(
                f"{file.path} is of an image of {file.size[0]} x {file.size[1]} px, and {slide.path.name} has "
                f"{slide.dimensions[0]} x {slide.dimensions[1]}: it is of another slide"
            )
        self.origin, told = _origin(file, slide, origin or file.origin)
        self.notes = (*file.notes, *told)
        shift = slide.bounds[:2] if self.origin == "bounds" and slide.bounds else (0, 0)
        shapes = shapely.transform([region.shape for region in file.regions], lambda corners: corners + shift)
        self.notes += _check_place(shapes, file, slide)
        of_class: dict[str, list[shapely.Geometry]] = {name: [] for name in self.classes}
        for region, shape in zip(file.regions, shapes):
            of_class[region.name].append(shape)
        self.shapes = {name: shapely.union_all(own) for name, own in of_class.items()}

    def check(self, inside: Sequence[str], outside: Sequence[str]) -> tuple[str, ...]:
        """Notes of classes that are asked for and not there. UserError: none of those to tile inside is."""
        check_classes(self.file.path, self.classes, inside, outside, every=False)
        if not (outside or inside or self.classes):
            raise UserError(f"{self.file.path} holds no region, so there is nothing to tile inside of")
        absent = [name for name in (*inside, *outside) if name not in self.classes]
        return tuple(f"no region {name} is drawn (drawn are: {', '.join(self.classes) or 'none'})" for name in absent)

    def inside(self, coords: np.ndarray, side: float, inside: Sequence[str], outside: Sequence[str]) -> np.ndarray:
        """Share (n,) of squares that lies in the classes `inside` and in none of `outside`, exactly.

        coords (n, 2): corners x, y; side: of the squares; both in level-0 pixels. Where neither names a class, all
        count as inside; where `inside` names none, all of the slide that is not `outside` does.
        """
        cut = shapely.union_all([self.shapes[name] for name in outside if name in self.shapes])
        if outside and not inside:
            return (1 - _shares(cut, coords, side)).astype(np.float32)
        kept = [self.shapes[name] for name in (inside or self.classes) if name in self.shapes]
        return _shares(shapely.union_all(kept), coords, side, cut).astype(np.float32)

    def wanted(
        self, coords: np.ndarray, side: float, inside: Sequence[str], outside: Sequence[str], least: float
    ) -> np.ndarray:
        """(n,) bool: squares of which at least the fraction `least` is as `inside` has it. UserError: none is."""
        shares = self.inside(coords, side, inside, outside)
        if not (found := shares >= least - 1e-6).any():
            raise UserError(
                f"no tile lies in the regions of {self.file.path} by {least:g} or more (the most is "
                f"{shares.max():.2f}); smaller tiles, or a lower --min-inside, do"
            )
        return found

    def labels(self, coords: np.ndarray, side: float) -> np.ndarray:
        """Which class has most of each square: (n,) text, NONE where most lies in none.

        What lies in several classes, as a region drawn within another, counts for the smallest.
        """
        taken, shares = shapely.Polygon(), {}
        for name in sorted(self.classes, key=lambda name: self.shapes[name].area):
            shares[name] = _shares(self.shapes[name], coords, side, taken)
            taken = shapely.union(taken, self.shapes[name])
        rest = 1 - np.sum([np.zeros(len(coords)), *shares.values()], axis=0)
        most = np.argmax(np.round([*shares.values(), rest], 6), axis=0)  # of equal ones the first
        return np.array([*shares, NONE], object)[most]


def find_regions(path: Path | str, slide: str) -> Path:
    """The file of a slide's regions: `path`, or in a folder the one that is called as the slide.

    slide: its name, with its ending. UserError: there is none.

    >>> _ = Path("a.geojson").write_text("[]")
    >>> find_regions(".", "a.svs")
    PosixPath('a.geojson')
    """
    path = Path(path)
    if not path.is_dir():
        return path
    stems = dict.fromkeys((Path(slide).stem, slide))
    found = [path / f"{stem}{suffix}" for stem in stems for suffix in SUFFIXES if (path / f"{stem}{suffix}").is_file()]
    if len(found) != 1:
        several = f"several files of regions of {slide}: {', '.join(each.name for each in found)}; keep one of them"
        none = f"no regions of {slide}; put them into {Path(slide).stem}.geojson, which may hold an empty list"
        raise UserError(f"{path} has {several if found else none}")
    return found[0]


def check_classes(
    where: object, known: Iterable[str], inside: Iterable[str], outside: Iterable[str], every: bool = True
) -> None:
    """UserError where classes that are asked for are not there, with those that are.

    where: what lacks them. every: each has to be there; else only one of `inside`, where it names any.

    >>> check_classes("a.geojson", ["Stroma", "Tumour"], ["Tumor"], [])
    Traceback (most recent call last):
    ldm.errors.UserError: a.geojson has no region 'Tumor'; did you mean 'Tumour'? Known: Stroma, Tumour.
    """
    known, inside, outside = set(known), list(inside), list(outside)
    if both := sorted(set(inside) & set(outside)):
        raise UserError(f"regions '{both[0]}' are to be tiled and to be left out; name them once")
    needed = [*inside, *outside] if every else [] if known & set(inside) else inside
    if absent := [name for name in needed if name not in known]:
        raise UserError(f"{where} has no region '{absent[0]}'{suggest(absent[0], known)}")


def check_files(files: Iterable[tuple[Path | str, str]], inside: Sequence[str], outside: Sequence[str]) -> None:
    """UserError where one of the files of regions is not there, or none of them has a class that is asked for.

    files: of each slide the file or folder, and its name; one that cannot be read counts as empty.

    >>> _ = Path("a.geojson").write_text("[]")
    >>> check_files([("a.geojson", "a.svs")], ["Tumour"], [])
    Traceback (most recent call last):
    ldm.errors.UserError: a.geojson has no region 'Tumour'. Known: (none).
    """
    known: set[str] = set()
    files = list(files)
    if absent := [path for path in dict.fromkeys(path for path, _ in files) if not Path(path).exists()]:
        raise UserError(f"there is no file or folder of regions at {some(list(map(str, absent)), 3)}")
    files = files if inside or outside else []
    for path, slide in files:
        with suppress(UserError):
            known |= set(read_geojson(find_regions(path, slide)).classes)
    if files:
        where = str(files[0][0]) if len({path for path, _ in files}) == 1 else f"none of {len(files)} files of regions"
        check_classes(where, known, inside, outside)


def _origin(file: RegionFile, slide: Slide, asked: str | None) -> tuple[str, tuple[str, ...]]:
    """What a file's coordinates count from, and notes."""
    if asked is not None and asked not in ("slide", "bounds"):
        raise UserError(f"regions count from the corner of the slide, or of its bounds; got '{asked}'")
    if slide.bounds is None:
        if asked == "bounds":
            raise UserError(f"{slide.path} has no bounds, so {file.path} counts from its corner; leave the origin out")
        return "slide", ()
    if asked or not file.regions:
        return asked or "slide", ()
    left, top, width, height = slide.bounds
    x0, y0, x1, y1 = shapely.total_bounds([region.shape for region in file.regions])
    dx, dy = width * _SLACK, height * _SLACK
    from_slide = x0 >= left - dx and y0 >= top - dy and x1 <= left + width + dx and y1 <= top + height + dy
    from_bounds = x0 >= -dx and y0 >= -dy and x1 <= width + dx and y1 <= height + dy
    given = f"{file.path} (x {x0:.0f} to {x1:.0f}, y {y0:.0f} to {y1:.0f})"
    holds = f"the bounds of {slide.path.name} ({width:.0f} x {height:.0f} px at {left:.0f}, {top:.0f})"
    if from_slide and from_bounds:
        raise UserError(
            f"{given} may count from the slide's corner, or from that of {holds}, as QuPath does; say which by "
            "--region-origin slide or bounds (region_origin= in Python)"
        )
    if not from_slide and not from_bounds:
        raise UserError(f"{given} lies neither in {holds} nor in these as QuPath shows them: it is of another slide")
    if from_slide:
        return "slide", ()
    return "bounds", ("coordinates of regions count from the corner of the slide's bounds, as QuPath does",)


def _check_place(shapes: np.ndarray, file: RegionFile, slide: Slide) -> tuple[str, ...]:
    """Notes of regions that reach beyond the slide. UserError: too much of them does."""
    width, height = slide.dimensions
    whole = shapely.box(0, 0, width, height)
    if not len(shapes) or shapely.covers(whole, shapely.box(*shapely.total_bounds(shapes))):
        return ()
    area, within = shapely.area(shapes), shapely.area(shapely.intersection(shapes, whole))
    if within.sum() < (1 - _OUTSIDE) * area.sum():
        x0, y0, x1, y1 = shapely.total_bounds(shapes)
        raise UserError(
            f"{1 - within.sum() / area.sum():.0%} of the area of {file.path} lies outside {slide.path.name}: it "
            f"reaches from x {x0:.0f} to {x1:.0f} and y {y0:.0f} to {y1:.0f}, and the slide has {width} x {height} px. "
            "It is of another slide, or counts pixels of another level than the finest"
        )
    beyond = int((within < area * (1 - 1e-6)).sum())
    return (f"{beyond} regions reach beyond the slide's edge",)


def _shares(
    shape: shapely.Geometry, coords: np.ndarray, side: float, without: shapely.Geometry | None = None
) -> np.ndarray:
    """Share (n,) of squares with corners coords (n, 2) that lies in a shape, and not in another."""
    if without is not None and not without.is_empty:
        return np.clip(_shares(shape, coords, side) - _shares(shapely.intersection(shape, without), coords, side), 0, 1)
    x, y = np.asarray(coords, np.float64).T
    squares = shapely.box(x, y, x + side, y + side)
    pieces = _pieces(shape)
    square, piece = shapely.STRtree(pieces).query(squares, predicate="intersects")
    areas = np.full(len(square), float(side**2))
    shapely.prepare(pieces)
    cut = ~shapely.covers(pieces[piece], squares[square])
    areas[cut] = shapely.area(shapely.intersection(squares[square[cut]], pieces[piece[cut]]))
    return np.clip(np.bincount(square, areas, minlength=len(squares)) / side**2, 0, 1)


def _pieces(shape: shapely.Geometry) -> np.ndarray:
    """A shape cut into polygons of few corners, so that each square meets little of it."""
    todo, done = [shape], []
    while todo:
        for part in shapely.get_parts(todo.pop()):
            if shapely.get_dimensions(part) < 2:
                continue
            x0, y0, x1, y1 = part.bounds
            if shapely.get_num_coordinates(part) <= _CORNERS or max(x1 - x0, y1 - y0) < 1:
                done.append(part)
                continue
            x, y = ((x0 + x1) / 2, y1) if x1 - x0 > y1 - y0 else (x1, (y0 + y1) / 2)
            first = shapely.box(x0, y0, x, y)
            todo += [shapely.intersection(part, first), shapely.difference(part, first)]
    return np.array(done, object)
