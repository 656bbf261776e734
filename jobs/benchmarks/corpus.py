"""`armd bench corpus`: the whole corpus stage against the bare tokenizer on the same text and cores."""

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated

import torch
import tyro

from armd import Tokenizer
from jobs import options
from jobs.benchmarks.measure import finish, spread
from pipelines import corpus, runtime, storage
from pipelines.corpus_config import CorpusConfig
from pipelines.records import read_records

COMMAND = "armd bench corpus"
PARALLELISM = "TOKENIZERS_PARALLELISM"


@dataclass(frozen=True, kw_only=True)
class CorpusBenchOptions:
    """Read, decode, tokenize, pack, hash and write, against `encode_batch` on documents that are in memory already."""

    rounds: int = 3
    """Times each is measured, in turns."""
    corpus: Annotated[CorpusConfig, tyro.conf.arg(name="")] = field(default_factory=CorpusConfig)
    """The corpus; a tokenizer is trained first, outside the measurement, where none is given."""


def main(arguments: Sequence[str]) -> None:
    """Run the benchmark and print its table and its line of JSON."""
    chosen = options.parse(
        CorpusBenchOptions(), arguments, command=COMMAND, description=CorpusBenchOptions.__doc__ or ""
    )
    runtime.connect()
    documents = [
        record.text
        for unit in corpus.work_units(chosen.corpus)
        for file in unit.files
        for record in read_records(file, chosen.corpus.reading)
        if record.text
    ]
    n_bytes = sum(len(text.encode()) for text in documents)
    seconds: dict[str, list[float]] = {"corpus stage": [], "bare tokenizer": []}
    with tempfile.TemporaryDirectory(prefix="armd-bench-") as folder:
        first = storage.join(folder, "first")
        manifest = corpus.run(chosen.corpus, {}, first)
        tokenizer = Tokenizer.load(storage.join(first, "tokenizer.json"))
        given = replace(chosen.corpus, tokenizer=storage.join(first, "tokenizer.json"))
        for round_ in range(chosen.rounds):
            since = time.perf_counter()
            corpus.run(given, {}, storage.join(folder, str(round_)))
            seconds["corpus stage"].append(time.perf_counter() - since)
            since = time.perf_counter()
            with every_core():
                tokenizer.encode_batch(documents)
            seconds["bare tokenizer"].append(time.perf_counter() - since)
    ratio = spread(seconds["bare tokenizer"])["median"] / spread(seconds["corpus stage"])["median"]
    print(f"{len(documents):,} documents, {n_bytes / 1e6:.1f} MB, n = {chosen.rounds}")
    for name, values in seconds.items():
        median = spread(values)["median"]
        print(f"{name:16}{median:8.2f} s{n_bytes / 1e6 / median:8.2f} MB/s")
    print(f"the stage runs at {ratio:.2f} of the tokenizer's speed")
    tokens = sum(split["tokens"] for split in manifest["splits"].values())
    result = {"seconds": {name: spread(values) for name, values in seconds.items()}, "ratio": ratio}
    about = {"documents": len(documents), "bytes": n_bytes, "tokens": tokens, "n": chosen.rounds}
    finish({"bench": "corpus", **about, **result}, torch.device("cpu"))


@contextlib.contextmanager
def every_core() -> Iterator[None]:
    """Let `tokenizers` use all cores: where Ray's workers share them, each is told to keep to one, this process too."""
    before = os.environ.get(PARALLELISM)
    os.environ[PARALLELISM] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ[PARALLELISM]
        else:
            os.environ[PARALLELISM] = before
