"""Text tables: the one place that reads CSV, TSV and plain text, whatever program wrote them.

    cells       separated by tabs, or else by commas or semicolons, as the header has more of
    quotes      hold cells together only where lines do not have the header's number of cells without them; else each
                line is a row, a lone " is a character, and a cell that stands in quotes loses them
    encoding    by its mark (UTF-8, UTF-16), else UTF-8, else Windows-1252, which is said
    unknown     empty cells and the placeholders of GDC, cBioPortal and Xena, see MISSING
    numbers     with a decimal point, or with a decimal comma, which is said

Lines before the header that begin with # are skipped. No row is lost unsaid: a line with too many cells is an error;
empty rows that are left out and rows that end early are counted in a note.
"""

from __future__ import annotations

import csv
import gzip
import re
import zlib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, NamedTuple

import pandas as pd

from ldm.errors import UserError, note
from ldm.foreign.budget import DEFLATE, afford, available
from ldm.foreign.paths import allowed

MISSING = frozenset(["", "NA", "NaN", "nan", "null", "NULL", "None", "N/A", "n/a", "#N/A", "<NA>"])
_WORDS = (
    "not available", "not applicable", "not evaluated", "not reported", "not allowed to collect", "unknown",
    "discrepancy", "pending", "completed",
)  # fmt: skip
# in any case, with or without brackets; '-- is GDC's
_PLACEHOLDER = re.compile(rf"'?--|\[({'|'.join(_WORDS)})\]|{'|'.join(_WORDS[:6])}", re.IGNORECASE)
_COMMA = re.compile(r"[+-]?\d+(,\d+)?([eE][+-]?\d+)?")
_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}(,\d{3})+")
_BOMS = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))
_BOOKS = ((b"PK\x03\x04", "an Excel workbook or a zip file"), (b"\xd0\xcf\x11\xe0", "an Excel workbook"))
_BLOCK = 1 << 20


def read_text(path: Path | str, what: str = "") -> str:
    r"""The text of a file, in the encoding that it has, without a byte-order mark.

    what: the option that names it, for messages. UserError: no such file, or no text.

    >>> _ = Path("genes.txt").write_bytes("TP53\nERα".encode("utf-16"))
    >>> read_text("genes.txt").splitlines()
    ['TP53', 'ERα']
    """
    path = allowed(path)
    try:
        with _opened(path, _encoding(path)) as stream:
            return stream.read()
    except OSError as error:
        option = f"`{what}` from " if what else ""
        raise UserError(f"cannot read {option}{path}: {error.strerror or error}.") from None


