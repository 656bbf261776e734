"""One order of every kind, for tests that must hold for all of them."""

import torch

from armd import Order


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def orders(length: int) -> dict[str, Order]:
    """One of every kind, shared and by sequence (of two)."""
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
BLOCKS = [name for name, order in orders(9).items() if not order.one_by_one]
SINGLE = [name for name, order in orders(9).items() if order.one_by_one]
