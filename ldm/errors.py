"""The one error a user's mistake raises, and the one place where commands turn it into a message."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches

LISTED = 25  # names that a message lists


class UserError(ValueError):
    """A mistake in what the user gave. The message says what was given, what is allowed and what to do."""


def suggest(given: str, known: Iterable[str]) -> str:
    """`given` and its nearest known name, as the end of an error message: "; did you mean 'x'? Known: ..."."""
    known = sorted(str(name) for name in known)
    listed = ", ".join(known[:LISTED]) or "(none)"
    return f"{nearest(given, known)} Known: {listed}{', ...' if len(known) > LISTED else '.'}"


def nearest(given: str, known: Iterable[str]) -> str:
    """The nearest known name to `given`, as the end of a sentence; a full stop where none is near.

    >>> nearest("demo/sll", ["demo/ssl", "demo/text"])
    "; did you mean 'demo/ssl'?"
    """
    near = get_close_matches(str(given), list(known), n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else "."


def some(names: Sequence[str], shown: int = LISTED) -> str:
    """The first `shown` of several names, and ", ..." if there are more."""
    return ", ".join(names[:shown]) + (", ..." if len(names) > shown else "")


def disk_full(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is that a disk is full: of Python, or as torch and safetensors tell it."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        told = ("No space left on device", "os error 28", "file write failed", "unexpected pos")
        if any(words in str(error) for words in told):
            return True
        error = error.__cause__ or error.__context__
    return False


def run_command(command: Callable[[], object]) -> int:
    """Run a command line's body. A UserError, and a full disk, become one line on stderr and exit code 2, Ctrl-C exit
    code 130."""
    try:
        command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; run the same command again to continue.", file=sys.stderr)
        return 130
    except Exception as error:
        if not disk_full(error):
            raise
        path = getattr(error, "filename2", None) or getattr(error, "filename", None)  # of a copy the second one
        place = f" ({path})" if path else ""
        print(f"error: the disk is full{place}; make room and run the same command again.", file=sys.stderr)
        return 2
    return 0
