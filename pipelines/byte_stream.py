"""A file's bytes a piece at a time: decompressed, cut at separators; a damaged archive told from a failing disk."""

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

from pipelines import storage
from pipelines.errors import UserError

CHUNK = 1 << 20
"""Bytes read at once."""
_ZSTD_CHUNK = 1 << 14  # decompressed; where the archive breaks off, so much of what is whole may be lost


class Damaged(Exception):
    """An archive that breaks off or does not decompress; the message is the reason."""


class Reader(io.RawIOBase):
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
        except Exception as error:  # every object store has exceptions of its own
            raise UserError(
                storage.redacted(f"reading {self._uri} failed: {first_line(error)}"),
                "run the same command again; what is done stays done",
            ) from None
        view[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def chunks(reader: io.RawIOBase, compression: str) -> Iterator[bytes]:
    """The decompressed content a piece at a time."""
    read: Callable[[int], bytes | None] = reader.read
    size = CHUNK
    if compression == "gz":
        read = gzip.GzipFile(fileobj=reader).read1  # `read` loses what it has where the archive breaks off
    elif compression == "zst":
        import pyarrow

        read = pyarrow.CompressedInputStream(pyarrow.PythonFile(reader, mode="r"), "zstd").read
        size = min(CHUNK, _ZSTD_CHUNK)
    while True:
        try:
            chunk = read(size)
        except (EOFError, OSError, zlib.error) as error:
            raise Damaged(f"damaged archive: {first_line(error)}") from None
        if not chunk:
            return
        yield chunk


def split(pieces: Iterator[bytes], separator: bytes) -> Iterator[bytes]:
    """What stands between separators; a last piece counts unless it is empty."""
    pending: list[bytes] = []
    carried = b""  # the end of what is pending: it may hold the beginning of a separator
    for chunk in pieces:
        *complete, rest = (carried + chunk).split(separator)
        for piece in complete:
            yield b"".join([*pending, piece])
            pending = []
        cut = max(0, len(rest) - len(separator) + 1)
        pending.append(rest[:cut])
        carried = rest[cut:]
    last = b"".join([*pending, carried])
    if last:
        yield last


def unix_lines(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The same content with LF for CRLF, also where the two are in different chunks."""
    held = b""
    for chunk in pieces:
        content = held + chunk
        held = content[-1:] if content.endswith(b"\r") else b""
        yield content[: len(content) - len(held)].replace(b"\r\n", b"\n")
    yield held


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
