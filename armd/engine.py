"""Continuous batching: who decodes next. Decides on slots, admission and the end of a text; tensors are the decoder's.

Requests join and leave between steps; each has its own generator, so its draws do not depend on its neighbours.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from armd.decoder import Decoder, Work
from armd.model import ARMD
from armd.order import stream_blocks
from armd.sampling import SamplingParams, distribution, draw


@dataclass(frozen=True)
class Written:
    """One token that a step chose."""

    index: int
    """Its place among the tokens to be written, in text order; 0 is the first after a prompt."""
    token: int
    logprob: float
    """Natural logarithm of its probability given the blocks before its own, before temperature."""


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
    """Drafts that verification kept; 0 in parallel mode, which verifies nothing."""
    rejected: int = 0
    """Drafts that verification replaced; 0 in parallel mode."""


@dataclass(frozen=True)
class Event:
    """What a step did for one request."""

    request_id: int
    written: list[Written]
    completion: Completion | None = None
    """Set once, in the request's last event."""


@dataclass
class _Text:
    """A request on its way: what is known, what is chosen, what is left to fill."""

    request_id: int
    params: SamplingParams
    known: dict[int, int]
    """position -> token, given with the request; generated first, left to right."""
    blocks: deque[list[int]]
    """Positions to fill, by block, in order."""
    holes: dict[int, int] = field(init=False)
    """position -> index among the tokens to be written."""
    slot: int = -1
    rank: int = 0
    """Ranks in the cache."""
    chosen: list[tuple[int, int]] = field(default_factory=list)
    """(position, token) of the last block, not yet in the cache."""
    written: dict[int, tuple[Written, int]] = field(default_factory=dict)
    """position -> what was written there, and at which step."""
    steps: int = 0
    end: int | None = None
    """Position of the first stop token, once there is one."""

    def __post_init__(self) -> None:
        self.generator = self.params.generator()
        filled = sorted(position for block in self.blocks for position in block)
        self.holes = {position: index for index, position in enumerate(filled)}


class Engine:
    """Decodes many requests at once on one model.

    Memory for `max_slots` texts is claimed here; requests beyond them wait their turn. Not thread-safe: one caller
    submits, steps and cancels.
    """

    def __init__(self, model: ARMD, *, max_slots: int = 8, device: torch.device | str | None = None) -> None:
        if device is not None:
            model = model.to(device)
        self.model = model.eval()
        self.decoder = Decoder(self.model, max_slots)
        self._free = deque(range(max_slots))
        self._waiting: deque[_Text] = deque()
        self._running: dict[int, _Text] = {}
        self._next_id = 0

    @property
    def idle(self) -> bool:
        """True when no request waits or runs."""
        return not self._waiting and not self._running

    def submit(self, prompt: Sequence[int], params: SamplingParams) -> int:
        """Queue a continuation of `prompt` (token ids, may be empty); returns the request's id.

        Raises:
            ValueError: a token is not in the vocabulary, or prompt and max_tokens do not fit the model's length.
        """
        length = len(prompt) + params.max_tokens
        if length > self.model.config.max_length:
            raise ValueError(
                f"max_tokens ({params.max_tokens}) + prompt ({len(prompt)}) exceeds the context of "
                f"{self.model.config.max_length} tokens"
            )
        return self.submit_template([*prompt, *([None] * params.max_tokens)], params)

    def submit_template(self, template: Sequence[int | None], params: SamplingParams) -> int:
        """Queue an infilling: token ids, None for each hole. All holes are filled; `params.max_tokens` plays no part.

        The known tokens come first in the order, then the holes, from left to right cut into `params.n_streams`.

        Raises:
            ValueError: a token is not in the vocabulary, or the template is longer than the model's length.
        """
        known = {position: token for position, token in enumerate(template) if token is not None}
        holes = [position for position, token in enumerate(template) if token is None]
        for token in known.values():
            if not 0 <= token < self.model.config.vocab_size:
                raise ValueError(f"token {token} is not in the vocabulary of {self.model.config.vocab_size}")
        if len(template) > self.model.config.max_length:
            raise ValueError(
                f"{len(template)} tokens are more than the context of {self.model.config.max_length} tokens"
            )
        text = _Text(self._next_id, params, known, deque(stream_blocks(holes, params.n_streams)))
        self._next_id += 1
        self._waiting.append(text)
        return text.request_id

    def cancel(self, request_id: int) -> bool:
        """Forget a request and free its slot; False when it is not here (any more)."""
        text = self._running.pop(request_id, None)
        if text is not None:
            self._free.append(text.slot)
            return True
        waiting = len(self._waiting)
        self._waiting = deque(text for text in self._waiting if text.request_id != request_id)
        return len(self._waiting) < waiting

    def step(self) -> list[Event]:
        """Admit what fits, advance every running text by one block; one event a text."""
        events = self._admit()
        texts = sorted(self._running.values(), key=lambda text: text.slot)
        if not texts:
            return events
        logits = self.decoder.step([_work(text) for text in texts])
        row = 0
        for text in texts:
            block = text.blocks.popleft()
            rows = logits[row : row + len(block)]
            row += len(block)
            events.append(self._write(text, block, rows))
        return events

    def _admit(self) -> list[Event]:
        """Give free slots to waiting requests; those with nothing to fill end at once."""
        events = []
        while self._waiting and (self._free or not self._waiting[0].blocks):
            text = self._waiting.popleft()
            if not text.blocks:
                events.append(Event(text.request_id, [], _completion(text)))
                continue
            text.slot = self._free.popleft()
            self.decoder.cache.clear(text.slot)
            self._running[text.request_id] = text
        return events

    def _write(self, text: _Text, block: list[int], logits_SV: torch.Tensor) -> Event:
        """Draw the block's tokens; the text ends when no position before its first stop token is left."""
        tokens_S = draw(distribution(logits_SV, text.params), text.generator)
        logprobs_S = logits_SV.float().log_softmax(dim=1).gather(1, tokens_S[:, None]).squeeze(1)
        text.steps += 1
        written = []
        for position, token, logprob in zip(block, tokens_S.tolist(), logprobs_S.tolist(), strict=True):
            one = Written(text.holes[position], token, logprob)
            written.append(one)
            text.written[position] = (one, text.steps)
            if token in text.params.stop_ids and (text.end is None or position < text.end):
                text.end = position
        text.chosen = list(zip(block, (one.token for one in written), strict=True))
        if text.end is not None:  # what stands behind the end will not be read
            left = ([position for position in block if position < text.end] for block in text.blocks)
            text.blocks = deque(block for block in left if block)
        if text.blocks:
            return Event(text.request_id, written)
        del self._running[text.request_id]
        self._free.append(text.slot)
        return Event(text.request_id, written, _completion(text))


