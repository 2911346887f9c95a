"""The error that a user's mistake raises, and the place where commands turn it into a message."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from difflib import get_close_matches
from io import TextIOWrapper

from tqdm import tqdm

LISTED = 25  # most names that a message lists
UNREAD = 141  # exit code where nobody reads the output, as shells tell it of a program that SIGPIPE ends
_REFUSED = {  # by the system, whatever a command wants of the file -> what to do
    errno.ENAMETOOLONG: "give a shorter name: 255 bytes at most, with what is added to it",
    errno.EACCES: "allow it, or give another place",
    errno.EPERM: "allow it, or give another place",
    errno.EROFS: "give a place on another disk",
    errno.ELOOP: "correct the links that lead to one another",
    errno.ENOTDIR: "a part of that path is a file; correct it",
    errno.EISDIR: "give a file",
    errno.EIO: "its disk has errors, or is gone",
    errno.ESTALE: "its disk is gone; mount it again",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the machine's limit of open files",
}
_WORKER = re.compile(r"^(?:[A-Za-z_]\w*\.)+[A-Za-z_]\w*: ", re.MULTILINE)  # how a traceback names its error
_UNDECODED = re.compile(r"[^\s\"'<>:]*[\udc80-\udcff][^\s\"'<>:]*")  # part of a name, with bytes that are not UTF-8
_COMMANDS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")  # to a terminal
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
        tqdm.write(f"note: {printable(text)}", file=sys.stderr)


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


def _of_worker(text: str) -> str:
    """What an error says, without the traceback that torch puts before it where a worker of a DataLoader raised it."""
    return _WORKER.split(text)[-1].rstrip() if text.startswith("Caught ") else text


def _told_by_system(error: Exception) -> str:
    """What is to be said of an error by which the system refuses a file, or its name; "" of others."""
    if _disk_full(error):
        path = getattr(error, "filename2", None) or getattr(error, "filename", None)  # a copy has both
        return f"the disk is full{f' ({path})' if path else ''}; make room and run the same command again."
    if isinstance(error, OSError) and error.errno in _REFUSED and error.filename is not None:
        return f"{error.filename}: {error.strerror}; {_REFUSED[error.errno]}."
    if isinstance(error, UnicodeEncodeError):
        return _no_text(error.object)
    return ""


def _no_text(text: str) -> str:
    """What is to be said of a text with bytes of a name that are not UTF-8; "" where there are none."""
    if (name := _UNDECODED.search(text)) is None:
        return ""
    return f"the name {name[0]!r} is not UTF-8, in which names are recorded; rename that file or folder."


def printable(text: object) -> str:
    r"""A text of others as a terminal may show it: what would move its cursor, or be no letter, as escapes.

    >>> print(printable("tiles \x1b[2J of\n0.5 um \udce9"))
    tiles \x1b[2J of
    0.5 um \udce9
    """
    return _COMMANDS.sub(lambda found: ascii(found[0])[1:-1], str(text))


def _unread() -> bool:
    """Whether what read the output of this process has gone; from then on none is written."""
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def run_command(command: Callable[[], object]) -> int:
    """Run the body of a command and return its exit code: 0, or 130 after Ctrl-C.

    A UserError, a full disk, and a file or name that the system refuses, are printed to stderr as one line, with exit
    code 2; other errors are raised. Where nobody reads its output any more (`| head`), it ends with UNREAD, and says
    nothing. Names on the command line are UTF-8, since most files that are written hold them.

    >>> def command():
    ...     raise UserError("there is no such file")
    >>> run_command(command)
    2
    """
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: names of files may be no text
    try:
        if told := next(filter(None, map(_no_text, sys.argv[1:])), ""):
            raise UserError(told)
        try:
            command()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # what is left of it, while an error of it is still caught
    except BrokenPipeError:
        if not _unread():
            raise
        return UNREAD
    except KeyboardInterrupt:
        print("stopped; run the same command again to continue.", file=sys.stderr)
        return 130
    except Exception as error:
        told = _of_worker(str(error)) if isinstance(error, UserError) else _told_by_system(error)
        if not told:
            raise
        print(f"error: {printable(told)}", file=sys.stderr)
        return 2
    return 0
