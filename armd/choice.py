"""The draws of a step: the rows of all requests together, one transfer to the host.

Every request's uniform numbers come from its own generator, as many as its own rows need, and every row is computed by
itself: what a request draws does not depend on its neighbours.

Shapes: M rows that want a draw, R rows of a part, D drafts among them, V words.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import NamedTuple

import torch
from torch import Tensor

from armd.sampling import SamplingParams, distribution, draw, parts, verify


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
    probabilities: Tensor | None
    """(n_rows - drafts, V) float64: what the tokens of rows without a draft were drawn from; None in parallel mode."""


class _Piece(NamedTuple):
    """Rows of one request in a part."""

    ask: Ask
    numbers: Tensor
    """The request's uniform numbers: a row each, then a draft each."""
    rows: range
    """Of the request's."""
    at: int
    """Of the part's: the first of them."""

    @property
    def drafts(self) -> range:
        """The first of the rows, which have drafts."""
        return range(self.rows.start, min(self.rows.stop, len(self.ask.drafts)))


def choose(logits_MV: Tensor, asks: Sequence[Ask]) -> list[Choice]:
    """Draw for every request, whose rows follow one another in the order of `asks`.

    Raises:
        ValueError: a row's logits are not numbers.
    """
    device, (n_rows, n_words) = logits_MV.device, logits_MV.shape
    rows_of = _consecutive([ask.n_rows for ask in asks])
    drafts_of = _consecutive([len(ask.drafts) for ask in asks])
    numbers = [torch.rand(ask.n_rows + len(ask.drafts), dtype=torch.float64, generator=ask.generator) for ask in asks]
    placed = torch.cat(numbers).to(device).split([len(own) for own in numbers])
    sure = any(ask.params.adaptive for ask in asks)
    n_best = min(max(ask.params.top_logprobs for ask in asks), n_words)
    told_of_parts, probabilities = [], [list[Tensor]() for _ in asks]
    for part in parts(logits_MV):
        pieces = {
            index: _Piece(ask, own, range(first - rows.start, last - rows.start), first - part.start)
            for index, (ask, own, rows) in enumerate(zip(asks, placed, rows_of, strict=True))
            if (first := max(rows.start, part.start)) < (last := min(rows.stop, part.stop))
        }
        told, weights_RV = _draw(logits_MV[part], list(pieces.values()), sure=sure, n_best=n_best)
        told_of_parts.append(told)
        for index, piece in pieces.items():
            if piece.ask.params.mode == "exact":
                probabilities[index].append(weights_RV[piece.at + len(piece.drafts) : piece.at + len(piece.rows)])
    columns = [column.double().flatten() for of_all in zip(*told_of_parts, strict=True) for column in of_all]

    values = iter(torch.cat(columns).tolist())  # the wait for the device
    kept = [*islice(values, drafts_of[-1].stop)]
    tokens, logprobs = ([*islice(values, n_rows)] for _ in range(2))
    if any(map(math.isnan, logprobs)):
        raise ValueError("the model's logits are not numbers: its weights are damaged, or too large for their type")
    sureness, entropies = ([*islice(values, n_rows * sure)] for _ in range(2))
    best, their_logprobs = ([*islice(values, n_rows * n_best)] for _ in range(2))

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
            probabilities=torch.cat(weights) if weights else None,
        )
        for ask, rows, drafts, weights in zip(asks, rows_of, drafts_of, probabilities, strict=True)
    ]


def _draw(logits_RV: Tensor, pieces: Sequence[_Piece], *, sure: bool, n_best: int) -> tuple[list[Tensor], Tensor]:
    """What is told of a part, a tensor a kind: which drafts stand, the tokens, their figures; and the weights (R, V)
    float64 that the tokens were drawn from.
    """
    device = logits_RV.device
    weights_RV = _distributions(logits_RV, pieces)
    rows_D = torch.tensor([piece.at + k for piece in pieces for k in range(len(piece.drafts))], device=device)
    kept_D = rows_D.bool()
    if len(rows_D):
        drafts_D = torch.tensor([piece.ask.drafts[row] for piece in pieces for row in piece.drafts], device=device)
        drafted = [(piece.ask.draft_probabilities, piece.drafts) for piece in pieces]
        drawn_from_DV = torch.cat([each[rows.start : rows.stop] for each, rows in drafted if each is not None and rows])
        of_drafts = ((piece.numbers[piece.ask.n_rows :], piece.drafts) for piece in pieces)
        uniform_D = torch.cat([numbers[rows.start : rows.stop] for numbers, rows in of_drafts if rows])
        kept_D = verify(weights_RV, rows_D, drawn_from_DV, drafts_D, uniform_D)
    tokens_R = draw(weights_RV, torch.cat([piece.numbers[piece.rows.start : piece.rows.stop] for piece in pieces]))
    if len(rows_D):
        tokens_R[rows_D] = torch.where(kept_D, drafts_D, tokens_R[rows_D])
    return [kept_D, tokens_R, *_figures(logits_RV, tokens_R, sure=sure, n_best=n_best)], weights_RV


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


def _distributions(logits_RV: Tensor, pieces: Sequence[_Piece]) -> Tensor:
    """(R, V) float64 probabilities; requests that are sampled alike are computed together."""
    if any(piece.ask.params.logit_bias or piece.ask.rows_without_stop for piece in pieces):
        logits_RV = logits_RV.to(torch.float64, copy=True)  # a bias must not be rounded to the model's type
        for ask, _, rows, at in pieces:
            for token, bias in ask.params.logit_bias.items():
                logits_RV[at : at + len(rows), token] += bias
            for row in set(rows).intersection(ask.rows_without_stop):
                logits_RV[at + row - rows.start, list(ask.params.stop_ids)] = -torch.inf
    alike: dict[tuple[float, int, float], list[_Piece]] = {}
    for piece in pieces:
        params = piece.ask.params
        alike.setdefault((params.temperature, params.top_k, params.top_p), []).append(piece)
    if len(alike) == 1:
        return distribution(logits_RV, pieces[0].ask.params)
    probabilities_RV = torch.empty_like(logits_RV, dtype=torch.float64)
    for some in alike.values():
        rows_S = torch.cat([torch.arange(piece.at, piece.at + len(piece.rows)) for piece in some]).to(logits_RV.device)
        probabilities_RV[rows_S] = distribution(logits_RV[rows_S], some[0].ask.params)
    return probabilities_RV


def _consecutive(lengths: Sequence[int]) -> list[slice]:
    """Slices of these lengths, one after the other."""
    ends = list(accumulate(lengths))
    return [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]
