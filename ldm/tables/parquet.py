"""Parquet tables: the one place that reads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from ldm.errors import UserError


def read_parquet(
    path: Path, what: str, again: str = "copy it again from its source", columns: Sequence[str] | None = None
) -> pd.DataFrame:
    """A whole table, or some columns of it.

    Args:
        what: what the table is, and again: how to get it anew, for messages.
    Raises:
        UserError: a file that is damaged or no Parquet.

    >>> _ = Path("index.parquet").write_text("slide,row")
    >>> read_parquet(Path("index.parquet"), "the table of tiles")
    Traceback (most recent call last):
    ldm.errors.UserError: the table of tiles index.parquet is broken (...); copy it again from its source.
    """
    try:
        return pd.read_parquet(path, columns=columns)
    except Exception as error:  # Arrow raises errors of many kinds for what it cannot read
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{what} {path} is broken ({reason}); {again}.") from error
