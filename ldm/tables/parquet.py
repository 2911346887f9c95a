"""Parquet tables: the one place that reads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ldm.errors import UserError
from ldm.foreign.budget import afford, available
from ldm.foreign.paths import allowed

CELL = 64  # bytes that a cell may take in memory


def read_parquet(
    path: Path, what: str, again: str = "copy it again from its source", columns: Sequence[str] | None = None
) -> pd.DataFrame:
    """A whole table, or some columns of it.

    Args:
        what: what the table is, and again: how to get it anew, for messages.
    Raises:
        UserError: a file that is damaged or no Parquet, more rows or longer texts than there is memory for: a page of a
            few bytes may stand for any number of equal ones.

    >>> _ = Path("index.parquet").write_text("slide,row")
    >>> read_parquet(Path("index.parquet"), "the table of tiles")
    Traceback (most recent call last):
    ldm.errors.UserError: the table of tiles index.parquet is broken (...); copy it again from its source.
    """
    try:
        check_parquet(path)
        frame = pd.read_parquet(path, columns=columns)
        for values in (frame.index, *(column for _, column in frame.items())):
            if isinstance(values.dtype, pd.StringDtype):
                pa.array(values.array).validate(full=True)  # that they are UTF-8, which else shows when they are used
        return frame
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
    what = f"the table {path} of {rows} rows"
    afford(max(CELL * rows * columns, 2 * unpacked), what)
    if 2 * _longest(told) > available():
        afford(2 * _text_bytes(path, told, what), what)


def _texts(told: pq.FileMetaData) -> list[int]:
    return [i for i in range(told.num_columns) if told.schema.column(i).physical_type == "BYTE_ARRAY"]


def _longest(told: pq.FileMetaData) -> int:
    """Bytes that texts take if each is as long as all that is stored of its part: they may be told once for all."""
    parts = (told.row_group(group).column(i) for group in range(told.num_row_groups) for i in _texts(told))
    return sum(part.num_values * part.total_uncompressed_size for part in parts)


def _text_bytes(path: Path, told: pq.FileMetaData, what: str) -> int:
    """Bytes that texts take, counted over the different ones. UserError: more than there are in memory."""
    count, names = 0, [told.schema.column(i).path for i in _texts(told)]
    with pq.ParquetFile(path, read_dictionary=names) as file:
        for group in range(told.num_row_groups):
            for column in file.read_row_group(group, columns=names).columns:
                for part in column.chunks:
                    while pa.types.is_list(part.type) or pa.types.is_large_list(part.type):
                        part = part.flatten()
                    if pa.types.is_dictionary(part.type):
                        lengths = pc.binary_length(part.dictionary).cast(pa.int64())
                        count += pc.sum(pc.take(lengths, part.indices)).as_py() or 0
                    elif pa.types.is_struct(part.type):
                        raise UserError(f"{what} has columns within columns, which are not read.")
                    else:
                        count += part.nbytes
                    afford(2 * count, what)
    return count
