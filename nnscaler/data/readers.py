"""How each type of file is read: from bytes to documents, one at a time, and never the whole file at once."""

from __future__ import annotations

import csv
import gzip
import json
import logging
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from nnscaler import hub
from nnscaler.data.encoding import REPLACE, Replaced, check_not_a_pointer, open_text
from nnscaler.errors import UserError

logger = logging.getLogger(__name__)

Row = tuple[Any, str]  # a decoded row, and where it stands, for messages
Document = str | Iterator[str]  # its text, or blocks of its text where that may be longer than memory

BLOCK = 1 << 18  # characters or bytes read at a time
DEFAULT_COLUMN = "text"
DELIMITERS = ",;\t|"  # of the fields of a CSV file, the likelier first
LINES_SEEN = 50  # of a CSV file, to find out how its fields are separated
OTHER_COLUMNS = (
    "--messages_column names one of conversations; in JSON, --text_column outer.inner names one within another"
)
_ABSENT = object()  # in the place of a value
HALF_PAIR = re.compile(r"[\ud800-\udfff]")  # JSON may spell half a surrogate pair, which no tokenizer takes


def read_documents(path: Path, file: IO[bytes], column: str | None, encoding: str | None) -> Iterator[Document]:
    """Yields the documents of one open file.

    Args:
        path: the name of the file. Its suffix, one of `READERS` or that and `.gz`, says how to read it.
        file: the open file, at its beginning.
        column: the column of a row that holds its text; in JSON also one within another ("data.text"). None: `text`, or
            else the only column of strings.
        encoding: how bytes are read as text; None: as the first bytes say, or else as UTF-8.

    Raises:
        UserError: the file is damaged (with the line, where the format has lines), or has no such text column. Errors
        of
            the file system and of libraries are left to `reading`.
    """
    content = _uncompressed(path, file)
    check_not_a_pointer(content, path)
    yield from READERS[kind(path)](content, path, column, encoding)


def read_rows(path: Path, file: IO[bytes], encoding: str | None) -> Iterator[Row]:
    """Yields the rows of one open file, as `read_documents` reads it, and where each stands.

    Raises UserError as `read_documents`, and for a type of file without rows of values.
    """
    if kind(path) not in ROW_READERS:
        raise UserError(f"{path}: conversations are read from {', '.join(ROW_READERS)} and .gz of these")
    content = _uncompressed(path, file)
    check_not_a_pointer(content, path)
    yield from ROW_READERS[kind(path)](content, path, encoding)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Inside, whatever goes wrong while a file is read becomes a UserError that names the file."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        place = f"{path}, near line {_line_of_damage(path)}" if path.exists() else str(path)
        raise UserError(f"{place}: damaged gzip data: {hub.first_line(error)}") from error
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"cannot read {path}: {hub.first_line(error)}") from error


def kind(path: Path) -> str:
    """The suffix that says how to read a file, without that of compression."""
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()


def _uncompressed(path: Path, file: IO[bytes]) -> IO[bytes]:
    return gzip.open(file) if path.suffix.lower() == ".gz" else file  # type: ignore[return-value]


def _line_of_damage(path: Path) -> int:
    """The line, counted from 1, from which a gzip file cannot be read."""
    line = 1
    try:
        with gzip.open(path) as file:
            while block := file.read1(BLOCK):
                line += block.count(b"\n")
    except (OSError, EOFError, zlib.error):
        pass
    return line


def _read_text(file: IO[bytes], path: Path, column: str | None, encoding: str | None) -> Iterator[Document]:
    def blocks() -> Iterator[str]:
        with reading(path):  # here too, because this runs when the document is read, after it has been yielded
            yield from iter(lambda: reader.read(BLOCK), "")

    reader = open_text(file, path, encoding)
    yield blocks()


def _json_line_rows(file: IO[bytes], path: Path, encoding: str | None) -> Iterator[Row]:
    for number, line in enumerate(open_text(file, path, encoding, newline="\n"), start=1):
        if not line.strip():
            continue
        try:
            yield json.loads(line), f"{path}, line {number}"
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not JSON: {_json_complaint(error)}") from error


