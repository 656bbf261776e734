"""The draws of a step: the rows of all requests together, one transfer to the host.

Every request's uniform numbers come from its own generator, as many as its own rows need, and every row is computed by
itself: what a request draws does not depend on its neighbours.

Shapes: M rows that want a draw, V words.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, islice

import torch
from torch import Tensor

from armd.sampling import SamplingParams, distribution, draw, verify


@dataclass(frozen=True)
class Ask:
    """What one request wants to have drawn from its rows of logits."""

    params: SamplingParams
    generator: torch.Generator
    n_rows: int
    rows_without_stop: Sequence[int]
    """Rows that may not draw a stop token."""
    drafts: Sequence[int]
    """For the first rows: tokens to verify."""
    draft_probabilities: Tensor | None
    """(drafts, V) float64: what they were drawn from."""


@dataclass(frozen=True)
class Choice:
    """What was drawn for one request. Lists go by row."""

    tokens: list[int]
    logprobs: list[float]
    """Natural logarithm of the tokens' probabilities, before temperature and bias."""
    kept: list[bool]
    """By draft: it is the row's token; else its replacement is."""
    sureness: list[float]
    """Probability of each row's most probable token. Not of the drawn one: to draw again what came out improbable
    would lower the temperature quietly. Empty unless the request is adaptive."""
    entropies: list[float]
    """Of each row's prediction, in nats, before temperature and bias. Empty unless the request is adaptive."""
    tops: list[tuple[tuple[int, float], ...]]
    """The most probable tokens of each row with their log-probabilities; empty unless they are asked for."""
    probabilities: Tensor
    """(n_rows, V) float64: what the tokens of rows without a draft were drawn from."""


def choose(logits_MV: Tensor, asks: Sequence[Ask]) -> list[Choice]:
    """Draw for every request, whose rows follow one another in the order of `asks`.

    Raises:
        ValueError: a row's logits are not numbers.
    """
    device, n_rows = logits_MV.device, len(logits_MV)
    rows_of = _consecutive([ask.n_rows for ask in asks])
    drafts_of = _consecutive([len(ask.drafts) for ask in asks])
    n_drafts = drafts_of[-1].stop
    weights_MV = _distributions(logits_MV, asks, rows_of)
    numbers = [torch.rand(ask.n_rows + len(ask.drafts), dtype=torch.float64, generator=ask.generator) for ask in asks]
    uniform_M = torch.cat([own[: ask.n_rows] for own, ask in zip(numbers, asks, strict=True)]).to(device)
    columns: list[Tensor] = []
    if n_drafts:
        verified = ((rows.start, len(ask.drafts)) for rows, ask in zip(rows_of, asks, strict=True))
        rows_D = torch.tensor([row for start, n in verified for row in range(start, start + n)], device=device)
        drafts_D = torch.tensor([token for ask in asks for token in ask.drafts], device=device)
        drawn_from_DV = torch.cat([ask.draft_probabilities for ask in asks if ask.draft_probabilities is not None])
        uniform_D = torch.cat([own[ask.n_rows :] for own, ask in zip(numbers, asks, strict=True)]).to(device)
        kept_D = verify(weights_MV, rows_D, drawn_from_DV, drafts_D, uniform_D)
        columns.append(kept_D)
    tokens_M = draw(weights_MV, uniform_M)
    if n_drafts:
        tokens_M[rows_D] = torch.where(kept_D, drafts_D, tokens_M[rows_D])
    sure = any(ask.params.adaptive for ask in asks)
    n_best = min(max(ask.params.top_logprobs for ask in asks), logits_MV.shape[1])
    columns += [tokens_M, *_figures(logits_MV, tokens_M, sure=sure, n_best=n_best)]

    told = iter(torch.cat([column.double().flatten() for column in columns]).tolist())  # the wait for the device
    kept = [*islice(told, n_drafts)]
    tokens, logprobs = ([*islice(told, n_rows)] for _ in range(2))
    if any(map(math.isnan, logprobs)):
        raise ValueError("the model's logits are not numbers: its weights are damaged, or too large for their type")
    sureness, entropies = ([*islice(told, n_rows * sure)] for _ in range(2))
    best, their_logprobs = ([*islice(told, n_rows * n_best)] for _ in range(2))

    def top(row: int, n: int) -> tuple[tuple[int, float], ...]:
        some = slice(row * n_best, row * n_best + min(n, n_best))
        return tuple(zip(map(int, best[some]), their_logprobs[some], strict=True))

    return [
        Choice(
            tokens=[int(token) for token in tokens[rows]],
            logprobs=logprobs[rows],
            kept=[keep == 1 for keep in kept[drafts]],
            sureness=sureness[rows] if ask.params.adaptive else [],
            entropies=entropies[rows] if ask.params.adaptive else [],
            tops=[top(row, n) for row in range(rows.start, rows.stop)] if (n := ask.params.top_logprobs) else [],
            probabilities=weights_MV[rows],
        )
        for ask, rows, drafts in zip(asks, rows_of, drafts_of, strict=True)
    ]


def _figures(logits_MV: Tensor, tokens_M: Tensor, *, sure: bool, n_best: int) -> list[Tensor]:
    """What is told of the predictions: the tokens' log-probabilities; if `sure` each row's largest probability, then
    its entropy; the `n_best` most probable tokens of each row, then their log-probabilities.
    """
    logprobs_MV = logits_MV.float().log_softmax(dim=1)
    figures = [logprobs_MV.gather(1, tokens_M[:, None])]
    if sure:
        figures += [logprobs_MV.amax(dim=1).exp(), -(logprobs_MV.exp() * logprobs_MV).sum(dim=1)]
    if n_best:
        best = logprobs_MV.topk(n_best, dim=1)
        figures += [best.indices, best.values]
    return figures


def _distributions(logits_MV: Tensor, asks: Sequence[Ask], rows_of: Sequence[slice]) -> Tensor:
    """(M, V) float64 probabilities; requests that are sampled alike are computed together."""
    if any(ask.params.logit_bias or ask.rows_without_stop for ask in asks):
        logits_MV = logits_MV.to(torch.float64, copy=True)  # a bias must not be rounded to the model's type
        for ask, rows in zip(asks, rows_of, strict=True):
            for token, bias in ask.params.logit_bias.items():
                logits_MV[rows, token] += bias
            for row in ask.rows_without_stop:
                logits_MV[rows.start + row, list(ask.params.stop_ids)] = -torch.inf
    alike: dict[tuple[float, int, float], list[int]] = {}
    for index, ask in enumerate(asks):
        alike.setdefault((ask.params.temperature, ask.params.top_k, ask.params.top_p), []).append(index)
    if len(alike) == 1:
        return distribution(logits_MV, asks[0].params)
    probabilities_MV = torch.empty_like(logits_MV, dtype=torch.float64)
    for some in alike.values():
        rows_S = torch.cat([torch.arange(rows_of[i].start, rows_of[i].stop) for i in some]).to(logits_MV.device)
        probabilities_MV[rows_S] = distribution(logits_MV[rows_S], asks[some[0]].params)
    return probabilities_MV


def _consecutive(lengths: Sequence[int]) -> list[slice]:
    """Slices of these lengths, one after the other."""
    ends = list(accumulate(lengths))
    return [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]
