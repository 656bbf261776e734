"""The documents of one input file, decoded a record at a time: what cannot be read is reported, never just skipped."""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from pipelines import python_docs, storage
from pipelines.byte_stream import CHUNK, Damaged, Reader, chunks, first_line, split, unix_lines
from pipelines.corpus_config import Reading
from pipelines.detokenizers import detokenized
from pipelines.errors import UserError
from pipelines.sources import PYTHON_DOCS, InputFile

_PARQUET_ROWS = 256  # decoded at once
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, kw_only=True)
class Record:
    """One record of an input file: a document, or the reason why there is none."""

    line: int
    """Line or row, from 1 in the part that is read, where it begins; 0: the file as a whole."""
    text: str = ""
    """The document, with LF line ends, no byte order mark and its spacing undone; "" where it is unreadable."""
    reason: str = ""
    """Why it cannot be read; "" where it can."""


class _Unreadable(Exception):
    """A record that goes to quarantine; the message is the reason."""


def read_records(file: InputFile, reading: Reading) -> Iterator[Record]:
    """The records of `file` in order; where it is a part of a file, those of the part.

    A text file is one record, or one between every two separators; each non-blank line of .jsonl is one, and each row
    of .parquet. What cannot be decoded comes as a record with a reason; where an archive breaks, the records before are
    given and one more for the rest.

    Raises:
        UserError: the file cannot be opened, or reading it fails (the network, the disk).
    """
    for record in _records(file, reading):
        if reading.detokenizer and record.text:
            record = replace(record, text=detokenized(record.text, reading.detokenizer))
        yield record


def _records(file: InputFile, reading: Reading) -> Iterator[Record]:
    try:
        if file.format == PYTHON_DOCS:
            yield from _python_docs(file)
            return
        raw = storage.open_read(file.uri)
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        # Not a matter of the file's content: a record of it would be kept where the file is back at the next run.
        raise UserError(
            storage.redacted(f"{file.uri} was listed but cannot be opened: {error.strerror or type(error).__name__}"),
            "put it back, or give this user the right to read it on every node; then run the same command again",
        ) from None
    with raw:
        reader = Reader(raw, file.uri)
        if file.format == "parquet":
            yield from _parquet(reader, file, reading.text_field)
        elif file.format == "jsonl":
            yield from _json_lines(_lines(reader, file), file.begin, reading.text_field)
        elif reading.document_separator:
            separator = reading.document_separator.replace("\r\n", "\n").encode("utf-8")  # as the content is read
            yield from _separated(chunks(reader, file.compression), separator)
        else:
            yield _text_file(chunks(reader, file.compression))


def _python_docs(file: InputFile) -> Iterator[Record]:
    for number, text in enumerate(python_docs.documents(file.uri.removeprefix(PYTHON_DOCS + ":")), 1):
        yield Record(line=number, text=text)


def _text_file(pieces: Iterator[bytes]) -> Record:
    try:
        return Record(line=0, text=_checked(_decoded(b"".join(pieces))))
    except (Damaged, _Unreadable) as error:
        return Record(line=0, reason=str(error))


def _separated(pieces: Iterator[bytes], separator: bytes) -> Iterator[Record]:
    """The documents between separators, each at the line where it begins; what follows a last separator counts."""
    line = 1
    try:
        for content in split(unix_lines(pieces), separator):
            try:
                record = Record(line=line, text=_checked(_decoded(content)))
            except _Unreadable as error:
                record = Record(line=line, reason=str(error))
            yield record
            line += content.count(b"\n") + separator.count(b"\n")
    except Damaged as error:
        yield Record(line=line, reason=str(error))


def counted_from(file: InputFile) -> tuple[int, int]:
    """Where the lines of a part of a file are counted from: a byte of the file, and how many rows come before.

    Of .jsonl the first line of the part, as counting those before would read all that comes before; of .parquet the
    rows before it are known.
    """
    if not file.begin:
        return 0, 0
    with storage.open_read(file.uri) as raw:
        if file.format != "parquet":
            return _first_line_at(raw, file.begin), 0
        import pyarrow.parquet

        groups = _groups(pyarrow.parquet.ParquetFile(raw).metadata)
        return 0, sum(group.num_rows for group in groups if _middle(group, file) < file.begin)


def _lines(reader: io.RawIOBase, file: InputFile) -> Iterator[bytes]:
    """The lines that begin in the part of the file."""
    at = _first_line_at(reader, file.begin)
    reader.seek(at)
    for line in split(chunks(reader, file.compression), b"\n"):
        if file.end is not None and at >= file.end:
            return
        yield line
        at += len(line) + 1


