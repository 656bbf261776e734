"""One training worker: torch.distributed and DeepSpeed, no Ray, so that it runs and is tested without a cluster.

The loop is bit for bit repeatable on the CPU: weights, data and orders follow from the seed and the step, and a
checkpoint holds everything else.
"""

import contextlib
import math
import os
import secrets
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from armd.model import ARMD
from armd.models import MODELS, Model
from armd.objective import Drawn, nats
from armd.optim import adamw, learning_rate
from armd.randomness import seeded
from armd.tokenizer import Tokenizer
from pipelines import storage, zero
from pipelines.batches import Batches, MicroBatch, held_out_draw, schedule
from pipelines.ema import Ema
from pipelines.errors import UserError
from pipelines.manifest import read_manifest
from pipelines.metrics import FILE, MetricsLog, read_metrics
from pipelines.saving import Saver, agree
from pipelines.shard_cache import ShardCache
from pipelines.train_config import TrainConfig
from pipelines.windows import WindowIndex, corpus_sha256


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker is to do; the same on all workers."""

    config: TrainConfig
    corpus: str
    """Directory or URI of the finished corpus."""
    output: str
    """Directory or URI of this training stage, which all workers can reach."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to compute; with "cuda" each worker takes the GPU of its LOCAL_RANK."""


Watch = Callable[[dict[str, Any]], None]
"""Receives every metrics record on rank 0, besides {"kind": "progress", "step", "loss"} after each step."""


def train(job: Job, watch: Watch) -> dict[str, Any]:
    """Train to the last step, from the newest committed checkpoint where there is one; rank 0's summary of the run.

    Raises:
        UserError: the output is not shared by the workers, a file is not as its manifest says, or a loss or gradient
            is not finite.
    """
    return Worker(job, watch).run()


