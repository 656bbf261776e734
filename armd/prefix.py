"""The first query, which knows the earlier blocks and nothing of its own token: prefix aggregation and neighbours.

    G0[n] = sum over i with block(i) < block(n) of <P[n], P[i]> X[i]          (equation 4 of docs/model.md)

where P[n] is the position table's row for the position at rank n. It is linear attention: written over chunks of ranks,
equation (5), its memory is linear in N; written as a recurrence it costs one rank-one update a token. A sum over all
that is known hardly says which token stands next door; `neighbours` does (equation 5a).

Shapes: B sequences (1 where an order is shared), N ranks, D model width, E width of the position table, K chunks of C
ranks, W ranks of a window, O offsets from a position.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from armd.order import Order

CHUNK = 128


def aggregate(p_BNE: Tensor, x_BND: Tensor, block_starts_BN: Tensor, largest_block: int, chunk: int = CHUNK) -> Tensor:
    """G0 (B, N, D) for all ranks at once, in float32; memory is linear in N for blocks up to the chunk.

    `p_BNE` may have B = 1 for an order shared by the batch, as may `block_starts_BN`, the number of ranks in earlier
    blocks. A block may begin before the chunk of its rank, by `reach` ranks at most. So a chunk's window is its own
    ranks and the `reach` before them, where each rank sees what its block allows; every rank before the window is seen
    by the whole chunk, through the running state.
    """
    length, reach = x_BND.shape[1], largest_block - 1
    chunk = min(max(chunk, largest_block), length)
    n_chunks = math.ceil(length / chunk)
    tail = n_chunks * chunk - length
    p_BKCE, x_BKCD = (_chunks(rows.float(), n_chunks, chunk) for rows in (p_BNE, x_BND))
    p_BKWE, x_BKWD = (_windows(rows, reach) for rows in (p_BKCE, x_BKCD))

    # A window's first C ranks are those between its beginning and the next one's.
    sums_BKED = p_BKWE[:, :-1, :chunk].mT @ x_BKWD[:, :-1, :chunk]
    states_BKED = F.pad(sums_BKED, (0, 0, 0, 0, 1, 0)).cumsum(dim=1)  # what lies before each chunk's window

    offsets_W = torch.arange(-reach, chunk, device=x_BND.device)
    ranks_KW = chunk * torch.arange(n_chunks, device=x_BND.device)[:, None] + offsets_W
    starts_BKC = F.pad(block_starts_BN, (0, tail)).unflatten(1, (n_chunks, chunk))
    visible_BKCW = ranks_KW[:, None] < starts_BKC[..., None]
    weights_BKCW = (p_BKCE @ p_BKWE.mT).masked_fill(~visible_BKCW, 0.0)
    g_BKCD = p_BKCE @ states_BKED + weights_BKCW @ x_BKWD
    return g_BKCD.flatten(1, 2)[:, :length]


def neighbours(x_BND: Tensor, order: Order, offsets: Sequence[int]) -> Tensor:
    """(B, N, O, D): for each rank, the rows of `x_BND`, ranked, at `offsets` from its position.

    Zeros where nothing is known there: the text ends before, or the position is in no earlier block.
    """
    length = x_BND.shape[1]
    positions_BN, ranks_BN, starts_BN = (
        one.reshape(-1, length) for one in (order.positions, order.ranks, order.block_starts)
    )
    at_BNO = torch.stack([positions_BN + offset for offset in offsets], dim=-1)  # a tensor of them would be a copy
    inside_BNO = (at_BNO >= 0) & (at_BNO < length)
    ranks_BNO = ranks_BN.gather(1, at_BNO.clamp(0, length - 1).flatten(1)).view(at_BNO.shape)
    known_BNO = inside_BNO & (ranks_BNO < starts_BN[..., None])
    rows_MD = x_BND.flatten(0, 1)
    firsts_B11 = torch.arange(0, len(rows_MD), length, device=x_BND.device)[:, None, None]
    # What is not known reads a row of zeros behind the last one. `gather` would keep the rows for the backward pass.
    places_BNO = (firsts_B11 + ranks_BNO).masked_fill(~known_BNO, len(rows_MD))
    return F.embedding(places_BNO, F.pad(rows_MD, (0, 0, 0, 1)))


def _chunks(rows_BN_: Tensor, n_chunks: int, chunk: int) -> Tensor:
    """(B, K, C, ...) from rows (B, N, ...), the last chunk filled up with zeros."""
    tail = n_chunks * chunk - rows_BN_.shape[1]
    return F.pad(rows_BN_, (0, 0, 0, tail)).unflatten(1, (n_chunks, chunk))


def _windows(rows_BKC_: Tensor, reach: int) -> Tensor:
    """(B, K, W, ...): each chunk with the last `reach` ranks before it, zeros before the first.

    Not by `unfold`: what torch 2.13's compiler makes of its backward pass on CPUs with AVX-512 writes out of bounds.
    """
    if reach == 0:
        return rows_BKC_
    before = F.pad(rows_BKC_, (0, 0, 0, 0, 1, 0))[:, :-1, -reach:]
    return torch.cat([before, rows_BKC_], dim=2)


def sinusoids(max_length: int, width: int) -> Tensor:
    """(max_length, width) sines and cosines of the position, of unit norm a row: the start of the position table."""
    frequencies = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000.0) / width))
    angles = torch.arange(max_length)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1) / math.sqrt(width / 2)
