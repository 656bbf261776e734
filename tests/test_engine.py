"""The engine: cached decoding against the parallel pass, batching, admission, cancelling, stopping."""

import pytest
import torch

from armd import ARMD, Completion, Engine, Order, SamplingParams, generate, infill, score
from tests.models import tiny_model


@pytest.fixture(scope="module")
def model() -> ARMD:
    return tiny_model(max_length=64)


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(13, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize(
    ("known", "n_tokens", "n_streams"),
    [(0, 16, 1), (0, 16, 4), (5, 17, 4), (13, 7, 20), (3, 61, 8), (1, 1, 4), (0, 1, 1)],
)
def test_cached_decoding_is_the_parallel_pass(model: ARMD, known: int, n_tokens: int, n_streams: int) -> None:
    """Invariant 3: the sampled text fed back through the parallel pass has the sampler's log-probabilities.

    Seen to fail with `token_ends` one too small, and with `<=` for `<` in the prefix state of a step.
    """
    start = prompt(known)
    one = generate(model, [start], SamplingParams(max_tokens=n_tokens, n_streams=n_streams, seed=3))[0]
    order = Order.strided(known + n_tokens, n_streams, prefix=known)
    parallel = score(model, torch.tensor([start + one.tokens]), order)[0, known:]
    torch.testing.assert_close(torch.tensor(one.logprobs), parallel, rtol=1e-4, atol=1e-5)
    streams = min(n_streams, n_tokens)
    assert one.steps == streams + -(-n_tokens // streams) - 1
    blocks = order.blocks[order.ranks][known:] - known + 1
    assert one.step_of_token == blocks.tolist()


@pytest.mark.parametrize("n_layers", [(1, 1), (2, 2), (3, 1)])
def test_cached_decoding_for_any_split_of_layers(n_layers: tuple[int, int]) -> None:
    model = tiny_model(n_layers=n_layers[0], n_two_stream_layers=n_layers[1])
    one = generate(model, [[1, 2]], SamplingParams(max_tokens=12, n_streams=3))[0]
    parallel = score(model, torch.tensor([[1, 2, *one.tokens]]), Order.strided(14, 3, prefix=2))[0, 2:]
    torch.testing.assert_close(torch.tensor(one.logprobs), parallel, rtol=1e-4, atol=1e-5)


def test_infilling_is_the_parallel_pass_of_its_order(model: ARMD) -> None:
    template = [3, None, None, None, 5, 6, None, None, 2]
    one = infill(model, template, SamplingParams(n_streams=2, seed=1))
    text = template.copy()
    holes = [i for i, token in enumerate(template) if token is None]
    for position, token in zip(holes, one.tokens, strict=True):
        text[position] = token
    # Known positions first; holes 1, 2, 3, 6, 7 in streams (1, 2, 3) and (6, 7).
    order = Order.given([0, 4, 5, 8, 1, 6, 2, 7, 3], [0, 1, 2, 3, 4, 5, 6, 6, 7])
    parallel = score(model, torch.tensor([text]), order)[0, holes]
    torch.testing.assert_close(torch.tensor(one.logprobs), parallel, rtol=1e-4, atol=1e-5)


def mixed_requests() -> list[tuple[list[int], SamplingParams]]:
    lengths = [(0, 5, 1), (3, 16, 4), (9, 20, 2), (30, 7, 7), (2, 62, 8), (1, 3, 1), (7, 0, 2)]
    return [
        (prompt(known, seed=i), SamplingParams(max_tokens=n, n_streams=s, seed=i, temperature=0.9))
        for i, (known, n, s) in enumerate(lengths)
    ]


def test_mixed_requests_get_what_they_get_alone(model: ARMD) -> None:
    """Invariant 6, with more requests than slots, so that they join and leave at different steps."""
    alone = [generate(model, [p], params)[0] for p, params in mixed_requests()]
    engine = Engine(model, max_slots=3)
    ids = [engine.submit(p, params) for p, params in mixed_requests()]
    done = drain(engine)
    for request_id, expected in zip(ids, alone, strict=True):
        assert done[request_id].tokens == expected.tokens
        torch.testing.assert_close(
            torch.tensor(done[request_id].logprobs), torch.tensor(expected.logprobs), rtol=1e-4, atol=1e-6
        )


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


def test_cancelled_slots_are_clean_again_and_again(model: ARMD) -> None:
    expected = generate(model, [[4, 2]], SamplingParams(max_tokens=8, n_streams=2))[0]
    engine = Engine(model, max_slots=2)
    for round_ in range(50):
        doomed = [engine.submit(prompt(round_ % 7), SamplingParams(max_tokens=30, n_streams=3)) for _ in range(4)]
        for _ in range(round_ % 5):
            engine.step()
        assert all(engine.cancel(request_id) for request_id in doomed)
        assert not engine.cancel(doomed[0])
        assert engine.idle
    request_id = engine.submit([4, 2], SamplingParams(max_tokens=8, n_streams=2))
    assert drain(engine)[request_id].tokens == expected.tokens


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


def test_requests_that_do_not_fit_are_refused_with_the_numbers(model: ARMD) -> None:
    engine = Engine(model)
    with pytest.raises(ValueError, match=r"max_tokens \(60\) \+ prompt \(5\) exceeds the context of 64"):
        engine.submit([0] * 5, SamplingParams(max_tokens=60))
    with pytest.raises(ValueError, match="13"):
        engine.submit([13], SamplingParams(max_tokens=1))
    with pytest.raises(ValueError, match="65"):
        engine.submit_template([None] * 65, SamplingParams())
    with pytest.raises(ValueError, match="2 sampling parameters"):
        generate(model, [[]], [SamplingParams(), SamplingParams()])
    assert engine.idle


def test_a_prompt_may_fill_the_context(model: ARMD) -> None:
    full = prompt(63)
    one = generate(model, [full], SamplingParams(max_tokens=1))[0]
    assert len(one.tokens) == 1
    assert generate(model, [prompt(64)], SamplingParams(max_tokens=0))[0].tokens == []


def test_memory_of_a_slot_is_known(model: ARMD) -> None:
    engine = Engine(model, max_slots=3)
    cache = engine.decoder.cache
    # float64 keys and values, with a null key and a rank for padding; a float32 state
    by_hand = 2 * (2 * (64 + 2) + 2 * (64 + 1)) * 16 * 8 + 8 * 16 * 4
    assert cache.bytes_per_slot == by_hand
