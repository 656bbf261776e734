"""Kill -9 at random moments: the shards are those of a run that nobody killed, and nothing else is left."""

import functools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipelines import corpus
from pipelines.corpus_config import CorpusConfig
from pipelines.corpus_tasks import in_tasks
from pipelines.sources import Unit

DRIVER = """
import sys
from pipelines import corpus
from tests.test_corpus_crashes import config

corpus.in_tasks = lambda function, units: ((index, function(unit)) for index, unit in enumerate(units))
print("begins", flush=True)
corpus.run(config(sys.argv[1]), {}, sys.argv[2])
"""


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Eight files of documents, some of them twice, and a record that cannot be read."""
    generator = random.Random(0)
    words = ["".join(generator.choices("etaoinshr", k=generator.randint(2, 7))) for _ in range(300)]
    folder = tmp_path_factory.mktemp("texts")
    documents = [" ".join(generator.choices(words, k=200)) for _ in range(300)]
    for number in range(8):
        lines = [json.dumps({"text": generator.choice(documents)}) for _ in range(60)]
        (folder / f"{number}.jsonl").write_text("\n".join(lines) + "\n{torn" * (number == 5))
    return str(folder)


def config(texts: str) -> CorpusConfig:
    small = {"vocab_size": 500, "sequence_length": 32, "validation_fraction": 0.2, "unit_bytes": 25_000}
    return CorpusConfig(sources=(texts,), drop_duplicates=True, max_quarantined=0.1, **small)  # type: ignore[arg-type]


def content(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` but the manifest, which says when it was made."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def timeless(folder: Path) -> dict:
    manifest = json.loads((folder / "manifest.json").read_text())
    return {name: value for name, value in manifest.items() if name not in ("started", "seconds")}


@pytest.fixture(scope="module")
def whole(texts: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a driver that nobody killed."""
    out = tmp_path_factory.mktemp("whole")
    assert start_driver(texts, out).wait(120) == 0
    return out


def start_driver(texts: str, out: Path) -> subprocess.Popen[str]:
    """A driver that has just begun the stage."""
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, texts, str(out)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begins\n"
    return process


def n_committed(out: Path) -> int:
    """Units whose first or second pass is done."""
    return sum(1 for folder in ("hashes", "units") for _ in (out / folder).glob("[!.]*"))


@pytest.mark.slow
def test_the_driver_is_killed_ten_times(texts: str, whole: Path, tmp_path: Path) -> None:
    """At random moments behind the first, fourth, seventh .. commit, in the first pass and in the second."""
    generator = random.Random(1)
    out = tmp_path / "out"
    for kill in range(10):
        process = start_driver(texts, out)
        while n_committed(out) < 3 * kill + 1:
            assert process.poll() is None
            time.sleep(0.001)
        time.sleep(generator.uniform(0, 0.03))
        process.kill()
        assert process.wait(60) == -signal.SIGKILL
        assert not (out / "manifest.json").exists()
        for name, data in content(out).items():
            if name.startswith("shards/train-"):
                assert data == (whole / name).read_bytes()
    assert start_driver(texts, out).wait(300) == 0
    assert content(out) == content(whole)
    assert timeless(out) == timeless(whole)


def dying(unit: Unit, function: Callable[[Unit], dict], marks: str) -> dict:
    """`function` of the unit, in a process that dies in the middle of every fifth that is begun anywhere."""
    try:
        number = len(os.listdir(marks))
        with open(os.path.join(marks, f"{number:03}"), "x"):
            pass
    except FileExistsError:  # another process was faster: this unit lives
        return function(unit)
    if number % 5 == 2:
        delay = random.Random(number).uniform(0, 0.1)
        threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        result = function(unit)
        time.sleep(1)  # a unit that is done sooner is lost with its answer
        return result
    return function(unit)


@pytest.mark.ray
@pytest.mark.slow
def test_workers_are_killed_ten_times(
    texts: str, whole: Path, tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray.cloudpickle

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test
    (tmp_path / "marks").mkdir()

    def some_die(function: Callable[[Unit], dict], units: list[Unit]) -> Iterator[tuple[int, dict]]:
        mortal = functools.partial(dying, function=function, marks=str(tmp_path / "marks"))
        return in_tasks(mortal, units)

    monkeypatch.setattr(corpus, "in_tasks", some_die)
    corpus.run(config(texts), {}, str(tmp_path / "out"))
    n_units = len(list((whole / "units").iterdir())) - 1
    assert len(os.listdir(tmp_path / "marks")) >= 2 * n_units + 10 - 4, "two passes, and each death's unit once more"
    assert content(tmp_path / "out") == content(whole)
    assert timeless(tmp_path / "out") == timeless(whole)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("n_workers", [1, 8])
def test_any_number_of_workers_gives_the_same_files(
    texts: str,
    whole: Path,
    tmp_path: Path,
    ray_cluster: None,
    monkeypatch: pytest.MonkeyPatch,
    n_workers: int,
) -> None:
    """The session's cluster has four CPUs: tasks ask for four or for half of one."""
    monkeypatch.setattr(corpus, "in_tasks", functools.partial(in_tasks, cpus=4 / n_workers))
    corpus.run(config(texts), {}, str(tmp_path / "out"))
    assert content(tmp_path / "out") == content(whole)
    assert timeless(tmp_path / "out") == timeless(whole)
