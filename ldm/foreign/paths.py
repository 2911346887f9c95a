"""Where files may lie that others name: within the folder that they came in, whatever it names or links to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from ldm.errors import UserError

_WITHIN: ContextVar[tuple[Path, ...]] = ContextVar("within", default=())
OWN = ("config.yaml", "model.safetensors")  # what a model folder's further files are not called


def lies_in(path: Path, folder: Path) -> bool:
    """Whether a path, its links followed, lies in a folder.

    The files in a snapshot of a Hugging Face cache are links to its blobs, which count as in it.

    >>> lies_in(Path("model/genes.txt"), Path("model")), lies_in(Path("model/../genes.txt"), Path("model"))
    (True, False)
    """
    path, folder = path.resolve(), folder.resolve()
    if path.is_relative_to(folder):
        return True
    snapshots = next((parent.parent for parent in (folder, *folder.parents) if parent.parent.name == "snapshots"), None)
    return snapshots is not None and path.parent == snapshots.parent / "blobs"


@contextmanager
def only_within(folder: Path | str, *more: Path | str) -> Iterator[None]:
    """A context in which `allowed` takes no path outside of a folder that others filled, its links followed.

    It is set while such a folder is read, and while a model is built of its config, so that files which its parameters
    name are its own. One within another only narrows it: a model folder names no other model folder.

    Args:
        more: what is open too: files that the user or this toolkit put there.

    >>> with only_within("model"):
    ...     allowed("/proc/self/environ")
    Traceback (most recent call last):
    ldm.errors.UserError: /proc/self/environ lies outside of the folder model, which names it or links to it: what ...
    """
    allowed(folder)
    token = _WITHIN.set((Path(folder), *map(Path, more)))
    try:
        yield
    finally:
        _WITHIN.reset(token)


def allowed(path: Path | str) -> Path:
    """The path of a file that is to be opened. UserError: within `only_within`, one that lies outside.

    >>> allowed("genes.txt")
    PosixPath('genes.txt')
    """
    path, folders = Path(path), _WITHIN.get()
    if folders and not any(lies_in(path, folder) for folder in folders):
        raise UserError(
            f"{path} lies outside of the folder {folders[0]}, which names it or links to it: what others made is read "
            "from its own folder alone. If you trust it, copy the file into that folder."
        )
    return path


def inside(folder: Path, name: str) -> Path:
    """The path of a file of a folder that others filled. UserError: it lies outside, by its name or by a link.

    >>> inside(Path("model"), "../other/weights.pt")
    Traceback (most recent call last):
    ldm.errors.UserError: model/../other/weights.pt lies outside of the folder model, which names it or links to ...
    """
    with only_within(folder):
        return allowed(folder / name)


def write_files(files: Mapping[str, str], folder: Path, source: object) -> None:
    """Write the texts of a checkpoint's further files, by name, into a folder. source: the checkpoint, for messages.

    >>> write_files({"../genes.txt": "TP53"}, Path("model"), "a.ckpt")
    Traceback (most recent call last):
    ldm.errors.UserError: a.ckpt holds a file called '../genes.txt', which is no plain name of one; it is not written.
    """
    for name, text in files.items():
        plain = isinstance(name, str) and Path(name).name == name and "\0" not in name
        if not plain or name in ("", "..", *OWN):
            raise UserError(f"{source} holds a file called {name!r}, which is no plain name of one; it is not written.")
        if not isinstance(text, str):
            raise UserError(f"{source} holds {name}, which is {type(text).__name__} and no text; it is not written.")
        (folder / name).write_text(text, encoding="utf-8")
