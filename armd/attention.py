"""One attention for both streams: rotary by position, a null key for the strict stream, masks by block.

Both masks say the same of a query: it sees its first so many keys, and `limits` is how many (docs/model.md, section 2).

* Causal, equation (2): rank n sees the keys of block(i) <= block(n); they end at the block's end, so the limit is
  `block_ends`.
* Strictly causal, equations (3) and (8): rank n sees the null key and the keys of block(i) < block(n). The strict
  stream's keys are shifted by one with the null key in front, so the limit is `block_starts + 1`. The key of the last
  rank falls off the end, and nobody misses it: no block comes after the last.

With one token a block both limits are n + 1, which is plain causal attention.

Shapes: B sequences (1 where an order is shared), H heads, N ranks, A width of a head, D model width.
"""

import functools
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from armd.products import Projection

Kernel = Literal["causal", "flex", "mask"]
"""How attention is computed: plain causal kernels without a mask, FlexAttention over a block mask, a boolean mask."""

Mask = Tensor | BlockMask | None
"""What a query sees, as its kernel wants it; None is plain causal attention."""


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


def choose_kernel(*, one_by_one: bool, head_width: int, device: torch.device) -> Kernel:
    """The kernel that attention runs on; everything that it depends on is known without asking the device.

    | kernel | where                                                                                     |
    | ------ | ----------------------------------------------------------------------------------------- |
    | causal | one token a block                                                                         |
    | flex   | larger blocks on CUDA                                                                     |
    | mask   | larger blocks elsewhere, where FlexAttention has no backward pass, and on CUDA with heads |
    |        | narrower than 16, which its kernels refuse                                                |
    """
    if one_by_one:
        return "causal"
    return "flex" if device.type == "cuda" and head_width >= 16 else "mask"


def build_mask(limits_BN: Tensor, kernel: Kernel) -> Mask:
    """The mask under which the query at rank n sees the keys `i < limits[n]`, for any `kernel` but "causal".

    A mask of B = 1 serves the whole batch.
    """
    assert kernel != "causal", "plain causal kernels need no mask"
    return boolean_mask(limits_BN) if kernel == "mask" else block_mask(limits_BN)


def boolean_mask(limits_BN: Tensor) -> Tensor:
    """(B, 1, N, N) bool: `i < limits[n]`."""
    keys = torch.arange(limits_BN.shape[-1], device=limits_BN.device)
    return (keys < limits_BN[..., None])[:, None]


def block_mask(limits_BN: Tensor) -> BlockMask:
    """`i < limits[n]` for FlexAttention, which skips the tiles that no query sees."""
    batch, length = limits_BN.shape
    shared_N = limits_BN[0]

    def sees_by_sequence(b: Tensor, h: Tensor, n: Tensor, i: Tensor) -> Tensor:
        return i < limits_BN[b, n]

    def sees(b: Tensor, h: Tensor, n: Tensor, i: Tensor) -> Tensor:  # b counts the batch's sequences, shared or not
        return i < shared_N[n]

    predicate = sees if batch == 1 else sees_by_sequence
    return create_block_mask(predicate, batch, None, length, length, device=limits_BN.device)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
    """Softmax attention (B, H, N, A) over the keys that `mask` lets each query see."""
    if isinstance(mask, BlockMask):
        # Uncompiled, it holds all N x N scores; on a CPU only tests come here, and compilation would cost them more.
        if q.device.type == "cpu" or torch.compiler.is_compiling():
            return flex_attention(q, k, v, block_mask=mask)
        return _compiled_flex_attention()(q, k, v, block_mask=mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


def joined(heads_BHNA: Tensor) -> Tensor:
    """(B, N, D): the heads of a row side by side."""
    return heads_BHNA.transpose(1, 2).flatten(2)


@functools.cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    """One for the process. `fullgraph` makes too many recompilations an error, where they would go on uncompiled."""
    return torch.compile(flex_attention, fullgraph=True)


class Attention(nn.Module):
    """Multi-head attention whose queries may come from another stream than its keys and values.

    Queries, keys and values are projected apart, because the two streams need them apart: content rows of the last
    two-stream layer have keys and values only, query rows have queries only.
    """

    def __init__(self, d_model: int, n_heads: int, *, null_key: bool) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.query = Projection(d_model, d_model)
        self.key_value = Projection(d_model, 2 * d_model)
        self.out = Projection(d_model, d_model)
        # What a strict query attends to where nothing comes before it: (key, value), (2, H, 1, A).
        self.null = nn.Parameter(torch.empty(2, n_heads, 1, d_model // n_heads)) if null_key else None

    def queries(self, x: Tensor, rotary: Tensor) -> Tensor:
        """(..., H, N, A): rotated queries of the rows of `x` (..., N, D); `rotary` is (B or 1, 1, N, A)."""
        return rotate(self._heads(self.query(x)), rotary)

    def keys_values(self, x_BND: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated keys and values of the rows of `x`, (B, H, N, A) each."""
        key, value = self.key_value(x_BND).chunk(2, dim=-1)
        return rotate(self._heads(key), rotary), self._heads(value)

    def causal(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
        """(B, N, D), all heads: rank n sees block(i) <= block(n). No `mask` says one token a block."""
        return joined(attend(q, k, v, mask))

    def strict(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
        """(B, N, D), all heads: rank n sees the null key and block(i) < block(n). No `mask` says one token a block.

        The keys are shifted by one, the null key in front; `mask` is over the shifted keys.
        """
        null_key, null_value = self.null_keys_values(k)
        k, v = torch.cat([null_key, k[:, :, :-1]], dim=2), torch.cat([null_value, v[:, :, :-1]], dim=2)
        return joined(attend(q, k, v, mask))

    def null_keys_values(self, like_BHNA: Tensor) -> tuple[Tensor, Tensor]:
        """The null key and value, (B, H, 1, A) each, in the type of `like`."""
        assert self.null is not None, "only two-stream layers have a null key"
        null = self.null.to(like_BHNA.dtype)
        shape = (like_BHNA.shape[0], -1, -1, -1)
        return null[0].expand(shape), null[1].expand(shape)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_heads, -1)).transpose(-3, -2)
