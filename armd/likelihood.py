"""Likelihoods: exact under any order, in one parallel pass."""

import math

import torch
from torch import Tensor

from armd.model import ARMD
from armd.order import Order


@torch.no_grad()
def score(model: ARMD, tokens_BN: Tensor, order: Order) -> Tensor:
    """(B, N) nats in text order: log p(token at position p | tokens of earlier blocks), float32.

    Its sum over a row is the row's exact log-likelihood under `order` where every block is one token; with larger
    blocks it is the likelihood that parallel sampling has, tokens of a block being independent given the earlier ones.
    """
    order = order.to(tokens_BN.device)
    logits_BNV = model.head(model.hidden_by_rank(tokens_BN, order)).float()
    targets_BN = tokens_BN.gather(1, order.positions.expand(tokens_BN.shape))
    ranked_BN = logits_BNV.gather(2, targets_BN[..., None]).squeeze(2) - logits_BNV.logsumexp(dim=2)
    return ranked_BN.gather(1, order.ranks.expand(tokens_BN.shape))


def perplexity(nats: float, tokens: int) -> float:
    """exp of the mean negative log-likelihood a token."""
    return math.exp(nats / tokens)


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """Negative log-likelihood in bits, divided by the text's UTF-8 bytes: comparable between tokenizers."""
    return nats / math.log(2) / n_bytes
