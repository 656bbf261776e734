"""From logits to tokens: temperature, top-k, top-p and the draw, as pure functions in float64.

float64, because a draw in float32 quietly lowers the temperature: its smallest uniform numbers cut off the tail.
"""

import math
import operator
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from armd.randomness import seeded

_PART = 1 << 18
"""Words of all rows of a part: 2 MB in float64."""

_ENGINES_OWN = ("min_tokens", "mode", "threshold", "max_entropy", "logit_bias", "top_logprobs")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is decoded.

    Raises:
        ValueError: naming the field and the value that does not fit.
    """

    max_tokens: int = 128
    """Tokens to write at most."""
    min_tokens: int = 0
    """No stop token stands among the first so many."""
    n_streams: int = 4
    """Streams written in parallel; 1 is plain left-to-right. More than max_tokens means max_tokens."""
    mode: Literal["parallel", "exact"] = "parallel"
    """`exact` verifies what it drafts, so that texts follow the one-token-a-block distribution of the same order."""
    threshold: float = 0.0
    """In parallel mode, positions are filled only where the most probable token reaches this probability, at least one
    a step; the others wait. 0 fills every position at its turn."""
    max_entropy: float | None = None
    """In parallel mode, positions are filled by rising entropy of their predictions, in nats, until those before one
    sum to more than this; the others wait. At temperature 1, with nothing cut or biased, the tokens of a step, drawn
    apart, differ by at most so many nats from tokens drawn one after the other (Ben-Hamu et al., arXiv 2505.24857).
    None fills every position at its turn."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most probable token."""
    top_p: float = 1.0
    """Keeps the most probable tokens up to this sum, the one that crosses it included."""
    top_k: int = 0
    """Keeps this many most probable tokens; 0 keeps all."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """token -> what is added to its logit, before temperature."""
    seed: int | None = 0
    """Seeds the request's own generator; None draws a fresh seed."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the text; the text before the first of them is returned."""
    top_logprobs: int = 0
    """Most probable tokens to tell at each place, with their log-probabilities."""

    def __post_init__(self) -> None:
        for name, least in (("max_tokens", 0), ("min_tokens", 0), ("top_k", 0), ("top_logprobs", 0), ("n_streams", 1)):
            value = getattr(self, name)
            if not _is_whole(value):
                raise ValueError(f"{name} must be a whole number, not {value!r}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, not {value}")
        if self.seed is not None and not _is_whole(self.seed):
            raise ValueError(f"seed must be a whole number or None, not {self.seed!r}")
        if self.mode not in ("parallel", "exact"):
            raise ValueError(f"mode must be parallel or exact, not {self.mode!r}")
        for name in ("threshold", "temperature", "top_p"):
            _check_number(name, getattr(self, name))
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must be between 0 and 1, not {self.threshold}")
        if self.max_entropy is not None:
            _check_number("max_entropy", self.max_entropy)
            if not 0 <= self.max_entropy < math.inf:
                raise ValueError(f"max_entropy must be at least 0 and finite, not {self.max_entropy}")
        if self.threshold and self.max_entropy is not None:
            raise ValueError(f"threshold ({self.threshold}) must be left out with max_entropy ({self.max_entropy})")
        for name, off in (("threshold", 0), ("max_entropy", None)):
            if self.mode == "exact" and getattr(self, name) != off:
                raise ValueError(
                    f"{name} must be {off} in exact mode, where drafts are verified, not {getattr(self, name)}"
                )
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be at least 0 and finite, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be more than 0 and at most 1, not {self.top_p}")
        if not isinstance(self.stop_ids, Collection):  # an iterator would be used up by the first look
            raise ValueError(f"stop_ids must be a collection of token ids, not {self.stop_ids!r}")
        if not isinstance(self.logit_bias, Mapping):
            raise ValueError(f"logit_bias must be a mapping from tokens to numbers, not {self.logit_bias!r}")
        for token, bias in self.logit_bias.items():
            _check_number(f"logit_bias of token {token}", bias)
            if not math.isfinite(bias):
                raise ValueError(f"logit_bias must be finite, not {bias} for token {token}")

    @property
    def adaptive(self) -> bool:
        """Which positions a step fills depends on how sure the model is."""
        return self.threshold > 0 or self.max_entropy is not None

    def generator(self) -> torch.Generator:
        """The request's generator; on the CPU, so that a seed means the same everywhere."""
        return seeded("sample", secrets.randbits(64) if self.seed is None else operator.index(self.seed))

    def check_plain(self) -> None:
        """Check that nothing is asked for that only an engine does.

        Raises:
            ValueError: naming what is.
        """
        plain = SamplingParams()
        for name in _ENGINES_OWN:
            if getattr(self, name) != getattr(plain, name):
                raise ValueError(f"{name} must be left out here, not {getattr(self, name)!r}")


