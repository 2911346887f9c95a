"""NumPy's arrays and numbers in pickles, made of what is written there and of nothing else."""

from __future__ import annotations

import pickle
import re
from typing import Any

import numpy as np


class Kind:
    """A dtype that a pickle describes: of plain numbers, truth values and texts, or of objects, which are not read."""

    def __init__(self, code: Any = "", *_: Any):
        if not isinstance(code, str) or not re.fullmatch(r"[biufcSU]\d+|O8?", code):
            raise pickle.UnpicklingError(f"it holds an array of the kind {str(code)[:20]!r}, which is not read")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        if order in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(order)


class Array:
    """An array that a pickle describes; `value` is empty until its bytes come. Of objects it stays empty."""

    def __init__(self, *_: Any):
        self.value = np.empty(0, np.uint8)

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, columns_first, raw = state
        if not isinstance(kind, Kind):
            raise pickle.UnpicklingError("it holds an array in a form that is not known")
        if kind.dtype.hasobject:
            self.value = np.empty(0, object)
            return
        if not isinstance(raw, bytes):
            raise pickle.UnpicklingError("it holds an array without its values")
        self.value = np.frombuffer(raw, kind.dtype).reshape(shape, order="F" if columns_first else "C")


def number(kind: Any, raw: Any = None) -> Any:
    """A number of NumPy's.

    >>> number(Kind("f4"), np.float32(1.5).tobytes())
    np.float32(1.5)
    """
    if not isinstance(kind, Kind) or kind.dtype.hasobject or not isinstance(raw, bytes):
        raise pickle.UnpicklingError("it holds a number in a form that is not known")
    return np.frombuffer(raw, kind.dtype)[0]


def latin1(text: Any = "", *_: Any) -> bytes:
    """Bytes as protocols before 3 write them.

    >>> latin1("a\\xff", "latin1")
    b'a\\xff'
    """
    if not isinstance(text, str):
        raise pickle.UnpicklingError("it holds bytes in a form that is not known")
    return text.encode("latin1")
