"""Parquet tables: the one place that reads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq

from ldm.errors import UserError
from ldm.foreign.budget import afford
from ldm.foreign.paths import allowed

CELL = 64  # bytes that a cell may take in memory


def read_parquet(
    path: Path, what: str, again: str = "copy it again from its source", columns: Sequence[str] | None = None
) -> pd.DataFrame:
    """A whole table, or some columns of it.

    Args:
        what: what the table is, and again: how to get it anew, for messages.
    Raises:
        UserError: a file that is damaged or no Parquet, more rows than there is memory for: a page of a few bytes may
            stand for any number of equal ones.

    >>> _ = Path("index.parquet").write_text("slide,row")
    >>> read_parquet(Path("index.parquet"), "the table of tiles")
    Traceback (most recent call last):
    ldm.errors.UserError: the table of tiles index.parquet is broken (...); copy it again from its source.
    """
    try:
        check_parquet(path)
        return pd.read_parquet(path, columns=columns)
    except UserError:
        raise
    except Exception as error:  # Arrow raises errors of many kinds for what it cannot read
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{what} {path} is broken ({reason}); {again}.") from error


def check_parquet(path: Path) -> None:
    """UserError unless the machine has the memory for a table. Arrow's errors: it is none.

    >>> pd.DataFrame({"slide": ["a", "b"]}).to_parquet("index.parquet")
    >>> check_parquet(Path("index.parquet"))
    """
    with pq.ParquetFile(allowed(path)) as file:
        told = file.metadata
        unpacked = sum(told.row_group(i).total_byte_size for i in range(told.num_row_groups))
        rows, columns = told.num_rows, max(1, told.num_columns)
    afford(max(CELL * rows * columns, 2 * unpacked), f"the table {path} of {rows} rows")
