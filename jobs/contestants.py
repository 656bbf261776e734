"""What a study compares: the baselines, the paper's recipes of ARMD, and recipes and models beyond the paper.

Each is a function of the study's training configuration that keeps data, batch and the whole number of steps, and
changes the model or the schedule of orders (docs/model.md, section 3).
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from pipelines.train_config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One row of the table."""

    label: str
    """What people read."""
    train: Callable[[TrainConfig], TrainConfig]
    """From the study's configuration to this one's."""


def _changed(config: TrainConfig, **changes: Any) -> TrainConfig:
    return dataclasses.replace(config, **changes)


def _baseline(config: TrainConfig, *, model: str) -> TrainConfig:
    """Another model; none but ARMD computes activations again."""
    return _changed(config, model=model, activation_checkpointing=False)


def _one_phase(config: TrainConfig, **changes: Any) -> TrainConfig:
    """No permutation and no strided phase: all steps left to right, or as `changes` mix them."""
    return _changed(config, steps=config.total_steps, strided_steps=0, max_shuffled=0, **changes)


def _mixed(config: TrainConfig, *, share: float, max_shuffled: int = 0, **changes: Any) -> TrainConfig:
    """After the first tenth, `share` of the steps strided."""
    mixed = _one_phase(config, mix_after=config.total_steps // 10, strided_share=share, **changes)
    return _changed(mixed, max_shuffled=max_shuffled)


def _no_neighbours(config: TrainConfig) -> TrainConfig:
    """The mixed recipe on the paper's model, whose first query is prefix aggregation alone."""
    architecture = dataclasses.replace(config.architecture, n_neighbours=0)
    return _mixed(config, share=0.5, streams=(2, 4, 8), architecture=architecture)


def _every_layer_two_stream(config: TrainConfig) -> TrainConfig:
    """The mixed recipe with no causal layer on top."""
    architecture = dataclasses.replace(config.architecture, n_two_stream_layers=config.architecture.n_layers)
    return _mixed(config, share=0.5, streams=(2, 4, 8), architecture=architecture)


CONTESTANTS = {
    "autoregressive": Contestant(label="autoregressive", train=partial(_baseline, model="autoregressive")),
    "left-to-right": Contestant(label="ARMD, left to right only", train=_one_phase),
    "rho-0": Contestant(label="ARMD, rho=0, then strided", train=partial(_changed, max_shuffled=0)),
    "rho-8": Contestant(label="ARMD, rho=8, then strided", train=partial(_changed, max_shuffled=8)),
    "rho-32": Contestant(label="ARMD, rho=32, then strided", train=partial(_changed, max_shuffled=32)),
    "mixed": Contestant(label="ARMD, mixed, 50% strided", train=partial(_mixed, share=0.5, streams=(2, 4, 8))),
    "mixed-wide": Contestant(
        label="ARMD, mixed, S up to 32", train=partial(_mixed, share=0.5, streams=(2, 4, 8, 16, 32))
    ),
    "mixed-infilling": Contestant(
        label="ARMD, mixed, 30% strided, 30% infilling",
        train=partial(_mixed, share=0.3, streams=(2, 4, 8), infilling_share=0.3),
    ),
    "mixed-rho-8": Contestant(
        label="ARMD, mixed, 50% strided, rho=8", train=partial(_mixed, share=0.5, max_shuffled=8, streams=(2, 4, 8))
    ),
    "mixed-no-neighbours": Contestant(label="ARMD, mixed, no neighbours in the first query", train=_no_neighbours),
    "mixed-two-stream": Contestant(label="ARMD, mixed, every layer two-stream", train=_every_layer_two_stream),
    "masked-diffusion": Contestant(label="masked diffusion", train=partial(_baseline, model="masked_diffusion")),
}
"""Contestants by the name that the command line takes."""

DEFAULT_CONTESTANTS = (
    "autoregressive",
    "left-to-right",
    "rho-0",
    "rho-8",
    "rho-32",
    "mixed",
    "mixed-no-neighbours",
    "masked-diffusion",
)
"""The paper's comparison, the mixed recipe, and that on the paper's own model."""
