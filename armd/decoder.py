"""One decoding step on tensors: content rows of the tokens just chosen, query rows of the positions to fill.

A step is one forward pass over the rows of all texts, gathered into one batch of rows (section 5): X rows enter the
caches of the two-stream layers, G rows pass through all layers, and each weight is read once. What the rows are and
what they see is worked out before (rows.py); nothing here waits for the device.

Shapes: M rows of all texts, B texts of a run, R rows of each, K keys, H heads, A head width, D model width, E prefix
width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from armd.attention import rotary_angles
from armd.cache import Cache
from armd.layers import Layer
from armd.model import ARMD
from armd.rows import Rows, Run, Seen, Work


class Decoder:
    """A model, its cache, and the step that advances some of the cache's texts.

    The model's weights must stay as they are: what depends on them alone is computed once.
    """

    def __init__(
        self, model: ARMD, n_slots: int, *, memory_bytes: int | None = None, static_shapes: bool = False
    ) -> None:
        self.model = model
        self.cache = Cache(model, n_slots, memory_bytes)
        self.static_shapes = static_shapes
        config = model.config
        with torch.inference_mode():
            # One position more than there are, for the padding, which aggregates nothing.
            self.prefix_table = F.pad(model.prefix_table.float(), (0, 0, 0, 1))
            everywhere = torch.arange(config.max_length + 1, device=self.prefix_table.device)
            cosines, sines = rotary_angles(everywhere, config.d_model // config.n_heads).chunk(2, dim=-1)
            # (2, positions, 1, A): what multiplies a row, and what multiplies it with its halves exchanged.
            self.rotary = torch.stack([torch.cat([cosines, cosines], -1), torch.cat([-sines, sines], -1)])[:, :, None]

    @torch.inference_mode()
    def step(self, work: Sequence[Work]) -> Tensor:
        """Append the content rows, compute the query rows; logits (sum of n_logits, V), texts one after the other.

        `work` is sorted by slot, one for each.
        """
        model, cache = self.model, self.cache
        rows = Rows(work, cache, static_shapes=self.static_shapes)
        x_MD = model.embedding(rows["content_tokens"])
        g_MD = model.normalised_query(_joined([self._aggregate(run, rows) for run in rows.runs])).to(x_MD.dtype)
        rotary = self.rotary[:, torch.cat([rows["content_positions"], rows["query_positions"]])]
        n_content = len(x_MD)
        both_MD = torch.cat([x_MD, g_MD])
        for layer, storage in zip(model.two_stream_layers, cache.content, strict=True):
            normed_MD = layer.attention_norm(both_MD)
            self._append(storage, rows["content_places"], layer.attention.key_value(normed_MD[:n_content]), rotary)
            if layer is model.two_stream_layers[-1]:  # above it nobody reads X
                both_MD, normed_MD, rotary = both_MD[n_content:], normed_MD[n_content:], rotary[:, n_content:]
                n_content = 0
            q_MHA = self._queries(layer, normed_MD, rotary)
            # Runs without content rows of their own are those that begin with nothing.
            written = [run for run in rows.runs if n_content and run.content_seen.n_keys]
            heads = [_attend(q_MHA[run.content], storage[run.slots, 1:], run.content_seen) for run in written]
            heads += [_attend(q_MHA[n_content:][run.query], storage[run.slots], run.strict_seen) for run in rows.runs]
            both_MD = layer.finish(both_MD, layer.attention.out(_joined(heads)))
        g_MD = both_MD
        for layer, storage in zip(model.causal_layers, cache.query, strict=True):
            normed_MD = layer.attention_norm(g_MD)
            self._append(storage, rows["query_places"], layer.attention.key_value(normed_MD), rotary)
            q_MHA = self._queries(layer, normed_MD, rotary)
            heads = [_attend(q_MHA[run.query], storage[run.slots], run.query_seen) for run in rows.runs]
            g_MD = layer.finish(g_MD, layer.attention.out(_joined(heads)))
        return model.head(model.final_norm(g_MD[rows["wanted"]]))[: rows.n_wanted]

    def _aggregate(self, run: Run, rows: Rows) -> Tensor:
        """Prefix aggregation (B * R, D) of a run's query rows: the state of certain ranks, and pending ones on top."""
        state_BED = self.cache.prefix[run.slots]
        n_texts = len(state_BED)
        embedding = self.model.embedding.weight
        if run.folded.start < run.folded.stop:
            p_BFE = self.prefix_table[rows["folded_positions"][run.folded]].unflatten(0, (n_texts, -1))
            x_BFD = F.embedding(rows["folded_tokens"][run.folded], embedding).float().unflatten(0, (n_texts, -1))
            state_BED.baddbmm_(p_BFE.mT, x_BFD)
        p_BRE = self.prefix_table[rows["query_positions"][run.query]].unflatten(0, (n_texts, -1))
        g_BRD = p_BRE @ state_BED
        if run.pending.start < run.pending.stop:  # they are at the ranks of the first query rows
            x_BPD = F.embedding(rows["pending_tokens"][run.pending], embedding).float().unflatten(0, (n_texts, -1))
            ranks_BR, starts_BR = (rows[name][run.query].view(n_texts, -1) for name in ("query_ranks", "starts"))
            pending_P = torch.arange(x_BPD.shape[1], device=ranks_BR.device)
            seen_BRP = pending_P < (starts_BR - ranks_BR[:, :1])[..., None]
            g_BRD = g_BRD + (p_BRE @ p_BRE[:, : len(pending_P)].mT * seen_BRP) @ x_BPD
        return g_BRD.flatten(0, 1)

    def _queries(self, layer: Layer, normed_MD: Tensor, rotary: Tensor) -> Tensor:
        """(M, H, A): rotated queries."""
        return _rotated(layer.attention.query(normed_MD).unflatten(1, (self.model.config.n_heads, -1)), rotary)

    def _append(self, storage: Tensor, places_M: Tensor, kv_MD: Tensor, rotary: Tensor) -> None:
        """Write keys, which are rotated, and values (M, 2 D) at their places in a layer's storage."""
        kv_M2HA = kv_MD.view(-1, *storage.shape[2:])
        kv_M2HA[:, 0] = _rotated(kv_M2HA[:, 0], rotary[:, : len(kv_MD)])
        storage.flatten(0, 1).index_copy_(0, places_M, kv_M2HA)


def _rotated(x_MHA: Tensor, rotary: Tensor) -> Tensor:
    """Rotary embedding of rows, by `rotary` (2, M, 1, A); what attention.rotate does, in fewer operations."""
    cosines, sines = rotary
    x = x_MHA.float()
    return torch.addcmul(x * cosines, x.roll(x.shape[-1] // 2, -1), sines).to(x_MHA.dtype)


def _attend(q_MHA: Tensor, storage: Tensor, seen: Seen) -> Tensor:
    """(M, D): attention of a run's rows over the keys and values (B, ranks, 2, H, A) of their own texts."""
    k_BHKA, v_BHKA = storage[:, : seen.n_keys].permute(2, 0, 3, 1, 4)
    q_BHRA = q_MHA.view(len(storage), -1, *q_MHA.shape[1:]).transpose(1, 2)
    heads = F.scaled_dot_product_attention(q_BHRA, k_BHKA, v_BHKA, attn_mask=seen.mask)
    return heads.transpose(1, 2).reshape(len(q_MHA), -1)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
