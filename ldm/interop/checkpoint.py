"""Weights from files that others made, read without running anything in them.

Pickles are data here: while one is read, every class or function that it names is an inert stand-in, but for
containers and numbers. Tensors become placeholders, and real ones, mapped from the file, when the pickle is read.
"""

from __future__ import annotations

import math
import mmap
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ldm.errors import UserError
from ldm.foreign.budget import in_words, plausible
from ldm.foreign.paths import allowed
from ldm.foreign.pickles import Stream, check_pickle
from ldm.interop.forms import SINGLE, check_form, file_of, shards_of, unwrapped, weights_in
from ldm.interop.pickled_arrays import Array, Kind, latin1, number

HEADER = 1 << 23  # bytes of the names and shapes of tensors
SHARED = 8  # times that the values of a file may be told anew, as of weights that parts of a model share
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # begins what torch wrote before 1.6
ZIP_MAGIC = b"PK\x03\x04"
STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128, "ComplexFloatStorage": torch.complex64, "UntypedStorage": torch.uint8,
}  # fmt: skip
NO_CHECKPOINT = {  # how files begin that are often found in a checkpoint's place
    b"version https://git-lfs": "is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`",
    b"<": "is a web page, not a checkpoint: its download needs another link, or a login",
    b"\x1f\x8b": "is a gzip archive; unpack it first",
}


class Inert:
    """What stands for an object of a class that is not known: it holds nothing and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Inert:
        return Inert()

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def _ignore(self, *args: Any) -> None:
        pass

    __setstate__ = __setitem__ = append = extend = add = _ignore


def read_checkpoint(path: str | Path, lora: bool = False) -> Any:
    """The content of a .safetensors file or of a torch file of any age: containers, plain values, tensors on the CPU.

    Tensors are mapped from the file, not copied, wherever it is laid out for that. Other objects are `Inert`. Of a
    folder the file of weights in it is read, of an index all its shards. Names are those of the model itself: what
    torch.compile, DataParallel and Lightning's strategies put before them is left out.
    UserError: no such file, a damaged or truncated one, another kind of file, weights that are not whole.
    lora: those of an adapter, which changes a model that is not in it, will do.

    >>> torch.save({"state_dict": {"weight": torch.ones(2)}, "date": Path("now")}, "model.ckpt")
    >>> content = read_checkpoint("model.ckpt")
    >>> content["state_dict"], type(content["date"]).__mro__[1].__name__
    ({'weight': tensor([1., 1.])}, 'Inert')
    """
    path = allowed(path)
    if path.is_dir():
        path = file_of(path) or path / SINGLE[0]
    if not path.is_file():
        raise UserError(f"the checkpoint {path} does not exist.")
    content = _sharded(path) if path.name.endswith(".index.json") else _read(path)
    if not lora:
        check_form(content, path)
    return unwrapped(content)


def _sharded(index: Path) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for path, names in shards_of(index).items():
        content |= _read(path)
        if lost := [name for name in names if name not in content]:
            raise UserError(f"{index} says that {path.name} holds {lost[0]}, which it lacks; copy the folder anew.")
    return content


def _read(path: Path) -> Any:
    try:
        with path.open("rb") as stream:
            start = stream.read(64)
            if start.startswith(ZIP_MAGIC):
                return _read_zip(path, stream)
            if _is_safetensors(path, start):
                _check_header(path, start)
                return load_file(path)
            for beginning, what in NO_CHECKPOINT.items():
                if start.startswith(beginning):
                    raise UserError(f"{path} {what}.")
            return _read_legacy(path, stream)
    except UserError:
        raise
    except (SafetensorError, zipfile.BadZipFile, EOFError, struct.error) as error:
        raise UserError(f"cannot read {path}: it is truncated or damaged ({_reason(error)}).") from error
    except Exception as error:  # a pickle may ask for anything, and fail in as many ways
        raise UserError(f"cannot read {path} as a checkpoint: {_reason(error)}.") from error


def _is_safetensors(path: Path, start: bytes) -> bool:
    """Whether a file is one of safetensors by its content, whatever its name; or by its name, if it is no pickle."""
    size = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" and size <= path.stat().st_size:
        return True
    other = (b"\x80", *NO_CHECKPOINT)
    return path.suffix == ".safetensors" and not start.startswith(other)


def _check_header(path: Path, start: bytes) -> None:
    """UserError for a .safetensors with so many names that to find each among all takes an hour."""
    size = int.from_bytes(start[:8], "little")
    if HEADER < size <= path.stat().st_size:  # else it is damaged
        raise UserError(f"{path} begins with names of {in_words(size)}; those of no model take more than 8 MB.")


def state_dict_of(content: Any, path: str | Path) -> dict[str, Tensor]:
    """The named tensors of a checkpoint's content, which may lie in its `state_dict`. UserError: there are none.

    >>> state_dict_of({"state_dict": {"weight": torch.ones(1)}, "epoch": 3}, "model.ckpt")
    {'weight': tensor([1.])}
    """
    state = weights_in(content)
    if tensors := {name: v for name, v in state.items() if isinstance(name, str) and isinstance(v, Tensor)}:
        return tensors
    if isinstance(content, Inert):
        kind = type(content)
        what = f"a pickled object of the class {kind.__module__}.{kind.__qualname__}, which only its own code can read"
        raise UserError(f"{path} holds {what}; save its state_dict() there.")
    raise UserError(f"{path} holds no weights; a checkpoint has a state_dict of named tensors.")


class _StorageType(NamedTuple):
    dtype: torch.dtype


class _Storage(NamedTuple):
    dtype: torch.dtype
    key: str
    offset: int  # in elements
    count: int


class _Placeholder:
    """A tensor that the pickle describes."""

    __slots__ = ("dtype", "offset", "size", "storage", "stride")

    def __init__(self, storage: _Storage, offset: int, size: tuple, stride: tuple, dtype: torch.dtype | None = None):
        numbers = (offset, *size, *stride)
        if not isinstance(storage, _Storage) or len(size) != len(stride):
            raise pickle.UnpicklingError("it holds a tensor in a form that is not known")
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise pickle.UnpicklingError("it holds a tensor of impossible shape")
        self.storage, self.offset, self.size, self.stride = storage, offset, size, stride
        self.dtype = dtype or storage.dtype

    def __setstate__(self, state: Any) -> None:
        pass


class _Dict(dict):
    """A mapping of any class."""

    def __setstate__(self, state: Any) -> None:
        pass


class _Function:
    """A function that a pickle may call. Nothing can be set on it."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]):
        object.__setattr__(self, "_call", call)

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"it sets '{name}' of a function")


