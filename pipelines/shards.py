"""One unit of work of the corpus: its documents tokenised into one shard a split, with a record that commits them.

A shard is a .npy file of one dimension: documents, each followed by the end-of-text token. Its name is its content's
hash, so the same input gives the same files whoever made them; the record, written after them, says which they are.
"""

import base64
import functools
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from armd.tokenizer import Tokenizer
from pipelines import storage
from pipelines.records import read_records
from pipelines.sources import InputFile, Unit

SPLITS = ("train", "validation")
SHARDS = "shards"
UNITS = "units"
_VERSION = 1  # to be raised when the same settings begin to give other shards
_BATCH_CHARACTERS = 1 << 20  # tokenised at once


@dataclass(frozen=True, kw_only=True)
class UnitSettings:
    """What every unit of a corpus has in common."""

    output_dir: str
    """The stage's folder or URI."""
    tokenizer_json: str
    """The tokenizer, as tokenizer.json."""
    text_field: str
    """Field or column that holds the document."""


def is_held_out(text: str, validation_fraction: float) -> bool:
    """True where the document belongs to the validation split: a matter of its text alone."""
    return _held_out(text.encode("utf-8"), validation_fraction)


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest type for token ids: uint16 for up to 65,536 entries, else uint32."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def unit_key(unit: Unit, settings: UnitSettings) -> str:
    """Identity of the unit's shards: the files as they are now, what is held out, the settings and the tokenizer."""
    identity = {
        "version": _VERSION,
        "files": [file.identity for file in unit.files],
        "tokenizer": storage.sha256_bytes(settings.tokenizer_json.encode("utf-8")),
        "text_field": settings.text_field,
        "validation_fraction": unit.validation_fraction,
    }
    return storage.sha256_bytes(json.dumps(identity, sort_keys=True).encode("utf-8"))


def record_path(key: str) -> str:
    """Where the record of the unit `key` is, relative to the output folder."""
    return f"{UNITS}/{key[:32]}.json"


def make_unit(unit: Unit, settings: UnitSettings) -> dict[str, Any]:
    """The unit's record: read where the unit is finished and its shards are intact, else made, shards first.

    Returns:
        {"key", "documents": {read, used, empty, quarantined}, "quarantine": [{source, line, reason}],
        "splits": {split: {documents, tokens, bytes, shards: [{path, sha256, tokens}], counts}}}, where `counts` is what
        `packed_counts` makes of the number of times each token occurs.

    Raises:
        UserError: an input file cannot be read for reasons that are not its own.
    """
    key = unit_key(unit, settings)
    record = _finished(key, settings.output_dir)
    if record is None:
        record = {"key": key, **_write_shards(unit, settings)}
        storage.write_json(storage.join(settings.output_dir, record_path(key)), record)
    return record


def packed_counts(counts: np.ndarray) -> str:
    """Counts as text for JSON."""
    return base64.b85encode(zlib.compress(counts.astype("<i8").tobytes(), 1)).decode("ascii")


def unpacked_counts(text: str) -> np.ndarray:
    """What `packed_counts` packed, int64."""
    return np.frombuffer(zlib.decompress(base64.b85decode(text)), dtype="<i8").astype(np.int64)


def _finished(key: str, output_dir: str) -> dict[str, Any] | None:
    """The record of a finished unit whose shards are there and intact."""
    try:
        record: dict[str, Any] = storage.read_json(storage.join(output_dir, record_path(key)))
        shards = [shard for split in SPLITS for shard in record["splits"][split]["shards"]]
        sums = [storage.sha256_file(storage.join(output_dir, shard["path"])) for shard in shards]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    intact = record.get("key") == key and sums == [shard["sha256"] for shard in shards]
    return record if intact else None


def _write_shards(unit: Unit, settings: UnitSettings) -> dict[str, Any]:
    tokenizer = _tokenizer(settings.tokenizer_json)
    folder = storage.join(settings.output_dir, SHARDS)
    documents = dict.fromkeys(("read", "used", "empty", "quarantined"), 0)
    quarantine: list[dict[str, Any]] = []
    with storage.scratch_file(folder) as train, storage.scratch_file(folder) as validation:
        with _Shard(train, tokenizer) as train_shard, _Shard(validation, tokenizer) as validation_shard:
            for texts in _batches(_texts(unit.files, settings.text_field, documents, quarantine)):
                for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
                    data = text.encode("utf-8")
                    held_out = _held_out(data, unit.validation_fraction)
                    (validation_shard if held_out else train_shard).append(ids, len(data))
        splits = {
            "train": train_shard.finish(settings.output_dir, "train"),
            "validation": validation_shard.finish(settings.output_dir, "validation"),
        }
    return {"documents": documents, "quarantine": quarantine, "splits": splits}


def _texts(
    files: Sequence[InputFile], text_field: str, documents: dict[str, int], quarantine: list[dict[str, Any]]
) -> Iterator[str]:
    """The files' documents in order; every record is counted, and noted where it is unreadable."""
    for file in files:
        for record in read_records(file, text_field):
            documents["read"] += 1
            if record.reason:
                documents["quarantined"] += 1
                source = storage.redacted(file.uri)
                quarantine.append({"source": source, "line": record.line, "reason": record.reason})
            elif not record.text.strip():
                documents["empty"] += 1
            else:
                documents["used"] += 1
                yield record.text


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _held_out(data: bytes, validation_fraction: float) -> bool:
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big") < validation_fraction * 2**64


@functools.lru_cache(maxsize=1)
def _tokenizer(text: str) -> Tokenizer:
    return Tokenizer.from_json(text)


class _Shard:
    """A .npy file that grows: the header is written again when its length is known."""

    def __init__(self, path: str, tokenizer: Tokenizer) -> None:
        self._path = path
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._eos_id = tokenizer.eos_id
        self._counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
        self._documents = self._tokens = self._bytes = 0

    def __enter__(self) -> "_Shard":
        self._file = open(self._path, "wb")
        self._write_header()
        return self

    def __exit__(self, *error: object) -> None:
        self._file.seek(0)
        self._write_header()
        self._file.close()

    def append(self, ids: list[int], n_bytes: int) -> None:
        """Add a document of these ids, whose text has `n_bytes` bytes of UTF-8."""
        array = np.array([*ids, self._eos_id], dtype=self._dtype)
        self._file.write(array.tobytes())
        np.add.at(self._counts, array, 1)
        self._documents += 1
        self._tokens += len(array)
        self._bytes += n_bytes

    def finish(self, output_dir: str, split: str) -> dict[str, Any]:
        """Put the closed file in its place; what the record says of the split. No shard for no tokens."""
        shards = []
        if self._tokens:
            digest = storage.sha256_file(self._path)
            path = f"{SHARDS}/{split}-{digest[:24]}.npy"
            storage.put_file(self._path, storage.join(output_dir, path))
            shards.append({"path": path, "sha256": digest, "tokens": self._tokens})
        return {
            "documents": self._documents,
            "tokens": self._tokens,
            "bytes": self._bytes,
            "shards": shards,
            "counts": packed_counts(self._counts),
        }

    def _write_header(self) -> None:
        """Numpy pads the header of a growing array to a fixed size."""
        description = np.lib.format.dtype_to_descr(self._dtype)
        header = {"descr": description, "fortran_order": False, "shape": (self._tokens,)}
        np.lib.format.write_array_header_1_0(self._file, header)
