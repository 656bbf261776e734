"""What one request gets: stop tokens, biases, figures, certainty, drafts; and what is refused."""

import dataclasses
import math
import re
from itertools import pairwise

import pytest
import torch

from armd import ARMD, Engine, SamplingParams, generate
from tests.decoding import MODES, assert_cached_is_parallel, events_of, prompt
from tests.models import tiny_model


@pytest.fixture(scope="module")
def model() -> ARMD:
    return tiny_model(max_length=64)


def test_events_tell_every_token_once_and_at_its_place(model: ARMD) -> None:
    engine = Engine(model, max_slots=1)
    engine.submit([1], SamplingParams(max_tokens=10, n_streams=3))
    told: dict[int, int] = {}
    completion = None
    while not engine.idle:
        for event in engine.step():
            for written in event.written:
                assert written.index not in told
                told[written.index] = written.token
            completion = event.completion
    assert completion is not None
    assert [told[i] for i in range(10)] == completion.tokens


def test_stop_cuts_the_text(model: ARMD) -> None:
    params = {"max_tokens": 40, "n_streams": 1, "seed": 5}
    free = generate(model, [[1]], SamplingParams(**params))[0]
    stop = free.tokens[6]
    one = generate(model, [[1]], SamplingParams(**params, stop_ids=(stop,)))[0]
    assert (one.finish_reason, free.finish_reason) == ("stop", "length")
    assert one.tokens == free.tokens[: free.tokens.index(stop)]
    assert one.steps == len(one.tokens) + 1


def test_a_stop_in_a_later_stream_waits_for_the_earlier_ones(model: ARMD) -> None:
    """The head of stream 2 is written at step 2; nothing behind it is computed, all before it still is."""
    for seed in range(100):
        params = {"max_tokens": 20, "n_streams": 2, "seed": seed}
        free = generate(model, [[1]], SamplingParams(**params))[0]
        stop = free.tokens[10]
        one = generate(model, [[1]], SamplingParams(**params, stop_ids=(stop,)))[0]
        if len(one.tokens) == 10:  # no other stop came before it
            assert one.finish_reason == "stop"
            assert one.steps == 11  # two heads, then nine tokens of the first stream
            assert stop not in one.tokens
            return
    raise AssertionError("no seed shows the case")


def test_no_stop_token_among_the_first_tokens(model: ARMD) -> None:
    params = {"max_tokens": 20, "n_streams": 3, "stop_ids": (0, 1, 2, 3, 4, 5)}
    for mode in MODES.values():
        n_short = 0
        for seed in range(5):
            one = generate(model, [[1]], SamplingParams(**params, **mode, seed=seed, min_tokens=7))[0]
            assert len(one.tokens) >= 7
            n_short += len(generate(model, [[1]], SamplingParams(**params, **mode, seed=seed))[0].tokens) < 7
        assert n_short > 2  # else this shows nothing


@pytest.mark.parametrize("mode", MODES)
def test_a_bias_forces_and_forbids_tokens_but_not_the_figures(model: ARMD, mode: str) -> None:
    params = SamplingParams(max_tokens=12, n_streams=3, logit_bias={4: 1e3, 5: 1e3, 6: -1e3}, **MODES[mode])
    one = assert_cached_is_parallel(model, [1, *[None] * 12], params)
    assert set(one.tokens) <= {4, 5}


@pytest.mark.parametrize("mode", MODES)
def test_top_logprobs_are_the_parallel_passes(sharp: ARMD, mode: str) -> None:
    params = SamplingParams(max_tokens=9, n_streams=3, top_logprobs=13, **MODES[mode])
    one = generate(sharp, [[1]], params)[0]
    assert len(one.top_logprobs) == 9
    for token, logprob, top in zip(one.tokens, one.logprobs, one.top_logprobs, strict=True):
        assert dict(top)[token] == pytest.approx(logprob, abs=1e-5)
        told = [each for _, each in top]
        assert told == sorted(told, reverse=True)
        assert torch.tensor(told).exp().sum() == pytest.approx(1, abs=1e-4)
    fewer = [dataclasses.replace(params, top_logprobs=n) for n in (2, 0, 20, 5)]
    for few, other in zip(fewer, generate(sharp, [[1]] * 4, fewer), strict=True):  # side by side
        told = [top[: few.top_logprobs] for top in one.top_logprobs] if few.top_logprobs else []
        assert [[token for token, _ in top] for top in other.top_logprobs] == [
            [token for token, _ in top] for top in told
        ]


