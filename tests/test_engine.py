"""The engine: batching, admission, sharing, cancelling, memory.

Tolerances: a request draws the same tokens whatever runs beside it; its log-probabilities are those of the parallel
pass, and those that it has alone, to rounding, as products of other row counts add in another order.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from armd import ARMD, Engine, SamplingParams, generate
from armd.decoder import Decoder
from armd.rows import Work
from tests.decoding import MODES, assert_same, drain, mixed_requests, prompt
from tests.models import tiny_model


@pytest.fixture(scope="module")
def model() -> ARMD:
    return tiny_model(max_length=64)


@pytest.mark.parametrize("options", [{}, {"static_shapes": True}, {"prefill_chunk": 5}], ids=str)
def test_mixed_requests_get_what_they_get_alone(sharp: ARMD, options: dict[str, Any]) -> None:
    """Invariant 6, with more requests than slots, so that they join and leave at different steps."""
    alone = [generate(sharp, [p], params)[0] for p, params in mixed_requests()]
    engine = Engine(sharp, max_slots=3, **options)
    ids = [engine.submit(p, params) for p, params in mixed_requests()]
    done = drain(engine)
    for request_id, expected in zip(ids, alone, strict=True):
        assert_same(done[request_id], expected)


@pytest.mark.parametrize("mode", MODES)
def test_others_beside_it_change_nothing(sharp: ARMD, mode: str) -> None:
    """In float32, with 1 to 32 of them.

    Seen to fail when all requests draw from one generator, and when texts of a run see as many keys as its longest.
    """
    model = ARMD(sharp.config)
    model.load_state_dict(sharp.state_dict())
    params = SamplingParams(max_tokens=30, n_streams=4, seed=11, **MODES[mode])
    expected = generate(model, [prompt(20)], params)[0]
    for n_others in (1, 4, 32):
        engine = Engine(model, max_slots=40)
        for p, other in mixed_requests(n_others // 2):
            engine.submit(p, other)
        engine.step()
        request_id = engine.submit(prompt(20), params)
        for p, other in mixed_requests(n_others - n_others // 2):
            engine.submit(p, other)
        assert_same(drain(engine)[request_id], expected)


def content_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by the content rows of every step."""
    counted: list[int] = []
    step = Decoder.step

    def counting(self: Decoder, work: Sequence[Work]) -> torch.Tensor:
        counted.append(sum(len(one.content_ends) for one in work))
        return step(self, work)

    monkeypatch.setattr(Decoder, "step", counting)
    return counted


