"""One attention for both streams: rotary by position, a null key for the strict stream, masks by block.

Shapes: B sequences, H heads, N ranks, A width of a head, D model width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rotary_angles(positions: Tensor, head_width: int, base: float = 10_000.0) -> Tensor:
    """Cosines, then sines, (..., head_width) float32, of the angles of `positions` (...).

    Computed where they are used: a table kept as a buffer would be rounded when a trainer turns the model to bfloat16.
    """
    exponents = torch.arange(0, head_width, 2, device=positions.device, dtype=torch.float32) / head_width
    angles = positions[..., None].float() * base**-exponents
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotary embedding of `x` (..., A) by the cosines and sines (..., A) of its rows' positions."""
    cosine, sine = rotary.chunk(2, dim=-1)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1).to(x.dtype)


def causal_mask(block_ends_BN: Tensor) -> Tensor:
    """(B, 1, N, N) bool: the key at rank i is visible at rank n when block(i) <= block(n)  (the paper's Mc)."""
    ranks = torch.arange(block_ends_BN.shape[-1], device=block_ends_BN.device)
    return (ranks < block_ends_BN[..., None])[:, None]


def strict_mask(block_starts_BN: Tensor) -> Tensor:
    """(B, 1, N, 1 + N) bool: the null key always, the key at rank i when block(i) < block(n)  (the paper's Ms)."""
    ranks = torch.arange(-1, block_starts_BN.shape[-1], device=block_starts_BN.device)
    return (ranks < block_starts_BN[..., None])[:, None]


class Attention(nn.Module):
    """Multi-head attention whose queries may come from another stream than its keys and values.

    Queries, keys and values are projected apart, because the two streams need them apart: content rows of the last
    two-stream layer have keys and values only, query rows have queries only.
    """

    def __init__(self, d_model: int, n_heads: int, *, null_key: bool) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.query = nn.Linear(d_model, d_model, bias=False)
        self.key_value = nn.Linear(d_model, 2 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        # What a strict query attends to where nothing comes before it: (key, value), (2, H, 1, A).
        self.null = nn.Parameter(torch.empty(2, n_heads, 1, d_model // n_heads)) if null_key else None

    def queries(self, x_BND: Tensor, rotary: Tensor) -> Tensor:
        """(B, H, N, A): rotated queries of the rows of `x`; `rotary` is (B or 1, 1, N, A)."""
        return rotate(self._heads(self.query(x_BND)), rotary)

    def keys_values(self, x_BND: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated keys and values of the rows of `x`, (B, H, N, A) each."""
        key, value = self.key_value(x_BND).chunk(2, dim=-1)
        return rotate(self._heads(key), rotary), self._heads(value)

    def merge(self, heads_BHNA: Tensor) -> Tensor:
        """(B, N, D): the heads joined and projected out."""
        return self.out(heads_BHNA.transpose(1, 2).flatten(2))

    def causal(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Rank n sees block(i) <= block(n). `mask` None says one token a block, where plain causal attention serves."""
        return self.merge(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None))

    def strict(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Rank n sees the null key and block(i) < block(n).

        With one token a block (`mask` None) the keys are shifted by one, the null key in front, and plain causal
        attention is exactly this (section 2.3); else the null key stands before all and `mask` says the rest.
        """
        null_key, null_value = self.null_keys_values(k)
        if mask is None:
            k, v = k[:, :, :-1], v[:, :, :-1]
        k, v = torch.cat([null_key, k], dim=2), torch.cat([null_value, v], dim=2)
        return self.causal(q, k, v, mask)

    def null_keys_values(self, like_BHNA: Tensor) -> tuple[Tensor, Tensor]:
        """The null key and value, (B, H, 1, A) each, in the type of `like`."""
        assert self.null is not None, "only two-stream layers have a null key"
        null = self.null.to(like_BHNA.dtype)
        shape = (like_BHNA.shape[0], -1, -1, -1)
        return null[0].expand(shape), null[1].expand(shape)

    def _heads(self, x_BND: Tensor) -> Tensor:
        return x_BND.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
