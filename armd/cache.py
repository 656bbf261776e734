"""What decoding remembers of each text: fixed storage, a slot a text; knows ranks, not tokens.

Two-stream layers remember content keys and values (the null key first), causal layers those of the query rows, prefix
aggregation its running state (docs/model.md, section 5). Storage is claimed once, so that memory is known beforehand.
Rolling back costs nothing: what lies beyond the ranks that masks show is written again before it is read.
"""

import math

import torch

from armd.config import ModelConfig
from armd.model import ARMD


class Cache:
    """Storage for `n_slots` texts of up to `max_length` tokens, in the model's type and on its device.

    Raises:
        ValueError: no slot is asked for, or the slots need more than `memory_bytes`.
    """

    def __init__(self, model: ARMD, n_slots: int, memory_bytes: int | None = None) -> None:
        if n_slots < 1:
            raise ValueError(f"a cache needs at least one slot, not {n_slots}")
        config, like = model.config, model.embedding.weight
        self.n_slots = n_slots
        self.max_length = config.max_length
        self.bytes_per_slot = bytes_per_slot(config, like.dtype)
        if memory_bytes is not None and n_slots * self.bytes_per_slot > memory_bytes:
            raise ValueError(
                f"{n_slots} slots of {self.bytes_per_slot:,} bytes need {n_slots * self.bytes_per_slot:,} bytes; "
                f"memory_bytes allows {memory_bytes:,}"
            )
        # (layer, key or value, slot, rank, head, width); content rows have the null key in front.
        self.content, self.query = (like.new_zeros(layers, 2, n_slots, *row) for layers, *row in _shapes(config))
        self.prefix = torch.zeros(n_slots, config.d_prefix, config.d_model, device=like.device)
        self._step = like.new_zeros(2 * (self.max_length + 2))
        self._step[self.max_length + 2 :] = -torch.inf
        with torch.no_grad():
            for storage, layer in zip(self.content, model.two_stream_layers, strict=True):
                assert layer.attention.null is not None, "only two-stream layers have a null key"
                storage[:, :, 0] = layer.attention.null.squeeze(2)[:, None]

    def clear(self, slot: int) -> None:
        """Make a slot ready for another text; masks show no key that it has not written."""
        self.prefix[slot] = 0

    def mask(self, shown_M: torch.Tensor, n_keys: int) -> torch.Tensor:
        """(M, K), added to scores: 0 for so many first keys of a row, -inf for the others; a window of a step."""
        return self._step.unfold(0, n_keys, 1)[self.max_length + 2 - shown_M]

    @torch.inference_mode()
    def copy(self, source: int, slot: int, n_ranks: int) -> None:
        """Give `slot` the keys and values of the first `n_ranks` ranks of `source`."""
        for storage, n_rows in ((self.content, 1 + n_ranks), (self.query, n_ranks)):
            storage[:, :, slot, :n_rows] = storage[:, :, source, :n_rows]


def bytes_per_slot(config: ModelConfig, dtype: torch.dtype) -> int:
    """Memory of one slot in bytes: keys and values in `dtype`, the prefix state in float32."""
    elements = sum(2 * math.prod(shape) for shape in _shapes(config))
    return elements * dtype.itemsize + 4 * config.d_prefix * config.d_model


def _shapes(config: ModelConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(layers, ranks, heads, width) of the keys, or the values, of content and of query rows.

    Content has the null key in front; the last rank of both takes what rows of the padding write.
    """
    row = (config.n_heads, config.d_model // config.n_heads)
    n_two, n_causal = config.n_two_stream_layers, config.n_layers - config.n_two_stream_layers
    return (n_two, config.max_length + 2, *row), (n_causal, config.max_length + 1, *row)
