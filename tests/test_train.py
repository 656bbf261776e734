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
    assert counts.seen[-1][1] == 120
    assert "held-out" in counts.seen[-1][2]

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
def test_an_error_for_the_user_comes_back_from_the_workers(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    corpus = make_corpus(folder)
    shard = next((folder / "shards").glob("train-*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    config = dataclasses.replace(CONFIG, steps=2, strided_steps=0)
    with pytest.raises(UserError, match=shard.name):
        train.run(config, {"corpus": corpus}, str(tmp_path / "output"))
    assert not (tmp_path / "output" / "manifest.json").exists()


def test_what_a_user_must_mend_is_an_outcome_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash would be tried again max_failures times, and fail again."""

    def refuse(job: Job, watch: object) -> None:
        raise UserError("what", "fix")

    monkeypatch.setattr("pipelines.train_loop.train", refuse)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    settings = {"config": CONFIG, "corpus": "", "output": "", "board": None, "run": "run"}
    assert train.work(settings) == {"error": ("what", "fix")}


@pytest.mark.usefixtures("ray_cluster")
def test_more_workers_than_the_cluster_has_are_refused_at_once(corpus: str, tmp_path: Path) -> None:
    since = time.monotonic()
    with pytest.raises(UserError, match="10000 CPUs, the cluster has"):
        train.wait_for_workers(10_000, False, seconds=45)
    with pytest.raises(UserError, match=r"1 GPUs, the cluster has 0") as caught:
        train.wait_for_workers(1, True, seconds=45)
    assert "--train.device cpu" in caught.value.fix
    assert time.monotonic() - since < 10
