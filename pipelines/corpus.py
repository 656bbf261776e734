"""The corpus stage: documents in, shards of tokens out (Ray Data, a task a unit of work).

The plan, the tokenizer and every shard depend on the input and the settings alone, never on the number of workers or on
the order in which they finish. A run that was killed leaves finished units behind, which the next one takes over.
"""

import functools
import json
import logging
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pipelines import sources, storage
from pipelines.corpus_config import CorpusConfig
from pipelines.errors import UserError
from pipelines.manifest import NAME as MANIFEST
from pipelines.manifest import is_done, read_manifest, write_manifest
from pipelines.progress import Progress, silent

if TYPE_CHECKING:
    from armd.tokenizer import Tokenizer
    from pipelines.shards import UnitSettings

QUARANTINE = "quarantine.jsonl"


def fingerprint(config: CorpusConfig) -> list[dict[str, Any]]:
    """What the sources and the given tokenizer are right now, JSON-able; reads listings and the tokenizer only.

    Raises:
        UserError: a source or the tokenizer is missing, cannot be read or is empty; a file is trained on and held out.
    """
    result = sources.fingerprint(config.sources)
    if config.validation_sources:
        result.append({"validation": sources.fingerprint(config.validation_sources, sources.VALIDATION_SOURCES)})
        work_units(config)  # refuses a file that is in both
    if config.tokenizer is not None:
        from pipelines.corpus_tokenizer import given_tokenizer

        result.append({"tokenizer_sha256": given_tokenizer(config.tokenizer).sha256})
    return result


def work_units(config: CorpusConfig) -> list[sources.Unit]:
    """The units of work, in order, those of the held-out sources last; reads listings only.

    Raises:
        UserError: a source is missing, cannot be read or is empty, or a file is trained on and held out.
    """
    files = sources.input_files(config.sources)
    if not config.validation_sources:
        return sources.work_units(files, config.unit_bytes, config.validation_fraction)
    held_out = sources.input_files(config.validation_sources, sources.VALIDATION_SOURCES)
    sources.check_apart(files, held_out)
    return [
        *sources.work_units(files, config.unit_bytes, validation_fraction=0.0),
        *sources.work_units(held_out, config.unit_bytes, validation_fraction=1.0),
    ]


def run(
    config: CorpusConfig, inputs: Mapping[str, str], output_dir: str, progress: Progress = silent
) -> dict[str, Any]:
    """Make the corpus in `output_dir` and return its manifest; needs no inputs from other stages.

    What an earlier run with the same settings and sources finished there is kept.

    Raises:
        UserError: a source or tokenizer that is missing or holds no text, too many unreadable records, too little text
            for one window a split, a place that cannot be written.
    """
    from pipelines.corpus_tokenizer import make_tokenizer
    from pipelines.shards import UnitSettings

    started = time.time()
    output_dir = storage.absolute(output_dir)
    identity = _identity(config)
    if is_done(output_dir):
        manifest = read_manifest(output_dir)
        if manifest.get("identity") == identity:
            return manifest
    storage.check_writable(output_dir)
    storage.remove_tree(storage.join(output_dir, MANIFEST))
    units = work_units(config)
    total = sum(file.size for unit in units for file in unit.files) / 1e6
    progress.update(0, total, "MB", "tokenizer")
    tokenizer = make_tokenizer(config, units, identity, output_dir)
    settings = UnitSettings(
        output_dir=output_dir,
        tokenizer_json=tokenizer.to_json(),
        text_field=config.text_field,
    )
    records = _records(units, settings, progress)
    _check(config, records, output_dir)
    _remove_leftovers(records, output_dir)
    body = {"identity": identity, **summary(config, tokenizer, records)}
    return write_manifest(output_dir, "corpus", body, started)


