"""Copies of slides on a local disk, made ahead of their reading and removed after it."""

from __future__ import annotations

import hashlib
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from data_prep.engine import KEPT
from ldm.data.tile_store import is_finished
from ldm.errors import UserError
from ldm.files import remove, whole

_WITH_FOLDER = (".mrxs", ".vms", ".vmu", ".dcm")  # slides of more than one file


def fetch(path: Path, cache: Path, unless: Path | None = None) -> dict[str, Any]:
    """Copy a slide into the folder `cache`, all of its files; nothing where the store `unless` is finished.

    >>> fetch(slide_path, Path("near"))["bytes"] == slide_path.stat().st_size
    True
    """
    if unless is not None and is_finished(unless):
        return {"state": KEPT}
    room = _room(path, cache)
    if (room / path.name).exists():
        return {"state": KEPT}
    try:
        room.parent.mkdir(parents=True, exist_ok=True)
        with whole(room) as part:
            part.mkdir()
            for own in parts_of(path):
                (shutil.copytree if own.is_dir() else shutil.copy2)(own, part / own.name)
    except OSError as error:
        raise UserError(f"cannot copy {path} to {cache}: {error.strerror or error}") from None
    return {"bytes": sum(file.stat().st_size for file in room.rglob("*") if file.is_file())}


def parts_of(path: Path) -> list[Path]:
    """Files and folders that make a slide: those beside it of MIRAX, Hamamatsu VMS and DICOM too.

    >>> parts_of(slide_path) == [slide_path]
    True
    """
    suffix = path.suffix.lower()
    if suffix == ".mrxs":
        return [path, path.with_suffix("")]
    if suffix == ".dcm":
        return sorted(path.parent.glob("*.dcm"))
    if suffix in _WITH_FOLDER:
        return sorted(path.parent.iterdir())
    return [path]


def _room(path: Path, cache: Path) -> Path:
    place = hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:12]
    return cache / f"histoldm-{place}"


class Fetched(AbstractContextManager):
    """The slide's copy in `cache` where there is one, which is removed at the end; else the slide itself."""

    def __init__(self, path: Path, cache: Path | None) -> None:
        self.path, self.room = path, None if cache is None else _room(path, cache)

    def __enter__(self) -> Path:
        near = None if self.room is None else self.room / self.path.name
        return near if near is not None and near.exists() else self.path

    def __exit__(self, *_: object) -> None:
        if self.room is not None:
            remove(self.room)