def _first(data: Any = None, *_: Any) -> Any:
    return data


def _mapping(*args: Any) -> _Dict:
    """defaultdict(factory, content), Counter(content)."""
    return _Dict(args[-1]) if args and isinstance(args[-1], dict) else _Dict()


def _of_type(function: Any = None, _type: Any = None, args: Any = (), *_: Any) -> Any:
    return function(*args) if isinstance(function, _Function) else Inert()


KNOWN: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor"): _Function(lambda *given: _Placeholder(*given[:4])),
    ("torch._utils", "_rebuild_tensor_v2"): _Function(lambda *given: _Placeholder(*given[:4])),
    ("torch._utils", "_rebuild_tensor_v3"): _Function(lambda *given: _Placeholder(*given[:4], given[6])),
    ("torch._utils", "_rebuild_parameter"): _Function(_first),
    ("torch._utils", "_rebuild_parameter_with_state"): _Function(_first),
    ("torch._tensor", "_rebuild_from_type_v2"): _Function(_of_type),
    ("collections", "OrderedDict"): _Dict,
    ("collections", "defaultdict"): _Function(_mapping),
    ("collections", "Counter"): _Function(_mapping),
    ("_codecs", "encode"): _Function(latin1),
    ("numpy", "dtype"): _Function(Kind),
    **{
        (f"numpy.{core}.multiarray", name): _Function(made)
        for core in ("core", "_core")
        for name, made in (("_reconstruct", Array), ("scalar", number))
    },
    **{(module, "complex"): complex for module in ("builtins", "__builtin__")},
}
COPIED = {  # containers made of others, whose entries are counted
    ("torch", "Size"): tuple,
    **{
        (module, kind.__name__): kind
        for module in ("builtins", "__builtin__")
        for kind in (set, frozenset, list, dict, tuple)
    },
}


class _Unpickler(pickle.Unpickler):
    """Reads a pickle whose every global is one of KNOWN or COPIED, a dtype, a kind of storage, or inert."""

    def __init__(self, stream: Stream):
        self.left = 100 * check_pickle(stream)  # entries that are copied from one container to another
        super().__init__(stream, encoding="latin1")
        self.inert: dict[tuple[str, str], type[Inert]] = {}
        self.dtypes: dict[str, torch.dtype] = {}  # of the storages, by key

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in KNOWN:
            return KNOWN[module, name]
        if (module, name) in COPIED:
            return _Function(partial(self.copied, COPIED[module, name]))
        if module.partition(".")[0] == "torch":
            if name in STORAGES:
                return _StorageType(STORAGES[name])
            if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
                return dtype
        if (module, name) not in self.inert:
            self.inert[module, name] = type(name, (Inert,), {"__module__": module})
        return self.inert[module, name]

    def copied(self, kind: type, *given: Any) -> Any:
        self.left -= sum(len(value) for value in given if hasattr(value, "__len__"))
        if self.left < 0:
            raise pickle.UnpicklingError("it copies itself to exhaust the machine")
        return kind(*given)

    def persistent_load(self, identity: Any) -> Any:
        kind, *given = identity
        if kind == "module":  # a class with its source, of old versions
            return given[0]
        storage, key, _, count, *view = given
        if kind != "storage" or not isinstance(storage, _StorageType) or type(count) is not int or count < 0:
            raise pickle.UnpicklingError("it refers to something that is no tensor")
        self.dtypes[str(key)] = storage.dtype
        offset, count = (int(view[0][1]), int(view[0][2])) if view and view[0] is not None else (0, count)
        return _Storage(storage.dtype, str(key), offset, count)


