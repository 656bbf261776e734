"""What decoding remembers of each text: fixed storage, a slot a text; knows ranks, not tokens.

Two-stream layers remember content keys and values (the null key first), causal layers those of the query rows, prefix
aggregation its running state (section 5). Storage is claimed once, so that memory is known beforehand.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from armd.model import ARMD


class Cache:
    """Storage for `n_slots` texts of up to `max_length` tokens, in the model's type and on its device."""

    def __init__(self, model: ARMD, n_slots: int) -> None:
        if n_slots < 1:
            raise ValueError(f"a cache needs at least one slot, not {n_slots}")
        config, like = model.config, model.embedding.weight
        heads, width = config.n_heads, config.d_model // config.n_heads
        n_causal = config.n_layers - config.n_two_stream_layers
        # (layer, key or value, slot, head, rank, width); content rows start at index 1, behind the null key.
        self.content = like.new_zeros(config.n_two_stream_layers, 2, n_slots, heads, 1 + config.max_length, width)
        self.query = like.new_zeros(n_causal, 2, n_slots, heads, config.max_length, width)
        self.prefix = torch.zeros(n_slots, config.d_prefix, config.d_model, device=like.device)
        with torch.no_grad():
            for depth, layer in enumerate(model.two_stream_layers):
                null = layer.attention.null_keys_values(self.content[depth, 0])
                self.content[depth, 0, :, :, :1], self.content[depth, 1, :, :, :1] = null

    @property
    def bytes_per_slot(self) -> int:
        """Memory of one slot in bytes."""
        storage = (self.content, self.query, self.prefix)
        return sum(tensor.numel() * tensor.element_size() for tensor in storage) // self.prefix.shape[0]

    def clear(self, slot: int) -> None:
        """Make a slot ready for another text; no mask reaches beyond the keys that it will have written."""
        self.prefix[slot] = 0


def rows_of(storage: Tensor, slots: Sequence[int], length: int) -> Tensor:
    """Keys or values (len(slots), H, length, A) of some slots; a view where the slots are neighbours."""
    first, n = slots[0], len(slots)
    if list(slots) == list(range(first, first + n)):
        return storage[first : first + n, :, :length]
    return storage[torch.tensor(slots, device=storage.device)][:, :, :length]
