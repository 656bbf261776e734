"""One layer over rows of many texts, its keys and values in a cache.

The same function as layers.Layer, with fewer operations: a step of few rows spends more time on calling modules and on
small kernels than on arithmetic. So weights are used as they are stored, without their modules, and queries and keys
are rotated together. Tests hold the two against each other.

Shapes: M rows, B texts of a run, R rows of each, K keys, H heads, A head width, D model width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armd.attention import rotary_angles
from armd.layers import Layer
from armd.products import product
from armd.rows import Seen


class RowNorm:
    """An RMSNorm of rows (M, D).

    In float32 on a CPU it takes four operations, where PyTorch's takes seven: half of the time where rows are few.
    """

    def __init__(self, norm: nn.RMSNorm) -> None:
        assert norm.eps is not None, "left out, it would depend on the type"
        self._weight, self._eps = norm.weight, norm.eps
        width = norm.weight.numel()
        self._scaled = norm.weight * width**0.5
        self._least = norm.weight.new_tensor((width * norm.eps) ** 0.5)

    def __call__(self, rows_MD: Tensor) -> Tensor:
        """(M, D)."""
        if rows_MD.dtype == torch.float32 and rows_MD.device.type == "cpu":
            length_M1 = torch.linalg.vector_norm(rows_MD, dim=1, keepdim=True).hypot_(self._least)
            return (rows_MD * self._scaled).div_(length_M1)
        return torch.rms_norm(rows_MD, self._weight.shape, self._weight, self._eps)


class CachedLayer:
    """A layer and its storage (2, slots, ranks, H, A) for keys and values.

    `normed(rows)` is what queries, keys and values are projected from.
    """

    def __init__(self, layer: Layer, storage: Tensor) -> None:
        attention = layer.attention
        self.normed = RowNorm(layer.attention_norm)
        self._mlp_norm = RowNorm(layer.mlp_norm)
        linears = (attention.query, attention.key_value, attention.out, layer.mlp_in, layer.mlp_out)
        self._query, self._key_value, self._out, self._mlp_in, self._mlp_out = (one.weight for one in linears)
        self._head_shape = storage.shape[-2:]
        self._keys, self._values = storage.flatten(1, 2)  # to write: (slots * ranks, H, A)
        self._keys_by_head, self._values_by_head = storage.transpose(2, 3)  # to read: (slots, H, ranks, A)

    def project(self, content_MD: Tensor, query_MD: Tensor, rotary_M: Tensor, places_M: Tensor) -> Tensor:
        """Queries (M, H, A) of some normed rows; the keys and values of others are written at their places.

        `rotary_M` are `rotary_rows` of the content's positions, then of the queries'.
        """
        n_content = len(content_MD)
        k_MD, v_MD = product(content_MD, self._key_value).chunk(2, dim=1)
        x_MHA = torch.cat([k_MD, product(query_MD, self._query)]).view(-1, *self._head_shape)
        cosines, sines = rotary_M.unbind(1)
        dtype = x_MHA.dtype
        x_MHA = x_MHA.float()
        x_MHA = torch.addcmul(x_MHA * cosines, x_MHA.roll(x_MHA.shape[2] // 2, 2), sines).to(dtype)
        self._keys.index_copy_(0, places_M, x_MHA[:n_content])
        self._values.index_copy_(0, places_M, v_MD.unflatten(1, self._head_shape))
        return x_MHA[n_content:]

    def attend(self, q_MHA: Tensor, runs: Sequence[tuple[slice, slice, Seen]]) -> Tensor:
        """(M, D): the attention of all rows, each over its own text's keys; `runs` are slots, rows, what they see."""
        heads = []
        for slots, rows, seen in runs:
            k_BHKA, v_BHKA = self._keys_by_head[slots, :, seen.keys], self._values_by_head[slots, :, seen.keys]
            q_BHRA = q_MHA[rows].view(len(k_BHKA), -1, *self._head_shape).transpose(1, 2)
            heads_BHRA = F.scaled_dot_product_attention(q_BHRA, k_BHKA, v_BHKA, attn_mask=seen.mask)
            heads.append(heads_BHRA.transpose(1, 2).reshape(-1, self._query.shape[1]))
        return heads[0] if len(heads) == 1 else torch.cat(heads)

    def finish(self, rows_MD: Tensor, heads_MD: Tensor) -> Tensor:
        """The rows after the layer, from what they attended to."""
        rows_MD = product(heads_MD, self._out, rows_MD)
        return product(F.gelu(product(self._mlp_norm(rows_MD), self._mlp_in)), self._mlp_out, rows_MD)


def rotary_rows(positions_M: Tensor, head_width: int) -> Tensor:
    """(M, 2, 1, A): cosines of the rows' angles, and sines with the sign of the half that they meet."""
    cosines, sines = rotary_angles(positions_M, head_width)[:, None].chunk(2, dim=-1)
    return torch.stack([torch.cat([cosines, cosines], -1), torch.cat([-sines, sines], -1)], dim=1)
