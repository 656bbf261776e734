"""Which rows a step has, where they are written and what they see: integers, worked out on the host.

Ranks make every mask an interval of keys. Neighbouring slots that bring equal numbers of rows are a run: attention over
a run is one call that reads the cache where it lies. With static shapes the rows of a text, the texts of a run and the
keys are padded to a few sizes, so that a GPU can replay what it has recorded; rows of the padding read the null key or
the first rank and write a rank that nobody reads.

Shapes: B texts of a run, R rows of each, K keys.
"""

import operator
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import NamedTuple

import torch
from torch import Tensor

from armd.cache import Cache

_KEYS_STEP = 128
"""With static shapes, numbers of keys are multiples of this."""


@dataclass
class Work:
    """What one text brings to a step: content rows from rank `cached` on, query rows from rank `queried` on."""

    slot: int
    """The text's place in the cache."""
    folded: int = 0
    """Ranks in the prefix state. Those up to `queried` are added to it, as their tokens are certain."""
    cached: int = 0
    """Ranks in the content cache."""
    queried: int = 0
    """Ranks in the cache of query rows."""
    tokens: Sequence[int] = ()
    """From rank `folded` to the last content row's."""
    positions: Sequence[int] = ()
    """From rank `folded` to the last query row's."""
    content_ends: Sequence[int] = ()
    """For each content row: how many ranks it sees."""
    starts: Sequence[int] = ()
    """For each query row: how many ranks of content it sees."""
    ends: Sequence[int] = ()
    """For each query row: how many ranks of query rows it sees; it always sees itself."""
    neighbours: Sequence[int | None] = ()
    """For each query row, at each of the model's offsets: the token there, if it is content that the row sees."""
    n_logits: int = 0
    """How many of the last query rows want logits."""


class Seen(NamedTuple):
    """What the rows of a run attend to."""

    keys: slice
    """Of a text's keys in the cache."""
    mask: Tensor | None
    """(B, 1, R, K), added to the scores; None where every row sees all K keys."""


class Shape(NamedTuple):
    """How many rows of each kind a text brings."""

    content: int
    query: int
    folded: int
    """Content that enters the prefix state."""
    pending: int
    """Content that some of the query rows see and some do not."""


class Run(NamedTuple):
    """Neighbouring slots with equal numbers of rows; slices are of the content rows, or the query rows, of all runs."""

    slots: slice
    content: slice
    query: slice
    folded: slice
    pending: slice
    content_seen: Seen
    """By content rows, of the content."""
    strict_seen: Seen
    """By query rows, of the content: the null key, then the first ranks."""
    query_seen: Seen
    """By query rows, of the query rows."""


