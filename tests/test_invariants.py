"""The first four invariants of docs/model.md, section 8; the others are the engine's. Each was seen to fail.

Every docstring names the line that was broken to see it.
"""

import itertools

import pytest
import torch

from armd import ARMD, Order
from armd.attention import Kernel
from tests.models import tiny_model
from tests.oracle import all_sequences, blocks_by_loop
from tests.orders import BLOCKS, NAMES, SINGLE, generator, orders

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")


def gradients_reach(model: ARMD, tokens: torch.Tensor, order: Order, kernel: Kernel | None) -> torch.Tensor:
    """(B, N, N) bool: whether the logits at rank n have any gradient with respect to the embedding at rank m."""
    embedded: list[torch.Tensor] = []

    def keep(_: torch.nn.Module, __: tuple, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0]

    handle = model.embedding.register_forward_hook(keep)
    logits = model.head(model.hidden_by_rank(tokens, order, kernel))
    handle.remove()
    reached = []
    for n in range(order.length):
        (gradient,) = torch.autograd.grad(logits[:, n].square().sum(), embedded[0], retain_graph=True)
        reached.append(gradient.abs().sum(dim=2) > 0)
    return torch.stack(reached, dim=1)


@pytest.mark.parametrize(
    ("name", "kernel"),
    [*((name, None) for name in NAMES), *((name, "mask") for name in SINGLE), *((name, "flex") for name in BLOCKS)],
)
def test_1_logits_see_earlier_blocks_and_nothing_else(name: str, kernel: Kernel | None, flex_backward: None) -> None:
    """Exactly zero, not small; and not zero for any earlier block.

    Fails with the strict stream's first query taken from X (`g = x` in hidden_by_rank); with `<=` for `<` in
    boolean_mask, in block_mask and in aggregate; without the line of Attention.strict that shifts the keys.
    """
    order = orders(9)[name]
    reached = gradients_reach(tiny_model(), torch.randint(13, (2, 9), generator=generator()), order, kernel)
    for row in range(2):
        blocks = blocks_by_loop(order, row)
        for n, m in itertools.product(range(9), range(9)):
            assert bool(reached[row, n, m]) == (blocks[m] < blocks[n]), (row, n, m)


EVIDENCE_FIRST = Order.given([0, 1, 2, 3, 4, 5, 6])
EVIDENCE_PERMUTED = Order.given([2, 0, 3, 1, 4, 5, 6])
TARGETS = (4, 5, 6)
"""Ranks that hold the same positions, after the same set of evidence, in both orders."""


def hidden_of_targets(model: ARMD, order: Order) -> torch.Tensor:
    tokens = torch.randint(13, (1, order.length), generator=generator())
    with torch.no_grad():
        return model.hidden_by_rank(tokens, order)[0, list(TARGETS)]


def test_2_the_first_query_does_not_depend_on_the_order_of_the_evidence() -> None:
    """It is a sum over the evidence. Fails with the table read by rank: `self.prefix_table[: order.length][None]`."""
    model = tiny_model()
    x = torch.randn(1, 7, 16, generator=generator(), dtype=torch.float64)
    first, permuted = (
        model.first_streams(x[:, order.positions], order)[1][0, list(TARGETS)]
        for order in (EVIDENCE_FIRST, EVIDENCE_PERMUTED)
    )
    torch.testing.assert_close(first, permuted, rtol=1e-5, atol=1e-6)


def test_2_nor_does_the_first_strict_layer() -> None:
    """Its keys and values come from the embeddings themselves, rotated by position, and softmax sums over a set.

    Fails with rotary by rank: `rotary_angles(torch.arange(order.length)[None], ...)` in hidden_by_rank.
    """
    model = tiny_model(n_layers=1, n_two_stream_layers=1)
    first, permuted = hidden_of_targets(model, EVIDENCE_FIRST), hidden_of_targets(model, EVIDENCE_PERMUTED)
    torch.testing.assert_close(first, permuted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("n_layers", "n_two_stream_layers"), [(2, 2), (2, 1)])
