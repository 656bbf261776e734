"""ARMD, the auto-regressive masked diffusion model (Karami and Ghodsi, arXiv 2601.16971).

A block-causal transformer that predicts every token of a text from the blocks before its own, in any order and in one
pass; docs/model.md has its equations:

* prefix aggregation and the tokens next door give each rank a first query that does not know its own token (prefix.py,
  equations 4 and 5a);
* the two-stream layers carry content X, causal, and query G, strictly causal, with one set of weights (equations 6, 7);
* the causal layers above run on G alone, and the logits are read from G.

No [mask] token, no time embedding: attention masks hide what is not yet generated. Rotary embedding by position in
every attention, RMSNorm before every part, GELU MLP of four times the width, no biases, the embedding tied to the head.

Shapes: B sequences, N tokens or ranks, D model width, V words. Ranked tensors have their rows in the order of
generation, others in the order of the text.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from armd.attention import Kernel, Mask, build_mask, choose_kernel, rotary_angles
from armd.config import ModelConfig
from armd.layers import Layer, initialise
from armd.order import Order
from armd.prefix import aggregate, neighbours
from armd.products import product


class ARMD(nn.Module):
    """The model; see the module's docstring. `generator` draws the initial weights."""

    activation_checkpointing = False
    """Keep only what enters each layer for the backward pass, and compute the rest again there."""

    def __init__(self, config: ModelConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.prefix_table = nn.Parameter(torch.empty(config.max_length, config.d_prefix))
        self.start = nn.Parameter(torch.empty(config.d_model))
        self.offsets = [*range(-config.n_neighbours, 0), *range(1, config.n_neighbours + 1)]
        """Of the neighbours that enter the first query."""
        self.neighbour_weights = nn.Parameter(torch.empty(len(self.offsets), config.d_model)) if self.offsets else None
        self.content_norm = nn.RMSNorm(config.d_model, eps=1e-6)
        self.query_norm = nn.RMSNorm(config.d_model, eps=1e-6)
        n_causal = config.n_layers - config.n_two_stream_layers
        # ModuleLists, typed by what they hold.
        self.two_stream_layers: Sequence[Layer] = nn.ModuleList(  # type: ignore[assignment]
            Layer(config, two_stream=True) for _ in range(config.n_two_stream_layers)
        )
        self.causal_layers: Sequence[Layer] = nn.ModuleList(  # type: ignore[assignment]
            Layer(config, two_stream=False) for _ in range(n_causal)
        )
        self.final_norm = nn.RMSNorm(config.d_model, eps=1e-6)
        initialise(self, config.n_layers, generator)

    def kernel(self, order: Order, device: torch.device | str) -> Kernel:
        """What the forward pass computes attention with, for `order` on `device`; see `choose_kernel`."""
        return choose_kernel(
            one_by_one=order.one_by_one,
            head_width=self.config.d_model // self.config.n_heads,
            device=torch.device(device),
        )

    def forward(self, tokens_BN: Tensor, order: Order, kernel: Kernel | None = None) -> Tensor:
        """Logits (B, N, V) in text order: [b, p] predicts the token at position p from the earlier blocks alone.

        `tokens_BN` is int64 in text order; `order` has N positions, shared or one for each sequence, on the tokens'
        device. `kernel` None takes what `self.kernel` answers.
        """
        logits_BNV = self.head(self.hidden_by_rank(tokens_BN, order, kernel))
        ranks_BN = order.ranks.expand(tokens_BN.shape)
        return logits_BNV.gather(1, ranks_BN[..., None].expand_as(logits_BNV))

    def hidden_by_rank(self, tokens_BN: Tensor, order: Order, kernel: Kernel | None = None) -> Tensor:
        """The last layer's output (B, N, D), ranked and normalised: what the head turns into logits."""
        self._check(tokens_BN, order)
        causal, strict = self._masks(order, kernel or self.kernel(order, tokens_BN.device))
        positions_BN = order.positions.reshape(-1, order.length)  # B is 1 where the order is shared
        rotary = rotary_angles(positions_BN, self.config.d_model // self.config.n_heads)[:, None]
        x, g = self.first_streams(self.embedding(tokens_BN.gather(1, positions_BN.expand(tokens_BN.shape))), order)

        *lower, last = self.two_stream_layers
        if lower:
            xg = torch.stack([x, g])
            for layer in lower:
                xg = self._run(layer.both_streams, xg, rotary, causal, strict)
            x, g = xg
        g = self._run(last.query_stream, x, g, rotary, strict)
        for layer in self.causal_layers:
            g = self._run(layer.causal_stream, g, rotary, causal)
        return self.final_norm(g)

    def first_streams(self, x_BND: Tensor, order: Order) -> tuple[Tensor, Tensor]:
        """X[0] and G[0], both (B, N, D), from the ranked embeddings."""
        p_BNE = self.prefix_table[order.positions.reshape(-1, order.length)]
        starts = order.block_starts.reshape(-1, order.length)
        with torch.autocast(x_BND.device.type, enabled=False):  # a long sum: float32 whatever the model computes in
            g_BND = aggregate(p_BNE, x_BND, starts, order.largest_block)
        content_BND = self.content_norm(x_BND)
        query_BND = self.query_norm(g_BND.to(self.start.dtype) + self.start)
        if self.neighbour_weights is not None:
            near_BNOD = neighbours(content_BND, order, self.offsets)
            query_BND = query_BND + (near_BNOD * self.neighbour_weights).sum(dim=2)
        return content_BND, query_BND.to(content_BND.dtype)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of normalised hidden rows (..., D)."""
        return product(hidden, self.embedding.weight)

    def _masks(self, order: Order, kernel: Kernel) -> tuple[Mask, Mask]:
        """The causal mask and, over shifted keys, the strict one."""
        if kernel == "causal":
            if not order.one_by_one:
                raise ValueError(f"causal kernels want one token a block, the order has {order.largest_block}")
            return None, None
        starts, ends = (limits.reshape(-1, order.length) for limits in (order.block_starts, order.block_ends))
        return build_mask(ends, kernel), build_mask(starts + 1, kernel)

    def _run(self, layer: Callable[..., Any], *inputs: Any) -> Any:
        """One layer's method on `inputs`, under `activation_checkpointing` where gradients are wanted."""
        if self.activation_checkpointing and torch.is_grad_enabled():
            # There is no dropout whose random state would have to be kept.
            return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
        return layer(*inputs)

    def _check(self, tokens_BN: Tensor, order: Order) -> None:
        if tokens_BN.ndim != 2 or tokens_BN.shape[1] != order.length:
            raise ValueError(f"tokens have shape {tuple(tokens_BN.shape)}, the order wants (B, {order.length})")
        if order.positions.device != tokens_BN.device:  # copied here, it would hold up the device in every pass
            raise ValueError(f"the order is on {order.positions.device}, the tokens on {tokens_BN.device}")
        if order.length > self.config.max_length:
            raise ValueError(f"{order.length} tokens are more than the model's max_length of {self.config.max_length}")
        if order.positions.ndim == 2 and order.positions.shape[0] != tokens_BN.shape[0]:
            raise ValueError(f"{order.positions.shape[0]} orders were given for {tokens_BN.shape[0]} sequences")
