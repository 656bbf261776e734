"""Prefix aggregation: the first query that knows the earlier blocks and nothing of its own token (section 2.1).

    G0[n] = sum over i with block(i) < block(n) of <P[n], P[i]> X[i]          (the paper's prefix aggregation)

where P[n] is the position table's row for the position at rank n. It is linear attention: written over chunks of ranks
its memory is linear in N, written as a recurrence it costs one rank-one update a token.

Shapes: B sequences (1 where an order is shared), N ranks, D model width, E width of the position table, K chunks of C
ranks, W ranks of a window, M ranks with padding.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

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
    # Padded by `reach` zeros, rank i stands at i + reach, where the windows begin at multiples of the chunk.
    p_BME, x_BMD = (F.pad(rows.float(), (0, 0, reach, tail)) for rows in (p_BNE, x_BND))
    p_BKCE = p_BME[:, reach:].unflatten(1, (n_chunks, chunk))

    p_steps, x_steps = (rows[:, : n_chunks * chunk].unflatten(1, (n_chunks, chunk)) for rows in (p_BME, x_BMD))
    sums_BKED = p_steps[:, :-1].mT @ x_steps[:, :-1]
    states_BKED = F.pad(sums_BKED, (0, 0, 0, 0, 1, 0)).cumsum(dim=1)  # what lies before each chunk's window

    p_BKEW, x_BKDW = (rows.unfold(1, reach + chunk, chunk) for rows in (p_BME, x_BMD))
    ranks_KW = torch.arange(-reach, n_chunks * chunk, device=x_BND.device).unfold(0, reach + chunk, chunk)
    starts_BKC = F.pad(block_starts_BN, (0, tail)).unflatten(1, (n_chunks, chunk))
    visible_BKCW = ranks_KW[:, None] < starts_BKC[..., None]
    weights_BKCW = (p_BKCE @ p_BKEW).masked_fill(~visible_BKCW, 0.0)
    g_BKCD = p_BKCE @ states_BKED + weights_BKCW @ x_BKDW.mT
    return g_BKCD.flatten(1, 2)[:, :length]


def sinusoids(max_length: int, width: int) -> Tensor:
    """(max_length, width) sines and cosines of the position, of unit norm a row: the start of the position table."""
    frequencies = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000.0) / width))
    angles = torch.arange(max_length)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1) / math.sqrt(width / 2)
