"""The corpus stage: documents in, shards of tokens out (Ray Data, a task a unit of work).

The plan, the tokenizer and every shard depend on the input and the settings alone, never on the number of workers or on
the order in which they finish. A run that was killed leaves finished units behind, which the next one takes over.
"""

import functools
import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pipelines import sources, storage
from pipelines.corpus_config import CorpusConfig
from pipelines.corpus_tasks import in_tasks
from pipelines.errors import UserError
from pipelines.manifest import NAME as MANIFEST
from pipelines.manifest import is_done, read_manifest, write_manifest
from pipelines.progress import Progress, silent

if TYPE_CHECKING:
    from pipelines.corpus_summary import Tally
    from pipelines.shards import UnitSettings

QUARANTINE = "quarantine.jsonl"
_FEWEST_QUARANTINED = 1000  # before the stage stops early


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
        return sources.work_units(files, config.unit_bytes, config.validation_fraction, bool(config.weights))
    held_out = sources.input_files(config.validation_sources, sources.VALIDATION_SOURCES)
    sources.check_apart(files, held_out)
    return [
        *sources.work_units(files, config.unit_bytes, validation_fraction=0.0, by_source=bool(config.weights)),
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
    from pipelines.corpus_summary import Tally, summary
    from pipelines.corpus_tokenizer import make_tokenizer
    from pipelines.formation import FORMATIONS, specials
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
    progress.update(0, _megabytes(units), "MB", "tokenizer")
    tokenizer = make_tokenizer(config, units, identity, output_dir)
    specials(config.formation, tokenizer)  # refuses a tokenizer that the formation cannot use
    if config.drop_duplicates:
        units = _without_duplicates(config, units, output_dir, progress)
    settings = UnitSettings(
        output_dir=output_dir,
        tokenizer_json=tokenizer.to_json(),
        reading=config.reading,
        formation=config.formation,
        row_length=config.sequence_length if FORMATIONS[config.formation].padded else None,
    )
    tally = Tally(len(units))
    _make_units(config, units, settings, tally, progress)
    _check(config, tally, output_dir)
    _remove_leftovers(tally, output_dir)
    body = {"identity": identity, **summary(config, tokenizer, tally, output_dir)}
    return write_manifest(output_dir, "corpus", body, started)


def _without_duplicates(
    config: CorpusConfig, units: Sequence[sources.Unit], output_dir: str, progress: Progress
) -> list[sources.Unit]:
    """The units, told which of their documents repeat another one's text; reads everything once."""
    from pipelines.duplicates import hash_unit, without_duplicates

    paths = [""] * len(units)
    done = 0.0
    hash_one = functools.partial(hash_unit, output_dir=output_dir, reading=config.reading)
    for index, result in in_tasks(hash_one, units):
        paths[index] = result["path"]
        done += _megabytes([units[index]])
        progress.update(done, _megabytes(units), "MB read", "looking for duplicates")
    return without_duplicates(units, output_dir, paths)


def _make_units(
    config: CorpusConfig,
    units: Sequence[sources.Unit],
    settings: "UnitSettings",
    tally: "Tally",
    progress: Progress,
) -> None:
    """Make the units, in any order; says how far it is as they come in, and stops where it can only fail."""
    from pipelines.shards import make_unit

    total, done, since = _megabytes(units), 0.0, time.monotonic()
    for index, record in in_tasks(functools.partial(make_unit, settings=settings), units):
        tally.add(index, record)
        done += _megabytes([units[index]])
        rate = tally.tokens / max(time.monotonic() - since, 1e-3)
        note = f"{tally.documents['used']:,} documents, {tally.tokens:,} tokens, {rate:,.0f} tokens/s"
        if tally.documents["quarantined"]:
            note += f", {tally.documents['quarantined']:,} quarantined"
        progress.update(done, total, "MB", note)
        expected = tally.documents["read"] * total / max(done, 1e-9)  # records, should they stay as long as they are
        if tally.documents["quarantined"] > max(_FEWEST_QUARANTINED, 2 * config.max_quarantined * expected):
            _write_quarantine(tally, settings.output_dir)
            raise _too_many_quarantined(config, tally, settings.output_dir)


def _megabytes(units: Iterable[sources.Unit]) -> float:
    return sum(file.read_bytes for unit in units for file in unit.files) / 1e6


def _identity(config: CorpusConfig) -> str:
    """Of the settings and of what the sources and the tokenizer hold, wherever they are."""
    elsewhere = ("sources", "validation_sources", "tokenizer")
    settings = {name: value for name, value in asdict(config).items() if name not in elsewhere}
    content = {"config": settings, "fingerprint": fingerprint(config)}
    return storage.sha256_bytes(json.dumps(content, sort_keys=True).encode("utf-8"))


def _check(config: CorpusConfig, tally: "Tally", output_dir: str) -> None:
    """Write quarantine.jsonl, and raise where the records are not a corpus."""
    from pipelines.corpus_tokenizer import no_text
    from pipelines.shards import SHARDS, SPLITS

    documents = tally.documents
    assert documents["read"] == sum(documents[kind] for kind in documents if kind != "read"), documents
    _write_quarantine(tally, output_dir)
    if documents["quarantined"] > config.max_quarantined * documents["read"]:
        raise _too_many_quarantined(config, tally, output_dir)
    if not documents["used"]:
        raise no_text(config)
    present = set(storage.list_names(storage.join(output_dir, SHARDS)))
    for shard in tally.shards:
        if shard["path"].rsplit("/", 1)[-1] not in present:
            raise UserError(
                storage.redacted(f"{output_dir} is not the same folder on every node: {shard['path']} is not here"),
                "choose a --root that all nodes share: an object store (s3://..) or a network folder",
            )
    for split in SPLITS:
        tokens = tally.total(split, "tokens")
        if tokens < config.sequence_length:
            raise _too_little(config, split, tokens, documents["used"])
    if config.weights:
        _check_mixture(config, tally)


def _check_mixture(config: CorpusConfig, tally: "Tally") -> None:
    """Refuse a source that has a weight and nothing to draw."""
    by_source = tally.tokens_by_source("train")
    for number, source in enumerate(config.sources):
        if by_source[number] < config.sequence_length:
            raise UserError(
                storage.redacted(
                    f"the source {source} has a weight and {by_source[number]} tokens to train on, less than "
                )
                + f"one window of {config.sequence_length}",
                f"give it more text, leave it out of {sources.SOURCES} and --corpus.weights, or take a shorter "
                "--corpus.sequence-length",
            )


def _write_quarantine(tally: "Tally", output_dir: str) -> None:
    lines = [json.dumps(entry, sort_keys=True) + "\n" for entry in tally.quarantine]
    storage.write_text(storage.join(output_dir, QUARANTINE), "".join(lines))


def _too_many_quarantined(config: CorpusConfig, tally: "Tally", output_dir: str) -> UserError:
    entries = list(tally.quarantine)
    reasons = {entry["source"]: _where(entry) for entry in reversed(entries)}
    worst = Counter(entry["source"] for entry in entries).most_common(3)
    named = "; ".join(f"{source} ({count}, the first: {reasons[source]})" for source, count in worst)
    report = storage.redacted(storage.join(output_dir, QUARANTINE))
    documents = tally.documents
    what = f"{documents['quarantined']} of {documents['read']} records cannot be read, more than max_quarantined = "
    return UserError(
        what + f"{config.max_quarantined:g} allows; the worst: {named}",
        f"see {report}; mend the files or raise --corpus.max-quarantined",
    )


def _where(entry: Mapping[str, Any]) -> str:
    """A quarantined record's line, if it is not the whole file, and the reason."""
    if not entry["line"]:
        return str(entry["reason"])
    start = f" from byte {entry['from_byte']} on" if "from_byte" in entry else ""
    return f"line {entry['line']}{start}: {entry['reason']}"


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


def _remove_leftovers(tally: "Tally", output_dir: str) -> None:
    """Remove shards and records that other settings, another input or a killed run left behind."""
    from pipelines.duplicates import FOLDER
    from pipelines.shards import SHARDS, UNITS, record_path

    kept = {shard["path"] for shard in tally.shards} | {record_path(key) for key in tally.keys}
    for folder in (SHARDS, UNITS):
        place = storage.join(output_dir, folder)
        storage.remove_unfinished(place)
        for name in storage.list_names(place):
            if f"{folder}/{name}" not in kept and name != "tokenizer.json":
                storage.remove_tree(storage.join(place, name))
    storage.remove_tree(storage.join(output_dir, FOLDER))