def test_long_prompts_are_computed_beside_decoding(model: ARMD, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = content_rows(monkeypatch)
    engine = Engine(model, max_slots=3, prefill_chunk=8)
    first, second, third = (
        engine.submit(prompt(known, seed=known), SamplingParams(max_tokens=12, n_streams=1)) for known in (1, 30, 10)
    )
    wrote = [[event.request_id for event in engine.step()] for _ in range(7)]
    # Of 41 known tokens 8 at a time, in the order of arrival.
    assert wrote[:3] == [[first]] * 3
    assert wrote[3:6] == [[first, second]] * 2 + [[first, second, third]]
    assert counted[:6] == [8, 8 + 1, 8 + 1, 8 + 1, 8 + 2, 1 + 2]


def test_samples_of_one_prompt_compute_it_once(model: ARMD, monkeypatch: pytest.MonkeyPatch) -> None:
    params = [SamplingParams(max_tokens=5, n_streams=1, seed=seed) for seed in range(4)]
    alone = [generate(model, [prompt(40)], one)[0] for one in params]
    other = prompt(40)[:24]
    other += [(prompt(40)[24] + 1) % 13, 7, 7]
    other_alone = generate(model, [other], params[0])[0]
    counted = content_rows(monkeypatch)
    engine = Engine(model, max_slots=4, prefill_chunk=16)
    ids = [engine.submit(prompt(40), one) for one in params]
    ids.append(engine.submit(other, params[0]))  # begins alike, and waits for a slot
    done = drain(engine)
    for request_id, expected in zip(ids, [*alone, other_alone], strict=True):
        assert_same(done[request_id], expected)
    # The prompt once, what the fifth has of its own, and of each text all tokens but the last.
    assert sum(counted) == 40 + 3 + 5 * 4


@pytest.mark.parametrize("steps", [0, 1, 2, 4])
@pytest.mark.parametrize("leaving", [[0], [1], [1, 0]], ids=str)
def test_followers_survive_those_who_leave(model: ARMD, steps: int, leaving: list[int]) -> None:
    """The first of them computes the prompt of all. Seen to fail when who left is still waited for, or served."""
    expected = generate(model, [prompt(40)], SamplingParams(max_tokens=5))[0]
    engine = Engine(model, max_slots=3, prefill_chunk=16)
    ids = [engine.submit(prompt(40), SamplingParams(max_tokens=5)) for _ in range(3)]
    for _ in range(steps):
        engine.step()
    for number in leaving:
        engine.cancel(ids[number])
        engine.submit(prompt(30, seed=5), SamplingParams(max_tokens=5))  # takes the slot
    done = drain(engine)
    for number in {0, 1, 2}.difference(leaving):
        assert_same(done[ids[number]], expected)
    assert not engine._followers


def test_cancelled_slots_are_clean_a_thousand_times(sharp: ARMD) -> None:
    """No drift of a reused slot, no state left behind, no memory claimed.

    Seen to fail when a slot's prefix state is not cleared.
    """
    last = SamplingParams(max_tokens=20, n_streams=3, mode="exact")
    expected = generate(sharp, [prompt(20)], last)[0]
    engine = Engine(sharp, max_slots=3)
    cache = engine.decoder.cache
    storage = [tensor.data_ptr() for tensor in (cache.content, cache.query, cache.prefix)]
    requests = mixed_requests(40)
    for round_ in range(1000):
        doomed = [engine.submit(*requests[(round_ + i) % 40]) for i in range(round_ % 4)]
        for _ in range(round_ % 3):
            for event in engine.step():
                if event.completion is not None:
                    doomed.remove(event.request_id)
        if round_ % 2:  # followers before the one who computes their prompt
            doomed.reverse()
        assert all(engine.cancel(request_id) for request_id in doomed)
        assert not any(engine.cancel(request_id) for request_id in doomed)
        assert engine.idle
    assert not engine._followers
    assert storage == [tensor.data_ptr() for tensor in (cache.content, cache.query, cache.prefix)]
    ids = [engine.submit(prompt(20), last) for _ in range(3)]
    done = drain(engine)
    for request_id in ids:
        assert_same(done[request_id], expected)


def test_no_request_breaks_a_step(model: ARMD) -> None:
    """Each of these drew a token that does not exist, which ended the step for all."""
    extremes = [
        SamplingParams(max_tokens=8, seed=1, logit_bias={4: 1e300, 5: -1e300}),
        SamplingParams(max_tokens=8, seed=1, temperature=1e-310),
        SamplingParams(max_tokens=8, seed=1, temperature=1e300),
    ]
    biased, cold, _ = generate(model, [[1]] * 3, extremes)
    assert biased.tokens == [4] * 8
    assert cold.tokens == generate(model, [[1]], SamplingParams(max_tokens=8, temperature=0))[0].tokens


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_damaged_weights_are_said(temperature: float) -> None:
    damaged = tiny_model()
    with torch.no_grad():
        damaged.final_norm.weight[0] = torch.nan
    with pytest.raises(ValueError, match="logits are not numbers: its weights are damaged"):
        generate(damaged, [[1]], SamplingParams(max_tokens=4, temperature=temperature))


def test_memory_of_a_slot_is_known(model: ARMD) -> None:
    engine = Engine(model, max_slots=3)
    cache = engine.decoder.cache
    # float64 keys and values, with a null key and a rank for padding; a float32 state
    by_hand = 2 * (2 * (64 + 2) + 2 * (64 + 1)) * 16 * 8 + 8 * 16 * 4
    assert cache.bytes_per_slot == by_hand
    storage = (cache.content, cache.query, cache.prefix)
    assert sum(tensor.numel() * tensor.element_size() for tensor in storage) == 3 * by_hand
    Engine(model, max_slots=3, memory_bytes=3 * by_hand)
    with pytest.raises(ValueError, match=f"3 slots of {by_hand:,} bytes need {3 * by_hand:,} bytes"):
        Engine(model, max_slots=3, memory_bytes=3 * by_hand - 1)