def _work(text: _Text) -> Work:
    """The rows a text brings to this step; on its first step those of all known tokens as well."""
    block = text.blocks[0]
    if text.rank == 0 and not text.chosen:
        positions = sorted(text.known)
        n = len(positions)
        work = Work(
            slot=text.slot,
            tokens=[text.known[position] for position in positions],
            token_positions=positions,
            token_rank=0,
            token_ends=list(range(1, n + 1)),
            positions=positions + block,
            rank=0,
            starts=[*range(n), *([n] * len(block))],
            ends=[*range(1, n + 1), *([n + len(block)] * len(block))],
            n_fill=len(block),
        )
        text.rank = n
        return work
    first, n = text.rank, text.rank + len(text.chosen)
    text.rank = n
    return Work(
        slot=text.slot,
        tokens=[token for _, token in text.chosen],
        token_positions=[position for position, _ in text.chosen],
        token_rank=first,
        token_ends=[n] * len(text.chosen),
        positions=block,
        rank=n,
        starts=[n] * len(block),
        ends=[n + len(block)] * len(block),
        n_fill=len(block),
    )


def _completion(text: _Text) -> Completion:
    end = text.end if text.end is not None else float("inf")
    kept = [text.written[position] for position in sorted(text.written) if position < end]
    return Completion(
        tokens=[one.token for one, _ in kept],
        logprobs=[one.logprob for one, _ in kept],
        steps=text.steps,
        finish_reason="length" if text.end is None else "stop",
        step_of_token=[step for _, step in kept],
    )


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


def infill(model: ARMD, template: Sequence[int | None], params: SamplingParams) -> Completion:
    """Fill the holes (None) of a template; the completion holds the filled tokens in text order."""
    engine = Engine(model, max_slots=1)
    return _finish(engine, [engine.submit_template(template, params)])[0]


def _finish(engine: Engine, ids: Sequence[int]) -> list[Completion]:
    done = {}
    while not engine.idle:
        for event in engine.step():
            if event.completion is not None:
                done[event.request_id] = event.completion
    return [done[request_id] for request_id in ids]