def test_2_every_layer_above_does(n_layers: int, n_two_stream_layers: int) -> None:
    """That is what the model is, and no fault: above the first layer the evidence has contexts of its own.

    Content rows have attended to the evidence before them (a second two-stream layer reads these), and so have query
    rows (a causal layer reads those). One layer of either kind is enough. Fails with the content stream not advanced,
    as by `torch.stack([xg[0], ..])` around what both_streams returns; and with queries for keys in causal_stream, where
    each row sees only itself.
    """
    model = tiny_model(n_layers=n_layers, n_two_stream_layers=n_two_stream_layers)
    first, permuted = hidden_of_targets(model, EVIDENCE_FIRST), hidden_of_targets(model, EVIDENCE_PERMUTED)
    assert (first - permuted).abs().amax(dim=1).min() > 1e-3


def test_2_evidence_of_one_block_may_be_listed_in_any_order() -> None:
    """At any depth: rows of a block have the same context. The same for blocks of evidence that follow each other.

    Fails with `block_ends` replaced by ranks + 1 in _masks, which is causal inside the block.
    """
    one = Order.given([0, 1, 2, 3, 4, 5, 6], [0, 0, 1, 1, 2, 3, 4])
    other = Order.given([1, 0, 3, 2, 4, 5, 6], [0, 0, 1, 1, 2, 3, 4])
    model = tiny_model()
    torch.testing.assert_close(hidden_of_targets(model, one), hidden_of_targets(model, other), rtol=1e-5, atol=1e-6)


def test_2_order_inside_the_target_block_only_permutes_the_outputs() -> None:
    """Logits in text order stay as they are. Fails, as above, with `block_ends` replaced by ranks + 1."""
    model = tiny_model()
    tokens = torch.randint(13, (1, 8), generator=generator())
    one = Order.given([0, 3, 5, 1, 7, 2, 4, 6], [0, 1, 2, 2, 2, 3, 3, 3])
    other = Order.given([0, 3, 7, 5, 1, 6, 2, 4], [0, 1, 2, 2, 2, 3, 3, 3])
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, one), model(tokens, other), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SINGLE)
def test_3_shifted_keys_are_masked_attention(name: str) -> None:
    """In float64 to its rounding. Fails with the strict limit `starts` or `starts + 2` for `starts + 1` in _masks.

    Chunked == quadratic is in test_prefix.py, cached == parallel in test_decoder.py.
    """
    model, order = tiny_model(), orders(9)[name]
    tokens = torch.randint(13, (2, 9), generator=generator())
    with torch.no_grad():
        causal, masked = (model(tokens, order, kernel=kernel) for kernel in ("causal", "mask"))
    torch.testing.assert_close(causal, masked, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("prefix", [0, 4])
def test_3_one_stream_is_left_to_right(prefix: int) -> None:
    """Fails without `+ 1` in Order._after, which then puts all streams into one block."""
    one, other = Order.strided(9, 1, prefix), Order.left_to_right(9)
    assert torch.equal(one.positions, other.positions)
    assert torch.equal(one.blocks, other.blocks)
    assert one.one_by_one


def test_4_probabilities_of_all_sequences_sum_to_one() -> None:
    """V = 3, N = 4: every permutation under every division into blocks, 192 orders.

    Fails with the strict limit `starts + 2` for `starts + 1` in _masks, since a rank then sees its own token; with
    `g = x` in hidden_by_rank; with logits returned by rank, not by position.
    """
    model, sequences = tiny_model(vocab_size=3, max_length=4), all_sequences(3, 4)
    for positions in itertools.permutations(range(4)):
        for steps in itertools.product((0, 1), repeat=3):
            order = Order.given(positions, [0, *itertools.accumulate(steps)])
            with torch.no_grad():
                log_p = model(sequences, order).log_softmax(dim=2).gather(2, sequences[..., None])
            assert float(log_p.sum(dim=(1, 2)).exp().sum()) == pytest.approx(1.0, abs=1e-5), (positions, steps)
