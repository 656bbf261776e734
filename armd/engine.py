"""Continuous batching: who decodes next. Decides on slots, admission, sharing and turns; tensors are the decoder's.

Requests join and leave between steps; each has its own generator, so its draws do not depend on its neighbours.
"""

import operator
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from armd.choice import choose
from armd.decoder import Decoder
from armd.model import ARMD
from armd.request import Completion, Event, Request
from armd.sampling import SamplingParams

_WORTH_SHARING = 16
"""Known tokens in common from which on they are copied instead of computed."""


@dataclass
class _Held:
    """What a slot's cache begins with."""

    known: list[tuple[int, int]]
    """(position, token) by rank."""
    request: Request | None
    """Who computes it; None once the slot is free."""


class Engine:
    """Decodes many requests at once on one model.

    Memory for `max_slots` texts is claimed here; requests beyond them wait their turn. Requests that begin alike share
    that beginning: it is computed once and copied, from a text that runs or from one that has left. Not thread-safe:
    one caller submits, steps and cancels.

    Whatever runs beside it, a request gets the tokens that it gets alone, and their log-probabilities to rounding, as
    products of other row counts add in another order. So it is from one process to another, where a machine computes
    products of few rows equally fast in several ways (products.py).

    Args:
        max_slots: texts that are written at once.
        device: where to compute; the model is moved there.
        prefill_chunk: known tokens that a step computes at most, beside what it decodes.
        memory_bytes: what the cache may take.
        static_shapes: pad rows to a few sizes; on a GPU, steps of a size that was there before are replayed.

    Raises:
        ValueError: the slots do not fit `memory_bytes`, or `model` is another kind of model.
    """

    def __init__(
        self,
        model: ARMD,
        *,
        max_slots: int = 8,
        device: torch.device | str | None = None,
        prefill_chunk: int = 256,
        memory_bytes: int | None = None,
        static_shapes: bool = False,
    ) -> None:
        if not isinstance(getattr(model, "_orig_mod", model), ARMD):  # compiled or not
            raise ValueError(f"an engine decodes with ARMD, not with {type(model).__name__}")
        if prefill_chunk < 1:
            raise ValueError(f"prefill_chunk must be at least 1, not {prefill_chunk}")
        if device is not None:
            model = model.to(device)
        self.model = model.eval()
        self.decoder = Decoder(self.model, max_slots, memory_bytes=memory_bytes, static_shapes=static_shapes)
        self._prefill_chunk = prefill_chunk
        self._held = [_Held([], None) for _ in range(max_slots)]
        self._waiting: deque[Request] = deque()
        self._running: dict[int, Request] = {}
        self._followers: dict[int, tuple[Request, int]] = {}
        """By the id of a request that waits in its slot: who computes its first ranks, and how many."""
        self._next_id = 0

    @property
    def idle(self) -> bool:
        """True when no request waits or runs."""
        return not self._waiting and not self._running

    def submit(self, prompt: Sequence[int], params: SamplingParams) -> int:
        """Queue a continuation of `prompt` (token ids, may be empty); returns the request's id.

        Raises:
            ValueError: a token is not in the vocabulary, or prompt and max_tokens do not fit the model's length. In a
                step, where it would fail for everybody, nothing that a request asks for fails.
        """
        if any(token is None for token in prompt):
            raise ValueError("prompt holds None: holes are for templates")
        length = len(prompt) + params.max_tokens
        if length > self.model.config.max_length:
            raise ValueError(
                f"max_tokens ({params.max_tokens}) + prompt ({len(prompt)}) exceeds the context of "
                f"{self.model.config.max_length} tokens"
            )
        return self.submit_template([*prompt, *([None] * params.max_tokens)], params)

    def submit_template(
        self,
        template: Sequence[int | None],
        params: SamplingParams,
        blocks: Sequence[Sequence[int]] | None = None,
    ) -> int:
        """Queue an infilling: token ids, None for each hole; `params.max_tokens` plays no part.

        All holes are filled, unless one of `params.stop_ids` is drawn: then those behind it are left out, so give none
        where known text follows a hole.

        The known tokens come first in the order, then the holes: in the order of `blocks`, lists of their positions;
        by default from left to right, cut into `params.n_streams`. Exact requests take positions in that order,
        `params.n_streams` at a time; adaptive ones too, but no two neighbours in one step.

        Raises:
            ValueError: a token is not in the vocabulary, the template is longer than the model's length, or `blocks`
                are not the holes.
        """
        vocab_size, max_length = self.model.config.vocab_size, self.model.config.max_length
        template = [None if token is None else _token_id(token, vocab_size, "token") for token in template]
        for kind, tokens in (("stop token", params.stop_ids), ("biased token", params.logit_bias)):
            for token in tokens:
                _token_id(token, vocab_size, kind)
        if params.min_tokens and len(set(params.stop_ids)) == vocab_size:
            raise ValueError(f"min_tokens ({params.min_tokens}) leaves nothing to draw: every token is a stop token")
        if len(template) > max_length:
            raise ValueError(f"{len(template)} tokens are more than the context of {max_length} tokens")
        if blocks is not None:
            holes = [position for position, token in enumerate(template) if token is None]
            if sorted(position for block in blocks for position in block) != holes or not all(blocks):
                raise ValueError(f"blocks must hold every hole of the template once, none of them empty, not {blocks}")
        request = Request(self._next_id, template, params, blocks, offsets=self.model.offsets)
        self._next_id += 1
        self._waiting.append(request)
        return request.request_id

    def cancel(self, request_id: int) -> bool:
        """Forget a request and free its slot; False when it is not here (any more)."""
        if request_id in self._running:
            self._leave(self._running[request_id])
            return True
        waiting = len(self._waiting)
        self._waiting = deque(one for one in self._waiting if one.request_id != request_id)
        return len(self._waiting) < waiting

    def step(self) -> list[Event]:
        """Admit what fits, advance the running texts; an event for each that wrote something or ended."""
        events = self._admit()
        turns = self._turns()
        if not turns:
            return events
        logits = self.decoder.step([request.work(n_prefill) for request, n_prefill in turns])
        drawing = [request for request, _ in turns if request.draws]
        if drawing:
            choices = choose(logits, [request.ask() for request in drawing])
            for request, choice in zip(drawing, choices, strict=True):
                events.append(request.take(choice))
                if events[-1].completion is not None:
                    self._leave(request)
        return events

    def _admit(self) -> list[Event]:
        """Give free slots to waiting requests; those with nothing to fill end at once."""
        events = []
        while self._waiting:
            free = [slot for slot, held in enumerate(self._held) if held.request is None]
            if self._waiting[0].blocks and not free:
                break
            request = self._waiting.popleft()
            if not request.blocks:
                events.append(Event(request.request_id, [], request.completion()))
                continue
            self._enter(request, free)
        return events

    def _enter(self, request: Request, free: list[int]) -> None:
        """Give `request` the slot that holds its beginning already, else the first one that is free."""
        slot = free[0]
        shared = [_in_common(request.known, held.known) for held in self._held]
        source = max(range(len(shared)), key=lambda slot: (shared[slot], slot in free))
        if shared[source] >= _WORTH_SHARING:
            leader = self._held[source].request
            if leader is None:
                slot = source
                request.skip(shared[source])
            else:
                self._followers[request.request_id] = leader, shared[source]
        request.slot = slot
        self._held[slot] = _Held(request.known, request)
        self.decoder.cache.clear(slot)
        self._running[request.request_id] = request

    def _turns(self) -> list[tuple[Request, int]]:
        """Who takes part in the next step, by slot, each with the known tokens that it may compute.

        Prefill goes by arrival; a request whose beginning another one computes waits for it.
        """
        left = self._prefill_chunk
        turns = []
        for request in self._running.values():
            if request.request_id in self._followers:
                leader, n_shared = self._followers[request.request_id]
                if leader.cached < n_shared:
                    continue
                self._share(request)
            n_prefill = min(request.n_to_prefill, left)
            if request.n_to_prefill and not n_prefill:
                continue
            left -= n_prefill
            turns.append((request, n_prefill))
        return sorted(turns, key=lambda turn: turn[0].slot)

    def _share(self, follower: Request) -> None:
        """Copy what `follower` waits for, as far as it was computed."""
        leader, n_shared = self._followers.pop(follower.request_id)
        n_ranks = min(n_shared, leader.cached)
        self.decoder.cache.copy(leader.slot, follower.slot, n_ranks)
        follower.skip(n_ranks)

    def _leave(self, request: Request) -> None:
        """Free the slot of `request`; what it computed stays there for requests that begin alike."""
        for follower_id, (leader, _) in list(self._followers.items()):
            if leader is request:
                self._share(self._running[follower_id])
        self._followers.pop(request.request_id, None)
        del self._running[request.request_id]
        self._held[request.slot] = _Held(request.known[: request.cached], None)


