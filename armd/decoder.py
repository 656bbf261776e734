"""One decoding step on tensors: content rows of the tokens just chosen, query rows of the positions to fill.

A step is one forward pass over the rows of all texts, gathered into one batch of rows (docs/model.md, section 5): X
rows enter the caches of the two-stream layers, G rows pass through all layers, and each weight is read once. What the
rows are and what they see is worked out before (rows.py); nothing here waits for the device.

Shapes: M rows of all texts, B texts of a run, R rows of each, K keys, H heads, A head width, D model width, E prefix
width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from armd.cache import Cache
from armd.cached_layer import CachedLayer, RowNorm, rotary_rows
from armd.model import ARMD
from armd.products import product
from armd.recorder import Recorder
from armd.rows import Rows, Run, Work


class Decoder:
    """A model, its cache, and the step that advances some of the cache's texts.

    The model's weights must stay as they are: what depends on them alone is computed once.
    """

    def __init__(
        self, model: ARMD, n_slots: int, *, memory_bytes: int | None = None, static_shapes: bool = False
    ) -> None:
        self.model = model
        self.cache = cache = Cache(model, n_slots, memory_bytes)
        self.static_shapes = static_shapes
        self._recorder = Recorder() if static_shapes and cache.prefix.device.type == "cuda" else None
        config = model.config
        with torch.inference_mode():
            self._content_norm, self._query_norm = RowNorm(model.content_norm), RowNorm(model.query_norm)
            self._two_stream_layers = [*map(CachedLayer, model.two_stream_layers, cache.content)]
            self._causal_layers = [*map(CachedLayer, model.causal_layers, cache.query)]
            # One position more than there are, for the padding, which aggregates nothing.
            self._prefix_table = F.pad(model.prefix_table.float(), (0, 0, 0, 1))
            everywhere = torch.arange(config.max_length + 1, device=cache.prefix.device)
            self._rotary = rotary_rows(everywhere, config.d_model // config.n_heads)

    @torch.inference_mode()
    def step(self, work: Sequence[Work]) -> Tensor:
        """Append the content rows, compute the query rows; logits (sum of n_logits, V), texts one after the other.

        `work` is sorted by slot, one for each.
        """
        rows = Rows(work, self.cache, n_neighbours=len(self.model.offsets), static_shapes=self.static_shapes)
        integers = rows.integers.to(self.cache.prefix.device)
        if self._recorder is None:
            logits = self._forward(rows.placed(integers))
        else:
            logits = self._recorder(rows.plan, integers, lambda inputs: self._forward(rows.placed(inputs)))
        return logits[: rows.n_wanted]

    def _forward(self, rows: Rows) -> Tensor:
        """The logits of the rows that want them, padding included."""
        model, n_content = self.model, rows.n_content
        embedded_MD = self._content_norm(F.embedding(rows["embedded"], model.embedding.weight))
        aggregated_MD = torch.cat([self._aggregate(run, rows) for run in rows.runs])
        g_MD = self._query_norm(aggregated_MD.to(model.start.dtype) + model.start)
        if model.neighbour_weights is not None:
            near_MD = embedded_MD[n_content:] * rows["neighbours_known"][:, None]
            g_MD = g_MD + (near_MD.view(rows.n_query, *model.neighbour_weights.shape) * model.neighbour_weights).sum(1)
        both_MD = torch.cat([embedded_MD[:n_content], g_MD])
        rotary_M = self._rotary[rows["rotated"]]  # content, content, query, query

        content = [(run.slots, run.content, run.content_seen) for run in rows.runs if _some(run.content)]
        strict = [(run.slots, _behind(n_content, run.query), run.strict_seen) for run in rows.runs]
        *below, last = self._two_stream_layers
        for layer in below:
            normed_MD = layer.normed(both_MD)
            rotary = rotary_M[: 2 * n_content + rows.n_query]
            q_MHA = layer.project(normed_MD[:n_content], normed_MD, rotary, rows["content_places"])
            both_MD = layer.finish(both_MD, layer.attend(q_MHA, content + strict))

        # Above the last one nobody reads X: content rows bring keys and values alone.
        strict = [(run.slots, run.query, run.strict_seen) for run in rows.runs]
        normed_MD = last.normed(both_MD)
        rotary = rotary_M[n_content : 2 * n_content + rows.n_query]
        q_MHA = last.project(normed_MD[:n_content], normed_MD[n_content:], rotary, rows["content_places"])
        g_MD = last.finish(both_MD[n_content:], last.attend(q_MHA, strict))

        query = [(run.slots, run.query, run.query_seen) for run in rows.runs]
        for layer in self._causal_layers:
            normed_MD = layer.normed(g_MD)
            q_MHA = layer.project(normed_MD, normed_MD, rotary_M[2 * n_content :], rows["query_places"])
            g_MD = layer.finish(g_MD, layer.attend(q_MHA, query))
        return product(model.final_norm(g_MD[rows["wanted"]]), model.embedding.weight)

    def _aggregate(self, run: Run, rows: Rows) -> Tensor:
        """Prefix aggregation (B * R, D) of a run's query rows: the state of certain ranks, and pending ones on top."""
        state_BED = self.cache.prefix[run.slots]
        n_texts = len(state_BED)
        embedding = self.model.embedding.weight
        if _some(run.folded):
            p_BFE = self._prefix_table[rows["folded_positions"][run.folded]].unflatten(0, (n_texts, -1))
            x_BFD = F.embedding(rows["folded_tokens"][run.folded], embedding).float().unflatten(0, (n_texts, -1))
            state_BED.baddbmm_(p_BFE.mT, x_BFD)
        p_BRE = self._prefix_table[rows["query_positions"][run.query]].unflatten(0, (n_texts, -1))
        g_BRD = p_BRE @ state_BED
        if _some(run.pending):  # they are at the ranks of the first query rows
            x_BPD = F.embedding(rows["pending_tokens"][run.pending], embedding).float().unflatten(0, (n_texts, -1))
            starts_BR = rows["starts"][run.query].view(n_texts, -1)
            first_B1 = rows["query_ranks"][run.query].view(n_texts, -1)[:, :1]
            pending_P = torch.arange(x_BPD.shape[1], device=x_BPD.device)
            seen_BRP = pending_P < (starts_BR - first_B1)[..., None]
            g_BRD = g_BRD + (p_BRE @ p_BRE[:, : len(pending_P)].mT * seen_BRP) @ x_BPD
        return g_BRD.flatten(0, 1)


def _behind(n_rows: int, rows: slice) -> slice:
    """The same rows where `n_rows` others come first."""
    return slice(n_rows + rows.start, n_rows + rows.stop)


def _some(rows: slice) -> bool:
    """Whether there are any."""
    return bool(rows.start < rows.stop)
