"""The invariants of the specification's section 7, and the model against its definition by loops."""

import math

import pytest
import torch

from armd import ARCHITECTURES, ARMD, Order, score
from armd.layers import initialise
from armd.prefix import aggregate
from tests.models import tiny_model
from tests.oracle import all_sequences, blocks_by_loop, logits_by_loop, prefix_by_loop


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def orders(length: int) -> dict[str, Order]:
    """One of every kind, shared and by sequence."""
    return {
        "left to right": Order.left_to_right(length),
        "progressive": Order.progressive(length, 4, generator=generator(1)),
        "random": Order.random(length, generator=generator(2)),
        "strided 2": Order.strided(length, 2),
        "strided 3, prefix, ragged": Order.strided(length, 3, prefix=3),
        "all streams of one": Order.strided(length, length),
        "one block": Order.given(range(length), [0] * length),
        "by sequence": Order.stack([Order.random(length, generator=generator(3)), Order.left_to_right(length)]),
        "by sequence, blocks": Order.stack([Order.strided(length, 2), Order.strided(length, 4, prefix=1)]),
    }


NAMES = list(orders(9))


@pytest.mark.parametrize("name", NAMES)
def test_forward_is_the_definition(name: str) -> None:
    """Every kernel path against loops over ranks. Seen to fail with `<=` for `<` in strict_mask."""
    model, order = tiny_model(), orders(9)[name]
    tokens = torch.randint(13, (2, 9), generator=generator())
    with torch.no_grad():
        logits = model(tokens, order)
        for row in range(2):
            expected = logits_by_loop(model, tokens[row].tolist(), order, row)
            torch.testing.assert_close(logits[row], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_logits_do_not_see_their_own_or_later_blocks(name: str) -> None:
    """Invariant 1: exactly zero, not small. Seen to fail with the strict stream's queries taken from X."""
    model, order, length = tiny_model(), orders(9)[name], 9
    tokens = torch.randint(13, (2, length), generator=generator())
    order = Order.stack([order, order]) if order.positions.ndim == 1 else order
    seen = torch.zeros(2, length, length, dtype=torch.bool)  # [row, rank n, rank m]
    embedded: list[torch.Tensor] = []

    def keep(_: torch.nn.Module, __: tuple, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    handle = model.embedding.register_forward_hook(keep)
    hidden = model.hidden_by_rank(tokens, order)
    handle.remove()
    for n in range(length):
        (gradient,) = torch.autograd.grad(hidden[:, n].sum(), embedded[0], retain_graph=True, allow_unused=True)
        seen[:, n] = gradient.abs().sum(dim=2) > 0 if gradient is not None else False
    for row in range(2):
        blocks = blocks_by_loop(order, row)
        for n in range(length):
            for m in range(length):
                assert bool(seen[row, n, m]) == (blocks[m] < blocks[n]), (n, m)


def test_order_inside_the_target_block_only_permutes_the_outputs() -> None:
    """Invariant 2, second half: in which sequence a block's positions are listed does not matter."""
    model = tiny_model()
    tokens = torch.randint(13, (1, 8), generator=generator())
    one = Order.given([0, 3, 5, 1, 7, 2, 4, 6], [0, 1, 2, 2, 2, 3, 3, 3])
    other = Order.given([0, 3, 7, 5, 1, 6, 2, 4], [0, 1, 2, 2, 2, 3, 3, 3])
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, one), model(tokens, other), rtol=1e-5, atol=1e-5)


def test_order_of_the_evidence_matters_only_through_context_of_causal_layers() -> None:
    """Invariant 2, first half, and what holds of it: G0 is a sum over the evidence, so it does not change at all.

    The strict attention of a first two-stream layer does not depend on it either, since content keys of that layer
    are the embeddings themselves. Above, content rows have seen what came before them in the order, so predictions do
    change when the evidence is reordered in blocks of its own; a block of evidence may be listed in any order.
    """
    tokens = torch.randint(13, (1, 6), generator=generator())
    one, other = Order.given([0, 1, 2, 3, 4, 5]), Order.given([2, 0, 3, 1, 4, 5])
    shallow = tiny_model(n_layers=1, n_two_stream_layers=1)
    deep = tiny_model()
    with torch.no_grad():
        for rank in (4, 5):  # positions 4 and 5 stand at these ranks in both
            a, b = (shallow.hidden_by_rank(tokens, o)[0, rank] for o in (one, other))
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        a, b = (deep.hidden_by_rank(tokens, o)[0, 4] for o in (one, other))
        assert (a - b).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["left to right", "progressive", "random", "by sequence"])
