"""The training stage on Ray Train: the same losses as without Ray, through the death of a worker; errors come back."""

import dataclasses
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from pipelines import train
from pipelines.errors import UserError
from pipelines.manifest import read_manifest
from pipelines.metrics import read_metrics
from pipelines.train_loop import Job
from pipelines.windows import Permutation, WindowIndex
from tests.corpora import make_corpus
from tests.gloo import run_workers
from tests.test_train_loop import CONFIG, losses

pytestmark = [pytest.mark.ray, pytest.mark.slow]


class Counts:
    """A `Progress` that remembers."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float | None, str]] = []

    def update(self, done: float, total: float | None, unit: str, note: str = "") -> None:
        self.seen.append((done, total, note))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(autouse=True)
def quick_controller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.3")


@pytest.mark.usefixtures("ray_cluster")
def test_a_killed_worker_costs_nothing_but_time(corpus: str, tmp_path: Path) -> None:
    """SIGKILL one of two workers in the middle: Ray starts the group again, and every loss is what it would be."""
    config = dataclasses.replace(CONFIG, steps=90, strided_steps=30, checkpoint_every=10, n_workers=2, zero_stage=2)
    output = tmp_path / "output"
    killed = threading.Thread(target=_kill_a_worker, args=(output,))
    killed.start()
    counts = Counts()
    manifest = train.run(config, {"corpus": corpus}, str(output), counts)
    killed.join(5)
    assert not killed.is_alive(), "no worker was killed"
    assert manifest == read_manifest(str(output))
    assert (manifest["steps"], manifest["world_size"], manifest["zero_stage"]) == (120, 2, 2)
    assert counts.seen[-1][:2] == (120, 120)
    assert "loss" in counts.seen[-1][2]

    plain = tmp_path / "plain"
    run_workers(Job(config=config, corpus=corpus, output=str(plain)))
    assert losses(output) == losses(plain)


def _kill_a_worker(output: Path) -> None:
    for _ in range(600):
        time.sleep(0.1)
        if (output / "metrics.jsonl").exists() and any(r["step"] >= 30 for r in read_metrics(str(output))):
            break
    workers = [p for p in psutil.process_iter(["name"]) if "RayTrainWorker" in (p.info["name"] or "")]
    mine = [p for p in workers if psutil.Process() in p.parents() or _same_session(p)]
    os.kill(mine[0].pid, signal.SIGKILL)


def _same_session(process: psutil.Process) -> bool:
    """Whether a worker belongs to the cluster that this process started, whose raylet is our child."""
    return any(child.name() == "raylet" and child in process.parents() for child in psutil.Process().children(True))


@pytest.mark.usefixtures("ray_cluster")
def test_an_error_of_one_rank_ends_all_and_comes_back(tmp_path: Path) -> None:
    """Rank 1 alone meets the damaged shard, while rank 0 waits for it in a collective.

    Seen to hang when `work` returned the error instead of raising it.
    """
    folder = tmp_path / "corpus"
    folder.mkdir()
    corpus = make_corpus(folder)
    config = dataclasses.replace(CONFIG, steps=2, strided_steps=0, batch_size=2, micro_batch_size=1, n_workers=2)
    seed, name = next(filter(None, (only_rank_1_reads(corpus, seed) for seed in range(100))))
    config = dataclasses.replace(config, seed=seed)
    shard = folder / name
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=shard.name):
        train.run(config, {"corpus": corpus}, str(tmp_path / "output"))
    assert not (tmp_path / "output" / "manifest.json").exists()


def only_rank_1_reads(corpus: str, seed: int) -> tuple[int, str] | None:
    """The seed and the shard of rank 1's first sequence, where rank 0's lies in the other shard."""
    windows = WindowIndex(corpus, "train")
    shards = read_manifest(corpus)["splits"]["train"]["shards"]
    order = Permutation(len(windows), seed, 0)
    of_rank = [int(order[sample] >= shards[0]["tokens"] // windows.sequence_length) for sample in (0, 1)]
    return (seed, shards[of_rank[1]]["path"]) if of_rank[0] != of_rank[1] else None


@pytest.mark.usefixtures("ray_cluster")
def test_more_workers_than_the_cluster_has_are_refused_at_once(corpus: str, tmp_path: Path) -> None:
    since = time.monotonic()
    with pytest.raises(UserError, match="10000 CPUs, the cluster has"), train.places(10_000, False, seconds=45):
        raise AssertionError("there is no place for them")
    with pytest.raises(UserError, match=r"1 GPUs, the cluster has 0") as caught, train.places(1, True, seconds=45):
        raise AssertionError("there is no place for it")
    assert "--train.device cpu" in caught.value.fix
    assert time.monotonic() - since < 10


def test_an_autoscaling_cluster_is_asked_to_grow_and_let_shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[dict[str, int]]] = []
    there = iter([0, 1, 2])
    monkeypatch.setattr("ray.cluster_resources", lambda: {"GPU": next(there)})
    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda bundles: asked.append(bundles))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with train.places(2, True, seconds=60):
        assert asked == [[{"GPU": 1}, {"GPU": 1}]]
    assert asked[1:] == [[]]


def test_gpus_are_taken_when_there_is_one_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: {"GPU": 1.0, "CPU": 8.0})
    one, two = (dataclasses.replace(CONFIG, n_workers=n) for n in (1, 2))
    assert train._use_gpu(one)
    assert not train._use_gpu(two)
    assert train._use_gpu(dataclasses.replace(two, device="gpu"))
