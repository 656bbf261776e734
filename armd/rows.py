"""Which rows a step has, where they are written and what they see: integers, worked out on the host.

Ranks make every mask an interval of keys. Neighbouring slots that bring equal numbers of rows are a run: attention over
a run is one call that reads the cache where it lies. With static shapes the rows of a text, the texts of a run and the
keys are padded to a few sizes, so that a GPU can replay what it has recorded; rows of the padding read the null key
and write a rank that nobody reads.

Shapes: B texts of a run, R rows of each, K keys.
"""

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
    n_logits: int = 0
    """How many of the last query rows want logits."""


class Seen(NamedTuple):
    """What the rows of a run attend to."""

    n_keys: int
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
    """Neighbouring slots with equal numbers of rows; slices are of the rows of all runs."""

    slots: slice
    both: slice
    """Content and query rows."""
    query: slice
    folded: slice
    pending: slice
    both_seen: Seen
    """Of the content, the null key in front, which only query rows see."""
    strict_seen: Seen
    """The same by query rows alone."""
    query_seen: Seen
    """Of the query rows, by query rows."""


class Rows:
    """The rows of one step: its runs, and by name the integers of all rows, on the device once they are placed.

    Rows of both streams go text by text, content before query rows.

    | of each              | integers                                                              |
    | -------------------- | --------------------------------------------------------------------- |
    | row                  | positions, content_ends (ranks of content that it sees)               |
    | content row          | tokens, content_rows (place among all rows), content_places           |
    | query row            | query_rows (place among all rows), query_positions, query_ranks,      |
    |                      | query_places, query_ends (ranks of query rows that it sees)           |
    | folded rank          | folded_tokens, folded_positions                                       |
    | pending rank         | pending_tokens                                                        |
    | query row for logits | wanted (place among query rows)                                       |

    `content_places` and `query_places` are in the storage of one layer with its slots joined.

    Args:
        work: what the texts bring, by slot.
        cache: where they bring it.
        static_shapes: pad to a few sizes.
    """

    def __init__(self, work: Sequence[Work], cache: Cache, *, static_shapes: bool) -> None:
        self._cache = cache
        self._static = static_shapes
        self._lists: defaultdict[str, list[int]] = defaultdict(list)
        first_query: dict[int, int] = {}
        cut: list[tuple[Shape, list[slice]]] = []
        for shape, members in _static_runs(work, cache.n_slots) if static_shapes else _runs(work):
            before = self._counts()
            for one in members:
                if one.positions:  # with static shapes a slot may bring padding to other runs
                    first_query[one.slot] = len(self._lists["query_rows"])
                self._add(one, shape)
            slots = slice(members[0].slot, members[-1].slot + 1)
            cut.append((shape, [slots, *map(slice, before, self._counts())]))
        for one in work:
            last = first_query[one.slot] + len(one.starts)
            self._lists["wanted"] += range(last - one.n_logits, last)
        self.n_wanted = len(self._lists["wanted"])
        if static_shapes:
            self._lists["wanted"] += [0] * (_size(self.n_wanted) - self.n_wanted)
        self._cut = cut
        self._sizes = [len(values) for values in self._lists.values()]
        self.integers = torch.tensor([*chain(*self._lists.values())])
        """All of them, on the host."""
        keys = [(self._content_keys(both), self._query_keys(query)) for _, (_, both, query, *_) in cut]
        self.plan = (
            tuple(self._sizes),
            tuple((shape, slots.start, slots.stop, n) for (shape, (slots, *_)), n in zip(cut, keys, strict=True)),
        )
        """With static shapes, all that a step depends on but the integers."""

    def placed(self, integers: Tensor) -> "Rows":
        """These rows, with their integers on the device."""
        self._columns = dict(zip(self._lists, integers.split(self._sizes), strict=True))
        self.runs = [self._run(shape, *slices) for shape, slices in self._cut]
        return self

    def __getitem__(self, column: str) -> Tensor:
        return self._columns[column]

    def _counts(self) -> list[int]:
        return [len(self._lists[name]) for name in ("positions", "query_rows", "folded_tokens", "pending_tokens")]

    def _add(self, one: Work, shape: Shape) -> None:
        """Append the rows of one text, padded to the shape of its run."""
        cached, queried = one.cached - one.folded, one.queried - one.folded  # as indices of its tokens and positions
        nowhere = self._cache.max_length  # the position and the rank of the padding
        content = one.slot * self._cache.content.shape[3] + 1
        query = one.slot * self._cache.query.shape[3]
        content_ranks = range(content + one.cached, content + one.folded + len(one.tokens))
        query_ranks = range(one.queried, one.folded + len(one.positions))
        row = len(self._lists["positions"])
        pad = self._pad
        pad("positions", one.positions[cached : len(one.tokens)], shape.content, nowhere)
        pad("positions", one.positions[queried:], shape.query, nowhere)
        pad("content_ends", one.content_ends, shape.content, 1)
        pad("content_ends", one.starts, shape.query, 0)
        pad("tokens", one.tokens[cached:], shape.content, 0)
        pad("content_rows", range(row, row + shape.content), shape.content, 0)
        pad("content_places", content_ranks, shape.content, content + nowhere)
        pad("query_rows", range(row + shape.content, row + shape.content + shape.query), shape.query, 0)
        pad("query_positions", one.positions[queried:], shape.query, nowhere)
        pad("query_ranks", query_ranks, shape.query, 0)
        pad("query_places", [query + rank for rank in query_ranks], shape.query, query + nowhere)
        pad("query_ends", one.ends, shape.query, 1)
        pad("folded_tokens", one.tokens[:queried], shape.folded, 0)
        pad("folded_positions", one.positions[:queried], shape.folded, nowhere)
        pad("pending_tokens", one.tokens[queried:], shape.pending, 0)

    def _pad(self, name: str, values: Sequence[int], length: int, padding: int) -> None:
        column = self._lists[name]
        column += values
        if len(values) < length:
            column += [padding] * (length - len(values))

    def _run(self, shape: Shape, slots: slice, both: slice, query: slice, folded: slice, pending: slice) -> Run:
        """A run, with what its rows see."""
        both_seen = self._content_seen(shape, slots, both)
        strict_seen = both_seen
        if both_seen.mask is not None:
            strict_seen = Seen(both_seen.n_keys, both_seen.mask[:, :, shape.content :])
        return Run(slots, both, query, folded, pending, both_seen, strict_seen, self._query_seen(slots, query))

    def _content_seen(self, shape: Shape, slots: slice, both: slice) -> Seen:
        """Of the content: the first ranks, and the null key by query rows."""
        shown = self._lists["content_ends"][both]
        n_keys = self._content_keys(both)
        if not shape.content and not self._static and min(shown) == max(shown):
            return Seen(n_keys, None)
        keys_K = torch.arange(n_keys, device=self._cache.prefix.device)
        mask = self._mask(keys_K > self["content_ends"][both].view(slots.stop - slots.start, 1, -1, 1))
        mask[:, :, : shape.content, 0] = -torch.inf
        return Seen(n_keys, mask)

    def _query_seen(self, slots: slice, query: slice) -> Seen:
        """Of the query rows: the first ranks, and the row's own."""
        shown = self._lists["query_ends"][query]
        n_keys = self._query_keys(query)
        if not self._static and min(shown) == n_keys:
            return Seen(n_keys, None)
        n_texts = slots.stop - slots.start
        keys_K = torch.arange(n_keys, device=self._cache.prefix.device)
        ends, own = (self[name][query].view(n_texts, 1, -1, 1) for name in ("query_ends", "query_ranks"))
        return Seen(n_keys, self._mask((keys_K >= ends) & (keys_K != own)))

    def _content_keys(self, both: slice) -> int:
        return self._n_keys(1 + max(self._lists["content_ends"][both]))

    def _query_keys(self, query: slice) -> int:
        own = 1 + max(self._lists["query_ranks"][query])
        return self._n_keys(max(own, *self._lists["query_ends"][query]))

    def _n_keys(self, n_keys: int) -> int:
        if not self._static:
            return n_keys
        return min(-(-n_keys // _KEYS_STEP) * _KEYS_STEP, self._cache.max_length + 1)

    def _mask(self, hidden: Tensor) -> Tensor:
        mask = torch.zeros(hidden.shape, dtype=self._cache.content.dtype, device=hidden.device)
        return mask.masked_fill_(hidden, -torch.inf)


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
