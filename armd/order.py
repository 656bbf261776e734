"""Orders: which position is generated at which rank, and which ranks are generated together.

Position is where a token stands in the text; rank is its place in the order of generation; a block is a run of ranks
generated in one step. Everything the model knows about an order is two integer arrays and one number, so a new order
needs no change to the model (docs/model.md, section 3).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Order:
    """An order of N positions, shared by a batch (N,) or one for each of its sequences (B, N).

    `positions[..., rank]` is a position, a permutation of 0..N-1; `blocks[..., rank]` is the rank's block, counted from
    0 without gaps and never falling. Built on the CPU by the class methods below, which check what they are given.
    """

    positions: Tensor
    """int64, (N,) or (B, N): the position at each rank."""
    blocks: Tensor
    """int64, same shape: the block of each rank."""
    largest_block: int
    """Tokens in the largest block, known on the host so that the model chooses its kernels without waiting."""

    @classmethod
    def left_to_right(cls, length: int) -> "Order":
        """Positions 0..length-1 in the order of the text, one token a block."""
        return _single(torch.arange(_length(length)))

    @classmethod
    def progressive(cls, length: int, n_shuffled: int, *, generator: torch.Generator | None = None) -> "Order":
        """Left-to-right, but `n_shuffled` ranks, drawn at random, exchange their positions among themselves.

        `n_shuffled` larger than `length` means all of them. One token a block.
        """
        if n_shuffled < 0:
            raise ValueError(f"n_shuffled must be at least 0, not {n_shuffled}")
        positions = torch.arange(_length(length))
        chosen = torch.randperm(length, generator=generator)[: min(n_shuffled, length)].sort().values
        positions[chosen] = chosen[torch.randperm(len(chosen), generator=generator)]
        return _single(positions)

    @classmethod
    def random(cls, length: int, *, generator: torch.Generator | None = None) -> "Order":
        """A random permutation, one token a block."""
        return _single(torch.randperm(_length(length), generator=generator))

    @classmethod
    def strided(cls, length: int, n_streams: int, prefix: int = 0) -> "Order":
        """A known prefix left to right, then `n_streams` streams side by side (strided block-parallel).

        The `length - prefix` positions after the prefix are cut into contiguous streams of equal length, the first ones
        one longer where it does not divide. The streams' first tokens (heads) are one block each; then the second
        tokens of all streams are a block, the third ones, and so on. More streams than positions means one each.
        """
        if not 0 <= prefix <= _length(length):
            raise ValueError(f"prefix must be between 0 and the length {length}, not {prefix}")
        return cls._after(range(prefix), range(prefix, length), n_streams)

    @classmethod
    def infilling(cls, length: int, holes: Sequence[int], n_streams: int = 1) -> "Order":
        """Known positions left to right, then `holes`, in `n_streams` streams: the order in which a template is filled.

        Raises:
            ValueError: `holes` names a position twice, or one that does not exist.
        """
        missing = sorted(holes)
        hidden = set(missing)
        if len(hidden) < len(missing) or (missing and not 0 <= missing[0] <= missing[-1] < _length(length)):
            raise ValueError(f"holes must be different positions between 0 and {length - 1}, not {list(holes)}")
        return cls._after([position for position in range(length) if position not in hidden], missing, n_streams)

    @classmethod
    def given(cls, positions: Sequence[int] | Tensor, blocks: Sequence[int] | Tensor | None = None) -> "Order":
        """Any order: `positions` by rank and `blocks` by rank (None: one token a block), (N,) or (B, N).

        Raises:
            ValueError: `positions` is not a permutation, or `blocks` does not count up from 0 without gaps.
        """
        positions = _whole("positions", positions)
        if positions.ndim not in (1, 2) or positions.shape[-1] == 0:
            raise ValueError(f"positions must have shape (N,) or (B, N) with N > 0, not {tuple(positions.shape)}")
        everywhere = torch.arange(positions.shape[-1])
        if not torch.equal(positions.sort(dim=-1).values, everywhere.expand_as(positions)):
            raise ValueError(f"positions must be a permutation of 0..{positions.shape[-1] - 1} by rank")
        if blocks is None:
            return _single(positions)
        blocks = _whole("blocks", blocks)
        if blocks.shape != positions.shape:
            raise ValueError(f"blocks have shape {tuple(blocks.shape)}, positions {tuple(positions.shape)}")
        steps = blocks.diff(dim=-1)
        if bool((blocks[..., 0] != 0).any()) or bool(((steps != 0) & (steps != 1)).any()):
            raise ValueError("blocks by rank must start at 0 and rise by 0 or 1")
        largest = max(int(torch.bincount(row).max()) for row in blocks.reshape(-1, blocks.shape[-1]))
        return cls(positions, blocks, largest)

    @classmethod
    def _after(cls, known: Sequence[int], missing: Sequence[int], n_streams: int) -> "Order":
        """`known` one by one, then `missing` in streams."""
        positions, blocks = list(known), list(range(len(known)))
        for together in stream_blocks(missing, n_streams):
            blocks += [blocks[-1] + 1 if blocks else 0] * len(together)
            positions += together
        return cls.given(positions, blocks)

    @classmethod
    def stack(cls, orders: Sequence["Order"]) -> "Order":
        """One order a sequence, from orders of (N,)."""
        return cls(
            torch.stack([order.positions for order in orders]),
            torch.stack([order.blocks for order in orders]),
            max(order.largest_block for order in orders),
        )

    @property
    def length(self) -> int:
        """N, the number of positions."""
        return self.positions.shape[-1]

    @property
    def one_by_one(self) -> bool:
        """True when every block is a single token; then plain causal kernels serve (docs/model.md, section 2.3)."""
        return self.largest_block == 1

    @property
    def ranks(self) -> Tensor:
        """int64, same shape: the rank of each position, the inverse of `positions`."""
        return self.positions.argsort(dim=-1)

    @property
    def block_starts(self) -> Tensor:
        """int64, same shape: the first rank of each rank's block, which is the number of ranks in earlier blocks."""
        if self.one_by_one:
            return torch.arange(self.length, device=self.positions.device).expand_as(self.positions)
        return torch.searchsorted(self.blocks, self.blocks, right=False)

    @property
    def block_ends(self) -> Tensor:
        """int64, same shape: one past the last rank of each rank's block."""
        return torch.searchsorted(self.blocks, self.blocks, right=True)

    def to(self, device: torch.device | str) -> "Order":
        """The same order on `device`."""
        return Order(self.positions.to(device), self.blocks.to(device), self.largest_block)


