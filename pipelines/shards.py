"""One unit of work of the corpus: its documents tokenised into one shard a split, with a record that commits them.

A shard is a .npy file of one dimension: documents, each followed by the end-of-text token unless the formation says
otherwise. Its name is its content's hash, so the same input gives the same files whoever made them; the record, written
after them, says which they are.
"""

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from armd.tokenizer import Tokenizer
from pipelines import storage
from pipelines.corpus_config import Reading
from pipelines.documents import Documents
from pipelines.duplicates import FOLDER as HASHES
from pipelines.errors import UserError
from pipelines.formation import FORMATIONS, row, specials
from pipelines.shard_file import SHARDS, ShardFile, unpacked_counts
from pipelines.sources import Unit

SPLITS = ("train", "validation")
UNITS = "units"
_VERSION = 2  # to be raised when the same settings begin to give other shards
_BATCH_CHARACTERS = 1 << 20  # tokenised at once; a longer document is tokenised and written in parts


@dataclass(frozen=True, kw_only=True)
class UnitSettings:
    """What every unit of a corpus has in common."""

    output_dir: str
    """The stage's folder or URI."""
    tokenizer_json: str
    """The tokenizer, as tokenizer.json."""
    reading: Reading = field(default_factory=Reading)
    """How files become documents."""
    formation: str = "packed"
    """How documents become sequences, by the preset's name."""
    row_length: int | None = None
    """Tokens of a sequence, where the formation gives each document one of its own."""


def is_held_out(text: str, validation_fraction: float) -> bool:
    """True where the document belongs to the validation split: a matter of its text alone."""
    return _held_out(hashlib.sha256(text.encode("utf-8")), validation_fraction)


def unit_key(unit: Unit, settings: UnitSettings) -> str:
    """Identity of the unit's shards: the files as they are now, what is held out, the settings and the tokenizer."""
    identity = {
        "version": _VERSION,
        "files": [file.identity for file in unit.files],
        "dropped": [unit.dropped, unit.n_hashed],
        "tokenizer": storage.sha256_bytes(settings.tokenizer_json.encode("utf-8")),
        "reading": asdict(settings.reading),
        "formation": [settings.formation, FORMATIONS[settings.formation].version, settings.row_length],
        "validation_fraction": unit.validation_fraction,
    }
    return storage.sha256_bytes(json.dumps(identity, sort_keys=True).encode("utf-8"))


def record_path(key: str) -> str:
    """Where the record of the unit `key` is, relative to the output folder."""
    return f"{UNITS}/{key[:32]}.json"


def make_unit(unit: Unit, settings: UnitSettings) -> dict[str, Any]:
    """The unit's record: read where the unit is finished and its shards are intact, else made, shards first.

    Returns:
        {"key", "source", "documents": {read, used, empty, duplicate, quarantined},
        "quarantine": [as `Documents.quarantine`], "splits": {split: {documents, tokens, bytes,
        shards: [{path, sha256, tokens}], counts, lengths, samples}}}, where `counts` is what `packed_counts` makes of
        the number of times each token occurs, `lengths[i]` is the number of documents of 2^(i-1) to 2^i - 1 tokens, and
        `samples` has [hash, first token, tokens] of the documents with the smallest hashes.

    Raises:
        UserError: an input file cannot be read for reasons that are not its own, or has other documents than when
            duplicates were looked for, or a shard cannot be written.
    """
    key = unit_key(unit, settings)
    record = _finished(key, settings.output_dir)
    if record is None:
        record = {"key": key, "source": unit.files[0].source, **_write_shards(unit, settings)}
        kept = {"record": record, "sha256": _digest(record)}
        storage.write_json(storage.join(settings.output_dir, record_path(key)), kept)
    return record


def _finished(key: str, output_dir: str) -> dict[str, Any] | None:
    """The record of a finished unit, if it and the unit's shards are intact."""
    try:
        kept = storage.read_json(storage.join(output_dir, record_path(key)))
        record: dict[str, Any] = kept["record"]
        if kept["sha256"] != _digest(record):
            return None
        shards = [shard for split in SPLITS for shard in record["splits"][split]["shards"]]
        sums = [storage.sha256_file(storage.join(output_dir, shard["path"])) for shard in shards]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    intact = record.get("key") == key and sums == [shard["sha256"] for shard in shards]
    return record if intact else None


