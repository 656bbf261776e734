"""The slow obvious truths that the fast paths are held against: loops over ranks, one token at a time, no caches."""

from collections.abc import Iterator, Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from armd import ARMD, Order
from armd.attention import rotary_angles, rotate


def blocks_by_loop(order: Order, row: int) -> list[int]:
    """The block of every rank of sequence `row`."""
    return order.blocks.expand(row + 1, -1)[row].tolist() if order.blocks.ndim == 1 else order.blocks[row].tolist()


def positions_by_loop(order: Order, row: int) -> list[int]:
    """The position at every rank of sequence `row`."""
    return order.positions.tolist() if order.positions.ndim == 1 else order.positions[row].tolist()


def prefix_by_loop(p_NE: Tensor, x_ND: Tensor, blocks: Sequence[int]) -> Tensor:
    """Prefix aggregation by its definition: for each rank, a sum over the ranks of earlier blocks."""
    rows = []
    for n in range(len(blocks)):
        total = torch.zeros_like(x_ND[0])
        for i in range(len(blocks)):
            if blocks[i] < blocks[n]:
                total = total + (p_NE[n] @ p_NE[i]) * x_ND[i]
        rows.append(total)
    return torch.stack(rows)


def neighbours_by_loop(x_ND: Tensor, positions: Sequence[int], blocks: Sequence[int], offsets: Sequence[int]) -> Tensor:
    """For each rank and offset, the row of the position there, if it is in an earlier block; else zeros."""
    rows = []
    for n, position in enumerate(positions):
        for offset in offsets:
            i = positions.index(position + offset) if position + offset in positions else n
            rows.append(x_ND[i] if blocks[i] < blocks[n] else torch.zeros_like(x_ND[0]))
    return torch.stack(rows).unflatten(0, (len(positions), len(offsets)))


def attend_by_loop(q_NA: Tensor, k_NA: Tensor, v_NA: Tensor, visible: Sequence[Sequence[int]]) -> Tensor:
    """One head: query n over the keys `visible[n]`, one softmax at a time."""
    rows = []
    for n, keys in enumerate(visible):
        weights = torch.stack([q_NA[n] @ k_NA[i] for i in keys]) / q_NA.shape[1] ** 0.5
        rows.append(weights.softmax(dim=0) @ v_NA[list(keys)])
    return torch.stack(rows)


def logits_by_loop(model: ARMD, tokens: Sequence[int], order: Order, row: int = 0) -> Tensor:
    """(N, V) in text order for one sequence, from the definitions of section 2 and nothing else."""
    positions, blocks = positions_by_loop(order, row), blocks_by_loop(order, row)
    n_ranks = len(positions)
    earlier = [[i for i in range(n_ranks) if blocks[i] < blocks[n]] for n in range(n_ranks)]
    up_to = [[i for i in range(n_ranks) if blocks[i] <= blocks[n]] for n in range(n_ranks)]
    x = model.embedding.weight[[tokens[p] for p in positions]]
    g = model.query_norm(prefix_by_loop(model.prefix_table[positions], x, blocks) + model.start)
    x = model.content_norm(x)
    if model.neighbour_weights is not None:
        near = neighbours_by_loop(x, positions, blocks, model.offsets)
        g = g + sum(weight_D * near[:, o] for o, weight_D in enumerate(model.neighbour_weights))
    rotary = rotary_angles(torch.tensor(positions), model.config.d_model // model.config.n_heads)

    def heads(rows: Tensor) -> Iterator[Tensor]:
        return iter(rows.unflatten(-1, (model.config.n_heads, -1)).unbind(dim=1))

    def through(layer: torch.nn.Module, queries: Tensor, content: Tensor, visible: list, null: bool) -> Tensor:
        attention = layer.attention
        q, c = attention.query(layer.attention_norm(queries)), attention.key_value(layer.attention_norm(content))
        k, v = c.chunk(2, dim=-1)
        merged = []
        for h, (q_h, k_h, v_h) in enumerate(zip(heads(q), heads(k), heads(v), strict=True)):
            q_h, k_h = rotate(q_h, rotary), rotate(k_h, rotary)
            if null:  # the null key is key 0
                k_h, v_h = torch.cat([attention.null[0, h], k_h]), torch.cat([attention.null[1, h], v_h])
                visible_h = [[0, *(i + 1 for i in keys)] for keys in visible]
            else:
                visible_h = visible
            merged.append(attend_by_loop(q_h, k_h, v_h, visible_h))
        y = queries + attention.out(torch.cat(merged, dim=1))
        return y + layer.mlp_out(F.gelu(layer.mlp_in(layer.mlp_norm(y))))

    for layer in model.two_stream_layers:
        g, x = through(layer, g, x, earlier, null=True), through(layer, x, x, up_to, null=False)
    for layer in model.causal_layers:
        g = through(layer, g, g, up_to, null=False)
    ranked = model.final_norm(g) @ model.embedding.weight.T
    out = torch.empty_like(ranked)
    out[positions] = ranked
    return out


def all_sequences(vocab_size: int, length: int) -> Tensor:
    """(V ** N, N): every sequence there is."""
    return torch.tensor(list(product(range(vocab_size), repeat=length)))
