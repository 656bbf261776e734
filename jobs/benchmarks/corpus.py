"""`armd bench corpus`: the whole corpus stage against the bare tokenizer on the same text and cores, and the reader."""

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tokenizers
import torch
import tyro

from jobs import options
from jobs.benchmarks.measure import finish, spread
from pipelines import corpus, runtime, storage
from pipelines.corpus_config import CorpusConfig
from pipelines.records import read_records
from pipelines.sample_order import SampleOrder
from pipelines.windows import WindowIndex

COMMAND = "armd bench corpus"
PARALLELISM = "TOKENIZERS_PARALLELISM"
_BATCH_CHARACTERS = 8_000_000  # given to the bare tokenizer at once: what it holds meanwhile is 100 times as much
_WINDOWS_READ = 20_000


@dataclass(frozen=True, kw_only=True)
class CorpusBenchOptions:
    """Read, decode, tokenize, pack, hash and write, against the library's batches on documents that are in memory."""

    rounds: int = 3
    """Times each is measured, in turns."""
    repeat: int = 1
    """Times the sources are read, under other names: how time and memory grow with the corpus."""
    corpus: Annotated[CorpusConfig, tyro.conf.arg(name="")] = field(default_factory=CorpusConfig)
    """The corpus; a tokenizer is trained first, outside the measurement, where none is given."""


def main(arguments: Sequence[str]) -> None:
    """Run the benchmark and print its table and its line of JSON."""
    chosen = options.parse(
        CorpusBenchOptions(), arguments, command=COMMAND, description=CorpusBenchOptions.__doc__ or ""
    )
    runtime.connect()
    with tempfile.TemporaryDirectory(prefix="armd-bench-") as folder:
        config = repeated(chosen.corpus, chosen.repeat, folder)
        manifest = corpus.run(config, {}, storage.join(folder, "first"))
        peaks = peak_bytes()  # now: the other contestants have all the text in this process
        config = replace(config, tokenizer=storage.join(folder, "first", "tokenizer.json"))
        bare = tokenizers.Tokenizer.from_file(storage.join(folder, "first", "tokenizer.json"))
        texts = documents(config)
        contestants: dict[str, Any] = {
            "corpus stage": lambda: corpus.run(config, {}, tempfile.mkdtemp(dir=folder)),
            "encode_batch": lambda: encode(bare.encode_batch, texts),
            "encode_batch_fast": lambda: encode(bare.encode_batch_fast, texts),
        }
        seconds: dict[str, list[float]] = {name: [] for name in contestants}
        computed: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(chosen.rounds):
            for name, run in contestants.items():
                since, before = time.perf_counter(), cpu_seconds()
                run()
                seconds[name].append(time.perf_counter() - since)
                computed[name].append(cpu_seconds() - before)
        reader = tokens_read_a_second(storage.join(folder, "first"))
    report(manifest, seconds, computed, peaks, reader)


def repeated(config: CorpusConfig, times: int, folder: str) -> CorpusConfig:
    """The same sources several times over: links to their files, so that each copy is read as a file of its own."""
    if times == 1:
        return config
    files = [file for unit in corpus.work_units(config) for file in unit.files if not file.begin]
    copies = Path(folder, "copies")
    copies.mkdir()
    for copy in range(times):
        for number, file in enumerate(files):
            os.symlink(file.uri, copies / f"{copy:04}-{number:04}-{os.path.basename(file.uri)}")
    return replace(config, sources=(str(copies),))


def documents(config: CorpusConfig) -> list[str]:
    """All texts of the corpus."""
    files = [file for unit in corpus.work_units(config) for file in unit.files]
    return [record.text for file in files for record in read_records(file, config.reading) if record.text]


def encode(encode_batch: Any, texts: Sequence[str]) -> None:
    """Every text by the bare library on every core; what it gives is dropped."""
    with every_core():
        begin = size = 0
        for end, text in enumerate(texts, 1):
            size += len(text)
            if size >= _BATCH_CHARACTERS or end == len(texts):
                encode_batch(list(texts[begin:end]), add_special_tokens=False)
                begin, size = end, 0