def stream_blocks(positions: Sequence[int], n_streams: int) -> list[list[int]]:
    """Cut `positions` into `n_streams` contiguous streams; the blocks in which they are generated, in order.

    The heads are blocks of one, then come the second tokens of all streams together, the third ones, and so on.

    Raises:
        ValueError: `n_streams` is less than 1.
    """
    if n_streams < 1:
        raise ValueError(f"n_streams must be at least 1, not {n_streams}")
    n_streams = min(n_streams, len(positions))
    if n_streams == 0:
        return []
    short, longer = divmod(len(positions), n_streams)
    streams = []
    start = 0
    for stream in range(n_streams):
        end = start + short + (stream < longer)
        streams.append(positions[start:end])
        start = end
    heads = [[stream[0]] for stream in streams]
    followers = [[stream[i] for stream in streams if i < len(stream)] for i in range(1, len(streams[0]))]
    return heads + followers


def _single(positions: Tensor) -> Order:
    return Order(positions, torch.arange(positions.shape[-1]).expand_as(positions), 1)


def _whole(name: str, values: Sequence[int] | Tensor) -> Tensor:
    """`values` as int64; numbers that are not whole would be cut off without a word."""
    found = torch.as_tensor(values)
    if found.numel() and (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool):
        raise ValueError(f"{name} must be whole numbers, not {str(found.dtype).removeprefix('torch.')}")
    return found.to(torch.int64)


def _length(length: int) -> int:
    if length < 1:
        raise ValueError(f"an order needs at least one position, not {length}")
    return length
