"""Likelihoods: exact under any order in one parallel pass, and bounds over random orders.

An order drawn uniformly for each sequence makes the model a mixture over orders, p(x) = E[p(x | order)]. With K orders
the mean of log p(x | order) is an estimate of a lower bound on log p(x), and the log of the mean of p(x | order) of a
tighter one, which rises towards log p(x) with K (Burda et al., arXiv 1509.00519): equations (11) and (12) of
docs/model.md.

Shapes: B sequences, N tokens, V words, K orders.
"""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from armd.model import ARMD
from armd.order import Order
from armd.randomness import seeded


@torch.no_grad()
def score(model: ARMD, tokens_BN: Tensor, order: Order) -> Tensor:
    """(B, N) nats in text order: log p(token at position p | tokens of earlier blocks), float32.

    Its sum over a row is the row's exact log-likelihood under `order` where every block is one token; with larger
    blocks it is the likelihood that parallel sampling has, tokens of a block being independent given the earlier ones.

    Raises:
        ValueError: naming the value: tokens that are not int64, not in the vocabulary, or not as many as the order has;
            more of them than the model's max_length; another number of orders than of sequences.
    """
    _check_ids(tokens_BN, model.config.vocab_size)
    order = order.to(tokens_BN.device)
    logits_BNV = model.head(model.hidden_by_rank(tokens_BN, order)).float()
    targets_BN = tokens_BN.gather(1, order.positions.expand(tokens_BN.shape))
    ranked_BN = logits_BNV.gather(2, targets_BN[..., None]).squeeze(2) - logits_BNV.logsumexp(dim=2)
    return ranked_BN.gather(1, order.ranks.expand(tokens_BN.shape))


def score_orders(model: ARMD, tokens_BN: Tensor, orders: Iterable[Order]) -> Tensor:
    """(B, K) nats, log p(sequence | order k), float64: `score` summed over positions, one order in memory at a time.

    Raises:
        ValueError: as `score`; or there are no orders.
    """
    columns = [score(model, tokens_BN, order).double().sum(dim=1) for order in orders]
    if not columns:
        raise ValueError("score_orders needs at least one order")
    return torch.stack(columns, dim=1)


def score_random_orders(model: ARMD, tokens_BN: Tensor, n_orders: int, *, seed: int = 0, first_row: int = 0) -> Tensor:
    """(B, K) nats under `n_orders` random orders of its own for each sequence, float64.

    Its mean over K and `importance_weighted` are the two bounds. `first_row` is the place of the batch's first sequence
    among all that are scored: with it the orders depend on the seed and the sequence's place alone, not on how the
    sequences are batched, and more orders begin with the same ones.

    Raises:
        ValueError: as `score`; or `n_orders` is less than 1.
    """
    if n_orders < 1:
        raise ValueError(f"n_orders must be at least 1, not {n_orders}")
    return score_orders(model, tokens_BN, _random_orders(tokens_BN, n_orders, seed, first_row))


def importance_weighted(logp_BK: Tensor) -> Tensor:
    """(B,) nats: log of the mean likelihood over K orders, from (B, K) log-likelihoods; at least their mean."""
    return logp_BK.logsumexp(dim=1) - math.log(logp_BK.shape[1])


def perplexity(nats: float, tokens: int) -> float:
    """exp of the mean negative log-likelihood a token."""
    return math.exp(nats / tokens)


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """Negative log-likelihood in bits, divided by the text's UTF-8 bytes: comparable between tokenizers."""
    return nats / math.log(2) / n_bytes


def _random_orders(tokens_BN: Tensor, n_orders: int, seed: int, first_row: int) -> Iterator[Order]:
    n_rows, length = tokens_BN.shape
    rows = range(first_row, first_row + n_rows)
    for k in range(n_orders):
        yield Order.stack([Order.random(length, generator=seeded("any order", seed, row, k)) for row in rows])


def _check_ids(tokens_BN: Tensor, vocab_size: int) -> None:
    if tokens_BN.dtype != torch.int64:
        raise ValueError(f"tokens must be int64, not {tokens_BN.dtype}")
    if tokens_BN.numel():
        least, greatest = (int(limit) for limit in tokens_BN.aminmax())
        if least < 0 or greatest >= vocab_size:
            bad = least if least < 0 else greatest
            raise ValueError(f"token {bad} is not in the vocabulary, whose ids run from 0 to {vocab_size - 1}")
