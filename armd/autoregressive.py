"""The autoregressive baseline: a plain causal transformer of the same layers, with a key/value cache.

Token n is predicted from a learned start vector and tokens 1 .. n-1, left to right. Layers, widths, initialisation and
the tied head are ARMD's, so a comparison is between the ways of predicting and of nothing else.

Shapes: B sequences, N tokens, D model width, V words.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armd.attention import rotary_angles
from armd.config import ModelConfig
from armd.layers import Layer, initialise
from armd.sampling import SamplingParams, distribution, draw


class AutoregressiveLM(nn.Module):
    """The baseline; `n_two_stream_layers` and `d_prefix` of the configuration mean nothing to it."""

    def __init__(self, config: ModelConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.start = nn.Parameter(torch.empty(config.d_model))
        self.layers: Sequence[Layer] = nn.ModuleList(  # type: ignore[assignment]
            Layer(config, two_stream=False) for _ in range(config.n_layers)
        )
        self.final_norm = nn.RMSNorm(config.d_model, eps=1e-6)
        initialise(self, config.n_layers, generator)

    def forward(self, tokens_BN: Tensor) -> Tensor:
        """Logits (B, N, V): [b, n] predicts token n from the tokens before it."""
        return self.head(self._hidden(tokens_BN))

    def nats(self, tokens_BN: Tensor, drawn: None = None) -> tuple[Tensor, int]:
        """(sum of negative log-likelihoods in nats, number of tokens); exact, and nothing is drawn for it."""
        logits_BNV = self(tokens_BN)
        total = F.cross_entropy(logits_BNV.flatten(0, 1).float(), tokens_BN.flatten(), reduction="sum")
        return total, tokens_BN.numel()

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[list[int]]:
        """At most `params.max_tokens` tokens after each prompt, one a step and text; a stop token is not returned.

        Each text has a generator of its own. Where prompts differ in length, short ones are continued while long ones
        are still read, so that all texts stand at the same position. `params.n_streams` means nothing here.

        Raises:
            ValueError: a prompt and its continuation are longer than the model's max_length.
        """
        known = [len(prompt) for prompt in prompts]
        ends = [n + params.max_tokens for n in known]
        longest = max(ends, default=0)
        if longest > self.config.max_length:
            raise ValueError(f"{longest} tokens are more than the model's max_length of {self.config.max_length}")
        if not prompts or params.max_tokens == 0:
            return [[] for _ in prompts]
        text_BN = torch.zeros(len(prompts), longest, dtype=torch.long, device=self.start.device)
        for row_N, prompt in zip(text_BN, prompts, strict=True):
            row_N[: len(prompt)] = torch.as_tensor(prompt, dtype=torch.long)
        generators = [params.generator() for _ in prompts]
        cache: list[tuple[Tensor, Tensor]] = []
        x_BND = self._inputs(text_BN[:, : min(known)])
        for place in range(min(known), longest):
            hidden_BD = self._advance(x_BND, place + 1 - x_BND.shape[1], cache)
            writing = [b for b in range(len(prompts)) if known[b] <= place < ends[b]]
            if not writing:  # all short texts have ended, a long prompt is still being read
                x_BND = self.embedding(text_BN[:, place : place + 1])
                continue
            probabilities_MV = distribution(self.head(hidden_BD[writing]), params)
            uniforms = [torch.rand(1, dtype=torch.float64, generator=generators[b]) for b in writing]
            tokens_M = draw(probabilities_MV, torch.cat(uniforms).to(probabilities_MV.device))
            text_BN[writing, place] = tokens_M
            for b, token in zip(writing, tokens_M.tolist(), strict=True):
                if token in params.stop_ids:
                    ends[b] = place
            if place + 1 >= max(ends):
                break
            x_BND = self.embedding(text_BN[:, place : place + 1])
        return [row[n:end] for row, n, end in zip(text_BN.tolist(), known, ends, strict=True)]

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of normalised hidden rows (..., D)."""
        return F.linear(hidden, self.embedding.weight)

    def _hidden(self, tokens_BN: Tensor) -> Tensor:
        """The last layer's output (B, N, D), normalised: row n has seen tokens 1 .. n-1."""
        x = self._inputs(tokens_BN[:, :-1])
        rotary = self._rotary(0, x.shape[1])
        for layer in self.layers:
            x = layer.causal_stream(x, rotary)
        return self.final_norm(x)

    def _advance(self, x_BND: Tensor, start: int, cache: list[tuple[Tensor, Tensor]]) -> Tensor:
        """The last of the given rows after all layers (B, D), normalised; keys and values join `cache`, one a layer."""
        rotary = self._rotary(start, x_BND.shape[1])
        first = not cache
        for depth, layer in enumerate(self.layers):
            normed = layer.attention_norm(x_BND)
            k, v = layer.attention.keys_values(normed, rotary)
            if first:
                cache.append((k, v))
            else:
                k, v = (torch.cat(pair, dim=2) for pair in zip(cache[depth], (k, v), strict=True))
                cache[depth] = k, v
            # Causal among the rows of a prompt; a single row after it sees everything.
            attended = F.scaled_dot_product_attention(layer.attention.queries(normed, rotary), k, v, is_causal=first)
            x_BND = layer.finish(x_BND, layer.attention.merge(attended))
        return self.final_norm(x_BND[:, -1])

    def _inputs(self, tokens_BN: Tensor) -> Tensor:
        """(B, 1 + N, D): the start vector, then the embeddings."""
        start_B1D = self.start.expand(len(tokens_BN), 1, -1)
        return torch.cat([start_B1D, self.embedding(tokens_BN)], dim=1)

    def _rotary(self, start: int, n: int) -> Tensor:
        positions_1N = torch.arange(start, start + n, device=self.start.device)[None]
        return rotary_angles(positions_1N, self.config.d_model // self.config.n_heads)[:, None]
