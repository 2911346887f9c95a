"""The error that a user's mistake raises, and the place where commands turn it into a message."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from difflib import get_close_matches

from tqdm import tqdm

LISTED = 25  # most names that a message lists
_NOTES: ContextVar[list[str] | None] = ContextVar("notes", default=None)


class UserError(ValueError):
    """A mistake in what the user gave. The message says what was given, what is allowed and what to do."""


def note(text: str) -> None:
    """Tell the user, on stderr, what the result may suffer from and what can be done; work goes on.

    >>> note("3 rows are empty and left out")
    """
    if (kept := _NOTES.get()) is not None:
        kept.append(text)
    else:
        tqdm.write(f"note: {text}", file=sys.stderr)


@contextmanager
def notes_kept() -> Iterator[list[str]]:
    """A context in which notes are kept in the list that it gives, and not told: whoever opens it tells them.

    >>> with notes_kept() as notes:
    ...     note("3 rows are empty")
    >>> notes
    ['3 rows are empty']
    """
    notes: list[str] = []
    token = _NOTES.set(notes)
    try:
        yield notes
    finally:
        _NOTES.reset(token)


def suggest(given: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the most similar known name, and the first LISTED of all known names.

    >>> suggest("unett", ["unet", "vae"])
    "; did you mean 'unet'? Known: unet, vae."
    """
    known = sorted(str(name) for name in known)
    listed = ", ".join(known[:LISTED]) or "(none)"
    return f"{nearest(given, known)} Known: {listed}{', ...' if len(known) > LISTED else '.'}"


def nearest(given: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: the most similar known name, or a full stop if none is similar.

    >>> nearest("demo/sll", ["demo/ssl", "demo/text"])
    "; did you mean 'demo/ssl'?"
    """
    near = get_close_matches(str(given), list(known), n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else "."


def some(names: Sequence[str], shown: int = LISTED) -> str:
    """The first `shown` names in one line, with ", ..." if there are more.

    >>> some(["a", "b", "c"], shown=2)
    'a, b, ...'
    """
    return ", ".join(names[:shown]) + (", ..." if len(names) > shown else "")


def _disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, means that a disk is full; Python, torch and safetensors each say it in
    their own way."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        told = ("No space left on device", "os error 28", "file write failed", "unexpected pos")
        if any(words in str(error) for words in told):
            return True
        error = error.__cause__ or error.__context__
    return False


def run_command(command: Callable[[], object]) -> int:
    """Run the body of a command and return its exit code: 0, or 130 after Ctrl-C.

    A UserError, or a full disk, is printed to stderr as one line, with exit code 2; other errors are raised.

    >>> def command():
    ...     raise UserError("there is no such file")
    >>> run_command(command)
    2
    """
    try:
        command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; run the same command again to continue.", file=sys.stderr)
        return 130
    except Exception as error:
        if not _disk_full(error):
            raise
        path = getattr(error, "filename2", None) or getattr(error, "filename", None)  # a copy has both
        place = f" ({path})" if path else ""
        print(f"error: the disk is full{place}; make room and run the same command again.", file=sys.stderr)
        return 2
    return 0