def distribution(logits_MV: Tensor, params: SamplingParams) -> Tensor:
    """(M, V) float64 probabilities from which tokens are drawn: temperature first, then top-k, then top-p."""
    logits_MV = logits_MV.double()
    if params.temperature == 0:
        return torch.zeros_like(logits_MV).scatter_(1, logits_MV.argmax(dim=1, keepdim=True), 1.0)
    if params.temperature != 1:
        # Below the largest, so that no temperature, however low, makes the quotient infinite.
        logits_MV = (logits_MV - logits_MV.amax(dim=1, keepdim=True)) / params.temperature
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


def _is_whole(value: object) -> bool:
    try:
        operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return False
    return True


def _check_number(name: str, value: object) -> None:
    try:
        float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name} must be a number, not {value!r}") from None
    if isinstance(value, str):
        raise ValueError(f"{name} must be a number, not {value!r}")


def parts(logits_MV: Tensor) -> list[slice]:
    """Rows whose distributions are computed together: on a CPU as many as a cache holds.

    With a large vocabulary those of a whole step can be more memory than the layers of the model touch.
    """
    n_rows, n_words = logits_MV.shape
    most = max(1, _PART // n_words) if logits_MV.device.type == "cpu" else max(1, n_rows)
    return [slice(start, min(start + most, n_rows)) for start in range(0, n_rows, most)]


def draw(weights_MV: Tensor, uniform_M: Tensor) -> Tensor:
    """(M,) token ids, one a row, where the row's cumulative weights cross a float64 uniform number in [0, 1).

    Weights need not sum to 1; a token of weight 0 is never drawn.
    """
    cumulative_MV = weights_MV.cumsum(dim=1)
    # A uniform number is at most 1 - 2^-53, and times the total rounds below it. `right=True` never lands on a token of
    # weight 0, whose cumulative value equals its predecessor's.
    # NaN is crossed nowhere; it must not draw a token that does not exist.
    tokens_M = torch.searchsorted(cumulative_MV, uniform_M[:, None] * cumulative_MV[:, -1:], right=True).squeeze(1)
    return tokens_M.clamp_(max=weights_MV.shape[1] - 1)


def verify(weights_MV: Tensor, rows_D: Tensor, draft_DV: Tensor, drafts_D: Tensor, uniform_D: Tensor) -> Tensor:
    """Which drafts stand, (D,) bool: equation (13). In place, their rows' targets become the weights of replacements.

    Draft x, drawn from `draft`, stands with probability min(1, target(x) / draft(x)); its replacement is drawn from
    the positive part of target - draft. Together they follow the target exactly (Leviathan et al., arXiv 2211.17192).
    """
    target_D = weights_MV[rows_D, drafts_D]
    draft_D = draft_DV.gather(1, drafts_D[:, None]).squeeze(1)
    weights_MV.index_add_(0, rows_D, draft_DV, alpha=-1).clamp_(min=0)
    # Distributions that differ by rounding alone may leave nothing to draw a replacement from.
    return (uniform_D * draft_D < target_D) | (weights_MV.sum(dim=1) == 0)[rows_D]
