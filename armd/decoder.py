"""One decoding step on tensors: content rows of the tokens just chosen, query rows of the positions to fill.

A step is one forward pass over the rows of all texts, gathered into one batch of rows (section 5): X rows enter the
caches of the two-stream layers, G rows pass through all layers, and each weight is read once. Ranks make every mask an
interval of keys: with tokens cached by rank, "earlier blocks" are the keys before the block's first rank, and "up to
this block" those before its last.

Shapes: M rows of all texts, B texts, R rows of the longest, H heads, A head width, D model width, E prefix width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from armd.attention import rotary_angles
from armd.cache import Cache, rows_of
from armd.layers import Layer
from armd.model import ARMD


@dataclass
class Work:
    """What one text brings to a step. Lists go by row; rows of one kind have consecutive ranks."""

    slot: int
    """The text's place in the cache."""
    tokens: list[int]
    """Content rows: tokens chosen since the last step."""
    token_positions: list[int]
    """Their positions in the text."""
    token_rank: int
    """Rank of the first of them."""
    token_ends: list[int]
    """One past the last rank of each one's block."""
    positions: list[int]
    """Query rows: positions whose query streams are to be computed, those to be filled last."""
    rank: int
    """Rank of the first of them."""
    starts: list[int]
    """First rank of each one's block."""
    ends: list[int]
    """One past the last rank of each one's block."""
    n_fill: int
    """How many of the last query rows want logits."""


class Rows:
    """Where the rows of one kind belong: text, place among its rows, rank, position, visible keys."""

    def __init__(self, counts: Sequence[int], ranks: Sequence[int], device: torch.device) -> None:
        texts = [b for b, count in enumerate(counts) for _ in range(count)]
        places = [r for count in counts for r in range(count)]
        self.texts = torch.tensor(texts, dtype=torch.long, device=device)
        self.places = torch.tensor(places, dtype=torch.long, device=device)
        ranks_M = [ranks[b] + r for b, r in zip(texts, places, strict=True)]
        self.ranks = torch.tensor(ranks_M, dtype=torch.long, device=device)
        self.shape = (len(counts), max(counts))

    def pad(self, rows_M: Tensor, fill: float = 0) -> Tensor:
        """(B, R, ...) from (M, ...)."""
        padded = rows_M.new_full((*self.shape, *rows_M.shape[1:]), fill)
        padded[self.texts, self.places] = rows_M
        return padded

    def unpad(self, padded_BR: Tensor) -> Tensor:
        """(M, ...) from (B, R, ...)."""
        return padded_BR[self.texts, self.places]