def _read_zip(path: Path, stream: IO[bytes]) -> Any:
    with zipfile.ZipFile(stream) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            inside = ", ".join(list(entries)[:4])
            raise UserError(f"{path} is a zip archive that holds {inside}; unpack it and give the checkpoint in it.")
        root = pickles[0].removesuffix("data.pkl")
        if root + "constants.pkl" in entries:
            raise UserError(f"{path} is a TorchScript program; give a file with its state dict.")
        if any(info.compress_type != zipfile.ZIP_STORED for info in entries.values()):
            raise UserError(f"{path} is a compressed archive, not as torch saves it; load and save it with torch.")
        if root + "byteorder" in entries and archive.read(root + "byteorder") != b"little":
            raise UserError(f"{path} was written on a big-endian machine; save it again on another.")
        with archive.open(pickles[0]) as inner:
            content = _Unpickler(inner).load()

    places = {}
    for name, info in entries.items():
        if name.startswith(root + "data/"):
            stream.seek(info.header_offset + 26)
            name_length, extra = struct.unpack("<HH", stream.read(4))
            start = info.header_offset + 30 + name_length + extra
            places[name.removeprefix(root + "data/")] = (start, info.file_size)
    return _Filled(path, places).fill(content)


def _read_legacy(path: Path, stream: IO[bytes]) -> Any:
    """One pickle after the other (magic number, version, system, content, keys), then the storages."""
    stream = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)  # which gives no more than there is
    try:
        magic = _Unpickler(stream).load()
    except Exception as error:
        raise UserError(f"cannot read {path}: it is no file of torch; give a .ckpt, .pt or .safetensors.") from error
    if magic != LEGACY_MAGIC:
        raise UserError(f"{path} is a pickle that torch.save did not write; load it with its code, and save it so.")
    _Unpickler(stream).load()
    system = _Unpickler(stream).load()
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise UserError(f"{path} was written on a big-endian machine; save it again on another.")
    reader = _Unpickler(stream)
    content = reader.load()
    places = {}
    for key in _Unpickler(stream).load():
        (count,) = struct.unpack("<q", stream.read(8))
        size = count * reader.dtypes[key].itemsize
        places[key] = (stream.tell(), size)
        if not 0 <= size <= len(stream) - stream.tell():
            raise EOFError(f"storage {key} ends beyond the file")
        stream.seek(size, 1)
    return _Filled(path, places).fill(content)


class _Filled:
    """A pickle's content with tensors in place of placeholders; `places` are start and size of storages in the file."""

    def __init__(self, path: Path, places: Mapping[str, tuple[int, int]]):
        self.path, self.length = path, path.stat().st_size
        self.file = torch.UntypedStorage.from_file(str(path), False, self.length)
        self.places = places
        self.storages: dict[str, torch.UntypedStorage] = {}
        self.told = 0  # bytes that its tensors would take
        self.seen: dict[int, Any] = {}

    def fill(self, value: Any) -> Any:
        if id(value) in self.seen:
            return self.seen[id(value)]
        if isinstance(value, _Placeholder):
            return self.seen.setdefault(id(value), self.tensor(value))
        if isinstance(value, dict):
            filled: Any = self.seen.setdefault(id(value), {})
            filled.update((self.fill(key), self.fill(child)) for key, child in value.items())
            return filled
        if type(value) is list:
            filled = self.seen.setdefault(id(value), [])
            filled.extend(self.fill(child) for child in value)
            return filled
        if type(value) is tuple:
            return self.seen.setdefault(id(value), tuple(self.fill(child) for child in value))
        if isinstance(value, Array):
            return value.value
        return None if isinstance(value, (_Function, _StorageType, _Storage, Kind)) else value

    def tensor(self, given: _Placeholder) -> Tensor:
        if 0 in given.size:
            return torch.empty(given.size, dtype=given.dtype)
        storage, item = self.storage(given), given.dtype.itemsize
        first = given.storage.offset * given.storage.dtype.itemsize // item + given.offset
        last = first + sum((count - 1) * step for count, step in zip(given.size, given.stride))
        if (last + 1) * item > storage.nbytes():
            raise EOFError("a tensor reaches beyond its storage")
        self.told += math.prod(given.size) * item  # of a stride of 0, or of one storage for many, more than there is
        plausible(self.told, self.length, f"the tensors in {self.path}", SHARED)
        return torch.empty(0, dtype=given.dtype).set_(storage, first, given.size, given.stride)

    def storage(self, given: _Placeholder) -> torch.UntypedStorage:
        key = given.storage.key
        if key not in self.storages:
            if key not in self.places:
                raise EOFError(f"storage {key} is missing")
            start, size = self.places[key]
            if start + size > self.length:
                raise EOFError(f"storage {key} ends beyond the file")
            part = self.file[start : start + size]
            self.storages[key] = part if start % given.dtype.itemsize == 0 else part.clone()
        return self.storages[key]


def _reason(error: Exception) -> str:
    text = str(error).splitlines()[0] if str(error) else ""
    return text.rstrip(".") or type(error).__name__
