"""Ways to damage a file, drawn by a seeded generator: bytes of any file, and the values in those of known form."""

from __future__ import annotations

import copy
import io
import json
import struct
import zipfile
from collections.abc import Callable
from random import Random
from typing import Any

import yaml

Edit = Callable[[bytes, Random], tuple[str, bytes]]

NUMBERS = (
    0, 1, -1, 2, 3, 255, 256, 65535, 2**31 - 1, -(2**31), 2**31, 2**32 - 1, 2**63 - 1, 10**9, 10**30, 0.5, -0.5, 1e-300,
    1e308, float("inf"), float("-inf"), float("nan"),
)  # fmt: skip
TEXTS = (
    "", " ", "x", "x" * 300, "x" * 70_000, "0", "-1", "1e999", "nan", "../../etc/passwd", "/etc/passwd", "a/b", "\0",
    ".", "${oc.env:HOME}", "${model}", "é", "\ud800", "%s%n{0}", "true", "null", "2024-13-45", "os.system", "ldm",
    "torch.nn.Identity", "torch.nn.Linear", "torch.nn.functional.relu", "torch.optim.Adam", "ldm.config.ALLOWED",
    "ldm.files.whole", "ldm.networks.unet.UNetModel",
)  # fmt: skip
CELLS = (
    "", "0", "-1", "1e999", "nan", "x" * 5000, '"', '""', '"a', "a,b", "a\tb", "a\nb", "\0", "é", "TP53", "../x",
    "=1+1", "1,5", "[Not Available]", "'--", "99999999999999999999", "/etc/passwd", "#", "None", "2024-02-30", "²",
)  # fmt: skip
OTHERS = (
    b"", b"\0", b"\n", b"{}", b"[]", b"null", b"404: not found\n", b"<!DOCTYPE html><html>", b"\x1f\x8b\x08\x00",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", b"PK\x03\x04", b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff\xe0", b"II*\0\x08\0\0\0", b"MM\0+\0\x08\0\0\0\0\0\0\0\x10", b"\x89HDF\r\n\x1a\n",
    b"SQLite format 3\0", b"\x93NUMPY\x01\x00\x76\x00{", b"\x80\x02.", b"\xff\xfe\x00\x00", b"\xef\xbb\xbf",
    b"PAR1PAR1", b"\x5c\x01\0\0", bytes(1000), b"[" * 100_000, b"{" * 100_000, b"{'a': " * 3000, b"- " * 50_000,
    b"".join(b"%c: &%c [%s]\n" % (k, k, b"*%c," % (k - 1) * 9 if k > 97 else b"1") for k in b"abcdefghi"),
    b"9" * 5000,
    b"a: &a [*a]\n", b"-" * 70_000, b"a: 2024-13-45\n", b"a: !!bool x\n", b"? [1]\n: 2\n",
    b"!!python/object:os.system {}",
)  # fmt: skip


def damaged(name: str, data: bytes, draw: Random) -> tuple[str, bytes]:
    """What was done to the file called `name`, and its content after it."""
    edit = STRUCTURED.get(name.rpartition(".")[2].lower())
    if edit is not None and draw.random() < 0.6:
        try:
            return edit(data, draw)
        except (ValueError, RecursionError, yaml.YAMLError):  # a value that this form cannot say
            pass
    return in_bytes(data, draw)


# --- bytes ----------------------------------------------------------------------------------------------------------


def in_bytes(data: bytes, draw: Random) -> tuple[str, bytes]:
    """One of the ways to damage any file."""
    edits = (_cut, _cut, _flip, _flip, _flip, _write, _write, _write, _write, _swap, _drop, _repeat, _insert, _blank,
             _digits, _other)  # fmt: skip
    return draw.choice(edits)(data, draw)


def _place(data: bytes, draw: Random) -> int:
    """Anywhere, oftener near the beginning and the end, where headers and directories are."""
    last, kind = max(len(data) - 1, 0), draw.random()
    if kind < 0.3:
        return draw.randint(0, last)
    near = min(last, int(2 ** draw.uniform(0, 11)))
    return near if kind < 0.75 else last - near


def _cut(data: bytes, draw: Random) -> tuple[str, bytes]:
    at = _place(data, draw)
    return f"cut at {at} of {len(data)}", data[:at]


def _flip(data: bytes, draw: Random) -> tuple[str, bytes]:
    new, places = bytearray(data), []
    for _ in range(draw.choice((1, 1, 2, 8, 40))):
        if new:
            places.append(at := _place(data, draw))
            new[at] ^= 1 << draw.randrange(8)
    return f"bits at {places[:8]} flipped", bytes(new)