def _first_line_at(reader: Any, begin: int) -> int:
    """Where the first line begins that begins at byte `begin` or behind it."""
    if not begin:
        return 0
    reader.seek(begin - 1)
    at = begin - 1
    while chunk := reader.read(CHUNK):
        if (place := chunk.find(b"\n")) >= 0:
            return at + place + 1
        at += len(chunk)
    return at


def _json_lines(lines: Iterator[bytes], begin: int, field: str) -> Iterator[Record]:
    number = 0
    try:
        for number, line in enumerate(lines, 1):
            content = line.removeprefix(_BOM) if number == 1 and not begin else line
            if content.strip():
                yield _json_line(number, content, field)
    except Damaged as error:
        yield Record(line=number + 1, reason=str(error))


def _json_line(number: int, line: bytes, field: str) -> Record:
    try:
        return Record(line=number, text=_checked(_field(_decoded(line), field)))
    except _Unreadable as error:
        return Record(line=number, reason=str(error))


def _field(line: str, field: str) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise _Unreadable(f"not JSON: {error.msg} at character {error.pos}") from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 10,000 brackets
        raise _Unreadable(f"not JSON that can be read: {error}") from None
    if not isinstance(value, dict):
        raise _Unreadable("not a JSON object")
    if field not in value:
        raise _Unreadable(f"no field {field!r}")
    text = value[field]
    if not isinstance(text, str):
        raise _Unreadable(f"field {field!r} is not text but {type(text).__name__}")
    return text


def _parquet(reader: io.RawIOBase, file: InputFile, column: str) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    broken = (pyarrow.ArrowException, OSError)
    try:
        source = io.BytesIO(b"".join(chunks(reader, file.compression))) if file.compression else reader
        # By default all of a row group's column is read at once, twice its size in memory.
        table = pyarrow.parquet.ParquetFile(
            source, page_checksum_verification=True, buffer_size=CHUNK, pre_buffer=False
        )
        groups = [(group.num_rows, _middle(group, file)) for group in _groups(table.metadata)]
    except (Damaged, *broken) as error:
        if not file.begin:  # a file is one record then, whatever the number of its parts
            yield Record(line=0, reason=f"not a Parquet file that can be read: {first_line(error)}")
        return
    known = column in table.schema_arrow.names
    row = 0
    for group, (n_rows, middle) in enumerate(groups):
        if middle < file.begin or (file.end is not None and middle >= file.end):
            continue
        end = row + n_rows
        reason = f"no column {column!r}"
        try:
            if known:
                for batch in table.iter_batches(_PARQUET_ROWS, row_groups=[group], columns=[column]):
                    for value in _cells(batch.column(0)):
                        row += 1
                        yield _cell(row, value, column)
        except broken as error:
            reason = f"its row group cannot be read: {first_line(error)}"
        while row < end:
            row += 1
            yield Record(line=row, reason=reason)


def _groups(metadata: Any) -> list[Any]:
    """The row groups as the footer has them.

    Raises:
        Damaged: they do not add up to the file's rows.
    """
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    rows = [group.num_rows for group in groups]
    if min(rows, default=0) < 0 or sum(rows) != metadata.num_rows:
        raise Damaged(f"damaged footer: row groups of {sum(rows)} rows in a file of {metadata.num_rows}")
    return groups


def _middle(group: Any, file: InputFile) -> int:
    """The byte of the file in the middle of a row group; one in the file, whatever a damaged footer says."""
    columns = [group.column(index) for index in range(group.num_columns)]
    starts = [column.dictionary_page_offset or column.data_page_offset for column in columns]
    middle = int(min(starts, default=0) + sum(column.total_compressed_size for column in columns) // 2)
    return min(max(middle, 0), max(file.size, 1) - 1)


def _cells(column: Any) -> list[Any]:
    """The cells as undecoded bytes where they are text, so that one bad cell does not spoil the others."""
    from pyarrow import binary_view, large_binary, types

    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if types.is_string(column.type) or types.is_large_string(column.type):
        column = column.cast(large_binary())
    elif types.is_string_view(column.type):
        column = column.cast(binary_view())
    return list(column.to_pylist())


def _cell(row: int, value: object, column: str) -> Record:
    try:
        if not isinstance(value, bytes):
            raise _Unreadable(f"column {column!r} is not text but {type(value).__name__}")
        return Record(line=row, text=_checked(_decoded(value)))
    except _Unreadable as error:
        return Record(line=row, reason=str(error))


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _Unreadable(f"not UTF-8: byte 0x{data[error.start]:02x} at {error.start}") from None


def _checked(text: str) -> str:
    """`text` without a byte order mark and with LF line ends, if a tokenizer can take it."""
    if "\0" in text:
        raise _Unreadable("holds a NUL character")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise _Unreadable("holds half of a surrogate pair") from None
    return text.removeprefix("\ufeff").replace("\r\n", "\n")
