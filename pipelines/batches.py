"""What a worker computes at each step: its sequences and what is drawn for them, read one step ahead.

A step's data are a pure function of the seed, the corpus and the step, whatever the number of workers: sequence
`row` of step `step` is sample `step * batch_size + row` of an endless run through the training windows, in an order
that the seed gives (`pipelines.sample_order`).
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from armd.masked_diffusion import Noise
from armd.objective import Drawn, Schedule
from armd.order import Order
from pipelines.sample_order import SampleOrder
from pipelines.train_config import TrainConfig
from pipelines.windows import WindowIndex


@dataclass(frozen=True)
class MicroBatch:
    """Sequences that go through the model together."""

    tokens_BN: torch.Tensor
    drawn: Drawn


def schedule(config: TrainConfig) -> Schedule:
    """The schedule of orders in a training configuration."""
    return Schedule(**{name: getattr(config, name) for name in Schedule.__dataclass_fields__})


def held_out_draw(config: TrainConfig, n_streams: int, rows: Sequence[int], n_rows: int, length: int) -> Drawn:
    """What the held-out loss of windows `rows` of `n_rows` is measured with, the same at every measurement."""
    if config.model == "autoregressive":
        return None
    if config.model == "masked_diffusion":
        return Noise.of_rows(rows, n_rows, length, "held out")
    return Order.strided(length, min(n_streams, length))


class Batches:
    """The micro-batches of one worker, step by step."""

    def __init__(self, config: TrainConfig, windows: WindowIndex, rank: int, pin_memory: bool = False) -> None:
        self._config = config
        self._windows = windows
        self._schedule = schedule(config)
        self._pin = pin_memory
        share = config.batch_size // config.n_workers
        self._rows = range(rank * share, (rank + 1) * share)
        self._order = SampleOrder(windows, config.seed)

    @property
    def n_windows(self) -> int:
        """Windows in an epoch."""
        return len(self._windows)

    def from_step(self, step: int) -> Iterator[list[MicroBatch]]:
        """The micro-batches of `step`, `step + 1`, ... to the end; the next is read while the last is computed."""
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as reader:
            ahead = reader.submit(self.at, step)
            for following in range(step + 1, self._config.total_steps + 1):
                batch = ahead.result()
                if following < self._config.total_steps:
                    ahead = reader.submit(self.at, following)
                yield batch

    def at(self, step: int) -> list[MicroBatch]:
        """The micro-batches of one step."""
        size = self._config.micro_batch_size
        rows = [self._rows[i : i + size] for i in range(0, len(self._rows), size)]
        return [self._micro_batch(step, part) for part in rows]

    def position(self, step: int) -> dict[str, Any]:
        """Where the data stand after `step` steps, as a checkpoint records it."""
        consumed = step * self._config.batch_size
        return {"epoch": consumed // len(self._windows), "consumed_samples": consumed, "seed": self._config.seed}

    def _micro_batch(self, step: int, rows: Sequence[int]) -> MicroBatch:
        tokens = torch.from_numpy(np.stack([self._window(step * self._config.batch_size + row) for row in rows]))
        return MicroBatch(tokens.pin_memory() if self._pin else tokens, self._draw(step, rows))

    def _draw(self, step: int, rows: Sequence[int]) -> Drawn:
        config, length = self._config, self._windows.sequence_length
        if config.model == "autoregressive":
            return None
        if config.model == "masked_diffusion":
            return Noise.of_rows(rows, config.batch_size, length, "train", config.seed, step)
        return self._schedule.order(step, rows, length)

    def _window(self, sample: int) -> np.ndarray:
        return self._windows[self._order[sample]]