class Rows:
    """The rows of one step: its runs, and by name the integers of all rows, on the device once they are placed.

    Content rows come first, text by text, then query rows.

    | of each              | integers                                                              |
    | -------------------- | --------------------------------------------------------------------- |
    | content row          | content_positions, content_places, content_ends (ranks of content     |
    |                      | that it sees)                                                         |
    | query row            | query_positions, query_places, query_ranks, starts (ranks of content  |
    |                      | that it sees), query_ends (ranks of query rows that it sees)          |
    | neighbour            | neighbours_known (0 or 1): of each query row, at each offset          |
    | folded rank          | folded_tokens, folded_positions                                       |
    | pending rank         | pending_tokens                                                        |
    | query row for logits | wanted (place among query rows)                                       |
    | embedded token       | embedded (token): those of content rows, then of neighbours           |
    | rotated row          | rotated (position): content rows twice, then query rows twice, so     |
    |                      | that the keys and the queries of every layer are a part of it         |

    `content_places` and `query_places` are in the storage of one layer with its slots joined.

    Args:
        work: what the texts bring, by slot.
        cache: where they bring it.
        n_neighbours: of each query row.
        static_shapes: pad to a few sizes.
    """

    def __init__(self, work: Sequence[Work], cache: Cache, *, n_neighbours: int, static_shapes: bool) -> None:
        self._cache = cache
        self._n_neighbours = n_neighbours
        self._static = static_shapes
        self._lists: defaultdict[str, list[int]] = defaultdict(list)
        first_query: dict[int, int] = {}
        cut: list[tuple[Shape, list[slice]]] = []
        for shape, members in _static_runs(work, cache.n_slots) if static_shapes else _runs(work):
            before = self._counts()
            for one in members:
                if one.positions:  # with static shapes a slot may bring padding to other runs
                    first_query[one.slot] = len(self._lists["query_positions"])
                self._add(one, shape)
            slots = slice(members[0].slot, members[-1].slot + 1)
            cut.append((shape, [slots, *map(slice, before, self._counts())]))
        for one in work:
            last = first_query[one.slot] + len(one.starts)
            self._lists["wanted"] += range(last - one.n_logits, last)
        self.n_wanted = len(self._lists["wanted"])
        if static_shapes:
            self._lists["wanted"] += [0] * (_size(self.n_wanted) - self.n_wanted)
        tokens = self._lists.pop("tokens")
        self._lists["embedded"] = tokens + self._lists.pop("neighbour_tokens")
        self._lists["rotated"] = 2 * self._lists["content_positions"] + 2 * self._lists["query_positions"]
        self.n_content, self.n_query = len(tokens), len(self._lists["query_positions"])
        self._cut = cut
        self._sizes = [len(values) for values in self._lists.values()]
        self.integers = torch.tensor([*chain(*self._lists.values())])
        """All of them, on the host."""
        self._keys = [self._numbers_of_keys(shape, content, query) for shape, (_, content, query, *_) in cut]
        """By run: how many keys its content rows see, its query rows of the content, its query rows of query rows."""
        self.plan = (
            tuple(self._sizes),
            tuple((shape, slots.start, slots.stop, n) for (shape, (slots, *_)), n in zip(cut, self._keys, strict=True)),
        )
        """With static shapes, all that a step depends on but the integers."""

    def placed(self, integers: Tensor) -> "Rows":
        """These rows, with their integers on the device."""
        self._columns = dict(zip(self._lists, integers.split(self._sizes), strict=True))
        self.runs = [self._run(slices, n_keys) for (_, slices), n_keys in zip(self._cut, self._keys, strict=True)]
        return self

    def __getitem__(self, column: str) -> Tensor:
        return self._columns[column]

    def _counts(self) -> list[int]:
        return [len(self._lists[name]) for name in ("tokens", "query_positions", "folded_tokens", "pending_tokens")]

    def _add(self, one: Work, shape: Shape) -> None:
        """Append the rows of one text, padded to the shape of its run."""
        cached, queried = one.cached - one.folded, one.queried - one.folded  # as indices of its tokens and positions
        nowhere = self._cache.max_length  # the position and the rank of the padding
        content = one.slot * self._cache.content.shape[3] + 1
        query = one.slot * self._cache.query.shape[3]
        content_ranks = range(content + one.cached, content + one.folded + len(one.tokens))
        query_ranks = range(one.queried, one.folded + len(one.positions))
        pad = self._pad
        pad("tokens", one.tokens[cached:], shape.content, 0)
        pad("content_positions", one.positions[cached : len(one.tokens)], shape.content, nowhere)
        pad("content_places", content_ranks, shape.content, content + nowhere)
        pad("content_ends", one.content_ends, shape.content, 1)
        pad("query_positions", one.positions[queried:], shape.query, nowhere)
        pad("query_places", [query + rank for rank in query_ranks], shape.query, query + nowhere)
        pad("query_ranks", query_ranks, shape.query, 0)
        pad("starts", one.starts, shape.query, 0)
        pad("query_ends", one.ends, shape.query, 1)
        n_neighbours = shape.query * self._n_neighbours
        assert len(one.neighbours) == self._n_neighbours * len(one.starts), (
            "a query row has a token or None at each offset"
        )
        pad("neighbour_tokens", [token or 0 for token in one.neighbours], n_neighbours, 0)
        pad("neighbours_known", [token is not None for token in one.neighbours], n_neighbours, 0)
        pad("folded_tokens", one.tokens[:queried], shape.folded, 0)
        pad("folded_positions", one.positions[:queried], shape.folded, nowhere)
        pad("pending_tokens", one.tokens[queried:], shape.pending, 0)

    def _pad(self, name: str, values: Sequence[int], length: int, padding: int) -> None:
        column = self._lists[name]
        column += values
        if len(values) < length:
            column += [padding] * (length - len(values))

    def _numbers_of_keys(self, shape: Shape, content: slice, query: slice) -> tuple[int, int, int]:
        lists = self._lists
        own = 1 + max(lists["query_ranks"][query])
        n_content = max(lists["content_ends"][content]) if shape.content else 0
        n_strict = 1 + max(lists["starts"][query])
        return self._n_keys(n_content), self._n_keys(n_strict), self._n_keys(max(own, *lists["query_ends"][query]))

    def _n_keys(self, n_keys: int) -> int:
        if not self._static:
            return n_keys
        return min(-(-n_keys // _KEYS_STEP) * _KEYS_STEP, self._cache.max_length + 1)

    def _run(self, slices: list[slice], n_keys: tuple[int, int, int]) -> Run:
        """A run, with what its rows see."""
        slots, content, query, folded, pending = slices
        n_content, n_strict, n_query = n_keys
        return Run(
            *(slots, content, query, folded, pending),
            content_seen=self._first(slots, "content_ends", content, slice(1, 1 + n_content)),
            strict_seen=self._first(slots, "starts", query, slice(0, n_strict)),
            query_seen=self._first_and_own(slots, query, slice(0, n_query)),
        )

    def _first(self, slots: slice, ends: str, rows: slice, keys: slice) -> Seen:
        """Of the content, the first ranks; the null key too where `keys` begin with it."""
        shown = self._lists[ends][rows]
        if not shown or (not self._static and min(shown) == max(shown)):
            return Seen(keys, None)
        return Seen(keys, self._mask(slots, self[ends][rows] + (1 - keys.start), keys))

    def _first_and_own(self, slots: slice, query: slice, keys: slice) -> Seen:
        """Of the query rows: the first ranks, and the row's own."""
        ends, own = (self._lists[name][query] for name in ("query_ends", "query_ranks"))
        if not self._static and min(ends) == keys.stop:
            return Seen(keys, None)
        mask = self._mask(slots, self["query_ends"][query], keys)
        if self._static or any(map(operator.le, ends, own)):
            mask.scatter_(3, self["query_ranks"][query].view(*mask.shape[:3], 1), 0.0)
        return Seen(keys, mask)

    def _mask(self, slots: slice, shown_M: Tensor, keys: slice) -> Tensor:
        n_keys = keys.stop - keys.start
        return self._cache.mask(shown_M, n_keys).view(slots.stop - slots.start, 1, -1, n_keys)


def _runs(work: Sequence[Work]) -> Iterator[tuple[Shape, list[Work]]]:
    """Runs without padding: neighbours of one shape."""
    shapes = [_shape(one) for one in work]
    for (_, shape), group in groupby(enumerate(work), key=lambda pair: (pair[1].slot - pair[0], shapes[pair[0]])):
        yield shape, [one for _, one in group]


def _static_runs(work: Sequence[Work], n_slots: int) -> Iterator[tuple[Shape, list[Work]]]:
    """Runs of padded shapes, from slot 0 on; slots that bring nothing of that shape bring padding."""
    by_shape: dict[Shape, dict[int, Work]] = {}
    for one in work:
        by_shape.setdefault(Shape(*map(_size, _shape(one))), {})[one.slot] = one
    for shape, members in by_shape.items():
        n_texts = min(_size(max(members) + 1), n_slots)
        yield shape, [members.get(slot) or Work(slot) for slot in range(n_texts)]


def _shape(one: Work) -> Shape:
    queried = one.queried - one.folded
    return Shape(len(one.content_ends), len(one.starts), queried, len(one.tokens) - queried)


def _size(n: int) -> int:
    """`n`, padded to a power of two."""
    return 1 << (n - 1).bit_length() if n else 0
