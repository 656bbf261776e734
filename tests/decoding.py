"""Requests and models for tests of decoding, and the parallel pass that it is held against."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from armd import ARMD, Completion, Engine, Event, Order, SamplingParams, score

MODES: dict[str, dict[str, Any]] = {
    "parallel": {},
    "exact": {"mode": "exact"},
    "exact, cooler": {"mode": "exact", "temperature": 0.7, "top_p": 0.9, "top_k": 9},
    "adaptive": {"threshold": 0.4},
    "adaptive, hard to please": {"threshold": 1.0},
    "adaptive by entropy": {"max_entropy": 1.5},
}


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(13, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def mixed_requests(n: int = 8) -> list[tuple[list[int], SamplingParams]]:
    """Lengths, streams, modes and ways of sampling in many combinations; half begin alike."""
    lengths = [(0, 5, 1), (23, 16, 4), (9, 20, 2), (30, 7, 7), (2, 62, 8), (23, 3, 1), (7, 0, 2), (40, 24, 3)]
    requests = []
    for i in range(n):
        known, n_tokens, n_streams = lengths[i % len(lengths)]
        mode = list(MODES.values())[i % len(MODES)]
        params = SamplingParams(max_tokens=n_tokens, n_streams=n_streams, seed=i, **{"temperature": 0.9, **mode})
        requests.append((prompt(known, seed=i % 2), params))
    return requests


def events_of(engine: Engine, request_id: int) -> list[Event]:
    """Every event of a request, in order."""
    found = []
    for _ in range(1000):
        if engine.idle:
            return found
        found += [event for event in engine.step() if event.request_id == request_id]
    raise AssertionError("the engine does not come to an end")


def drain(engine: Engine) -> dict[int, Completion]:
    done = {}
    for _ in range(1000):
        if engine.idle:
            return done
        for event in engine.step():
            if event.completion is not None:
                assert event.request_id not in done
                done[event.request_id] = event.completion
    raise AssertionError("the engine does not come to an end")


def assert_same(one: Completion, other: Completion) -> None:
    """The same text in the same steps; log-probabilities to rounding."""
    assert dataclasses.replace(one, logprobs=[]) == dataclasses.replace(other, logprobs=[])
    torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), rtol=1e-4, atol=1e-5)


def parallel_logprobs(
    model: ARMD, template: Sequence[int | None], params: SamplingParams, events: Sequence[Event]
) -> torch.Tensor:
    """What the parallel pass says about every token, in the order in which `events` wrote them."""
    holes = [position for position, token in enumerate(template) if token is None]
    text = [token or 0 for token in template]
    steps = [[holes[one.index] for one in event.written] for event in events]
    for event, positions in zip(events, steps, strict=True):
        for position, one in zip(positions, event.written, strict=True):
            text[position] = one.token
    known = [position for position in range(len(template)) if position not in holes]
    ranked = known + [position for positions in steps for position in positions]
    unwritten = [position for position in holes if position not in ranked]  # behind a stop token; seen by nobody
    tokens = torch.tensor([text])
    if params.adaptive:  # each as if it alone came next
        logprobs = []
        for step, positions in enumerate(steps):
            before = known + [position for earlier in steps[:step] for position in earlier]
            for position in positions:
                rest = [other for other in range(len(text)) if other != position and other not in before]
                logprobs.append(score(model, tokens, Order.given([*before, position, *rest]))[0, position])
        return torch.stack(logprobs)
    one_by_one = params.mode == "exact"
    sizes = [1] * len(ranked) if one_by_one else [1] * len(known) + [len(positions) for positions in steps]
    sizes += [1] * len(unwritten)
    blocks = [block for block, size in enumerate(sizes) for _ in range(size)]
    return score(model, tokens, Order.given(ranked + unwritten, blocks))[0, ranked[len(known) :]]


def assert_cached_is_parallel(
    model: ARMD,
    template: Sequence[int | None],
    params: SamplingParams,
    blocks: Sequence[Sequence[int]] | None = None,
    **options: Any,
) -> Completion:
    engine = Engine(model, max_slots=2, **options)
    events = events_of(engine, engine.submit_template(template, params, blocks))
    cached = torch.tensor([one.logprob for event in events for one in event.written])
    torch.testing.assert_close(cached, parallel_logprobs(model, template, params, events), rtol=1e-4, atol=1e-5)
    completion = events[-1].completion
    assert completion is not None
    return completion
