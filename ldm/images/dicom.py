"""Which DICOM files are slides: a slide is a series, whose files are its levels or parts of one."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

SUFFIX = ".dcm"
_SLIDES = "1.2.840.10008.5.1.4.1.1.77.1.6"  # VL Whole Slide Microscopy Image Storage
_DEFLATED = "1.2.840.10008.1.2.1.99"  # no slide is packed so
_TAGS = [
    "SOPClassUID", "SeriesInstanceUID", "Modality", "ImageType", "TotalPixelMatrixColumns", "InConcatenationNumber",
]  # fmt: skip


def one_per_series(paths: Iterable[Path]) -> list[Path]:
    """The paths in their order, and of the DICOM files among them the one of each series that stands for the slide.

    That is the finest level, and the first part of one that is split. Labels, overviews and thumbnails are no slides; a
    file that cannot be read as DICOM stays, so that whoever opens it tells why.

    >>> one_per_series([Path("a.svs"), Path("b.png")]) == [Path("a.svs"), Path("b.png")]
    True
    """
    best: dict[str, tuple[tuple[int, int, str], Path]] = {}
    kept = []
    for path in paths:
        if path.suffix.lower() != SUFFIX or not (header := _header(path)):
            kept.append(path)
            continue
        if str(header.get("SOPClassUID", "")) != _SLIDES:
            kept.append(path)
        elif "VOLUME" in header.get("ImageType", []):
            series, width = str(header.get("SeriesInstanceUID", path)), int(header.get("TotalPixelMatrixColumns") or 0)
            rank = (-width, int(header.get("InConcatenationNumber") or 0), path.name)
            if series not in best:
                kept.append(series)
            best[series] = min(best.get(series, (rank, path)), (rank, path))
    return [best[item][1] if isinstance(item, str) else item for item in kept]


def series_of(path: Path) -> str:
    """The series that a DICOM file of a slide is of; "" of other files.

    >>> series_of(slide_path)
    ''
    """
    header = _header(path) if path.suffix.lower() == SUFFIX else None
    slide = header is not None and str(header.get("SOPClassUID", "")) == _SLIDES
    return str(header.get("SeriesInstanceUID", path)) if slide else ""


def beside_slide(path: Path) -> str:
    """What a DICOM file of a slide is that is none of its levels, as LABEL or OVERVIEW; "" of other files.

    >>> beside_slide(slide_path)
    ''
    """
    header = _header(path) if path.suffix.lower() == SUFFIX else None
    if header is None or str(header.get("SOPClassUID", "")) != _SLIDES:
        return ""
    kinds = [str(part) for part in header.get("ImageType", [])]
    return "" if "VOLUME" in kinds else (kinds[2:3] or ["picture"])[0]


def why_no_slide(path: Path) -> str:
    """Why a DICOM file is no slide, to follow its name; "" of other files.

    >>> why_no_slide(slide_path)
    ''
    """
    with path.open("rb") as file:
        if file.read(132)[128:] != b"DICM" or not (header := _header(path)):
            return ""
    kind = " ".join(str(part) for part in header.get("ImageType", []))
    if str(header.get("SOPClassUID", "")) == _SLIDES:
        return f"is a DICOM file of a slide ({kind}) that OpenSlide cannot read"
    held = f"modality {header.get('Modality') or 'unknown'}{f', {kind}' if kind else ''}"
    return f"is a DICOM file but no slide ({held}); whole-slide series (VL Whole Slide Microscopy) are read"


def _header(path: Path) -> Any:
    """The part of a DICOM header that is asked for here; None where the file has none."""
    from pydicom import dcmread
    from pydicom.filereader import read_file_meta_info

    try:
        if read_file_meta_info(path).get("TransferSyntaxUID") == _DEFLATED:
            return None  # pydicom would unpack all of it at once
        return dcmread(path, stop_before_pixels=True, specific_tags=_TAGS)
    except Exception:  # of damaged ones, whatever it stumbles over
        return None
