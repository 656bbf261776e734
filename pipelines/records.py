"""The documents of one input file, decoded a record at a time: what cannot be read is reported, never just skipped."""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from pipelines import python_docs, storage
from pipelines.errors import UserError
from pipelines.sources import PYTHON_DOCS, InputFile

_CHUNK = 1 << 20
_PARQUET_ROWS = 256  # decoded at once
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, kw_only=True)
class Record:
    """One record of an input file: a document, or the reason why there is none."""

    line: int
    """Line or row, from 1; 0: the file as a whole."""
    text: str = ""
    """The document, with LF line ends and no byte order mark; "" where it is empty or unreadable."""
    reason: str = ""
    """Why it cannot be read; "" where it can."""


class _Unreadable(Exception):
    """A record that goes to quarantine; the message is the reason."""


class _Damaged(Exception):
    """An archive that breaks off or does not decompress; the message is the reason."""


def read_records(file: InputFile, text_field: str) -> Iterator[Record]:
    """The records of `file` in order.

    A text file is one record, each non-blank line of .jsonl one, each row of .parquet one. What cannot be decoded comes
    as a record with a reason; where an archive breaks, the records before are given and one more for the rest.

    Raises:
        UserError: the file is there, but reading it fails (the network, the disk).
    """
    try:
        if file.format == PYTHON_DOCS:
            yield from _python_docs(file)
            return
        raw = storage.open_read(file.uri)
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        yield Record(line=0, reason=f"cannot be opened: {error.strerror or type(error).__name__}")
        return
    with raw:
        reader = _Reader(raw, file.uri)
        if file.format == "parquet":
            yield from _parquet(reader, file.compression, text_field)
        elif file.format == "jsonl":
            yield from _json_lines(_chunks(reader, file.compression), text_field)
        else:
            yield _text_file(_chunks(reader, file.compression))


def _python_docs(file: InputFile) -> Iterator[Record]:
    for number, text in enumerate(python_docs.documents(file.uri.removeprefix(PYTHON_DOCS + ":")), 1):
        yield Record(line=number, text=text)


def _text_file(chunks: Iterator[bytes]) -> Record:
    try:
        return Record(line=0, text=_checked(_decoded(b"".join(chunks))))
    except (_Damaged, _Unreadable) as error:
        return Record(line=0, reason=str(error))


def _json_lines(chunks: Iterator[bytes], field: str) -> Iterator[Record]:
    number = 0
    try:
        for number, line in enumerate(_lines(chunks), 1):
            content = line.removeprefix(_BOM) if number == 1 else line
            if content.strip():
                yield _json_line(number, content, field)
    except _Damaged as error:
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


def _parquet(reader: io.RawIOBase, compression: str, column: str) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    broken = (pyarrow.ArrowException, OSError)
    try:
        source = io.BytesIO(b"".join(_chunks(reader, compression))) if compression else reader
        table = pyarrow.parquet.ParquetFile(source, page_checksum_verification=True)
    except (_Damaged, *broken) as error:
        yield Record(line=0, reason=f"not a Parquet file that can be read: {_first_line(error)}")
        return
    known = column in table.schema_arrow.names
    row = 0
    for group in range(table.num_row_groups):
        end = row + table.metadata.row_group(group).num_rows
        reason = f"no column {column!r}"
        try:
            if known:
                for batch in table.iter_batches(_PARQUET_ROWS, row_groups=[group], columns=[column]):
                    for value in _cells(batch.column(0)):
                        row += 1
                        yield _cell(row, value, column)
        except broken as error:
            reason = f"its row group cannot be read: {_first_line(error)}"
        while row < end:
            row += 1
            yield Record(line=row, reason=reason)


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


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Lines without their LF; a last one without LF counts."""
    pending: list[bytes] = []
    for chunk in chunks:
        *complete, rest = chunk.split(b"\n")
        for line in complete:
            yield b"".join([*pending, line])
            pending = []
        pending.append(rest)
    last = b"".join(pending)
    if last:
        yield last


def _chunks(reader: io.RawIOBase, compression: str) -> Iterator[bytes]:
    """The decompressed content a piece at a time."""
    stream: Any = reader
    if compression == "gz":
        stream = gzip.GzipFile(fileobj=reader)
    elif compression == "zst":
        import pyarrow

        stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(reader, mode="r"), "zstd")
    while True:
        try:
            chunk = stream.read(_CHUNK)
        except (EOFError, OSError, zlib.error) as error:
            raise _Damaged(f"damaged archive: {_first_line(error)}") from None
        if not chunk:
            return
        yield chunk


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


class _Reader(io.RawIOBase):
    """Passes reads on, and tells a failing disk or network from a damaged file: the first is a `UserError`."""

    def __init__(self, file: IO[bytes], uri: str) -> None:
        self._file = file
        self._uri = uri

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        try:
            data = self._file.read(len(view))
        except OSError as error:
            raise UserError(
                storage.redacted(f"reading {self._uri} failed: {_first_line(error)}"),
                "run the same command again; what is done stays done",
            ) from None
        view[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()
