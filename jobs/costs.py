"""What a training run costs, from its configuration: parameters, arithmetic, memory, disk. Pure functions.

Arithmetic counts multiply and add as two, and causal attention as the half of the square that it needs (design: a layer
is 12 d^2 multiply-adds a token, a two-stream layer carries content and query rows, the last of them only the content's
keys and values).
"""

import dataclasses
import math
from dataclasses import dataclass

from armd.config import ModelConfig
from pipelines.train_config import TrainConfig

PREFIX_CHUNK = 128
"""Ranks a chunk of prefix aggregation in training."""

# Tensors as wide as the model that a layer keeps a row for its backward pass: the inputs of its two norms and what they
# put out, queries, keys (before and after rotation), values, the attended heads, and the MLP's hidden layer before and
# after its activation (4 each). In float32, which is for CPUs, the norms are not fused and keep more.
_KEPT_A_ROW = {True: 17, False: 22}
_KEPT_KEYS_VALUES_ONLY = 4
_KEPT_OUTSIDE_LAYERS = 8  # the aggregation, the norms of what enters, and the last norm; neighbours come on top


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Forward floating-point operations a token."""

    layers: float
    """Projections and MLPs."""
    attention: float
    """Scores and weighted sums: the visible half of the square, or all of it where nothing is causal."""
    prefix: float
    """Prefix aggregation."""
    head: float
    """The output projection."""

    @property
    def weights(self) -> float:
        """Matrix products with weights: all but attention and prefix aggregation."""
        return self.layers + self.head

    @property
    def forward(self) -> float:
        """All of them."""
        return self.layers + self.attention + self.prefix + self.head

    @property
    def training(self) -> float:
        """Forward and backward, which costs twice the forward."""
        return 3 * self.forward


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one worker while training."""

    parameters: float
    """The weights the model computes with."""
    gradients: float
    """Their gradients."""
    master: float
    """DeepSpeed's float32 copy of the weights."""
    moments: float
    """AdamW's two moments, float32."""
    average: float
    """The moving average of the weights, float32, where there is one."""
    activations: float
    """What a micro-batch keeps for its backward pass; an estimate."""
    logits: float
    """A micro-batch's logits with their float32 copies and gradients; an estimate."""

    @property
    def total(self) -> float:
        """All of them; buffers of communication and the allocator's slack come on top."""
        return sum(getattr(self, name) for name in self.__dataclass_fields__)


def parameters(config: ModelConfig) -> int:
    """Parameters of the model, exactly; the tied output projection counts once."""
    import torch

    from armd.model import ARMD

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in ARMD(config).parameters())


def flops(config: ModelConfig) -> Flops:
    """Forward operations a token with texts of `max_length` tokens, one token a block."""
    d, n, two = config.d_model, config.max_length, config.n_two_stream_layers
    content = 12 * (two - 1) + 2
    query = 10 * two + 12 * (config.n_layers - two)
    rows_attending = (two - 1) + config.n_layers
    chunk = min(PREFIX_CHUNK, n)
    n_chunks = math.ceil(n / chunk)
    within = 2.0 * chunk * (config.d_prefix + d)
    across = 2.0 * config.d_prefix * d * (2 - 1 / n_chunks)  # every chunk reads the state, all but the last add to it
    return Flops(
        layers=2.0 * (content + query) * d * d,
        attention=2.0 * n * d * rows_attending,
        prefix=(within + across) * n_chunks * chunk / n,
        head=2.0 * d * config.vocab_size,
    )


def autoregressive_flops(config: ModelConfig) -> Flops:
    """The same for a plain causal transformer of the same width and depth."""
    d, n = config.d_model, config.max_length
    return Flops(
        layers=24.0 * config.n_layers * d * d,
        attention=2.0 * n * d * config.n_layers,
        prefix=0.0,
        head=2.0 * d * config.vocab_size,
    )


def masked_diffusion_flops(config: ModelConfig) -> Flops:
    """The same for a bidirectional transformer of that size, one noise level a pass; [mask] has no logit."""
    plain = autoregressive_flops(config)
    return dataclasses.replace(plain, attention=2 * plain.attention)


def allowed_ratio(config: ModelConfig) -> float:
    """Times the arithmetic of an autoregressive training step that ARMD's takes, and so may take in time.

    Of the products with weights, forward and backward alike (design: 1.24 for the small model with 50k words);
    attention and prefix aggregation are not in it.
    """
    return flops(config).weights / autoregressive_flops(config).weights


def memory(config: ModelConfig, train: TrainConfig, n_parameters: int, *, bfloat16: bool) -> Memory:
    """Bytes a worker: stage 1 shards the optimiser's states, 2 the gradients too, 3 the weights too."""
    width = 2 if bfloat16 else 4
    share = 1 / train.n_workers
    rows = train.micro_batch_size * config.max_length
    kept = _kept_a_row(config, train, bfloat16=bfloat16)
    # At the start of the backward pass: log-probabilities and two gradients in float32, one more in bfloat16.
    logits = 14 if bfloat16 else 12
    return Memory(
        parameters=width * n_parameters * (share if train.zero_stage >= 3 else 1),
        gradients=width * n_parameters * (share if train.zero_stage >= 2 else 1),
        master=4 * n_parameters * share,
        moments=8 * n_parameters * share,
        average=0 if train.ema_decay is None else 4 * n_parameters * (share if train.zero_stage >= 3 else 1),
        activations=width * rows * config.d_model * kept,
        logits=logits * rows * config.vocab_size,
    )


def _kept_a_row(config: ModelConfig, train: TrainConfig, *, bfloat16: bool) -> float:
    """Tensors as wide as the model that are kept a row for the backward pass of all layers."""
    n_both = config.n_two_stream_layers - 1  # the last one brings keys and values alone of its content
    neighbours = 2 * config.n_neighbours
    if not train.activation_checkpointing:
        return _KEPT_A_ROW[bfloat16] * (n_both + config.n_layers) + _KEPT_KEYS_VALUES_ONLY + neighbours
    # What enters each layer; what the first query and the last norm keep; and all of the layer that is computed again.
    entering = 2 * config.n_two_stream_layers + (config.n_layers - config.n_two_stream_layers)
    return entering + _KEPT_OUTSIDE_LAYERS + neighbours + _KEPT_A_ROW[bfloat16] * (2 if n_both else 1)


def checkpoint_bytes(train: TrainConfig, n_parameters: int, *, bfloat16: bool) -> float:
    """One checkpoint: the weights, the float32 copy, two moments, and the average where there is one."""
    return n_parameters * ((2 if bfloat16 else 4) + 12 + (0 if train.ema_decay is None else 4))


def export_bytes(n_parameters: int) -> float:
    """The exported model: float32 weights."""
    return 4.0 * n_parameters


def tokens(train: TrainConfig, sequence_length: int) -> int:
    """Tokens that the run trains on, repetitions included."""
    return train.total_steps * train.batch_size * sequence_length