def _token_id(token: int, vocab_size: int, kind: str) -> int:
    """`token` as an int, if it is one of the vocabulary's; numpy's and torch's integers are."""
    try:
        index = operator.index(token)
    except TypeError:
        index = -1
    if not 0 <= index < vocab_size:
        raise ValueError(f"{kind} {token!r} is not in the vocabulary of {vocab_size}")
    return index


def _in_common(first: Sequence[tuple[int, int]], second: Sequence[tuple[int, int]]) -> int:
    """How many entries both begin with."""
    length = min(len(first), len(second))
    return next((i for i in range(length) if first[i] != second[i]), length)


def generate(
    model: ARMD, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
) -> list[Completion]:
    """Continue every prompt (token ids; [] starts from nothing); `params` is one for all or one a prompt."""
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    if len(each) != len(prompts):
        raise ValueError(f"{len(each)} sampling parameters were given for {len(prompts)} prompts")
    engine = Engine(model, max_slots=max(1, min(len(prompts), 32)))
    ids = [engine.submit(prompt, one) for prompt, one in zip(prompts, each, strict=True)]
    return _finish(engine, ids)


def infill(
    model: ARMD,
    template: Sequence[int | None],
    params: SamplingParams,
    blocks: Sequence[Sequence[int]] | None = None,
) -> Completion:
    """Fill the holes (None) of a template, see `Engine.submit_template`; the filled tokens come in text order."""
    engine = Engine(model, max_slots=1)
    return _finish(engine, [engine.submit_template(template, params, blocks)])[0]


def _finish(engine: Engine, ids: Sequence[int]) -> list[Completion]:
    done = {}
    while not engine.idle:
        for event in engine.step():
            if event.completion is not None:
                done[event.request_id] = event.completion
    return [done[request_id] for request_id in ids]
