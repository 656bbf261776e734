"""Prefix aggregation: the chunked form against its definition, and what it costs in memory."""

import pytest
import torch

from armd import Order
from armd.prefix import aggregate, neighbours
from tests.memory import LargestTensor
from tests.oracle import blocks_by_loop, neighbours_by_loop, positions_by_loop, prefix_by_loop
from tests.orders import NAMES, generator, orders


@pytest.mark.parametrize("chunk", [1, 4, 16, 128])
@pytest.mark.parametrize("name", NAMES)
def test_chunked_is_the_quadratic_sum(name: str, chunk: int) -> None:
    """Invariant 3, with its gradients. Fails when windows reach back `largest_block - 2` ranks instead of 1 less than
    the block, and when the running state includes the window's own chunk."""
    order = orders(23)[name]
    p = torch.randn(2, 23, 8, generator=generator(), requires_grad=True)
    x = torch.randn(2, 23, 5, generator=generator(1), requires_grad=True)
    weight = torch.randn(2, 23, 5, generator=generator(2))
    got = aggregate(p, x, order.block_starts.reshape(-1, 23), order.largest_block, chunk)
    expected = torch.stack([prefix_by_loop(p[row], x[row], blocks_by_loop(order, row)) for row in range(2)])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    expected = expected + 0.0 * (p.sum() + x.sum())  # one block: nothing is summed, and gradients are zero
    for a, b in zip(*(torch.autograd.grad((g * weight).sum(), (p, x)) for g in (got, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("offsets", [[-1, 1], [-3, 2, 30]], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_neighbours_are_those_of_earlier_blocks(name: str, offsets: list[int]) -> None:
    """Fails with `<=` for the last `<` of `neighbours`, and without `inside_BNO`."""
    order = orders(23)[name]
    x = torch.randn(2, 23, 5, generator=generator(1), requires_grad=True)
    got = neighbours(x, order, offsets)
    expected = torch.stack(
        [
            neighbours_by_loop(x[row], positions_by_loop(order, row), blocks_by_loop(order, row), offsets)
            for row in range(2)
        ]
    )
    assert torch.equal(got, expected)
    expected = expected + 0.0 * x.sum()  # one block: nothing is known, and gradients are zero
    weight = torch.randn(got.shape, generator=generator(2))
    grads = [torch.autograd.grad((one * weight).sum(), x)[0] for one in (got, expected)]
    torch.testing.assert_close(*grads)


def test_an_order_shared_by_the_batch_needs_one_table() -> None:
    order = orders(23)["strided 2"]
    p, x = torch.randn(1, 23, 8, generator=generator()), torch.randn(3, 23, 5, generator=generator(1))
    starts = order.block_starts[None]
    expected = aggregate(p.expand(3, -1, -1), x, starts.expand(3, -1), 2, 4)
    torch.testing.assert_close(aggregate(p, x, starts, 2, 4), expected)


@pytest.mark.parametrize("n_streams", [1, 16])
def test_memory_is_linear_in_length(n_streams: int) -> None:
    """At N = 8192 no tensor of the forward or backward pass comes near the N x N of the quadratic form, and twice the
    length takes twice the memory. Fails with `chunk=length` in `aggregate`: then the weights are quadratic."""

    def largest(length: int) -> int:
        order = Order.strided(length, n_streams)
        p, x = (torch.randn(1, length, width, requires_grad=True) for width in (8, 32))
        with LargestTensor() as seen:
            aggregate(p, x, order.block_starts[None], order.largest_block).sum().backward()
        return seen.numel

    assert largest(8192) <= 8192 * 8192 / 40
    assert largest(8192) <= 2.1 * largest(4096)
