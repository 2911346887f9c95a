"""Finds out before any work starts whether a file is empty, holds text, is a TIFF (SVS, ...) that was cut short, or a
JPEG that is drawn over and over."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from pathlib import Path

from ldm.errors import UserError

_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_OFFSETS, _COUNTS = (273, 324), (279, 325)  # strips, tiles
_NUMBERS = (256, 257, 277, 278, 284, 322, 323)  # width, height, samples, rows per strip, planes, tile's sides
_WHOLE = {3: "H", 4: "I", 16: "Q"}
_NDPI_TAG = 65420  # NDPI keeps the high half of its offsets elsewhere: OpenSlide's business
_MAX_DIRECTORIES = 4096
_JPEG = b"\xff\xd8\xff"
_PASS = re.compile(rb"\xff\xda\x00(?:\x08\x01|\x0a\x02|\x0c\x03|\x0e\x04)")  # of one to four colours
_MOST_PASSES = 200  # of a progressive JPEG, which has about ten


def refuse_damaged(path: Path) -> None:
    """UserError for empty files, text files, TIFF files that point beyond their end and JPEG files of too many passes.

    >>> _ = Path("a.tif").write_text("404: not found")
    >>> refuse_damaged(Path("a.tif"))
    Traceback (most recent call last):
    ldm.errors.UserError: a.tif holds text, not an image; it begins with '404: not found'
    """
    try:
        head = path.open("rb").read(512)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if not head:
        raise UserError(f"{path} is empty (0 bytes); copy it again from its source")
    lists = path.suffix.lower() in (".vms", ".vmu")  # Hamamatsu's text files that name the images of a slide
    if not lists and b"\0" not in head and all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head):
        start = head.decode().split("\n")[0][:60]
        raise UserError(f"{path} holds text, not an image; it begins with '{start}'")
    if head.startswith(_JPEG) and (passes := sum(1 for _ in _PASS.finditer(path.read_bytes()))) > _MOST_PASSES:
        raise UserError(f"{path} is drawn in {passes} passes over all of it, a JPEG of a camera or a program in ten")
    if missing := missing_bytes(path):
        raise UserError(
            f"{path} was cut short at {path.stat().st_size} bytes ({missing}); copy it again from its source"
        )


def missing_bytes(path: Path | str) -> str:
    """What the TIFF at `path` points to beyond its end, in words; "" when nothing is missing or it is no TIFF.

    Walks the chain of directories and checks each one's tag values, strips and tiles against the size of the file.

    >>> _ = Path("cut.svs").write_bytes(slide_path.read_bytes()[:-1000])
    >>> missing_bytes(slide_path), missing_bytes("cut.svs")
    ('', 'directory 3 should be at byte 1938212')
    """
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(16)
        if head[:2] not in (b"II", b"MM") or len(head) < 8:
            return ""
        order = "<" if head[:2] == b"II" else ">"
        magic = struct.unpack(order + "H", head[2:4])[0]
        if magic not in (42, 43) or (magic == 43 and len(head) < 16):
            return ""
        big = magic == 43
        word, entry_bytes, count_format = ("Q", 20, "Q") if big else ("I", 12, "H")
        word_bytes, count_bytes = struct.calcsize(word), struct.calcsize(count_format)
        offset = struct.unpack(order + word, head[8:16] if big else head[4:8])[0]
        for directory in range(_MAX_DIRECTORIES):
            if offset == 0:
                return ""
            if offset + count_bytes > size:
                return f"directory {directory} should be at byte {offset}"
            file.seek(offset)
            entries = struct.unpack(order + count_format, file.read(count_bytes))[0]
            if offset + count_bytes + entries * entry_bytes + word_bytes > size:
                return f"directory {directory} at byte {offset} is cut off"
            body = file.read(entries * entry_bytes + word_bytes)
            data: dict[int, tuple[int, ...]] = {}
            numbers: dict[int, int] = {}
            for i in range(entries):
                entry = body[i * entry_bytes : (i + 1) * entry_bytes]
                tag, kind, count = struct.unpack(order + "HH" + word, entry[: 4 + word_bytes])
                value_bytes = _TYPE_BYTES.get(kind, 1) * count
                if tag == _NDPI_TAG:
                    return ""
                value = entry[4 + word_bytes :]
                if value_bytes > word_bytes:
                    start = struct.unpack(order + word, value)[0]
                    if start + value_bytes > size:
                        return f"tag {tag} of directory {directory} should be at byte {start}"
                    if tag in (*_OFFSETS, *_COUNTS):
                        here = file.tell()
                        file.seek(start)
                        value = file.read(value_bytes)
                        file.seek(here)
                if tag in _NUMBERS and count == 1 and kind in _WHOLE:
                    numbers[tag] = struct.unpack_from(order + _WHOLE[kind], value)[0]
                if tag in (*_OFFSETS, *_COUNTS):
                    letter = {3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}.get(kind)
                    if letter is None:
                        return f"the places of the pixels of directory {directory} are no whole numbers"
                    data[tag] = struct.unpack(f"{order}{count}{letter}", value[:value_bytes])
            for offsets, counts in zip(_OFFSETS, _COUNTS):
                ends = (o + c for o, c in zip(data.get(offsets, ()), data.get(counts, ())) if c)
                end = max(ends, default=0)
                if end > size:
                    return f"pixels of directory {directory} should reach byte {end}"
            if lacking := _lacking_parts(numbers, data):
                return f"directory {directory} {lacking}"
            offset = struct.unpack(order + word, body[-word_bytes:])[0]
    return ""


def _lacking_parts(numbers: Mapping[int, int], data: Mapping[int, tuple[int, ...]]) -> str:
    """What a directory lacks that lists fewer strips or tiles than its size takes; "" of others."""
    width, height = numbers.get(256, 0), numbers.get(257, 0)
    tiled = _OFFSETS[1] in data
    listed = len(data.get(_OFFSETS[tiled], ()))
    if not listed or not width or not height:
        return ""
    wide, tall = (numbers.get(322, 0), numbers.get(323, 0)) if tiled else (width, numbers.get(278, height))
    planes = numbers.get(277, 1) if numbers.get(284) == 2 else 1
    needed = planes * -(-width // (wide or width)) * -(-height // (tall or height))
    if needed <= listed:
        return ""
    return f"is {width} x {height} px in {needed} {'tiles' if tiled else 'strips'}, of which it lists {listed}"
