"""One request on its way: the order it is written in, the rows it brings to a step, what a step's draws make of it.

Three ways to fill the positions of an order, all of them here:

* parallel: a block at a time, drawn and done;
* exact (docs/model.md, section 5.1): the next ranks are drafted, `n_streams` at most, heads too. The first of them
  stands at once, as it was drawn from what it is to follow; the next step verifies the others and drafts on. At a
  rejection the accepted drafts and the replacement stay, and the drafts behind it wait for the next step, wherever
  blocks would have begun: so many ranks are in as many different streams all the same. Where most drafts are rejected,
  as heads are, fewer are made;
* adaptive: of the next `n_streams` open positions those are filled of which the model is sure enough, by `threshold` or
  by `max_entropy`.

In the last two, caches hold what the order has with one token a block: content rows see the ranks before them, and
query rows that were computed before their evidence was complete are computed again.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice

import torch
from torch import Tensor

from armd.choice import Ask, Choice
from armd.order import stream_blocks
from armd.rows import Work
from armd.sampling import SamplingParams

_MORE_THAN_TWICE = 4
"""So many more drafts than twice what the last step wrote. More would be verified for nothing; fewer cost steps."""


@dataclass(frozen=True)
class Written:
    """One token that a step chose."""

    index: int
    """Its place among the tokens to be written, in text order; 0 is the first after a prompt."""
    token: int
    logprob: float
    """Natural logarithm of its probability given the blocks before its own, before temperature."""
    top: tuple[tuple[int, float], ...] = ()
    """The most probable tokens there with their log-probabilities, as many as `top_logprobs` asks for."""


@dataclass(frozen=True)
class Completion:
    """A finished text, without its prompt."""

    tokens: list[int]
    logprobs: list[float]
    steps: int
    """Forward passes that wrote tokens of this text."""
    finish_reason: str
    """`stop` at a stop token, else `length`."""
    step_of_token: list[int]
    """The step, counted from 1, at which each token was written."""
    accepted: int = 0
    """Tokens written as they were drafted; 0 in parallel mode, which verifies nothing."""
    rejected: int = 0
    """Tokens written in place of a draft; 0 in parallel mode."""
    top_logprobs: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    """The most probable tokens at each place; empty unless `top_logprobs` asks for some."""


@dataclass(frozen=True)
class Event:
    """What a step did for one request."""

    request_id: int
    written: list[Written]
    completion: Completion | None = None
    """Set once, in the request's last event."""
    drafted: list[Written] = field(default_factory=list)
    """In exact mode, what the next step will verify; it may come otherwise."""
    rejected: int = 0
    """Of `written`, tokens in place of a rejected draft."""