def tokens_read_a_second(corpus_dir: str) -> float:
    """How fast one worker reads training windows in the order of a run, its shards checked before."""
    windows = WindowIndex(corpus_dir, "train")
    order = SampleOrder(windows, seed=0)
    for part in windows.parts:
        for index in part.windows[:: max(1, len(part.windows) // 1000)]:
            windows[index]
    since = time.perf_counter()
    for sample in range(_WINDOWS_READ):
        windows[order[sample]]
    return _WINDOWS_READ * windows.sequence_length / (time.perf_counter() - since)


@dataclass(frozen=True)
class Process:
    """What Linux tells about a process."""

    name: str
    parent: int
    peak_bytes: int
    cpu_seconds: float


def processes() -> dict[int, Process]:
    """This process and those below it, Ray's workers among them, by their numbers."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            status = dict(line.partition(":")[::2] for line in (folder / "status").read_text().splitlines())
            times = (folder / "stat").read_text().rpartition(")")[2].split()[11:15]  # own and of ended children
            found[int(folder.name)] = Process(
                name=status["Name"].strip(),
                parent=int(status["PPid"]),
                peak_bytes=int(status.get("VmHWM", "0").split()[0]) * 1024,
                cpu_seconds=sum(map(int, times)) / os.sysconf("SC_CLK_TCK"),
            )
    below = {os.getpid()}
    while more := {pid for pid, process in found.items() if process.parent in below} - below:
        below |= more
    return {pid: found[pid] for pid in below}


def cpu_seconds() -> float:
    """Time that these processes have computed, on any core."""
    return sum(process.cpu_seconds for process in processes().values())


def peak_bytes() -> dict[str, int]:
    """The most memory that this process, and any worker, has had at once."""
    found = processes()
    workers = [process.peak_bytes for process in found.values() if process.name.startswith("ray::")]
    return {"driver": found[os.getpid()].peak_bytes, "worker": max(workers, default=0)}


def report(
    manifest: dict[str, Any],
    seconds: dict[str, list[float]],
    computed: dict[str, list[float]],
    peaks: dict[str, int],
    reader: float,
) -> None:
    """Print what was measured: time, CPU time, peak memory, and the reader's speed."""
    n = manifest["documents"]["used"]
    n_bytes, tokens = (sum(split[name] for split in manifest["splits"].values()) for name in ("bytes", "tokens"))
    medians = {name: spread(values)["median"] for name, values in seconds.items()}
    print(f"{n:,} documents, {n_bytes / 1e6:.1f} MB, {tokens:,} tokens, n = {len(seconds['corpus stage'])}")
    for name, median in medians.items():
        rates = f"{median:8.2f} s{n_bytes / 1e6 / median:8.2f} MB/s{tokens / median:12,.0f} tokens/s"
        print(f"{name:18}{rates}{spread(computed[name])['median']:8.2f} CPU s")
    ratios = {name: medians[name] / medians["corpus stage"] for name in medians if name != "corpus stage"}
    print("the stage's speed: " + ", ".join(f"{ratio:.2f} of {name}" for name, ratio in ratios.items()))
    print("peak memory: " + ", ".join(f"{name} {peak / 1e6:,.0f} MB" for name, peak in peaks.items()))
    print(f"reader: {reader:,.0f} tokens/s")
    about = {"documents": n, "bytes": n_bytes, "tokens": tokens, "n": len(seconds["corpus stage"])}
    result = {
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "cpu_seconds": {name: spread(values) for name, values in computed.items()},
        "ratios": ratios,
    }
    finish(
        {"bench": "corpus", **about, **result, "peak_bytes": peaks, "reader_tokens_per_second": reader},
        torch.device("cpu"),
    )


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
