"""Pickles that others wrote, looked through before they are read: what they ask to be allocated is in them."""

from __future__ import annotations

import pickle
import pickletools
from typing import Protocol

_MEMO = ("PUT", "BINPUT", "LONG_BINPUT")


class Stream(Protocol):
    """What is needed of a stream: of bytes, with a place in it."""

    def read(self, size: int, /) -> bytes: ...

    def readline(self) -> bytes: ...

    def tell(self) -> int: ...

    def seek(self, place: int, /) -> object: ...


def check_pickle(stream: Stream) -> int:
    """How many operations a pickle has; the stream stays where it is.

    pickle.UnpicklingError: it is cut short, or would have more allocated than it holds, as by a text of 2^40 bytes or a
    place in the memory of Python's unpickler that it never comes to.

    >>> import io
    >>> check_pickle(io.BytesIO(pickle.dumps([1, 2]))) > 3
    True
    >>> check_pickle(io.BytesIO(b"\\x80\\x04]r\\xff\\xff\\xff\\x7f."))
    Traceback (most recent call last):
    _pickle.UnpicklingError: it asks for memory that it has no use for
    """
    place, count = stream.tell(), 0
    try:
        for operation, argument, _ in pickletools.genops(stream):
            count += 1
            if operation.name in _MEMO and argument > count:
                raise pickle.UnpicklingError("it asks for memory that it has no use for")
    except (ValueError, OverflowError, IndexError) as error:  # a length that it does not have, an unknown operation
        raise pickle.UnpicklingError(f"it is no whole pickle ({str(error).splitlines()[0]})") from None
    stream.seek(place)
    return count