def _encoding(path: Path) -> str:
    """How the text of a file is encoded. UserError: a workbook, or no text; OSError where it cannot be read."""
    try:
        marked = _marked(path)
        for encoding in (marked,) if marked else ("utf-8", "cp1252", "latin-1"):
            try:
                with _opened(path, encoding) as stream:
                    while stream.read(_BLOCK):
                        pass
            except UnicodeDecodeError:
                continue
            if encoding in ("cp1252", "latin-1"):
                name = "Windows-1252" if encoding == "cp1252" else "Latin-1"
                note(f"{path} is not UTF-8; its letters are read as {name}. If they come out wrong, save it as UTF-8.")
            return encoding
    except (EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: it is cut off or broken ({error}).") from None
    raise UserError(f"{path} begins as text in {marked.upper()} and does not go on so; copy it again from its source.")


def _marked(path: Path) -> str | None:
    """The encoding that a text's mark or its zeros tell; None where neither does."""
    with _opened(path, None) as stream:
        head = stream.read(4096)
    if named := next((name for mark, name in _BOMS if head.startswith(mark)), None):
        return named
    if book := next((name for mark, name in _BOOKS if head.startswith(mark)), None):
        raise UserError(f"{path} is {book}; save the table as CSV or tab-separated text.")
    if b"\0" not in head:
        return None
    odd, even = head[1::2].count(0), head[::2].count(0)
    if max(odd, even) < len(head) // 3:
        raise UserError(f"{path} is no text; give a table of text, CSV or tab-separated.")
    return "utf-16-le" if odd > even else "utf-16-be"


def _opened(path: Path, encoding: str | None) -> IO:
    if path.suffix == ".gz":
        _check_packed(path, path.stat().st_mtime_ns)
    opener = gzip.open if path.suffix == ".gz" else open
    return opener(path, "rb") if encoding is None else opener(path, "rt", encoding=encoding, newline="")


@lru_cache(16)
def _check_packed(path: Path, changed: int) -> None:
    """UserError for a packed table that becomes larger than the memory; one is looked through that could be."""
    if 4 * path.stat().st_size * DEFLATE < available():
        return
    size = 0
    with gzip.open(path) as stream:
        while block := stream.read(1 << 20):
            size += len(block)
            afford(4 * size, f"the table {path}, unpacked,")


class Record(NamedTuple):
    """A row of a table: the line (from 1) that it begins in, and its cells."""

    line: int
    cells: list[str]


def unquoted(cell: str) -> str:
    '''A cell without quotes around all of it.

    >>> unquoted('"a ""b"""'), unquoted('"driver" see text'), unquoted('"putative')
    ('a "b"', '"driver" see text', '"putative')
    '''
    if len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in (inner := cell[1:-1].replace('""', "")):
        return inner if '""' not in cell[1:-1] else cell[1:-1].replace('""', '"')
    return cell


def records(lines: Iterable[str], separator: str, quoted: bool, first: int = 1) -> Iterator[Record]:
    r"""The rows of the lines of a table, blank ones left out.

    quoted: cells with separators, line ends or quotes in them stand in quotes. first: number of the first line.
    csv.Error: a quote in the middle of a quoted cell, or one without an end.

    >>> list(records(['a,"b, c"\n', "\n", "d,e\n"], ",", quoted=True))
    [Record(line=1, cells=['a', 'b, c']), Record(line=3, cells=['d', 'e'])]
    """
    if not quoted:
        for number, line in enumerate(lines, first):
            if (text := line.rstrip("\r\n")).strip(" "):
                yield Record(number, [unquoted(cell.strip(" ")) for cell in text.split(separator)])
        return
    reader, line = csv.reader(lines, delimiter=separator, skipinitialspace=True, strict=True), first
    for cells in reader:
        if cells:
            yield Record(line, cells)
        line = reader.line_num + first


def cells_of(line: str, separator: str) -> list[str]:
    """The cells of one line, held together by quotes where they are those of a CSV.

    >>> cells_of('path,"a, b",c', ","), cells_of('"cyst" seen,c', ",")
    (['path', 'a, b', 'c'], ['"cyst" seen', 'c'])
    """
    try:
        return next(records([line], separator, separator != "\t"), Record(0, [])).cells
    except csv.Error:
        return next(records([line], separator, False)).cells


@dataclass(frozen=True)
class Form:
    """How a text table is written.

    Attributes:
        header: names of its columns; start: the line (from 0) after them. rows: of cells, all of them.
        width: of the longest row, where cells after the header's last are empty.
        quoted: see `records`. short: rows with fewer cells than the header; first_short: the line of the first.
    """

    path: Path
    encoding: str
    separator: str
    header: list[str]
    start: int
    quoted: bool = False
    rows: int = 0
    width: int = 0
    short: int = 0
    first_short: int = 0

    @property
    def words(self) -> str:
        kind = {"\t": "separated by tabs", ";": "separated by semicolons"}.get(self.separator, "separated by commas")
        return f"{kind}, {self.rows} rows of {len(self.header)} columns"


def find_form(path: Path | str) -> Form:
    r"""How a text table is written, found by its lines, all of which are counted.

    UserError: no such file, no text, no header, a line with more cells than the header.

    >>> _ = Path("t.tsv").write_text('gene\tnote\nTP53\t"putative\nKRAS\t\n')
    >>> form = find_form("t.tsv")
    >>> form.header, form.rows, form.quoted
    (['gene', 'note'], 2, False)
    """
    path = Path(path)
    try:
        encoding = _encoding(path)
        start, header, separator = _header(path, encoding)
        raw = _counted(path, encoding, start, separator, len(header), False)
        if raw.short and header[0] == "":  # a row with one cell too many, and no table of R's
            raw = _counted(path, encoding, start, separator, len(header := header[1:]), False)
        found = raw
        if raw.short or raw.long or raw.width > len(header):
            quoted = _counted(path, encoding, start, separator, len(header), True)
            if quoted is not None and not quoted.long and (raw.long or _off(quoted) < _off(raw)):
                found = quoted
    except OSError as error:
        raise UserError(f"cannot read the table {path}: {error.strerror or error}.") from None
    if found.long:
        line, count = found.long
        name = "tab" if separator == "\t" else f"'{separator}'"
        raise UserError(
            f"cannot read {path}: line {line} has {count} cells, the header {len(header)}: rows with more cells than "
            f"its header has columns cannot be placed. Values with a {name} or a line's end in them need quotes."
        )
    if not found.rows:
        raise UserError(f"{path} has no rows under its header.")
    return Form(path, encoding, separator, header, start, **{k: v for k, v in vars(found).items() if k != "long"})


@dataclass
class _Counts:
    quoted: bool
    rows: int = 0
    width: int = 0
    short: int = 0
    first_short: int = 0
    long: tuple[int, int] | None = None


def _off(found: _Counts) -> tuple[int, int]:
    return found.short, found.width


def _header(path: Path, encoding: str) -> tuple[int, list[str], str]:
    """The line after the header, names of columns, and the separator."""
    with _opened(path, encoding) as stream:
        comments = []
        for number, line in enumerate(stream):
            if line.lower().startswith("sep=") and len(line.strip()) == 5:  # Excel's hint to itself
                continue
            if line.strip() and line[0] != "#":
                break
            comments += [(number, line)] if line.strip() else []
        else:
            raise UserError(f"{path} is no table of columns: it has no rows at all; the first line names its columns.")
        after = next(stream, "")
    marks = [comment.count(mark := "\t" if "\t" in line else ",") for _, comment in comments]
    if len(marks) == 1 and marks[0] == line.count(mark) > 0:  # a header that begins with #
        (number, header), after = comments[0], line
        line = header.lstrip("# ")
    separator = "\t" if "\t" in line else max(",;", key=line.count)
    header, first = (cells_of(text, separator) for text in (line, after))
    if separator == "\t" and len(first) == len(header) + 1 and first[-1]:
        # R's write.table leaves out the name of the row names
        header = ["", *header]
    return number + 1, [name.strip() for name in header], separator


def _counted(path: Path, encoding: str, start: int, separator: str, width: int, quoted: bool) -> _Counts | None:
    """Rows of a table and their numbers of cells, read with or without quotes; None where the quotes are none."""
    found = _Counts(quoted, width=width)
    with _opened(path, encoding) as stream:
        for _ in range(start):
            next(stream)
        try:
            for line, count, rest in _widths(stream, separator, quoted, start + 1, width):
                found.rows += 1
                if count > width and rest:
                    found.long = found.long or (line, count)
                elif count > found.width:
                    found.width = count
                elif count < width:
                    found.short += 1
                    found.first_short = found.first_short or line
        except csv.Error:
            return None
    return found


def _widths(
    stream: Iterable[str], separator: str, quoted: bool, first: int, width: int
) -> Iterator[tuple[int, int, bool]]:
    """Of each row its line, its number of cells, and whether one beyond `width` holds something."""
    if quoted:
        for line, cells in records(stream, separator, True, first):
            yield line, len(cells), any(cells[width:])
        return
    for line, text in enumerate(stream, first):
        if text.strip(" \r\n"):
            count = text.count(separator) + 1
            yield line, count, count > width and any(cell.strip() for cell in text.split(separator)[width:])


def read_chunks(form: Form, text: Collection[int], rows: int, missing: Collection[str] = MISSING) -> Iterator:
    r"""The rows of a table as data frames of at most `rows` rows: columns `text` as text, the others as pandas infers.

    Columns are called by their numbers. Cells in `missing` are unknown.

    >>> _ = Path("t.csv").write_text("gene,a\nTP53,1\nKRAS,\n")
    >>> [chunk[1].tolist() for chunk in read_chunks(find_form("t.csv"), [0], 1000)]
    [[1.0, nan]]
    """
    with _opened(form.path, form.encoding) as stream:
        for _ in range(form.start):
            next(stream)
        quoting = csv.QUOTE_MINIMAL if form.quoted else csv.QUOTE_NONE
        try:
            reader = pd.read_csv(
                stream, sep=form.separator, header=None, names=range(form.width), index_col=False, quoting=quoting,
                skipinitialspace=True, skip_blank_lines=True, keep_default_na=False, na_values=sorted(missing),
                dtype=dict.fromkeys(text, str), chunksize=rows, low_memory=False,
            )  # fmt: skip
            with reader:
                for chunk in reader:
                    yield _unwrapped(chunk) if not form.quoted else chunk
        except (ValueError, OSError) as error:  # ParserError is a ValueError
            raise UserError(f"cannot read {form.path}: {error}.") from error


def text_columns(frame: pd.DataFrame) -> list[int]:
    """The places of the columns that hold text.

    >>> text_columns(pd.DataFrame({"a": [1, 2], "b": ["x", "1"]}))
    [1]
    """
    return [i for i, kind in enumerate(frame.dtypes) if not pd.api.types.is_numeric_dtype(kind)]  # bool is numeric


def _unwrapped(frame: pd.DataFrame) -> pd.DataFrame:
    """Cells of text without the quotes around them."""
    for i in text_columns(frame):
        column = frame.iloc[:, i]
        if pd.api.types.infer_dtype(column) == "integer":  # larger than 64 bits hold
            frame.isetitem(i, column.astype(float))
        elif column.str.startswith('"').any():
            frame.isetitem(i, column.map(unquoted, na_action="ignore"))
    return frame


def read_table(path: Path | str, numbers: bool = False, missing: Collection[str] | None = None) -> pd.DataFrame:
    r"""A whole table as text, by the names of its columns; NaN is unknown. Empty rows are left out and counted aloud.

    Args:
        numbers: columns that hold nothing but numbers, or but True and False, become those.
        missing: what stands for an unknown value in place of MISSING and placeholders as [Not Available].
    Raises:
        UserError: no such file, no text, two columns of one name, a line with more cells than the header, no row.

    >>> _ = Path("t.csv").write_text("slide;age;stage\na.svs;61,5;II\nb.svs;'--;[Not Available]\n")
    >>> table = read_table("t.csv", numbers=True)
    >>> table["age"].tolist(), table["stage"].tolist()
    ([61.5, nan], ['II', nan])
    """
    form = find_form(path)
    path, header = form.path, form.header
    if twice := [name for name in dict.fromkeys(header) if name and header.count(name) > 1]:
        raise UserError(f"{path} has {header.count(twice[0])} columns called '{twice[0]}'; rename them.")
    columns = range(form.width)
    chunks = read_chunks(form, columns, form.rows, MISSING if missing is None else missing)
    frame = pd.concat(list(chunks), ignore_index=True).apply(lambda column: column.str.strip())
    if len(frame) != form.rows:
        raise UserError(f"{path} has {form.rows} rows, and {len(frame)} could be read; save it as tab-separated text.")
    frame = without_placeholders(frame) if missing is None else frame.replace(list(missing), pd.NA)
    tell_rows(form, len(frame) - len(kept := frame.dropna(how="all")))
    if kept.empty:
        raise UserError(f"{path} has no rows with a value in them.")
    named = [i for i in columns if i < len(header) and (header[i] or kept[i].notna().any())]
    kept = kept[named].set_axis([header[i] for i in named], axis=1).reset_index(drop=True)
    return kept.apply(lambda column: as_values(column, path, form.separator)) if numbers else kept


def tell_rows(form: Form, empty: int) -> None:
    r"""Say which rows of a table are not whole: `empty` ones that are left out, and those that end early.

    >>> _ = Path("t.csv").write_text("a,b\n1,2\n3,4\n")
    >>> tell_rows(find_form("t.csv"), 0)                                         # nothing to say
    """
    if empty:
        note(f"{form.path} has {form.rows} rows; {empty} of them are empty and left out.")
    if form.short:
        note(
            f"{form.path} has {form.short} rows with fewer cells than its header (the first is line "
            f"{form.first_short}); what they lack is taken as unknown. Is the file whole?"
        )


def is_missing(cell: str) -> bool:
    """Whether a cell says that a value is not known.

    >>> is_missing(" [Not Available]"), is_missing("Not Reported"), is_missing("unknown primary")
    (True, True, False)
    """
    return cell.strip() in MISSING or _PLACEHOLDER.fullmatch(cell.strip()) is not None


def without_placeholders(frame: pd.DataFrame) -> pd.DataFrame:
    """The table with NaN for what GDC, cBioPortal and Xena write where they do not know a value.

    >>> table = pd.DataFrame({"stage": ["II", "[Not Available]", "not reported", "'--"]})
    >>> without_placeholders(table)["stage"].tolist()
    ['II', nan, nan, nan]
    """
    frame = frame.copy()
    for i in text_columns(frame):
        column = frame.iloc[:, i]
        frame.isetitem(i, column.mask([isinstance(cell, str) and is_missing(cell) for cell in column]))
    return frame


def as_values(column: pd.Series, path: Path | str, separator: str = ",") -> pd.Series:
    """A column of text as numbers or truth values, where it holds nothing else; else as it is.

    Args:
        path: the table, for messages. separator: of its cells; where it is a semicolon, a comma is a decimal comma.
    Raises:
        UserError: commas that may separate decimals or thousands.

    >>> as_values(pd.Series(["1,5", "2"]), "t.tsv", ";").tolist(), as_values(pd.Series(["a", "2"]), "t.csv").tolist()
    ([1.5, 2.0], ['a', '2'])
    """
    known = column.dropna()
    if known.empty or pd.api.types.is_numeric_dtype(column):
        return column
    numbers = pd.to_numeric(column, errors="coerce")
    if numbers[known.index].notna().all():
        return numbers
    if set(known) <= {"True", "False"} and len(known) == len(column):
        return column == "True"
    texts = known.astype(str)
    if not texts.str.fullmatch(_COMMA).all():
        return column
    if separator != ";" and (doubtful := texts[texts.str.contains(",")]).str.fullmatch(_THOUSANDS).all():
        raise UserError(
            f"{path} has '{doubtful.iloc[0]}' in the column {column.name}: its comma may be a decimal one or separate "
            "thousands. Save the table with a decimal point, or without a separator of thousands."
        )
    return pd.to_numeric(column.str.replace(",", ".", regex=False))
