"""Orders: permutations, blocks and the example of the specification's section 3."""

import pytest
import torch

from armd import Order
from armd.order import stream_blocks


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_strided_is_the_example_of_the_specification() -> None:
    order = Order.strided(8, 2)
    assert order.positions.tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert order.blocks.tolist() == [0, 1, 2, 2, 3, 3, 4, 4]
    assert order.largest_block == 2


def test_strided_with_a_prefix_and_ragged_streams() -> None:
    order = Order.strided(9, 3, prefix=2)  # 7 positions: streams of 3, 2 and 2
    assert order.positions.tolist() == [0, 1, 2, 5, 7, 3, 6, 8, 4]
    assert order.blocks.tolist() == [0, 1, 2, 3, 4, 5, 5, 5, 6]


@pytest.mark.parametrize("length", [1, 2, 7, 16])
@pytest.mark.parametrize("n_streams", [1, 2, 3, 8, 40])
@pytest.mark.parametrize("prefix", [0, 1, 7, 16])
def test_strided_steps_are_those_of_the_specification(length: int, n_streams: int, prefix: int) -> None:
    if prefix > length:
        with pytest.raises(ValueError, match=str(prefix)):
            Order.strided(length, n_streams, prefix)
        return
    order = Order.strided(length, n_streams, prefix)
    rest = length - prefix
    n_streams = min(n_streams, rest)
    steps = prefix + (n_streams + -(-rest // n_streams) - 1 if rest else 0)
    assert order.blocks.unique().numel() == steps
    assert sorted(order.positions.tolist()) == list(range(length))


def test_one_stream_is_left_to_right() -> None:
    assert torch.equal(Order.strided(9, 1).positions, Order.left_to_right(9).positions)
    assert torch.equal(Order.strided(9, 1).blocks, Order.left_to_right(9).blocks)


def test_progressive_shuffles_only_as_many_ranks_as_it_says() -> None:
    moved = []
    for seed in range(200):
        order = Order.progressive(64, 8, generator=generator(seed))
        assert sorted(order.positions.tolist()) == list(range(64))
        moved.append(int((order.positions != torch.arange(64)).sum()))
    assert max(moved) == 8  # no more than rho, and now and then all of them
    assert 6.5 < sum(moved) / len(moved) < 7.5  # a random permutation of 8 leaves 1 in its place on average
    assert torch.equal(Order.progressive(64, 0).positions, torch.arange(64))


def test_progressive_moves_every_rank_sometimes() -> None:
    moved = torch.zeros(16)
    for seed in range(300):
        moved += Order.progressive(16, 4, generator=generator(seed)).positions != torch.arange(16)
    assert moved.min() > 20  # expected 300 * 4/16 * 3/4 = 56 each


def test_block_starts_and_ends_by_counting() -> None:
    order = Order.stack([Order.strided(11, 3, 2), Order.strided(11, 5)])
    for row in range(2):
        blocks = order.blocks[row].tolist()
        assert order.block_starts[row].tolist() == [sum(b < c for b in blocks) for c in blocks]
        assert order.block_ends[row].tolist() == [sum(b <= c for b in blocks) for c in blocks]


def test_ranks_invert_positions() -> None:
    order = Order.stack([Order.random(9, generator=generator(s)) for s in range(3)])
    for row in range(3):
        for rank, position in enumerate(order.positions[row].tolist()):
            assert order.ranks[row, position] == rank


@pytest.mark.parametrize(
    ("positions", "blocks"),
    [([0, 0, 1], None), ([1, 2, 3], None), ([], None), ([0, 1], [1, 1]), ([0, 1], [0, 2]), ([0, 1, 2], [0, 1, 0])],
)
def test_given_refuses_what_is_no_order(positions: list[int], blocks: list[int] | None) -> None:
    with pytest.raises(ValueError):
        Order.given(positions, blocks)


def test_given_says_that_nothing_is_no_order() -> None:
    with pytest.raises(ValueError, match="must have shape"):
        Order.given([])


def test_given_refuses_what_it_would_have_to_cut_off() -> None:
    """Fails with `torch.as_tensor(values, dtype=torch.int64)`, which makes [0.9, 1.2] an order."""
    with pytest.raises(ValueError, match="positions must be whole numbers, not float32"):
        Order.given([0.9, 1.2])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="blocks must be whole numbers, not bool"):
        Order.given([0, 1], torch.tensor([False, True]))
    assert Order.given(torch.tensor([1, 0], dtype=torch.int32)).positions.dtype == torch.int64


def test_stream_blocks_refuses_no_streams() -> None:
    with pytest.raises(ValueError, match="0"):
        stream_blocks(range(4), 0)
    assert stream_blocks([], 3) == []


def test_infilling_fills_holes_last_in_streams() -> None:
    order = Order.infilling(8, [2, 3, 5, 6], n_streams=2)
    assert order.positions.tolist() == [0, 1, 4, 7, 2, 5, 3, 6]
    assert order.blocks.tolist() == [0, 1, 2, 3, 4, 5, 6, 6]
    assert Order.infilling(4, []).positions.tolist() == [0, 1, 2, 3]
    for holes in ([4], [-1], [1, 1]):
        with pytest.raises(ValueError, match="holes must be different positions between 0 and 3"):
            Order.infilling(4, holes)