def _json_rows(file: IO[bytes], path: Path, encoding: str | None) -> Iterator[Row]:
    """The rows of a JSON array, or the objects of a file one after the other, decoded one at a time."""
    reader, decoder = open_text(file, path, encoding), json.JSONDecoder()
    between = re.compile(r"[\s,\[\]]*")
    pending, at = "", 0  # text read, and where in it the next row begins
    line, depth, more = 1, 0, True
    while more:
        gap = between.match(pending, at).group()  # type: ignore[union-attr]
        at, line, depth = at + len(gap), line + gap.count("\n"), depth + gap.count("[") - gap.count("]")
        try:
            row, end = decoder.raw_decode(pending, at)
        except (ValueError, RecursionError) as error:
            what, place = _json_complaint(error), getattr(error, "pos", at)
            # No further text can mend an error that is well before the end of what has been read.
            hopeless = isinstance(error, RecursionError) or (
                place < len(pending) - 16 and not what.startswith("Unterminated string")
            )
            # Doubling what is pending keeps the work linear in the length of one long row.
            block = reader.read(max(BLOCK, len(pending) - at)) if more else ""
            more = bool(block)
            if at < len(pending) and (hopeless or not more):
                line += pending.count("\n", at, place)
                raise UserError(f"{path}, line {line}: not JSON: {what}") from error
            pending, at = pending[at:] + block, 0
            continue
        yield row, f"{path}, line {line}"
        at, line = end, line + pending.count("\n", at, end)
    if depth:
        raise UserError(f"{path}, line {line}: not JSON: the file ends inside a list")


def _read_json_lines(file: IO[bytes], path: Path, column: str | None, encoding: str | None) -> Iterator[Document]:
    return _texts(_json_line_rows(file, path, encoding), column)


def _read_json(file: IO[bytes], path: Path, column: str | None, encoding: str | None) -> Iterator[Document]:
    return _texts(_json_rows(file, path, encoding), column)


def _texts(rows: Iterator[Row], column: str | None) -> Iterator[Document]:
    for row, place in rows:
        column, text = _row_text(row, column, place)
        yield text


def _json_complaint(error: ValueError | RecursionError) -> str:
    """What is wrong, without the words that lead to a place in the text, which the caller names."""
    if isinstance(error, json.JSONDecodeError):
        return error.msg.removesuffix(" at").removesuffix(" starting")
    return hub.first_line(error)


def _read_csv(file: IO[bytes], path: Path, column: str | None, encoding: str | None) -> Iterator[Document]:
    csv.field_size_limit(sys.maxsize)  # a field may be a whole book
    lines = iter(open_text(file, path, encoding))
    first = list(islice(lines, LINES_SEEN))
    rows = csv.reader(chain(first, lines), strict=True, delimiter=_delimiter(path, first))
    try:
        header = next(rows, None)
        if header is None:
            return
        index = header.index(_choose_column(header, header, column, path))
        for row in rows:
            if len(row) > len(header):
                raise UserError(
                    f"{path}, line {rows.line_num}: the row has {len(row)} fields, the header {len(header)}; "
                    "a text that holds the sign between fields stands in quotes"
                )
            if row:
                yield row[index]
    except IndexError as error:
        raise UserError(f"{path}, line {rows.line_num}: the row is shorter than the header") from error
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num}: not CSV: {hub.first_line(error)}") from error


def _delimiter(path: Path, first: list[str]) -> str:
    """The sign between fields: one that divides all rows into as many fields as the header has, which are two at least.

    Where there is none, the one that divides the header into most. (`csv.Sniffer` takes the signs of prose for it.)
    """
    if kind(path) == ".tsv":
        return "\t"
    complete = first if len(first) < LINES_SEEN else first[:-1]  # the last row may go on
    fields = {delimiter: len(next(csv.reader(first, delimiter=delimiter), [])) for delimiter in DELIMITERS}
    chosen = max(DELIMITERS, key=lambda delimiter: fields[delimiter])  # the likeliest where none divides it
    for delimiter in reversed(DELIMITERS):
        widths = {len(row) for row in csv.reader(complete, delimiter=delimiter) if row}
        if len(widths) == 1 and widths != {1}:
            chosen = delimiter
    if chosen != ",":
        logger.info("%s: fields are separated by %r", path, chosen)
    return chosen


