"""From logits to tokens: temperature, top-k, top-p and the draw, as pure functions in float64.

float64, because a draw in float32 quietly lowers the temperature: its smallest uniform numbers cut off the tail.
"""

import secrets
from dataclasses import dataclass

import torch
from torch import Tensor

from armd.randomness import seeded


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is decoded.

    Raises:
        ValueError: naming the field and the value that does not fit.
    """

    max_tokens: int = 128
    """Tokens to write at most."""
    n_streams: int = 4
    """Streams written in parallel; 1 is plain left-to-right. More than max_tokens means max_tokens."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most probable token."""
    top_p: float = 1.0
    """Keeps the most probable tokens up to this sum, the one that crosses it included."""
    top_k: int = 0
    """Keeps this many most probable tokens; 0 keeps all."""
    seed: int | None = 0
    """Seeds the request's own generator; None draws a fresh seed."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the text; the text before the first of them is returned."""

    def __post_init__(self) -> None:
        if self.max_tokens < 0:
            raise ValueError(f"max_tokens must be at least 0, not {self.max_tokens}")
        if self.n_streams < 1:
            raise ValueError(f"n_streams must be at least 1, not {self.n_streams}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be at least 0 and finite, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be more than 0 and at most 1, not {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0, not {self.top_k}")

    def generator(self) -> torch.Generator:
        """The request's generator; on the CPU, so that a seed means the same everywhere."""
        return seeded("sample", secrets.randbits(64) if self.seed is None else self.seed)


def distribution(logits_MV: Tensor, params: SamplingParams) -> Tensor:
    """(M, V) float64 probabilities from which tokens are drawn: temperature first, then top-k, then top-p."""
    logits_MV = logits_MV.double()
    if params.temperature == 0:
        return torch.zeros_like(logits_MV).scatter_(1, logits_MV.argmax(dim=1, keepdim=True), 1.0)
    logits_MV = logits_MV / params.temperature
    if 0 < params.top_k < logits_MV.shape[1]:
        least_M1 = logits_MV.topk(params.top_k, dim=1).values[:, -1:]
        logits_MV = logits_MV.masked_fill(logits_MV < least_M1, -torch.inf)
    probabilities_MV = logits_MV.softmax(dim=1)
    if params.top_p < 1:
        sorted_MV, tokens_MV = probabilities_MV.sort(dim=1, descending=True, stable=True)
        # A token stays when those before it have not reached top_p yet: the one that crosses it stays too.
        dropped_MV = sorted_MV.cumsum(dim=1) - sorted_MV >= params.top_p
        probabilities_MV = probabilities_MV.masked_fill(dropped_MV.gather(1, tokens_MV.argsort(dim=1)), 0.0)
        probabilities_MV = probabilities_MV / probabilities_MV.sum(dim=1, keepdim=True)
    return probabilities_MV


def draw(probabilities_MV: Tensor, generator: torch.Generator) -> Tensor:
    """(M,) token ids, one a row, by inverting each row's cumulative distribution at a float64 uniform number."""
    cumulative_MV = probabilities_MV.cumsum(dim=1)
    uniform_M1 = torch.rand(len(probabilities_MV), 1, dtype=torch.float64, generator=generator)
    targets_M1 = uniform_M1.to(cumulative_MV.device) * cumulative_MV[:, -1:]
    # `right=True` never lands on a token of probability 0, whose cumulative value equals its predecessor's.
    tokens_M = torch.searchsorted(cumulative_MV, targets_M1, right=True).squeeze(1)
    last_M = probabilities_MV.shape[1] - 1 - (probabilities_MV.flip(1) > 0).to(torch.uint8).argmax(dim=1)
    return torch.minimum(tokens_M, last_M)
