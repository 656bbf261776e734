"""A step's data: every sample once an epoch, the same for any number of workers and any starting step."""

import dataclasses
from pathlib import Path

import pytest
import torch

from pipelines.batches import Batches
from pipelines.metrics import MetricsLog, read_metrics
from pipelines.train_config import TrainConfig
from pipelines.windows import WindowIndex
from tests.corpora import make_corpus

CONFIG = TrainConfig(batch_size=8, micro_batch_size=2, steps=40, strided_steps=10, ar_steps=2, permutation_steps=4)


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> WindowIndex:
    return WindowIndex(make_corpus(tmp_path_factory.mktemp("corpus")), "train")


def rows(config: TrainConfig, windows: WindowIndex, rank: int, step: int) -> torch.Tensor:
    parts = Batches(config, windows, rank).at(step)
    assert all(len(part.tokens_BN) == config.micro_batch_size for part in parts)
    return torch.cat([part.tokens_BN for part in parts])


def test_workers_share_one_global_batch(windows: WindowIndex) -> None:
    for step in (0, 17):
        whole = rows(CONFIG, windows, 0, step)
        for n_workers in (2, 4):
            config = dataclasses.replace(CONFIG, n_workers=n_workers)
            parts = [rows(config, windows, rank, step) for rank in range(n_workers)]
            assert torch.equal(torch.cat(parts), whole)


def test_an_epoch_has_every_window_once(windows: WindowIndex) -> None:
    batches = Batches(CONFIG, windows, 0)
    n = len(windows)
    assert n > 100
    steps = -(-n // CONFIG.batch_size)
    seen = torch.cat([torch.cat([part.tokens_BN for part in batches.at(step)]) for step in range(steps)])[:n]
    expected = torch.stack([torch.from_numpy(windows[i]) for i in range(n)])
    assert sorted(seen.tolist()) == sorted(expected.tolist())
    assert not torch.equal(seen, expected)  # shuffled
    last = batches.at(steps - 1)  # the batch that crosses into the next epoch is full
    assert sum(len(part.tokens_BN) for part in last) == CONFIG.batch_size
    position = batches.position(steps)
    assert position == {"epoch": steps * 8 // n, "consumed_samples": steps * 8, "seed": 0}


def test_a_run_goes_on_with_another_number_of_workers(windows: WindowIndex) -> None:
    """1, 2, 4 and 1 again, a change every few steps and inside an epoch: the samples of the run that never changed."""
    one = Batches(CONFIG, windows, 0)
    steps = 3 * len(windows) // CONFIG.batch_size
    for step in range(steps):
        n_workers = (1, 2, 4, 1)[step * 4 // steps]
        config = dataclasses.replace(CONFIG, n_workers=n_workers)
        together = torch.cat([rows(config, windows, rank, step) for rank in range(n_workers)])
        assert torch.equal(together, torch.cat([part.tokens_BN for part in one.at(step)]))
        assert Batches(config, windows, n_workers - 1).position(step) == one.position(step)


def test_reading_ahead_changes_nothing(windows: WindowIndex) -> None:
    batches = Batches(CONFIG, windows, 0)
    ahead = list(batches.from_step(37))
    assert len(ahead) == 13
    for step, parts in enumerate(ahead, start=37):
        for part, expected in zip(parts, Batches(CONFIG, windows, 0).at(step), strict=True):
            assert torch.equal(part.tokens_BN, expected.tokens_BN)
            assert torch.equal(part.drawn.positions, expected.drawn.positions)


def test_metrics_of_steps_done_again_are_dropped(tmp_path: Path) -> None:
    uri = str(tmp_path / "metrics.jsonl")
    log = MetricsLog(uri, 0)
    for step in (1, 2, 3):
        log.write({"kind": "train", "step": step, "loss": 1.0})
    log.flush()
    with open(uri, "a") as file:
        file.write('{"kind": "train", "st')  # torn by a crash
    log = MetricsLog(uri, 2)
    log.write({"kind": "train", "step": 3, "loss": 2.0})
    assert [(r["step"], r["loss"]) for r in read_metrics(str(tmp_path))] == [(1, 1.0), (2, 1.0), (3, 2.0)]
    with pytest.raises(ValueError):
        log.write({"kind": "train", "step": 4, "loss": float("nan")})