def _read_parquet(file: IO[bytes], path: Path, column: str | None, encoding: str | None) -> Iterator[Document]:
    with _parquet(file) as parquet:
        schema = parquet.schema_arrow
        strings = [
            field.name
            for field in schema
            if pa.types.is_string(field.type)
            or pa.types.is_large_string(field.type)
            or pa.types.is_string_view(field.type)
        ]
        column = _choose_column(strings, schema.names, column, path)
        if column not in strings:
            held = schema.field(column).type
            raise UserError(f"{path}: column {column!r} holds {_not_text(str(held), pa.types.is_nested(held))}")
        for batch in parquet.iter_batches(_rows_at_once(parquet), columns=[column]):
            for text in batch.column(0).cast(pa.large_binary()).to_pylist():
                yield text.decode(errors=REPLACE) if text else ""


def _parquet_rows(file: IO[bytes], path: Path, encoding: str | None) -> Iterator[Row]:
    with _parquet(file) as parquet:
        number = 0
        for batch in parquet.iter_batches(_rows_at_once(parquet)):
            for row in batch.to_pylist():
                number += 1
                yield row, f"{path}, row {number}"


@contextmanager
def _parquet(file: IO[bytes]) -> Iterator[pq.ParquetFile]:
    with tempfile.TemporaryFile() as seekable:  # the format is read from its end
        if isinstance(file, gzip.GzipFile):
            shutil.copyfileobj(file, seekable)
            file = seekable
        yield pq.ParquetFile(file, buffer_size=BLOCK, pre_buffer=False)


def _rows_at_once(parquet: pq.ParquetFile) -> int:
    rows = max(1, parquet.metadata.num_rows)
    row_bytes = sum(parquet.metadata.row_group(i).total_byte_size for i in range(parquet.num_row_groups)) // rows
    return min(1000, BLOCK // max(1, row_bytes) + 1)


READERS = {
    ".txt": _read_text,
    ".md": _read_text,
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}


ROW_READERS = {".jsonl": _json_line_rows, ".json": _json_rows, ".parquet": _parquet_rows}


def _row_text(row: Any, column: str | None, place: str) -> tuple[str, str]:
    """The text column of a decoded JSON row, and its text. `column` None: it is chosen now"""
    if not isinstance(row, dict):
        raise UserError(f"{place}: a row must be a JSON object, not {type(row).__name__}")
    if column is None or _value(row, column) is _ABSENT:
        strings = [name for name, value in row.items() if isinstance(value, str)]
        column = _choose_column(strings, list(row), column, place)
    text = _value(row, column)
    if text is None:
        text = ""
    if not isinstance(text, str):
        what = _not_text(type(text).__name__, isinstance(text, list | dict))
        raise UserError(f"{place}: column {column!r} holds {what}")
    try:
        text.encode()
    except UnicodeEncodeError:
        text, count = HALF_PAIR.subn("\ufffd", text)
        Replaced.count += count
    return column, text


def _value(row: dict[str, Any], column: str) -> Any:
    """The value of a column, or of one within another, such as "data.text"; _ABSENT where there is no such column.
    Within what is null, all is."""
    if column in row:
        return row[column]
    value: Any = row
    for name in column.split("."):
        if value is not None:
            value = value.get(name, _ABSENT) if isinstance(value, dict) else _ABSENT
    return value


def _not_text(held: str, nested: bool) -> str:
    return f"{held}, not text" + (f"; {OTHER_COLUMNS}" if nested else "")


def _choose_column(strings: list[str], columns: list[str], wanted: str | None, place: str | Path) -> str:
    wanted = wanted if wanted is not None or DEFAULT_COLUMN not in columns else DEFAULT_COLUMN
    if wanted is None and len(strings) == 1:
        return strings[0]
    if wanted is None or wanted not in columns:
        if wanted:
            problem = f"there is no column {wanted!r}"
        else:
            problem = "it is not clear which column holds the text" if strings else "no column holds text"
        if strings:
            choices = f"choose one of {', '.join(strings)} with --text_column"
        else:
            choices = f"the row has {', '.join(columns) or 'nothing'}; {OTHER_COLUMNS}"
        raise UserError(f"{place}: {problem}; {choices}")
    return wanted
