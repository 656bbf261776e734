"""The corpus's tokenizer: the given one, or one trained on a bounded, evenly spread sample of the training split."""

import os
import tempfile
from collections.abc import Iterator, Sequence

from armd.tokenizer import Tokenizer
from pipelines import storage
from pipelines.corpus_config import CorpusConfig, Reading
from pipelines.errors import UserError
from pipelines.records import Record, read_records
from pipelines.shards import is_held_out
from pipelines.sources import Unit

NAME = "tokenizer.json"
_MARK = "units/tokenizer.json"  # says which settings the tokenizer of an unfinished run was trained with
_SAMPLED_UNITS = 64  # places that the sample is taken from


def given_tokenizer(uri: str) -> Tokenizer:
    """The tokenizer at a path or URI.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    try:
        if storage.is_local(uri):
            return Tokenizer.load(storage.absolute(uri))
        with tempfile.TemporaryDirectory() as folder:
            return Tokenizer.load(_fetched(uri, folder))
    except UserError:
        raise
    except Exception as error:  # every object store has exceptions of its own
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise UserError(
            storage.redacted(f"the tokenizer {uri} cannot be used: {reason}"),
            "give --corpus.tokenizer a tokenizer.json or a folder with one, or with GPT-2's or BERT's files; "
            "leave it out to train one",
        ) from None


def make_tokenizer(config: CorpusConfig, units: Sequence[Unit], identity: str, output_dir: str) -> Tokenizer:
    """Put tokenizer.json into `output_dir`; one that an earlier run of the same `identity` trained there is kept.

    Raises:
        UserError: the given tokenizer cannot be read, or there is no text to train one on.
    """
    path, mark = storage.join(output_dir, NAME), storage.join(output_dir, _MARK)
    if config.tokenizer is not None:
        tokenizer = given_tokenizer(config.tokenizer)
    else:
        try:
            trained = storage.read_text(path)
            if storage.read_json(mark) == {"identity": identity, "sha256": storage.sha256_bytes(trained.encode())}:
                return Tokenizer.from_json(trained)
        except (FileNotFoundError, ValueError):
            pass  # there is none yet, or not a whole one: train it
        tokenizer = Tokenizer.train(training_sample(config, units), config.vocab_size)
    storage.write_text(path, tokenizer.to_json())
    storage.write_json(mark, {"identity": identity, "sha256": tokenizer.sha256})
    return tokenizer


def training_sample(config: CorpusConfig, units: Sequence[Unit]) -> list[str]:
    """Documents of the training split, cut where their share of `tokenizer_sample_bytes` characters ends.

    Raises:
        UserError: there are none; says whether they are missing, unreadable or all held out.
    """
    units = [unit for unit in units if unit.validation_fraction < 1]
    places = min(len(units), _SAMPLED_UNITS)
    texts: list[str] = []
    unreadable = ""
    n_held_out = 0
    for place in range(places):
        left = max(1, config.tokenizer_sample_bytes // places)
        unit = units[place * len(units) // places]
        for uri, record in _records(unit, config.reading):
            if record.reason:
                place_in_file = f", line {record.line}" if record.line else ""
                unreadable = unreadable or f"{uri}{place_in_file}: {record.reason}"
            elif not record.text.strip():
                continue
            elif is_held_out(record.text, unit.validation_fraction):
                n_held_out += 1
            else:
                texts.append(record.text[:left])
                left -= len(record.text)
            if left <= 0:
                break
    if texts:
        return texts
    sources = storage.redacted(" ".join(config.sources))
    if unreadable:
        raise UserError(
            storage.redacted(f"no document of {sources} can be read; the first that fails: {unreadable}"),
            "mend the sources, or name the field that holds the text by --corpus.text-field",
        )
    if n_held_out:
        raise UserError(
            f"every document of {sources} is held out for validation: {n_held_out} of {n_held_out}",
            "give more documents, or a smaller --corpus.validation-fraction",
        )
    raise no_text(config)


def _records(unit: Unit, reading: Reading) -> Iterator[tuple[str, Record]]:
    """The unit's records, each with its file."""
    return ((file.uri, record) for file in unit.files for record in read_records(file, reading))


def no_text(config: CorpusConfig) -> UserError:
    """The error for sources in which no document has a character."""
    return UserError(
        storage.redacted(f"the sources hold no text: {' '.join(config.sources)}"),
        "name files with text in --corpus.sources",
    )


def _fetched(uri: str, folder: str) -> str:
    """Copy the tokenizer's files at `uri` into the local `folder`; the path to load."""
    if not storage.isdir(uri):
        name = os.path.join(folder, uri.rsplit("/", 1)[-1])
        storage.write_bytes(name, storage.read_bytes(uri))
        return name
    for name in storage.list_names(uri):
        if name.endswith((".json", ".txt", ".bpe")):
            storage.write_bytes(os.path.join(folder, name), storage.read_bytes(storage.join(uri, name)))
    return folder