class Request:
    """The state of one request; the engine owns its slot and its turn, the decoder its tensors.

    `template` holds token ids, None for a hole. Known tokens come first in the order, left to right and one a block;
    `blocks` are the positions of the holes in theirs, None: strided. `offsets` are the model's.
    """

    def __init__(
        self,
        request_id: int,
        template: Sequence[int | None],
        params: SamplingParams,
        blocks: Sequence[Sequence[int]] | None = None,
        *,
        offsets: Sequence[int] = (),
    ) -> None:
        holes = [position for position, token in enumerate(template) if token is None]
        self.request_id = request_id
        self.params = params
        self.generator = params.generator()
        self.known = [(position, token) for position, token in enumerate(template) if token is not None]
        """(position, token) by rank."""
        self.positions = [position for position, _ in self.known]
        """By rank, of the tokens that stand."""
        self.tokens = [token for _, token in self.known]
        self._offsets = offsets
        self._ranked = {position: (rank, token) for rank, (position, token) in enumerate(self.known)}
        """position -> rank and token, of the tokens that stand."""
        blocks = stream_blocks(holes, params.n_streams) if blocks is None else blocks
        self.blocks = deque(list(block) for block in blocks)
        """Positions to fill, by block; outside parallel mode one a block."""
        self.one_by_one = params.mode == "exact" or params.adaptive
        if self.one_by_one:
            self.blocks = deque([position] for block in self.blocks for position in block)
        self.slot = -1
        self.folded = self.cached = self.queried = 0
        """Ranks in the prefix state, in the content cache and in the cache of query rows."""
        self._drafts: list[Written] = []
        """For the first blocks, to be verified."""
        self._n_to_draft = min(params.n_streams, _MORE_THAN_TWICE)
        self._draft_probabilities: Tensor | None = None
        self._candidates: list[int] = []
        """Positions that the step under way draws."""
        self._index = {position: index for index, position in enumerate(holes)}
        self._written: dict[int, tuple[Written, int]] = {}  # position -> what, at which step
        self._steps = self._accepted = self._rejected = 0
        self._end: int | None = None  # position of the first stop token

    @property
    def n_to_prefill(self) -> int:
        """Known tokens that are not in the cache."""
        return max(0, len(self.known) - self.cached)

    @property
    def draws(self) -> bool:
        """The step under way draws tokens for it, or verifies some."""
        return bool(self._candidates or self._drafts)

    def skip(self, n_ranks: int) -> None:
        """Leave out the first known ranks: the slot's caches hold them."""
        self.cached = self.queried = n_ranks

    def work(self, n_prefill: int) -> Work:
        """The rows of the next step: at most `n_prefill` known tokens; once those are done, positions to draw."""
        if self.n_to_prefill > n_prefill:
            n_content = self.cached + n_prefill
            self._candidates = []
            positions = self.positions[self.folded : n_content]
        else:
            n_content = len(self.tokens) + len(self._drafts)
            self._candidates = self._next_candidates()
            drafted = (block[0] for block in islice(self.blocks, len(self._drafts)))
            positions = [*self.positions[self.folded :], *drafted, *self._candidates]
        causal = self.one_by_one or self.cached < len(self.known)
        n_drawn = len(self._candidates)
        n_ranks = n_content + n_drawn
        starts = [*range(self.queried, n_content), *[n_content] * n_drawn]
        work = Work(
            slot=self.slot,
            folded=self.folded,
            cached=self.cached,
            queried=self.queried,
            tokens=[*self.tokens[self.folded : n_content], *(draft.token for draft in self._drafts)],
            positions=positions,
            content_ends=range(self.cached + 1, n_content + 1) if causal else [n_content] * (n_content - self.cached),
            starts=starts,
            ends=[*range(self.queried + 1, n_content + 1), *self._candidate_ends(n_content, n_ranks)],
            neighbours=self._neighbours(positions[self.queried - self.folded :], starts) if self._offsets else (),
            n_logits=len(self._drafts) + n_drawn,
        )
        self.folded, self.cached = self.queried, n_content
        # A candidate's query row stays only where it is known to be a row of its own order.
        self.queried = n_content if self.one_by_one else n_ranks
        return work

    def ask(self) -> Ask:
        """What to draw from the logits of the step under way."""
        drawn = [block[0] for block in islice(self.blocks, len(self._drafts))] + self._candidates
        return Ask(
            params=self.params,
            generator=self.generator,
            n_rows=len(drawn),
            rows_without_stop=[row for row, at in enumerate(drawn) if self._index[at] < self.params.min_tokens],
            drafts=[draft.token for draft in self._drafts],
            draft_probabilities=self._draft_probabilities,
        )

    def take(self, choice: Choice) -> Event:
        """Write what the step chose; the event holds the completion when nothing is left to fill."""
        self._steps += 1
        end_before, rejected_before = self._end, self._rejected
        if self.params.mode == "exact":
            written = self._take_exact(choice)
        elif self.params.adaptive:
            written = self._take_sure(choice)
        else:
            self.blocks.popleft()
            written = [self._write(at, choice, row) for row, at in enumerate(self._candidates)]
        if self._end is not None and self._end != end_before:  # what stands behind the end will not be read
            left = ([position for position in block if position < self._end] for block in self.blocks)
            self.blocks = deque(block for block in left if block)
            self._drafts, self._draft_probabilities = [], None
        completion = None if self.blocks else self.completion()
        return Event(self.request_id, written, completion, self._drafts, self._rejected - rejected_before)

    def completion(self) -> Completion:
        """The text as it stands."""
        end = float("inf") if self._end is None else self._end
        kept = [self._written[position] for position in sorted(self._written) if position < end]
        return Completion(
            tokens=[one.token for one, _ in kept],
            logprobs=[one.logprob for one, _ in kept],
            steps=self._steps,
            finish_reason="length" if self._end is None else "stop",
            step_of_token=[step for _, step in kept],
            accepted=self._accepted,
            rejected=self._rejected,
            top_logprobs=[one.top for one, _ in kept] if self.params.top_logprobs else [],
        )

    def _next_candidates(self) -> list[int]:
        """Positions to draw, behind those of the drafts."""
        n_drafts = len(self._drafts)
        if not self.one_by_one:
            return self.blocks[0]
        if self.params.mode == "exact":
            return [block[0] for block in islice(self.blocks, n_drafts, n_drafts + self._n_to_draft)]
        candidates: list[int] = []
        for (position,) in self.blocks:
            if len(candidates) == self.params.n_streams:
                break
            if position - 1 not in candidates:  # neighbours depend on each other too much to be drawn apart
                candidates.append(position)
        return candidates

    def _neighbours(self, positions: Sequence[int], starts: Sequence[int]) -> list[int | None]:
        """For query rows at `positions`, the tokens at the offsets from there, of the ranks before their `starts`."""
        drafts = zip(self.blocks, self._drafts, strict=False)
        drafted = {block[0]: (rank, one.token) for rank, (block, one) in enumerate(drafts, start=len(self.tokens))}
        found: list[int | None] = []
        for position, start in zip(positions, starts, strict=True):
            for offset in self._offsets:
                at = position + offset
                rank, token = self._ranked.get(at) or drafted.get(at) or (start, None)
                found.append(token if rank < start else None)
        return found

    def _candidate_ends(self, n_content: int, n_ranks: int) -> Sequence[int]:
        """How many query rows each candidate sees; the first stands where it would as the next rank in any case."""
        n_drawn = n_ranks - n_content
        if not self.one_by_one:
            return [n_ranks] * n_drawn
        if self.params.mode == "exact":  # they are in their order, so each sees those before it, as it will
            return range(n_content + 1, n_ranks + 1)
        return [n_content + (row == 0) for row in range(n_drawn)]  # any of them may be the next

    def _take_exact(self, choice: Choice) -> list[Written]:
        """Keep drafts up to the first that is rejected; where none is, the first new draft stands as it was drawn.

        The next ones wait, old and new: nothing that has been seen since depends on what they turned out to be.
        """
        n_before, n_drafts, end_before = len(self.tokens), len(self._drafts), self._end
        new = enumerate(self._candidates, start=n_drafts)
        drafts = self._drafts + [self._told(position, choice, row) for row, position in new]
        written: list[Written] = []
        n_kept = 0
        for row, kept in enumerate([*choice.kept, True][: len(drafts)]):
            written.append(self._write(self.blocks.popleft()[0], choice, row))
            n_kept += kept and row < n_drafts
            self._rejected += not kept
            # A stop token changes which positions are left, and so what later drafts may build on.
            if not kept or self._end != end_before:
                break
        self._n_to_draft = min(self.params.n_streams, 2 * len(written) + _MORE_THAN_TWICE)
        waiting = slice(len(written), len(written) + self._n_to_draft - 1)
        assert choice.probabilities is not None, "an exact request is told what its tokens were drawn from"
        old, new_ones = self._draft_probabilities, choice.probabilities
        self._drafts = drafts[waiting]
        self._draft_probabilities = (new_ones if old is None else torch.cat([old, new_ones]))[waiting]
        self._accepted = len(self._written) - self._rejected
        self.cached, self.queried = n_before + n_kept, len(self.tokens)
        return written

    def _take_sure(self, choice: Choice) -> list[Written]:
        """Fill the candidates of which the model is sure, at least the one it is surest of; the others stay open."""
        n_before = len(self.tokens)
        rows = self._sure_rows(choice)
        written = [self._write(self._candidates[row], choice, row) for row in rows]
        filled = {self._candidates[row] for row in rows}
        self.blocks = deque(block for block in self.blocks if block[0] not in filled)
        self.queried = n_before + (rows[0] == 0)  # the first candidate's query row stands at its rank, if it was filled
        return written

    def _sure_rows(self, choice: Choice) -> list[int]:
        """The rows to write, as `threshold` or `max_entropy` has it."""
        most = self.params.max_entropy
        if most is None:
            rows = [row for row, sureness in enumerate(choice.sureness) if sureness >= self.params.threshold]
            return rows or [choice.sureness.index(max(choice.sureness))]
        # The largest of the entropies does not count: what a last token leaves open, no other has to fit.
        by_entropy = sorted(range(len(choice.entropies)), key=choice.entropies.__getitem__)
        before = accumulate((choice.entropies[row] for row in by_entropy), initial=0.0)
        return sorted(row for row, spent in zip(by_entropy, before, strict=False) if spent <= most)

    def _write(self, position: int, choice: Choice, row: int) -> Written:
        """Let what the step chose for `row` stand at `position`."""
        one = self._told(position, choice, row)
        self.positions.append(position)
        self._ranked[position] = len(self.tokens), one.token
        self.tokens.append(one.token)
        self._written[position] = (one, self._steps)
        if one.token in self.params.stop_ids and (self._end is None or position < self._end):
            self._end = position
        return one

    def _told(self, position: int, choice: Choice, row: int) -> Written:
        """What the step chose for `row`, at `position`."""
        top = choice.tops[row] if choice.tops else ()
        return Written(self._index[position], choice.tokens[row], choice.logprobs[row], top)