class Worker:
    """The state of one rank."""

    def __init__(self, job: Job, watch: Watch) -> None:
        self.job, self.config, self.watch = job, job.config, watch
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        assert self.world == self.config.n_workers, "the batch is cut by the configuration's number of workers"
        self.device = _device(job)
        self.dtype = _dtype(self.config, self.device)
        self.saver = Saver(job.output, agree(secrets.token_hex(4), self.device), self.device)
        self.corpus_sha = corpus_sha256(job.corpus)
        cache = ShardCache(max_bytes=self.config.cache_bytes)
        train_windows = WindowIndex(job.corpus, "train", cache)
        self.validation = WindowIndex(job.corpus, "validation", cache)
        _check_windows(train_windows, self.validation)
        self.length = train_windows.sequence_length
        self.batches = Batches(self.config, train_windows, self.rank, pin_memory=self.device.type == "cuda")
        self.schedule = schedule(self.config)
        vocab_size = _tokenizer(job.corpus).vocab_size
        model_config = self.config.architecture.model_config(vocab_size, self.length)
        model = MODELS[self.config.model](model_config, generator=seeded("weights", self.config.seed)).to(self.device)
        if isinstance(model, ARMD):
            model.activation_checkpointing = self.config.activation_checkpointing
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        optimizer = adamw(
            model,
            learning_rate=self.config.learning_rate,
            betas=self.config.betas,
            weight_decay=self.config.weight_decay,
        )
        self.engine = zero.initialize(Nats(model), optimizer, self.config, bfloat16=self.dtype == "bfloat16")
        self.ema = Ema(self.engine, self.config.ema_decay) if self.config.ema_decay else None
        self.step = self._resume()
        log_uri = storage.join(job.output, FILE)
        self.log = MetricsLog(log_uri, self.step) if self.rank == 0 else None

    def run(self) -> dict[str, Any]:
        """All steps that are left, and the summary."""
        config, since = self.config, _Meter()
        for micro_batches in self.batches.from_step(self.step):
            loss = self._train_step(micro_batches)
            self.step += 1
            last = self.step == config.total_steps
            since.add(loss)
            if self.rank == 0:
                self.watch({"kind": "progress", "step": self.step, "loss": loss})
            if self.step % config.log_every == 0 or last:
                self._record(self._metrics(since))
                since = _Meter()
            validation = None
            if self.step % config.validate_every == 0 or last:
                validation = self._validate(last)
                since.pause()
            if self.step % config.checkpoint_every == 0 or last:
                self._save(validation)
                since.pause()
        return self._summary()

    def _train_step(self, micro_batches: list[MicroBatch]) -> float:
        """Forward, backward and update; the loss of the global batch in nats a token.

        A loss or gradient that is not finite stops every rank before anything is saved.
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self._learning_rate(self.step)
        total = torch.zeros((), device=self.device)
        for micro_batch in micro_batches:
            loss_sum, count = self.engine(micro_batch.tokens_BN.to(self.device, non_blocking=True), micro_batch.drawn)
            # Every sequence has the same number of tokens, so DeepSpeed's mean over ranks and micro-batches of these
            # means is the mean over the global batch.
            self.engine.backward(loss_sum / count)
            total += loss_sum.detach()
            if micro_batch is micro_batches[-1]:
                loss = self._summed(total)[0] / (self.config.batch_size * self.length)
                self._check_finite("loss", loss)
            self.engine.step()
        self._check_finite("gradient's norm", self._gradient_norm())
        if self.ema is not None:
            self.ema.update()
        return loss

    @torch.no_grad()
    def _validate(self, last: bool) -> dict[str, float]:
        """Held-out nats a token, left to right; where streams are taught, in each number of them too."""
        config = self.config
        begun = self.step > (config.mix_after if config.strided_share else config.steps)
        streams = sorted({1, *config.streams}) if config.teaches_streams and (last or begun) else [1]
        losses = {}
        self.engine.eval()
        with self.ema.in_place() if self.ema is not None else contextlib.nullcontext():
            for n_streams in streams:
                losses[str(n_streams)] = self._held_out(n_streams)
                self._record({"kind": "validation", "loss": losses[str(n_streams)], "n_streams": n_streams})
        self.engine.train()
        return losses

    def _held_out(self, n_streams: int) -> float:
        """Mean nats a token over the first validation windows, shared out over the ranks."""
        n = min(self.config.validation_windows, len(self.validation))
        size = self.config.micro_batch_size
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        for first in range(0, n, size * self.world):
            mine = range(first + self.rank * size, min(n, first + (self.rank + 1) * size))
            # Under ZeRO-3 every forward is collective: a rank with nothing left computes window 0 for nothing.
            rows = [self.validation[i] for i in mine] or [self.validation[0]]
            tokens = torch.from_numpy(np.stack(rows)).to(self.device)
            drawn = held_out_draw(self.config, n_streams, mine or [0], n, self.length)
            loss_sum, count = self.engine(tokens, drawn)
            if mine:
                total += torch.tensor([float(loss_sum), count], dtype=torch.float64, device=self.device)
        loss_sum, count = self._summed(total)
        return loss_sum / count

    def _save(self, validation: dict[str, float] | None) -> None:
        if self.log is not None:
            self.log.flush()
        about = {
            "step": self.step,
            "world_size": self.world,
            "zero_stage": self.config.zero_stage,
            "dtype": self.dtype,
            "config": asdict(self.config),
            "parameters": self.parameters,
            "sequence_length": self.length,
            "data": {**self.batches.position(self.step), "corpus_sha": self.corpus_sha},
            "validation": validation,
        }
        self.saver.save(self.engine, self.ema, about, self.config.keep_checkpoints)

    def _resume(self) -> int:
        """Load the newest committed checkpoint; the number of steps it has behind it, 0 where there is none."""
        found = self.saver.newest()
        if found is None:
            return 0
        path, manifest = found
        anew = "remove the training stage's directory and run the same command again"
        if manifest["data"].get("corpus_sha") != self.corpus_sha:
            raise UserError(f"checkpoint {path} was trained on another corpus than {self.job.corpus}", anew)
        if manifest["dtype"] != self.dtype:
            raise UserError(
                f"checkpoint {path} was trained in {manifest['dtype']}, this run computes in {self.dtype}",
                f"pass --train.dtype {manifest['dtype']}, or run where it was begun; or {anew}",
            )
        self.saver.load(self.engine, self.ema, path, manifest)
        return int(manifest["step"])

    def _summary(self) -> dict[str, Any]:
        found = self.saver.newest()
        assert found is not None, "the last step is always saved"
        path, manifest = found
        assert manifest["step"] == self.step
        rates = [r["tokens_per_second"] for r in read_metrics(self.job.output) if r["kind"] == "train"]
        return {
            "checkpoint": "checkpoints/" + path.rstrip("/").rsplit("/", 1)[-1],
            "parameters": self.parameters,
            "steps": self.step,
            "tokens": self.step * self.config.batch_size * self.length,
            "epochs": manifest["data"]["consumed_samples"] / self.batches.n_windows,
            "final": {
                "validation_nats_per_token": manifest["validation"]["1"],
                "validation_nats_per_token_by_streams": manifest["validation"],
                "averaged_weights": self.ema is not None,
            },
            "tokens_per_second": statistics.median(rates),
            "world_size": self.world,
            "zero_stage": self.config.zero_stage,
            "dtype": self.dtype,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
        }

    def _summed(self, local: torch.Tensor) -> list[float]:
        """The sum over ranks, in float64 so that its rounding does not depend on their number."""
        total = local.double().reshape(-1)
        dist.all_reduce(total)
        return total.tolist()

    def _learning_rate(self, step: int) -> float:
        config = self.config
        return learning_rate(
            step,
            total_steps=config.total_steps,
            peak=config.learning_rate,
            warmup_steps=config.warmup_steps,
            schedule=config.schedule,
            min_ratio=config.min_learning_rate_ratio,
        )

    def _gradient_norm(self) -> float:
        norm = self.engine.get_global_grad_norm()
        return 0.0 if norm is None else float(norm)

    def _check_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise UserError(
                f"the {what} is {value} at step {self.step + 1}, learning rate {self._learning_rate(self.step):.3g}",
                "lower --train.learning-rate or raise --train.warmup-steps; the checkpoints before this step are kept",
            )

    def _metrics(self, since: "_Meter") -> dict[str, Any]:
        step = self.step - 1  # the step just done, counted from 0 as the schedules do
        kind = self.schedule.kind(step)
        strided = kind == "strided"
        return {
            "kind": "train",
            "loss": since.loss,
            "grad_norm": self._gradient_norm(),
            "learning_rate": self._learning_rate(step),
            "tokens_per_second": self.config.batch_size * self.length / since.step_seconds,
            "step_seconds": since.step_seconds,
            "order": kind,
            "n_shuffled": self.schedule.n_shuffled(step),
            "n_streams": self.schedule.strided_draw(step, self.length)[0] if strided else 1,
        }

    def _record(self, record: dict[str, Any]) -> None:
        if self.log is not None:
            record = {
                **record,
                "step": self.step,
                "tokens": self.step * self.config.batch_size * self.length,
            }
            self.log.write(record)
            self.watch(record)


class _Meter:
    """Mean loss and time of the steps since the last line of metrics; the time of validating and saving left out."""

    def __init__(self) -> None:
        self._losses: list[float] = []
        self._seconds = 0.0
        self._since = time.perf_counter()

    def add(self, loss: float) -> None:
        self._losses.append(loss)
        self._seconds += time.perf_counter() - self._since
        self._since = time.perf_counter()

    def pause(self) -> None:
        """What happened since the last step was not training."""
        self._since = time.perf_counter()

    @property
    def loss(self) -> float:
        return sum(self._losses) / len(self._losses)

    @property
    def step_seconds(self) -> float:
        return self._seconds / len(self._losses)


class Nats(torch.nn.Module):
    """The objective as the module that DeepSpeed wraps: its forward is the sum of nats and the count."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens_BN: torch.Tensor, drawn: Drawn) -> tuple[torch.Tensor, int]:
        """As `armd.objective.nats`."""
        return nats(self.model, tokens_BN, drawn)