def _digest(record: dict[str, Any]) -> str:
    return storage.sha256_bytes(json.dumps(record, sort_keys=True).encode("utf-8"))


def _write_shards(unit: Unit, settings: UnitSettings) -> dict[str, Any]:
    tokenizer = _tokenizer(settings.tokenizer_json)
    folder = storage.join(settings.output_dir, SHARDS)
    dropped = set(unpacked_counts(unit.dropped).tolist()) if unit.dropped else set()
    empty_rows = FORMATIONS[settings.formation].empty_rows
    documents = Documents(unit, settings.reading, empty_rows=empty_rows, dropped=dropped)
    ends = _Ends(settings, tokenizer)
    with storage.scratch_file(folder) as train, storage.scratch_file(folder) as validation:
        train_shard, validation_shard = (ShardFile(path, tokenizer.vocab_size) for path in (train, validation))
        with train_shard, validation_shard:
            for text, parts in _tokenised(documents, tokenizer):
                data = text.encode("utf-8")
                digest = hashlib.sha256(data)
                shard = validation_shard if _held_out(digest, unit.validation_fraction) else train_shard
                shard.append(ends.around(parts), len(data), digest.hexdigest()[:16])
        _check_count(unit, documents, settings.output_dir)
        splits = {
            "train": train_shard.finish(settings.output_dir, "train"),
            "validation": validation_shard.finish(settings.output_dir, "validation"),
        }
    return {"documents": documents.counts, "quarantine": documents.quarantine, "splits": splits}


def _check_count(unit: Unit, documents: Documents, output_dir: str) -> None:
    """The numbers of the documents to leave out are those of the first pass: both must have seen the same ones."""
    found = documents.counts["used"] + documents.counts["duplicate"]
    if unit.n_hashed not in (None, found):
        raise UserError(
            storage.redacted(
                f"{unit.files[0].uri} to {unit.files[-1].uri} had {unit.n_hashed} documents when duplicates were "
                f"looked for, and {found} when they were read again"
            ),
            storage.redacted(f"remove {storage.join(output_dir, HASHES)} and run again while no file changes"),
        )


class _Ends:
    """Puts round a document what the formation wants there."""

    def __init__(self, settings: UnitSettings, tokenizer: Tokenizer) -> None:
        formation = FORMATIONS[settings.formation]
        self._specials = specials(settings.formation, tokenizer)
        self._length = settings.row_length if formation.padded else None
        self._end = [tokenizer.eos_id] if formation.row_ends else []

    def around(self, parts: Iterable[list[int]]) -> Iterator[list[int]]:
        if self._length is not None:
            ids: list[int] = []
            for part in parts:
                ids += part
                if len(ids) >= self._length:
                    break
            yield row(ids, self._length, self._specials)
            return
        last: list[int] = []
        for part in parts:
            if last:
                yield last
            last = part
        yield [*last, *self._end]


def _tokenised(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[tuple[str, Iterable[list[int]]]]:
    """Each text with its ids, in parts; texts are tokenised together up to `_BATCH_CHARACTERS`."""
    for batch in _batches(texts):
        if len(batch) == 1 and len(batch[0]) > _BATCH_CHARACTERS:
            yield batch[0], tokenizer.encode_stream(batch)
        else:
            for text, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
                yield text, [ids]


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts together, a long one alone."""
    batch: list[str] = []
    size = 0
    for text in texts:
        if batch and size + len(text) > _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    if batch:
        yield batch


def _held_out(digest: Any, validation_fraction: float) -> bool:
    return int.from_bytes(digest.digest()[:8], "big") < validation_fraction * 2**64


@functools.lru_cache(maxsize=1)
def _tokenizer(text: str) -> Tokenizer:
    return Tokenizer.from_json(text)
