"""What a corpus is made from, before anything is read: the input files, in a fixed order, and the units of work."""

import itertools
import json
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipelines import hub, python_docs, storage
from pipelines.errors import UserError

PYTHON_DOCS = "python-docs"
SOURCES = "--corpus.sources"
VALIDATION_SOURCES = "--corpus.validation-sources"
FORMATS = ("txt", "md", "jsonl", "parquet")
COMPRESSIONS = ("gz", "zst")
_CUT = ("jsonl", "parquet")  # formats that can be read from the middle, where they are not compressed
_SMALLEST_UNIT = 1_000_000  # bytes
_SMALLEST_PART = 10_000  # bytes of a file that is cut, whatever the unit
_FEWEST_UNITS = 16  # of a corpus that is large enough
_ENDINGS = "." + ", .".join(FORMATS) + ", each plain or with ." + " or .".join(COMPRESSIONS)


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """One file of documents."""

    uri: str
    """Where it is: an absolute path, a full URI, or python-docs:PATH."""
    name: str
    """Which source it comes from, from 0, and its path below that: 0:folder/a.txt. Stays when the source is moved."""
    format: str
    """python-docs, or one of `FORMATS`."""
    compression: str
    """"" or one of `COMPRESSIONS`."""
    size: int
    """Bytes."""
    version: str
    """Changes when the content does: the modification time in ns, or the object store's version (ETag)."""
    begin: int = 0
    """The records are those that begin at this byte or behind it (a row group of .parquet: whose middle is there) .."""
    end: int | None = None
    """.. and before this one; None: to the end of the file."""

    @property
    def source(self) -> int:
        """Which source it comes from, from 0."""
        return int(self.name.partition(":")[0])

    @property
    def read_bytes(self) -> int:
        """Bytes of the part that is read."""
        return (self.size if self.end is None else self.end) - self.begin

    @property
    def identity(self) -> dict[str, Any]:
        """What stands for the content, JSON-able: all but where the file is. The content itself is not read."""
        return {name: value for name, value in asdict(self).items() if name != "uri"}


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A unit of work: files, or parts of them, that are read together and make one shard a split, at most."""

    files: tuple[InputFile, ...]
    """In the order in which they are read."""
    validation_fraction: float
    """Share of their documents that are held out: 0 or 1 where the held-out documents have sources of their own."""
    dropped: str = ""
    """Which of its documents are left out, by their number among those with text, as `packed_counts` packs them."""
    n_hashed: int | None = None
    """How many documents with text there were when duplicates were looked for; None: they were not."""


def input_files(sources: Iterable[str], option: str = SOURCES) -> list[InputFile]:
    """All files of the sources, each once, in the order of the sources and by name within one.

    `option` is where the user named them, for the errors.

    Raises:
        UserError: a source does not exist, cannot be read, matches nothing usable, or holds only empty files.
    """
    found: dict[str, InputFile] = {}
    for number, source in enumerate(sources):
        files = _python_docs(number, option) if source == PYTHON_DOCS else _stored(source, number, option)
        if not any(file.size for file in files):
            raise UserError(
                storage.redacted(f"the source {source} holds no text: every file is empty"),
                f"name a file or folder with text in {option}",
            )
        for file in files:
            found.setdefault(file.uri, file)
    return list(found.values())


def check_apart(training: Iterable[InputFile], held_out: Iterable[InputFile]) -> None:
    """Refuse a file that is in both, under whatever names on this machine.

    Raises:
        UserError: naming the first such file.
    """
    trained_on = {_place(file) for file in training}
    for file in held_out:
        if _place(file) in trained_on:
            raise UserError(
                storage.redacted(f"{file.uri} is in {SOURCES} and in {VALIDATION_SOURCES}: trained on and held out"),
                "name each file in one of them; a pattern such as 'texts/train-*.txt' leaves files out",
            )


def _place(file: InputFile) -> str:
    """Where the file is, symbolic links followed."""
    return os.path.realpath(file.uri) if storage.is_local(file.uri) else file.uri


def fingerprint(sources: Iterable[str], option: str = SOURCES) -> list[dict[str, Any]]:
    """What each source holds right now, JSON-able; reads no file.

    Of each file its path relative to the source, its size and its modification time or ETag count: it changes when a
    file is added, removed, renamed or written, and stays when the source is moved as it is (`mv`, `cp -a`).

    Raises:
        UserError: as `input_files`.
    """
    result = []
    for source in sources:
        files = input_files([source], option)
        listing = json.dumps([file.identity for file in files], sort_keys=True)
        total = sum(file.size for file in files)
        digest = storage.sha256_bytes(listing.encode())
        result.append({"files": len(files), "bytes": total, "listing_sha256": digest})
    return result


def work_units(
    files: Sequence[InputFile], unit_bytes: int, validation_fraction: float, by_source: bool = False
) -> list[Unit]:
    """The files, in order, in units of at most `unit_bytes` bytes.

    A larger file is cut into such units where its format can be read from the middle, else it is a unit of its own.
    With `by_source` no unit holds files of two sources. A small corpus makes smaller units, so that there is work for
    several processes; how many there are does not matter, or the shards would depend on the machine.
    """
    total = sum(file.size for file in files)
    unit_bytes = min(unit_bytes, max(_SMALLEST_UNIT, total // _FEWEST_UNITS))
    units: list[list[InputFile]] = []
    filled = 0
    for file in (part for whole in files for part in _cut(whole, unit_bytes)):
        turned = by_source and units and units[-1][0].source != file.source
        if not units or turned or filled + file.read_bytes > unit_bytes:
            units.append([])
            filled = 0
        units[-1].append(file)
        filled += file.read_bytes
    return [Unit(files=tuple(unit), validation_fraction=validation_fraction) for unit in units]


def _cut(file: InputFile, unit_bytes: int) -> list[InputFile]:
    """The file in equal parts of about `unit_bytes` bytes, if it can be read from the middle."""
    part_bytes = max(unit_bytes, _SMALLEST_PART)
    if file.compression or file.format not in _CUT or file.size <= part_bytes:
        return [file]
    n_parts = -(-file.size // part_bytes)
    ends = [part * file.size // n_parts for part in range(n_parts + 1)]
    return [replace(file, begin=begin, end=end) for begin, end in itertools.pairwise(ends)]


def _python_docs(number: int, option: str) -> list[InputFile]:
    files = [
        InputFile(
            uri=f"{PYTHON_DOCS}:{path}",
            name=f"{number}:{path}",
            format=PYTHON_DOCS,
            compression="",
            size=size,
            version=platform.python_version(),
        )
        for path, size in python_docs.source_files()
    ]
    if not files:
        raise UserError(
            f"this Python comes without the sources of its standard library ({python_docs.library_folder()})",
            f"use another Python, or name your own text in {option}",
        )
    return files


def _stored(source: str, number: int, option: str) -> list[InputFile]:
    """The files of a path or URI: a file, a folder, or a glob."""
    is_pattern = any(character in source for character in "*?[")
    try:
        if source.startswith(hub.PREFIX):
            entries = hub.files(source)
        elif storage.exists(source) or not is_pattern:
            entries = storage.find(source)
        else:
            entries = storage.glob(source)
    except UserError:
        raise
    except Exception as error:  # every object store has exceptions of its own
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise UserError(
            storage.redacted(f"the source {source} cannot be read: {reason}"),
            "check the name, the credentials and, for other stores than AWS, AWS_ENDPOINT_URL",
        ) from None
    files = [_input_file(entry, number) for entry in entries]
    usable = [file for file in files if file is not None]
    if not usable:
        raise _nothing(source, is_pattern, len(entries), option)
    return usable


def _nothing(source: str, is_pattern: bool, n_others: int, option: str) -> UserError:
    """The error for a source without a single usable file."""
    if n_others:
        what = f"the source {source} has no file of a kind that can be read"
        return UserError(storage.redacted(what), f"use files that end in {_ENDINGS}")
    if is_pattern:
        return UserError(
            storage.redacted(f"the source {source} matches no file"), "check the pattern; quote it in a shell"
        )
    if storage.is_local(source) and storage.isdir(source):
        return UserError(f"the source {source} is an empty folder", f"name a file or folder with text in {option}")
    return UserError(storage.redacted(f"the source {source} does not exist"), f"check the name in {option}")


def _input_file(entry: storage.Entry, number: int) -> InputFile | None:
    """The file, of source `number`, with its format by its name's ending; None where that is none that can be read."""
    name = entry.uri.rsplit("/", 1)[-1].lower()
    compression = next((kind for kind in COMPRESSIONS if name.endswith("." + kind)), "")
    kind = name.removesuffix("." + compression).rsplit(".", 1)[-1] if "." in name else ""
    if kind not in FORMATS:
        return None
    return InputFile(
        uri=entry.uri,
        name=f"{number}:{entry.name}",
        format=kind,
        compression=compression,
        size=entry.size,
        version=entry.version,
    )