def _device(job: Job) -> torch.device:
    if job.device == "cpu":
        # As many threads as there are cores for each of the workers on this machine. One thread more than cores would
        # wait for its turn at the end of every operation, so only those count that this process may run on.
        neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // neighbours))
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def _dtype(config: TrainConfig, device: torch.device) -> str:
    """What the forward and backward pass compute in."""
    if config.dtype != "auto":
        return config.dtype
    return "bfloat16" if device.type == "cuda" else "float32"


def _check_windows(train: WindowIndex, validation: WindowIndex) -> None:
    for split, windows in (("training", train), ("held-out", validation)):
        if len(windows) == 0:
            raise UserError(
                f"the corpus's {split} documents do not fill one window of {windows.sequence_length} tokens",
                "add text, or shorten the windows by --corpus.sequence-length",
            )


def _tokenizer(corpus: str) -> Tokenizer:
    """The corpus's tokenizer, which must be the one that made its shards."""
    path = storage.join(corpus, "tokenizer.json")
    tokenizer = Tokenizer.from_json(storage.read_text(path))
    if tokenizer.sha256 != read_manifest(corpus)["tokenizer_sha256"]:
        raise UserError(
            f"{path} is not the tokenizer that made the corpus's shards",
            "remove the corpus's manifest.json and run the same command again to make it anew",
        )
    return tokenizer
