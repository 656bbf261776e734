"""What a corpus's manifest says, from the records of its units."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

from armd.tokenizer import Tokenizer
from pipelines import storage
from pipelines.corpus_config import CorpusConfig
from pipelines.documents import KINDS
from pipelines.formation import described
from pipelines.shard_file import SAMPLES, token_dtype, unpacked_counts
from pipelines.shards import SPLITS

_SHOWN = 160  # tokens of a sample document


class Tally:
    """The records of the units as they come in, in any order; what can be added up is added up and not kept."""

    def __init__(self, n_units: int) -> None:
        self._records: list[dict[str, Any]] = [{}] * n_units
        self._counts: dict[str, Any] = dict.fromkeys(SPLITS, 0)
        self.documents = dict.fromkeys(("read", *KINDS), 0)
        """Records so far, by what became of them."""
        self.tokens = 0
        """Tokens so far, of both splits."""

    def add(self, index: int, record: dict[str, Any]) -> None:
        """Take the record of unit `index`."""
        self._records[index] = record
        for kind, count in record["documents"].items():
            self.documents[kind] += count
        for split, part in record["splits"].items():
            self.tokens += part["tokens"]
            self._counts[split] = self._counts[split] + unpacked_counts(part.pop("counts"))

    @property
    def keys(self) -> list[str]:
        """The units' keys, in the order of the plan."""
        return [record["key"] for record in self._records]

    @property
    def quarantine(self) -> Iterator[dict[str, Any]]:
        """What cannot be read, of the units so far, in the order of the plan."""
        return (entry for record in self._records for entry in record.get("quarantine", ()))

    @property
    def shards(self) -> Iterator[dict[str, Any]]:
        """All shards."""
        return (shard for split in SPLITS for part in self.parts(split) for shard in part["shards"])

    def parts(self, split: str) -> Iterator[dict[str, Any]]:
        """What each unit gave to the split, in the order of the plan."""
        return (record["splits"][split] for record in self._records)

    def total(self, split: str, name: str) -> int:
        """The sum of a count of the split."""
        return sum(part[name] for part in self.parts(split))

    def n_shards_by_source(self, split: str) -> Counter[int]:
        """Shards of each source, by its number."""
        counts: Counter[int] = Counter()
        for record in self._records:
            counts[record["source"]] += len(record["splits"][split]["shards"])
        return counts

    def tokens_by_source(self, split: str) -> Counter[int]:
        """Tokens of each source, by its number."""
        counts: Counter[int] = Counter()
        for record in self._records:
            counts[record["source"]] += record["splits"][split]["tokens"]
        return counts

    def unigram_nats_per_token(self) -> float:
        """Cross-entropy of the training split's token counts, one added to each, on the validation split; nats."""
        train, validation = (self._counts[split] for split in SPLITS)
        log_p = np.log(train + 1) - math.log(train.sum() + len(train))
        return float(-(validation * log_p).sum() / validation.sum())


def summary(config: CorpusConfig, tokenizer: Tokenizer, tally: Tally, output_dir: str) -> dict[str, Any]:
    """The manifest's content; reads the sample documents from the shards in `output_dir`."""
    return {
        "config": {
            **asdict(config),
            "sources": [storage.redacted(source) for source in config.sources],
            "validation_sources": [storage.redacted(source) for source in config.validation_sources],
        },
        "documents": tally.documents,
        "quarantine_reasons": quarantine_reasons(tally),
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "dtype": token_dtype(tokenizer.vocab_size).name,
        "sequence_length": config.sequence_length,
        "formation": described(config.formation, tokenizer),
        "splits": {split: _split(config, tally, split) for split in SPLITS},
        "samples": _samples(tally, tokenizer, output_dir),
        "unigram": {"validation_nats_per_token": tally.unigram_nats_per_token()},
    }


def quarantine_reasons(tally: Tally) -> dict[str, int]:
    """Quarantined records by the kind of reason."""
    return dict(Counter(entry["reason"].partition(":")[0] for entry in tally.quarantine))


def _split(config: CorpusConfig, tally: Tally, split: str) -> dict[str, Any]:
    result: dict[str, Any] = {name: tally.total(split, name) for name in ("documents", "tokens", "bytes")}
    lengths = [part["lengths"] for part in tally.parts(split)]
    longest = max(map(len, lengths))
    result["lengths"] = [sum(one[i] for one in lengths if i < len(one)) for i in range(longest)]
    result["shards"] = [shard for part in tally.parts(split) for shard in part["shards"]]
    if config.weights and split == "train":
        n_shards = tally.n_shards_by_source(split)
        result["mixture"] = [{"weight": w, "shards": n_shards[source]} for source, w in enumerate(config.weights)]
    return result


def _samples(tally: Tally, tokenizer: Tokenizer, output_dir: str) -> list[dict[str, Any]]:
    """Training documents with the smallest hashes: as good as drawn, and the same on any number of machines."""
    found = [
        (digest, part["shards"][0]["path"], start, tokens)
        for part in tally.parts("train")
        for digest, start, tokens in part["samples"]
    ]
    samples = []
    for digest, path, start, tokens in sorted(found)[:SAMPLES]:
        ids = _read(storage.join(output_dir, path), start, min(tokens, _SHOWN))
        samples.append({"hash": digest, "tokens": tokens, "shown": _texts(ids, tokenizer)})
    return samples


def _read(uri: str, start: int, count: int) -> list[int]:
    """`count` ids of a shard from place `start` on, without reading the rest."""
    with storage.open_read(uri) as file:
        np.lib.format.read_magic(file)
        _, _, dtype = np.lib.format.read_array_header_1_0(file)
        file.seek(file.tell() + start * dtype.itemsize)
        return np.frombuffer(file.read(count * dtype.itemsize), dtype=dtype).tolist()


def _texts(ids: list[int], tokenizer: Tokenizer) -> list[str]:
    """The text of each token; tokens that make up one character together come as one."""
    texts, pending = [], list[int]()
    for token in ids:
        pending.append(token)
        text = tokenizer.decode(pending)
        if not text.endswith("\ufffd") or len(pending) == 4:
            texts.append(text)
            pending = []
    return [*texts, tokenizer.decode(pending)] if pending else texts
