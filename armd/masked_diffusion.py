"""The diffusion baseline: absorbing-state masked diffusion (MDLM, Sahoo et al., arXiv 2406.07524) of the same layers.

At time t every token has been replaced by [mask] with probability t (the log-linear schedule, alpha(t) = 1 - t). A
bidirectional transformer predicts the masked tokens, and the negative ELBO is

    L = E over t of  1/t  *  sum over masked n of  -log p(x_n | tokens that are not masked)

(their equation 8; 17 in docs/model.md).
The network is not told t (section 3.5.1 there: it can count the masks), predicts no [mask] and leaves unmasked tokens
alone. Layers, widths, initialisation and the tied head are ARMD's.

Shapes: B sequences, N tokens, D model width, V words.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armd.attention import joined, rotary_angles
from armd.config import ModelConfig
from armd.layers import Layer, initialise
from armd.products import product
from armd.randomness import seeded
from armd.sampling import SamplingParams, distribution, draw

LEAST_TIME = 1e-3
"""Times are drawn from here to 1: the weight 1/t has no bound at 0."""


@dataclass(frozen=True)
class Noise:
    """What one estimate of the ELBO draws for a batch."""

    times_B: Tensor
    """float32, (B,): each sequence's time."""
    masked_BN: Tensor
    """bool, (B, N): the tokens that are hidden."""

    @classmethod
    def of_rows(cls, rows: Sequence[int], n_rows: int, length: int, *parts: object) -> "Noise":
        """The noise of some rows of a batch of `n_rows`, the same whoever asks for which; `parts` seed it.

        Times are antithetic and of low discrepancy: one uniform number is shared, and row r stands r / n_rows further
        on, so that the batch covers the interval evenly.
        """
        shared = torch.rand((), generator=seeded("time", *parts)).item()
        times_B = torch.tensor([(shared + row / n_rows) % 1.0 for row in rows])
        uniforms_BN = torch.stack([torch.rand(length, generator=seeded("mask", *parts, row)) for row in rows])
        return cls._at(times_B, uniforms_BN)

    @classmethod
    def draw(cls, n_rows: int, length: int, generator: torch.Generator | None = None) -> "Noise":
        """The noise of a whole batch from one generator."""
        shared = torch.rand((), generator=generator)
        times_B = (shared + torch.arange(n_rows) / n_rows) % 1.0
        return cls._at(times_B, torch.rand(n_rows, length, generator=generator))

    @classmethod
    def _at(cls, uniform_B: Tensor, uniforms_BN: Tensor) -> "Noise":
        times_B = LEAST_TIME + (1 - LEAST_TIME) * uniform_B
        return cls(times_B, uniforms_BN < times_B[:, None])

    def to(self, device: torch.device | str) -> "Noise":
        """The same noise on `device`."""
        return Noise(self.times_B.to(device), self.masked_BN.to(device))


class MaskedDiffusionLM(nn.Module):
    """The baseline; `n_two_stream_layers`, `d_prefix` and `n_neighbours` of the configuration mean nothing to it."""

    def __init__(self, config: ModelConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size + 1, config.d_model)  # the last row is [mask]
        self.input_norm = nn.RMSNorm(config.d_model, eps=1e-6)
        self.layers: Sequence[Layer] = nn.ModuleList(  # type: ignore[assignment]
            Layer(config, two_stream=False) for _ in range(config.n_layers)
        )
        self.final_norm = nn.RMSNorm(config.d_model, eps=1e-6)
        initialise(self, config.n_layers, generator)

    @property
    def mask_id(self) -> int:
        """The id of [mask], one past the vocabulary."""
        return self.config.vocab_size

    def forward(self, tokens_BN: Tensor) -> Tensor:
        """Logits (B, N, V) of what stands behind each [mask] of `tokens_BN`; rows of other tokens mean nothing."""
        return self._head(self._hidden(tokens_BN))

    def _hidden(self, tokens_BN: Tensor) -> Tensor:
        """The last layer's output (B, N, D), normalised."""
        x = self.input_norm(self.embedding(tokens_BN))
        positions_1N = torch.arange(tokens_BN.shape[1], device=tokens_BN.device)[None]
        rotary = rotary_angles(positions_1N, self.config.d_model // self.config.n_heads)[:, None]
        for layer in self.layers:
            normed = layer.attention_norm(x)
            k, v = layer.attention.keys_values(normed, rotary)
            attended = F.scaled_dot_product_attention(layer.attention.queries(normed, rotary), k, v)
            x = layer.finish(x, joined(attended))
        return self.final_norm(x)

    def _head(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of normalised hidden rows (..., D)."""
        return product(hidden, self.embedding.weight[: self.mask_id])

    def nats(self, tokens_BN: Tensor, drawn: Noise) -> tuple[Tensor, int]:
        """(one estimate of the negative ELBO in nats, summed over the batch; number of tokens, masked or not)."""
        noise = drawn.to(tokens_BN.device)
        logits_BNV = self(tokens_BN.masked_fill(noise.masked_BN, self.mask_id))
        nats = F.cross_entropy(logits_BNV.flatten(0, 1).float(), tokens_BN.flatten(), reduction="none")
        total = (nats.view_as(tokens_BN) * noise.masked_BN / noise.times_B[:, None]).sum()
        return total, tokens_BN.numel()

    def elbo(self, tokens_BN: Tensor, *, generator: torch.Generator | None = None) -> tuple[Tensor, int]:
        """(negative ELBO in nats, number of tokens): `nats` with noise of its own; an estimate, so average many."""
        n_rows, length = tokens_BN.shape
        return self.nats(tokens_BN, Noise.draw(n_rows, length, generator=generator))

    @torch.no_grad()
    def sample(
        self, n_texts: int, length: int, params: SamplingParams | None = None, *, n_steps: int | None = None
    ) -> Tensor:
        """(n_texts, length) int64 tokens written from nothing; `params` gives temperature, top-k, top-p and seed.

        `n_steps` None is the first-hitting sampler (Zheng et al., arXiv 2409.02908): the next token to appear stands
        at any masked position with equal probability, one evaluation of the network a token, exact in continuous
        time. A number is ancestral sampling on that many even steps of time, in which tokens that appear together are
        drawn independently; a step in which none appears needs no evaluation.

        Raises:
            ValueError: `length` is more than the model's max_length, `n_steps` less than 1, or `params` asks for what
                only an engine does.
        """
        if not 1 <= length <= self.config.max_length:
            raise ValueError(f"length must be between 1 and the model's max_length {self.config.max_length}: {length}")
        if n_steps is not None and n_steps < 1:
            raise ValueError(f"n_steps must be at least 1, not {n_steps}")
        params = params or SamplingParams()
        params.check_plain()
        generator = params.generator()
        device = self.embedding.weight.device
        if n_steps is None:
            step_BN = torch.rand(n_texts, length, generator=generator).argsort(dim=1)
        else:
            # A token appears at a uniform time, whichever the others do: the step in which its time falls.
            step_BN = (torch.rand(n_texts, length, generator=generator) * n_steps).long()
        text_BN = torch.full((n_texts, length), self.mask_id, device=device)
        for step in step_BN.unique().tolist():
            appearing_BN = (step_BN == step).to(device)
            probabilities_MV = distribution(self._head(self._hidden(text_BN)[appearing_BN]), params)
            uniform_M = torch.rand(len(probabilities_MV), dtype=torch.float64, generator=generator)
            text_BN[appearing_BN] = draw(probabilities_MV, uniform_M.to(device))
        return text_BN