def _write(data: bytes, draw: Random) -> tuple[str, bytes]:
    at, size = _place(data, draw), draw.choice((1, 2, 4, 8))
    value = draw.choice((0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1))
    word = struct.pack(draw.choice("<>") + "Q", value)
    word = word[:size] if draw.random() < 0.5 else word[-size:]
    return f"{word.hex()} written at {at}", data[:at] + word + data[at + size :]


def _swap(data: bytes, draw: Random) -> tuple[str, bytes]:
    a, b = sorted((_place(data, draw), _place(data, draw)))
    size = min(draw.choice((1, 4, 16, 256, 4096)), b - a)
    return f"{size} bytes at {a} and {b} swapped", (
        data[:a] + data[b : b + size] + data[a + size : b] + data[a : a + size] + data[b + size :]
    )


def _drop(data: bytes, draw: Random) -> tuple[str, bytes]:
    at, size = _place(data, draw), draw.choice((1, 2, 8, 64, 1000))
    return f"{size} bytes at {at} dropped", data[:at] + data[at + size :]


def _repeat(data: bytes, draw: Random) -> tuple[str, bytes]:
    at, size = _place(data, draw), draw.choice((1, 2, 8, 64, 1000))
    return f"{size} bytes at {at} repeated", data[: at + size] + data[at:]


def _insert(data: bytes, draw: Random) -> tuple[str, bytes]:
    at, new = _place(data, draw), draw.randbytes(draw.choice((1, 2, 8, 64)))
    return f"{len(new)} bytes put in at {at}", data[:at] + new + data[at:]


def _blank(data: bytes, draw: Random) -> tuple[str, bytes]:
    at, size, value = _place(data, draw), draw.choice((2, 8, 64, 512)), draw.choice((b"\0", b"\xff"))
    return f"{size} bytes {value.hex()} at {at}", data[:at] + value * size + data[at + size :]


def _digits(data: bytes, draw: Random) -> tuple[str, bytes]:
    """A number that is written in digits becomes another one."""
    runs = [i for i in range(len(data[:20_000])) if data[i : i + 1].isdigit() and not data[i - 1 : i].isdigit()]
    if not runs:
        return _write(data, draw)
    at = end = draw.choice(runs)
    while data[end : end + 1].isdigit():
        end += 1
    new = str(draw.choice(NUMBERS)).encode()
    return f"{data[at:end].decode()} at {at} is {new.decode()}", data[:at] + new + data[end:]


def _other(data: bytes, draw: Random) -> tuple[str, bytes]:
    new = draw.choice(OTHERS)
    if draw.random() < 0.2:
        return f"{new[:20]!r} before it", new + data
    return f"it is {new[:20]!r} ({len(new)})", new


# --- values ---------------------------------------------------------------------------------------------------------


def in_tree(tree: Any, draw: Random, text_only: bool = True) -> tuple[str, Any]:
    """A copy of nested mappings and lists in which a few values are others, missing, or there twice."""
    tree, told = copy.deepcopy(tree), []
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        places = [place for place in _places(tree) if place]
        if not places:
            return "a value in place of all", _value(draw, text_only)
        place = draw.choice(places)
        told.append(_change(tree, place, places, draw, text_only))
    return "; ".join(told), tree


def _places(tree: Any, here: tuple = ()) -> list[tuple]:
    found, children = [here], ()
    if isinstance(tree, dict):
        children = tree.items()
    elif isinstance(tree, list):
        children = enumerate(tree[:50])
    for key, child in children:
        found += _places(child, (*here, key))
    return found


def _at(tree: Any, place: tuple) -> Any:
    for key in place:
        tree = tree[key]
    return tree


def _change(tree: Any, place: tuple, places: list[tuple], draw: Random, text_only: bool) -> str:
    *home, key = place
    holder, name = _at(tree, tuple(home)), ".".join(map(str, place))
    kind = draw.random()
    if kind < 0.2:
        del holder[key]
        return f"{name} is gone"
    if kind < 0.3 and isinstance(holder, dict):
        new = draw.choice(("", "x", "targte", "params", str(key) + "s", "target"))
        holder[new] = holder.pop(key)
        return f"{name} is called {new!r}"
    if kind < 0.4:
        other = copy.deepcopy(_at(tree, draw.choice(places)))
        holder[key] = other
        return f"{name} is {str(other)[:40]!r}, as elsewhere"
    if kind < 0.45:
        value = holder[key]
        for _ in range(draw.choice((1, 2, 70, 900))):
            value = [value] if draw.random() < 0.5 else {"a": value}
        holder[key] = value
        return f"{name} is nested"
    if kind < 0.55 and isinstance(holder, list):
        holder += holder * draw.choice((1, 3))
        return f"{name} stands there again"
    value = holder[key]
    if kind < 0.65 and isinstance(value, (int, float)) and not isinstance(value, bool):
        holder[key] = draw.choice((-value, value * 1000, value * 10**9, value / 7, value + 1, str(value)))
    else:
        holder[key] = _value(draw, text_only)
    return f"{name} is {str(holder[key])[:40]!r}"