class Decoder:
    """A model, its cache, and the step that advances some of the cache's texts."""

    def __init__(self, model: ARMD, n_slots: int) -> None:
        self.model = model
        self.cache = Cache(model, n_slots)
        self.head_width = model.config.d_model // model.config.n_heads

    @torch.inference_mode()
    def step(self, work: Sequence[Work]) -> Tensor:
        """Append the content rows, compute the query rows; logits (sum of n_fill, V), texts one after the other."""
        device = self.model.embedding.weight.device
        slots = [w.slot for w in work]
        content = Rows([len(w.tokens) for w in work], [w.token_rank for w in work], device)
        query = Rows([len(w.positions) for w in work], [w.rank for w in work], device)
        tokens_M = _flat([w.tokens for w in work], device)
        positions_M = _flat([w.token_positions for w in work], device)
        fills_M = _flat([w.positions for w in work], device)
        ends_M = _flat([w.token_ends for w in work], device)
        query_starts_M = _flat([w.starts for w in work], device)
        query_ends_M = _flat([w.ends for w in work], device)
        n_known = max(w.token_rank + len(w.tokens) for w in work)
        n_queried = max(w.rank + len(w.positions) for w in work)

        x_MD = self.model.embedding(tokens_M)
        g_MD = self._first_query(x_MD, positions_M, fills_M, content, query, query_starts_M, slots)
        rotary_x = rotary_angles(positions_M, self.head_width)
        rotary_g = rotary_angles(fills_M, self.head_width)

        # Keys as intervals [first, last): index 0 is the null key, rank i stands at index 1 + i.
        mask_x = _interval(content, torch.ones_like(ends_M), 1 + ends_M, 1 + n_known)
        mask_g = _interval(query, torch.zeros_like(query_starts_M), 1 + query_starts_M, 1 + n_known)
        n_layers = len(self.model.two_stream_layers)
        for depth, layer in enumerate(self.model.two_stream_layers):
            storage = self.cache.content[depth]
            k, v = layer.keys_values(x_MD[None], rotary_x)
            self._append(storage, k, v, content, slots, 1)
            keys, values = (rows_of(part, slots, 1 + n_known) for part in storage)
            if depth + 1 < n_layers:  # the last two-stream layer needs keys and values alone from X
                rows = torch.cat([x_MD, g_MD])
                q = _rows(layer.queries(rows[None], torch.cat([rotary_x, rotary_g])))
                heads_x = _attend(content, q[: len(x_MD)], keys, values, mask_x)
                heads_g = _attend(query, q[len(x_MD) :], keys, values, mask_g)
                rows = self._finish(layer, rows, torch.cat([heads_x, heads_g]))
                x_MD, g_MD = rows[: len(x_MD)], rows[len(x_MD) :]
            else:
                q = _rows(layer.queries(g_MD[None], rotary_g))
                g_MD = self._finish(layer, g_MD, _attend(query, q, keys, values, mask_g))

        mask_g = _interval(query, torch.zeros_like(query_ends_M), query_ends_M, n_queried)
        for depth, layer in enumerate(self.model.causal_layers):
            storage = self.cache.query[depth]
            k, v = layer.keys_values(g_MD[None], rotary_g)
            self._append(storage, k, v, query, slots, 0)
            keys, values = (rows_of(part, slots, n_queried) for part in storage)
            q = _rows(layer.queries(g_MD[None], rotary_g))
            g_MD = self._finish(layer, g_MD, _attend(query, q, keys, values, mask_g))
        wanted = [r >= len(w.positions) - w.n_fill for w in work for r in range(len(w.positions))]
        return self.model.head(self.model.final_norm(g_MD[torch.tensor(wanted, device=device)]))

    def _first_query(
        self,
        x_MD: Tensor,
        positions_M: Tensor,
        fills_M: Tensor,
        content: Rows,
        query: Rows,
        starts_M: Tensor,
        slots: Sequence[int],
    ) -> Tensor:
        """G0 of the query rows by the recurrence: the cached ranks' state, and this step's content rows on top."""
        table = self.model.prefix_table
        x_BRD, p_BRE = content.pad(x_MD.float()), content.pad(table[positions_M].float())
        p_query = query.pad(table[fills_M].float())
        where = torch.tensor(slots, device=x_MD.device)
        state_BED = self.cache.prefix[where]
        # A rank beyond every block start stands for "no such row".
        x_ranks = content.pad(content.ranks, fill=self.model.config.max_length)
        visible = x_ranks[:, None, :] < query.pad(starts_M)[:, :, None]
        weights = (p_query @ p_BRE.mT).masked_fill(~visible, 0.0)
        g_BRD = p_query @ state_BED + weights @ x_BRD
        self.cache.prefix[where] = state_BED + p_BRE.mT @ x_BRD
        return self.model.normalised_query(query.unpad(g_BRD)).to(x_MD.dtype)

    def _append(self, storage: Tensor, k: Tensor, v: Tensor, rows: Rows, slots: Sequence[int], offset: int) -> None:
        """Write keys and values (1, H, M, A) at their slots and ranks."""
        at = torch.tensor(slots, device=k.device)[rows.texts]
        storage[0].transpose(1, 2)[at, rows.ranks + offset] = _rows(k)
        storage[1].transpose(1, 2)[at, rows.ranks + offset] = _rows(v)

    def _finish(self, layer: Layer, rows_MD: Tensor, heads_MHA: Tensor) -> Tensor:
        attended = layer.attention.merge(heads_MHA.transpose(0, 1)[None])
        return layer.finish(rows_MD[None], attended)[0]


def _attend(rows: Rows, q_MHA: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """(M, H, A): each row's attention over its own text's keys."""
    if not len(q_MHA):
        return q_MHA
    q_BHRA = rows.pad(q_MHA).transpose(1, 2)
    return rows.unpad(F.scaled_dot_product_attention(q_BHRA, keys, values, attn_mask=mask).transpose(1, 2))


def _interval(rows: Rows, first_M: Tensor, last_M: Tensor, n_keys: int) -> Tensor:
    """(B, 1, R, n_keys) bool: row sees keys first .. last - 1; rows of the padding see key 0, to stay finite."""
    keys = torch.arange(n_keys, device=first_M.device)
    first, last = rows.pad(first_M)[..., None], rows.pad(last_M, fill=1)[..., None]
    return ((keys >= first) & (keys < last))[:, None]


def _rows(heads: Tensor) -> Tensor:
    """(M, H, A) from (1, H, M, A)."""
    return heads[0].transpose(0, 1)


def _flat(lists: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    return torch.tensor([value for values in lists for value in values], dtype=torch.long, device=device)
