"""An exponential moving average of the weights that the model computes with, sharded the way ZeRO shards them.

Each rank averages the tensors it holds: whole parameters under stages 1 and 2, its flat slices under stage 3. In a
bfloat16 run these are bfloat16; the average itself is kept and exported in float32.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FILE = "ema-rank-{rank:05d}.safetensors"


class Ema:
    """The average, in float32, of what `engine`'s model holds on this rank."""

    def __init__(self, engine: Any, decay: float) -> None:
        self.decay = decay
        self._engine = engine
        self.sharded = engine.zero_optimization_partition_weights()
        self._held = {name: _held(parameter) for name, parameter in engine.module.named_parameters()}
        self.average = {name: tensor.detach().float().clone() for name, tensor in self._held.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights; once after every optimiser step."""
        for name, tensor in self._held.items():
            self.average[name].lerp_(tensor.float(), 1 - self.decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block the model computes with the average instead of the weights."""
        weights = {name: tensor.detach().clone() for name, tensor in self._held.items()}
        self._copy(self.average)
        try:
            yield
        finally:
            self._copy(weights)

    def save(self, folder: str, rank: int) -> None:
        """Write this rank's share; without sharding the ranks agree and rank 0 writes for all."""
        if rank == 0 or self.sharded:
            shares = {name: tensor.cpu().contiguous() for name, tensor in self.average.items()}
            save_file(shares, Path(folder, FILE.format(rank=rank)))

    def load(self, folder: str, rank: int) -> None:
        """Read back what `save` wrote."""
        shares = load_file(Path(folder, FILE.format(rank=rank if self.sharded else 0)))
        for name, tensor in self.average.items():
            tensor.copy_(shares[name])

    @torch.no_grad()
    def _copy(self, source: dict[str, Tensor]) -> None:
        if self.sharded:  # drop what stage 3 has gathered from the old slices and would go on computing with
            self._engine.empty_partition_cache()
        for name, tensor in self._held.items():
            tensor.copy_(source[name])
        kept_whole = getattr(self._engine.optimizer, "persistent_parameters", [])
        if kept_whole:  # small parameters stay gathered between steps
            kept_whole[0].all_gather(kept_whole)


def gather(folder: str, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """The whole averaged parameters from the files of all ranks."""
    files = [load_file(path) for path in sorted(Path(folder).glob("ema-rank-*.safetensors"))]
    flat = {name: torch.cat([file[name].flatten() for file in files]) for name in shapes}
    # Stage 3 pads a parameter so that it divides by the number of ranks.
    return {name: flat[name][: shape.numel()].view(shape).clone() for name, shape in shapes.items()}


def _held(parameter: torch.nn.Parameter) -> Tensor:
    return getattr(parameter, "ds_tensor", parameter)