def _value(draw: Random, text_only: bool) -> Any:
    kind = draw.random()
    if kind < 0.4:
        return draw.choice(NUMBERS)
    if kind < 0.75:
        return draw.choice(TEXTS)
    return draw.choice(({}, [], None, True, False, [[]], {"a": 1}, {"target": "x"}, [None], [1, 2, 3], ["a", "b"]))


def in_yaml(data: bytes, draw: Random) -> tuple[str, bytes]:
    how, tree = in_tree(yaml.safe_load(data), draw)
    return how, yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).encode()


def in_json(data: bytes, draw: Random) -> tuple[str, bytes]:
    how, tree = in_tree(json.loads(data), draw)
    return how, json.dumps(tree).encode()


def in_table(data: bytes, draw: Random) -> tuple[str, bytes]:
    """Cells, columns and rows of text tables."""
    text = data.decode()
    separator = "\t" if "\t" in text else ","
    rows = [line.split(separator) for line in text.split("\n")]
    told = []
    for _ in range(draw.choice((1, 1, 2, 5))):
        row = draw.choice((0, draw.randrange(len(rows))))
        column = draw.randrange(max(len(rows[row]), 1))
        new, kind = draw.choice(CELLS), draw.random()
        if kind < 0.45:
            rows[row][column : column + 1] = [new]
            told.append(f"cell {row},{column} is {new[:20]!r}")
        elif kind < 0.55:
            rows[row].insert(column, new)
            told.append(f"a cell {new[:20]!r} is put in at {row},{column}")
        elif kind < 0.65:
            del rows[row][column : column + 1]
            told.append(f"cell {row},{column} is gone")
        elif kind < 0.75:
            rows.insert(draw.randrange(len(rows)), list(rows[row]))
            told.append(f"row {row} is there twice")
        elif kind < 0.85 and len(rows) > 1:
            del rows[row]
            told.append(f"row {row} is gone")
        else:
            rows = [[*cells[:column], *cells[column + 1 :]] if draw.random() < 0.95 else cells for cells in rows]
            told.append(f"column {column} is gone")
        rows = rows or [[""]]
    text = draw.choice(("\n", "\n", "\n", "\r\n", "\r")).join(separator.join(cells) for cells in rows)
    return "; ".join(told), text.encode(draw.choice(("utf-8", "utf-8", "utf-8", "utf-16", "latin-1", "utf-8-sig")))


def in_torch(data: bytes, draw: Random) -> tuple[str, bytes]:
    """The content of a torch file, or the bytes of its pickle in a whole archive."""
    import torch

    if draw.random() < 0.5:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        name = draw.choice([name for name in entries if name.endswith(".pkl")] * 4 + list(entries))
        how, entries[name] = in_bytes(entries[name], draw)
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for entry, content in entries.items():
                archive.writestr(entry, content)
        return f"{name.rpartition('/')[2]}: {how}", buffer.getvalue()
    how, tree = in_tree(torch.load(io.BytesIO(data), weights_only=True), draw)
    if draw.random() < 0.3:
        how, tree = _tensor(tree, draw)
    buffer = io.BytesIO()
    torch.save(tree, buffer)
    return how, buffer.getvalue()


def _tensor(tree: Any, draw: Random) -> tuple[str, Any]:
    """One tensor of another shape, kind or value."""
    import torch

    places = [place for place in _places(tree) if isinstance(_at(tree, place), torch.Tensor)]
    if not places or not places[0]:
        return "a tensor of nothing", torch.zeros(draw.choice(((0,), (), (2, 0), (1, 1, 1, 1, 1))))
    *home, key = draw.choice(places)
    holder = _at(tree, tuple(home))
    old = holder[key]
    ways = {
        "of whole numbers": lambda: old.long(), "complex": lambda: old.float() + 1j, "empty": lambda: old.flatten()[:0],
        "flat": lambda: old.flatten(), "without end": lambda: old.float() * float("inf"), "half": lambda: old.half(),
        "of one value": lambda: torch.zeros(()), "turned": lambda: old.T if old.ndim == 2 else old[None],
        "of bool": lambda: old.bool(), "sparse": lambda: old.float().to_sparse(), "no tensor": lambda: [1, 2],
        "of no device": lambda: torch.empty(old.shape, device="meta"),
    }  # fmt: skip
    how = draw.choice(list(ways))
    holder[key] = ways[how]()
    return f"the tensor {key} is {how}", tree


STRUCTURED: dict[str, Edit] = {
    "yaml": in_yaml, "json": in_json, "csv": in_table, "tsv": in_table, "txt": in_table, "maf": in_table,
    "pt": in_torch, "ckpt": in_torch, "pth": in_torch,
}  # fmt: skip