def _records(units: Sequence[sources.Unit], settings: "UnitSettings", progress: Progress) -> list[dict[str, Any]]:
    """The units' records in the order of the plan; says how far it is as they come in."""
    sizes = [sum(file.size for file in unit.files) / 1e6 for unit in units]
    records: list[dict[str, Any]] = [{}] * len(units)
    done = 0.0
    counts: Counter[str] = Counter()
    for index, record in each_unit(units, settings):
        records[index] = record
        done += sizes[index]
        counts.update(record["documents"])
        counts["tokens"] += sum(part["tokens"] for part in record["splits"].values())
        note = f"{counts['used']:,} documents, {counts['tokens']:,} tokens"
        if counts["quarantined"]:
            note += f", {counts['quarantined']:,} quarantined"
        progress.update(done, sum(sizes), "MB", note)
    return records


def each_unit(units: Sequence[sources.Unit], settings: "UnitSettings") -> Iterator[tuple[int, dict[str, Any]]]:
    """(index, record) of each unit as it is finished, in any order, by Ray Data."""
    import ray.data

    from pipelines.runtime import connect

    connect()
    _silence_ray_data()
    items = [{"index": index, "unit": json.dumps(asdict(unit))} for index, unit in enumerate(units)]
    dataset = ray.data.from_items(items, override_num_blocks=len(items))
    for row in dataset.map(functools.partial(_make_row, settings=settings), num_cpus=1).iter_rows():
        if row["error"]:
            raise UserError(*json.loads(row["error"]))
        yield row["index"], json.loads(row["record"])


def _silence_ray_data() -> None:
    """Keep Ray Data's bars and log lines off the terminal: what matters is reported or raised here."""
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.CRITICAL)


def _make_row(row: dict[str, Any], settings: "UnitSettings") -> dict[str, Any]:
    """What a Ray task does: one unit. A `UserError` comes back as a value, since Ray Data does not hand on its type."""
    from pipelines.shards import make_unit

    plain = json.loads(row["unit"])
    files = tuple(sources.InputFile(**file) for file in plain.pop("files"))
    unit = sources.Unit(files=files, **plain)
    try:
        return {"index": row["index"], "record": json.dumps(make_unit(unit, settings)), "error": ""}
    except UserError as error:
        return {"index": row["index"], "record": "", "error": json.dumps([error.what, error.fix])}