def test_shifted_keys_are_masked_attention(name: str) -> None:
    """Invariant 3. Declaring a larger block than there is sends a one-by-one order down the masked path."""
    model, order = tiny_model(), orders(9)[name]
    tokens = torch.randint(13, (2, 9), generator=generator())
    masked = Order(order.positions, order.blocks, largest_block=2)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, order), model(tokens, masked), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 4, 16, 128])
@pytest.mark.parametrize("name", NAMES)
def test_chunked_prefix_aggregation_is_the_quadratic_sum(name: str, chunk: int) -> None:
    """Invariant 3. Seen to fail with the running state taken one chunk too far."""
    order = orders(23)[name]
    p = torch.randn(2, 23, 8, generator=generator())
    x = torch.randn(2, 23, 5, generator=generator(1))
    starts = order.block_starts.reshape(-1, 23)
    got = aggregate(p, x, starts, order.largest_block, chunk)
    for row in range(2):
        expected = prefix_by_loop(p[row], x[row], blocks_by_loop(order, row))
        torch.testing.assert_close(got[row], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "order",
    [
        Order.left_to_right(4),
        Order.given([2, 0, 3, 1]),
        Order.strided(4, 2),
        Order.strided(4, 4),
        Order.given([3, 1, 0, 2], [0, 0, 1, 1]),
        Order.given(range(4), [0] * 4),
    ],
    ids=["left to right", "given", "strided 2", "strided 4", "two blocks", "one block"],
)
def test_probabilities_of_all_sequences_sum_to_one(order: Order) -> None:
    """Invariant 4. Seen to fail with block_starts + 1, where a rank sees its own token."""
    model = tiny_model(vocab_size=3, max_length=4)
    sequences = all_sequences(3, 4)
    total = score(model, sequences, order).double().sum(dim=1).exp().sum()
    assert math.isclose(float(total), 1.0, abs_tol=1e-5)


def test_score_is_in_text_order() -> None:
    model, order = tiny_model(), orders(9)["by sequence, blocks"]
    tokens = torch.randint(13, (2, 9), generator=generator())
    with torch.no_grad():
        expected = model(tokens, order).log_softmax(dim=2).gather(2, tokens[..., None]).squeeze(2)
    torch.testing.assert_close(score(model, tokens, order).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "count"), [("small", 123_627_520), ("medium", 353_595_392)])
def test_parameter_counts_of_the_presets(name: str, count: int) -> None:
    """The head is tied to the embedding; the layers hold 12 d^2 each."""
    architecture = ARCHITECTURES[name]
    with torch.device("meta"):
        model = ARMD(architecture.model_config(50_257, 1024))
    d, layers = architecture.d_model, architecture.n_layers
    by_hand = 50_257 * d + 1024 * architecture.d_prefix + layers * (12 * d * d + 2 * d)
    by_hand += architecture.n_two_stream_layers * 2 * d + 3 * d  # null keys; start vector and two norms
    assert sum(parameter.numel() for parameter in model.parameters()) == count == by_hand


def test_same_generator_same_weights() -> None:
    config = ARCHITECTURES["tiny"].model_config(20, 16)
    one, other = ARMD(config, generator=generator(5)), ARMD(config, generator=generator(5))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    initialise(other, other.config.n_layers, generator(6))
    assert not torch.equal(one.embedding.weight, other.embedding.weight)


def test_initial_loss_is_that_of_guessing() -> None:
    config = ARCHITECTURES["tiny"].model_config(100, 64)
    model = ARMD(config, generator=generator())
    tokens = torch.randint(100, (4, 64), generator=generator())
    loss = -float(score(model, tokens, Order.left_to_right(64)).mean())
    assert abs(loss - math.log(100)) < 0.3


@pytest.mark.parametrize(
    ("tokens", "order", "message"),
    [
        (torch.zeros(1, 5, dtype=torch.int64), Order.left_to_right(4), "4"),
        (torch.zeros(1, 40, dtype=torch.int64), Order.left_to_right(40), "max_length"),
        (torch.zeros(3, 4, dtype=torch.int64), Order.stack([Order.left_to_right(4)] * 2), "2 orders"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(tokens: torch.Tensor, order: Order, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model()(tokens, order)
