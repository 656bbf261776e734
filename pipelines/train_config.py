"""What a training run is: schedules, batch, optimiser, workers. Imports neither ray nor torch."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from armd.config import Architecture


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Progressive permutation for `steps` steps, then strided fine-tuning for `strided_steps` more.

    The baselines train with the same data, steps and batch; settings of orders and streams mean nothing to them.

    Raises:
        ValueError: naming the field and the value that does not fit.
    """

    architecture: Architecture = field(default_factory=Architecture)
    """The model's layers and widths; vocabulary and length come from the corpus."""
    model: Literal["armd", "autoregressive", "masked_diffusion"] = "armd"
    """What is trained: the model, or a baseline of the same layers (a plain causal transformer, or MDLM)."""
    seed: int = 0
    """Seeds the weights, the order of the data and every drawn permutation."""
    batch_size: int = 512
    """Sequences a step, over all workers."""
    micro_batch_size: int = 8
    """Sequences a worker computes at once; the rest of its share is accumulated."""
    steps: int = 400_000
    """Steps of training with progressive permutation."""
    strided_steps: int = 10_000
    """Steps of strided fine-tuning after them."""
    ar_steps: int = 9_000
    """Steps with the plain left-to-right order before any rank is shuffled (the paper's i_ar)."""
    permutation_steps: int = 48_000
    """Step at which `max_shuffled` ranks are shuffled; the number grows linearly until then (the paper's i_perm)."""
    max_shuffled: int = 32
    """Ranks shuffled among themselves in the end (the paper's rho)."""
    streams: tuple[int, ...] = (1, 2, 4)
    """Numbers of streams that strided and infilling steps draw from, one a step."""
    prefix_probability: float = 0.5
    """Share of the strided steps with a known prefix of random length before the streams, as prompts need."""
    strided_share: float = 0.0
    """Share of the steps between `mix_after` and `steps` that are strided, as the mixed recipe has it."""
    infilling_share: float = 0.0
    """Share of them in which holes are filled, so that infilling is in distribution."""
    mix_after: int = 0
    """Steps before the first one that these shares take."""
    learning_rate: float = 3e-4
    """Peak learning rate of AdamW."""
    min_learning_rate_ratio: float = 0.1
    """Where the cosine ends, as a share of the peak."""
    warmup_steps: int = 2_500
    """Steps over which the learning rate rises from zero."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after the warm-up, over all steps, the strided ones included."""
    weight_decay: float = 0.1
    """AdamW's decay of the weight matrices; norms, tables and vectors are not decayed."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 switches clipping off."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the forward and backward pass; auto: bfloat16 on GPUs, float32 elsewhere."""
    activation_checkpointing: bool = False
    """Keep of a layer only what enters it and compute the rest again for the backward pass: about a fifth of the
    activations' memory for a third more arithmetic. For ARMD only."""
    ema_decay: float | None = None
    """Decay a step of an exponential moving average of the weights, which is then what is validated and exported."""
    n_workers: int = 1
    """Training processes: one a GPU where there are GPUs, else CPU processes."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """What the workers ask of the cluster; auto: GPUs where it has one for each when the stage begins, else CPUs."""
    wait_for_nodes: float = 45.0
    """Seconds to wait for an autoscaling cluster to grow to the workers' needs before giving up."""
    max_failures: int = 3
    """Times a crashed or lost worker group is restarted from the newest checkpoint."""
    zero_stage: Literal[1, 2, 3] = 1
    """What DeepSpeed ZeRO shards over the workers: 1 optimiser state, 2 and gradients, 3 and parameters.

    In bfloat16, stages 2 and 3 add up micro-batches in float32, stage 1 in bfloat16."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    validate_every: int = 1_000
    """Steps between two measurements of the held-out loss; the last step is always measured."""
    validation_windows: int = 256
    """Held-out windows used for it, at most."""
    checkpoint_every: int = 1_000
    """Steps between two checkpoints; the last step is always saved."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept."""
    cache_bytes: int = 200_000_000_000
    """Bytes of each machine's disk, at most, for shards of a corpus on an object store; best, the corpus fits."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "batch_size", "micro_batch_size", "n_workers", "log_every", "validate_every")
        _at_least(self, 1, "validation_windows", "checkpoint_every", "keep_checkpoints", "cache_bytes")
        _at_least(self, 0, "steps", "strided_steps", "ar_steps", "max_shuffled", "warmup_steps", "weight_decay", "clip")
        _at_least(self, 0, "mix_after", "strided_share", "infilling_share")
        _at_least(self, 0, "max_failures", "wait_for_nodes")
        if self.activation_checkpointing and self.model != "armd":
            raise ValueError(f"activation_checkpointing must be False for model = {self.model}, which has none")
        if self.total_steps < 1:
            raise ValueError("steps + strided_steps must be at least 1, not 0")
        if self.permutation_steps < self.ar_steps:
            raise ValueError(
                f"permutation_steps = {self.permutation_steps} must not be less than ar_steps = {self.ar_steps}"
            )
        if self.batch_size % self.n_workers:
            raise ValueError(f"batch_size = {self.batch_size} must be a multiple of n_workers = {self.n_workers}")
        if (self.batch_size // self.n_workers) % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size = {self.micro_batch_size} must divide a worker's share of the batch, "
                f"{self.batch_size // self.n_workers}"
            )
        if not self.streams or min(self.streams) < 1:
            raise ValueError(f"streams must be numbers of at least 1, not {self.streams}")
        if self.strided_share + self.infilling_share > 1:
            raise ValueError(
                f"strided_share = {self.strided_share} and infilling_share = {self.infilling_share} are more than 1"
            )
        for name in ("prefix_probability", "min_learning_rate_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, not {getattr(self, name)}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be more than 0 and finite, not {self.learning_rate}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be at least 0 and less than 1, not {self.betas}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay must be between 0 and 1, not {self.ema_decay}")

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "TrainConfig":
        """The configuration that `dataclasses.asdict` wrote, as a checkpoint's manifest holds it."""
        tuples = {name: tuple(fields[name]) for name in ("streams", "betas")}
        return cls(**{**fields, **tuples, "architecture": Architecture(**fields["architecture"])})

    @property
    def total_steps(self) -> int:
        """Steps of the whole run, the strided ones included."""
        return self.steps + self.strided_steps

    @property
    def teaches_streams(self) -> bool:
        """Whether any step is strided, so that parallel sampling is in distribution at the end."""
        return self.model == "armd" and bool(self.strided_steps or (self.strided_share and self.steps > self.mix_after))

    @property
    def accumulation(self) -> int:
        """Micro-batches a worker computes for one step."""
        return self.batch_size // self.n_workers // self.micro_batch_size


def _at_least(config: TrainConfig, least: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not (value >= least and math.isfinite(value)):  # not a number is neither
            raise ValueError(f"{name} must be at least {least}, not {getattr(config, name)}")