def test_a_threshold_waits_for_certainty(sharp: ARMD) -> None:
    """At 0 all positions are filled at their turn, at 1 one a step; between them, only those that are sure enough."""
    base = SamplingParams(max_tokens=24, n_streams=4, seed=2)
    steps = {}
    for threshold in (0.001, 0.5, 1.0):
        engine = Engine(sharp, max_slots=1)
        params = dataclasses.replace(base, threshold=threshold, top_logprobs=1)
        events = events_of(engine, engine.submit([], params))
        steps[threshold] = len(events)
        for event in events:
            sure = [one.top[0][1] >= math.log(threshold) - 1e-6 for one in event.written]
            assert all(sure) or len(sure) == 1
    assert steps[0.001] == 6 < steps[0.5] < steps[1.0] == 24


def test_an_entropy_bound_holds_for_what_each_step_writes(sharp: ARMD) -> None:
    """Fails when the surest is taken instead of the most that fit, or when the largest entropy counts."""
    steps = {}
    for most in (0.0, 1.5, 100.0):
        engine = Engine(sharp, max_slots=1)
        params = SamplingParams(max_tokens=24, n_streams=4, seed=2, max_entropy=most, top_logprobs=13)
        events = events_of(engine, engine.submit([], params))
        steps[most] = len(events)
        several = 0
        for event in events:
            entropies = [-sum(math.exp(p) * p for _, p in one.top) for one in event.written]
            assert sum(entropies) - max(entropies) <= most + 1e-5
            several += len(entropies) > 1 and sum(entropies) > most
        assert most != 1.5 or several > 0
    assert steps[100.0] == 6 < steps[1.5] < steps[0.0] == 24


def test_drafts_are_told_and_then_verified(sharp: ARMD) -> None:
    engine = Engine(sharp, max_slots=1)
    events = events_of(engine, engine.submit([], SamplingParams(max_tokens=40, n_streams=4, mode="exact")))
    kept = rejected = 0
    for event, after in pairwise(events):
        for draft, written in zip(event.drafted, after.written, strict=False):
            assert draft.index == written.index
            kept += draft.token == written.token
            rejected += draft.token != written.token
    done = events[-1].completion
    assert done is not None
    assert rejected == done.rejected > 0
    assert kept > 0
    assert not events[-1].drafted


def test_requests_that_do_not_fit_are_refused_with_the_numbers(model: ARMD) -> None:
    engine = Engine(model)
    with pytest.raises(ValueError, match=r"max_tokens \(60\) \+ prompt \(5\) exceeds the context of 64"):
        engine.submit([0] * 5, SamplingParams(max_tokens=60))
    with pytest.raises(ValueError, match="token 13 is not in the vocabulary of 13"):
        engine.submit([13], SamplingParams(max_tokens=1))
    for strange in (1.5, "1", None):
        with pytest.raises(
            ValueError, match=re.escape(f"token {strange!r} is not") if strange else "prompt holds None"
        ):
            engine.submit([1, strange], SamplingParams(max_tokens=1))
    with pytest.raises(ValueError, match="stop token 99 is not"):
        engine.submit([1], SamplingParams(max_tokens=1, stop_ids=(99,)))
    with pytest.raises(ValueError, match="biased token -1 is not"):
        engine.submit([1], SamplingParams(max_tokens=1, logit_bias={-1: 2.0}))
    with pytest.raises(ValueError, match=r"min_tokens \(1\) leaves nothing to draw"):
        engine.submit([1], SamplingParams(max_tokens=1, min_tokens=1, stop_ids=tuple(range(13))))
    with pytest.raises(ValueError, match="65"):
        engine.submit_template([None] * 65, SamplingParams())
    with pytest.raises(ValueError, match="2 sampling parameters"):
        generate(model, [[]], [SamplingParams(), SamplingParams()])
    with pytest.raises(ValueError, match="prefill_chunk must be at least 1, not 0"):
        Engine(model, prefill_chunk=0)
    with pytest.raises(ValueError, match="decodes with ARMD, not with Linear"):
        Engine(torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one slot, not 0"):
        Engine(model, max_slots=0)
    assert engine.idle


@pytest.mark.parametrize("mode", MODES)
def test_a_prompt_may_fill_the_context(model: ARMD, mode: str) -> None:
    one = generate(model, [prompt(63)], SamplingParams(max_tokens=1, **MODES[mode]))[0]
    assert (len(one.tokens), one.steps, one.finish_reason) == (1, 1, "length")
    none = generate(model, [prompt(64)], SamplingParams(max_tokens=0, **MODES[mode]))[0]
    assert (none.tokens, none.steps, none.finish_reason) == ([], 0, "length")
