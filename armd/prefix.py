"""Prefix aggregation: the first query that knows the earlier blocks and nothing of its own token (section 2.1).

    G0[n] = sum over i with block(i) < block(n) of <P[n], P[i]> X[i]          (the paper's prefix aggregation)

where P[n] is the position table's row for the position at rank n. It is linear attention: written over chunks of ranks
its memory is linear in N, written as a recurrence it costs one rank-one update a token.

Shapes: B sequences (1 where an order is shared), N ranks, D model width, E width of the position table, C chunk.
"""

import math

import torch
from torch import Tensor

CHUNK = 128


def aggregate(p_BNE: Tensor, x_BND: Tensor, block_starts_BN: Tensor, largest_block: int, chunk: int = CHUNK) -> Tensor:
    """G0 (B, N, D) for all ranks at once, in float32.

    `p_BNE` may have B = 1 for an order shared by the batch, as may `block_starts_BN`, the number of ranks in earlier
    blocks. Ranks are cut into chunks no smaller than the largest block, so that the earlier blocks of a rank reach
    back at least to the chunk before its own: what lies before that chunk comes from the running state, the rest from a
    product within two chunks.
    """
    length = x_BND.shape[1]
    chunk = min(max(chunk, largest_block), length)
    pad = -length % chunk
    p_BNE, x_BND = p_BNE.float(), x_BND.float()
    if pad:
        p_BNE = torch.nn.functional.pad(p_BNE, (0, 0, 0, pad))
        x_BND = torch.nn.functional.pad(x_BND, (0, 0, 0, pad))
        block_starts_BN = torch.nn.functional.pad(block_starts_BN, (0, pad))
    n_chunks = x_BND.shape[1] // chunk
    p_BKCE = p_BNE.unflatten(1, (n_chunks, chunk))
    x_BKCD = x_BND.unflatten(1, (n_chunks, chunk))

    sums_BKED = torch.einsum("bkce,bkcd->bked", p_BKCE.expand(x_BND.shape[0], -1, -1, -1), x_BKCD)
    # The state before the chunk before: chunk k starts from the sum over chunks 0 .. k-2.
    states_BKED = _shift(sums_BKED.cumsum(dim=1), 2)
    g_BKCD = p_BKCE @ states_BKED

    p_window = torch.cat([_shift(p_BKCE, 1), p_BKCE], dim=2)
    x_window = torch.cat([_shift(x_BKCD, 1), x_BKCD], dim=2)
    first = chunk * torch.arange(-1, n_chunks - 1, device=x_BND.device)
    key_ranks_KW = first[:, None] + torch.arange(2 * chunk, device=x_BND.device)
    visible = key_ranks_KW[None, :, None, :] < block_starts_BN.unflatten(1, (n_chunks, chunk))[..., None]
    weights = (p_BKCE @ p_window.mT).masked_fill(~visible, 0.0)
    g_BKCD = g_BKCD + weights @ x_window
    return g_BKCD.flatten(1, 2)[:, :length]


def sinusoids(max_length: int, width: int) -> Tensor:
    """(max_length, width) sines and cosines of the position, of unit norm a row: the start of the position table."""
    frequencies = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000.0) / width))
    angles = torch.arange(max_length)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1) / math.sqrt(width / 2)


def _shift(chunks: Tensor, by: int) -> Tensor:
    """Chunk k becomes what chunk k - `by` was; zeros come in at the front."""
    moved = torch.zeros_like(chunks)
    moved[:, by:] = chunks[:, :-by] if chunks.shape[1] > by else chunks[:, :0]
    return moved