def summary(config: CorpusConfig, tokenizer: "Tokenizer", records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The manifest's content, from the units' records in the order of the plan."""
    from pipelines.shards import SPLITS, token_dtype

    splits = {}
    for split in SPLITS:
        parts = [record["splits"][split] for record in records]
        splits[split] = {name: sum(part[name] for part in parts) for name in ("documents", "tokens", "bytes")}
        splits[split]["shards"] = [shard for part in parts for shard in part["shards"]]
    return {
        "config": {
            **asdict(config),
            "sources": [storage.redacted(source) for source in config.sources],
            "validation_sources": [storage.redacted(source) for source in config.validation_sources],
        },
        "documents": _documents(records),
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "dtype": token_dtype(tokenizer.vocab_size).name,
        "sequence_length": config.sequence_length,
        "splits": splits,
        "unigram": {"validation_nats_per_token": unigram_nats_per_token(records)},
    }


def unigram_nats_per_token(records: Iterable[Mapping[str, Any]]) -> float:
    """Cross-entropy of the training split's token counts, one added to each, on the validation split; nats a token."""
    import numpy as np

    from pipelines.shards import unpacked_counts

    train: Any = 0
    validation: Any = 0
    for record in records:
        train = train + unpacked_counts(record["splits"]["train"]["counts"])
        validation = validation + unpacked_counts(record["splits"]["validation"]["counts"])
    log_p = np.log(train + 1) - math.log(train.sum() + len(train))
    return float(-(validation * log_p).sum() / validation.sum())


def _identity(config: CorpusConfig) -> str:
    """Of the settings and of what the sources and the tokenizer hold, wherever they are."""
    elsewhere = ("sources", "validation_sources", "tokenizer")
    settings = {name: value for name, value in asdict(config).items() if name not in elsewhere}
    content = {"config": settings, "fingerprint": fingerprint(config)}
    return storage.sha256_bytes(json.dumps(content, sort_keys=True).encode("utf-8"))


def _documents(records: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    total = dict.fromkeys(("read", "used", "empty", "quarantined"), 0)
    for record in records:
        for name in total:
            total[name] += record["documents"][name]
    return total


def _check(config: CorpusConfig, records: Sequence[Mapping[str, Any]], output_dir: str) -> None:
    """Write quarantine.jsonl, and raise where the records are not a corpus."""
    from pipelines.corpus_tokenizer import no_text
    from pipelines.shards import SHARDS, SPLITS

    documents = _documents(records)
    assert documents["read"] == documents["used"] + documents["empty"] + documents["quarantined"], documents
    lines = [json.dumps(entry, sort_keys=True) + "\n" for record in records for entry in record["quarantine"]]
    storage.write_text(storage.join(output_dir, QUARANTINE), "".join(lines))
    if documents["quarantined"] > config.max_quarantined * documents["read"]:
        raise _too_many_quarantined(config, documents, records, output_dir)
    if not documents["used"]:
        raise no_text(config)
    present = set(storage.list_names(storage.join(output_dir, SHARDS)))
    for shard in _shards(records):
        if shard["path"].rsplit("/", 1)[-1] not in present:
            raise UserError(
                storage.redacted(f"{output_dir} is not the same folder on every node: {shard['path']} is not here"),
                "choose a --root that all nodes share: an object store (s3://..) or a network folder",
            )
    for split in SPLITS:
        tokens = sum(record["splits"][split]["tokens"] for record in records)
        if tokens < config.sequence_length:
            raise _too_little(config, split, tokens, documents["used"])


def _too_many_quarantined(
    config: CorpusConfig, documents: Mapping[str, int], records: Sequence[Mapping[str, Any]], output_dir: str
) -> UserError:
    entries = [entry for record in records for entry in record["quarantine"]]
    reasons = {entry["source"]: _where(entry) for entry in reversed(entries)}
    worst = Counter(entry["source"] for entry in entries).most_common(3)
    named = "; ".join(f"{source} ({count}, the first: {reasons[source]})" for source, count in worst)
    report = storage.redacted(storage.join(output_dir, QUARANTINE))
    what = f"{documents['quarantined']} of {documents['read']} records cannot be read, more than max_quarantined = "
    return UserError(
        what + f"{config.max_quarantined:g} allows; the worst: {named}",
        f"see {report}; mend the files or raise --corpus.max-quarantined",
    )


def _where(entry: Mapping[str, Any]) -> str:
    """A quarantined record's line, if it is not the whole file, and the reason."""
    return f"line {entry['line']}: {entry['reason']}" if entry["line"] else str(entry["reason"])


def _too_little(config: CorpusConfig, split: str, tokens: int, documents: int) -> UserError:
    what = f"the {split} split has {tokens} tokens (of {documents} documents in all), less than one window of "
    if config.validation_sources:
        option = sources.VALIDATION_SOURCES if split == "validation" else sources.SOURCES
        fix = f"give more text in {option}, or a shorter --corpus.sequence-length"
    else:
        share = "larger" if split == "validation" else "smaller"
        fix = (
            "give more documents (a text file is one, a line of .jsonl is one), a shorter --corpus.sequence-length, "
            f"or a {share} --corpus.validation-fraction than {config.validation_fraction:g}"
        )
    return UserError(what + f"{config.sequence_length}", fix)


def _shards(records: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    for record in records:
        for part in record["splits"].values():
            yield from part["shards"]


def _remove_leftovers(records: Sequence[Mapping[str, Any]], output_dir: str) -> None:
    """Remove shards and records that other settings, another input or a killed run left behind."""
    from pipelines.shards import SHARDS, UNITS, record_path

    kept = {shard["path"] for shard in _shards(records)} | {record_path(record["key"]) for record in records}
    for folder in (SHARDS, UNITS):
        place = storage.join(output_dir, folder)
        storage.remove_unfinished(place)
        for name in storage.list_names(place):
            if f"{folder}/{name}" not in kept and name != "tokenizer.json":
                storage.remove_tree(storage.join(place, name))
