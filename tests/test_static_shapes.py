"""Steps of few shapes, which a GPU can replay: padded rows, recorded plans."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from armd import ARMD, Engine, SamplingParams, generate, recorder
from armd.cached_layer import CachedLayer
from tests.decoding import MODES, assert_same, drain, mixed_requests, prompt
from tests.models import tiny_model


def test_static_shapes_are_few(sharp: ARMD, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row counts are powers of two, keys multiples of 128 or all there are, whatever the requests."""
    shapes = set()
    attend = CachedLayer.attend

    def recorded(self: CachedLayer, q: torch.Tensor, runs: Any) -> torch.Tensor:
        for slots, rows, seen in runs:
            n_texts, n_rows = slots.stop - slots.start, rows.stop - rows.start
            shapes.add((n_texts, n_rows // n_texts, seen.keys.stop - seen.keys.start))
        return attend(self, q, runs)

    monkeypatch.setattr(CachedLayer, "attend", recorded)
    engine = Engine(sharp, max_slots=4, static_shapes=True)
    for p, params in mixed_requests(16):
        engine.submit(p, params)
    drain(engine)
    sizes = {1, 2, 4, 8, 16, 32, 64}
    both = {x + g for x in sizes | {0} for g in sizes}  # content and query rows are padded apart
    for n_texts, n_rows, n_keys in shapes:
        assert n_texts in {1, 2, 4}
        assert n_rows in both
        assert n_keys == 65  # 64 ranks and the null key are less than 128


@pytest.mark.parametrize("max_slots", [1, 5])
def test_a_recorded_step_depends_on_its_plan_and_its_integers(max_slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU replays is what it recorded: here an earlier step of the same plan, on other integers.

    Seen to fail when the plan leaves out the number of keys; when logits of the padding are told.
    """
    model = tiny_model(max_length=200)
    lengths = [(0, 5), (23, 16), (100, 60)]  # from 127 ranks on there is another number of keys
    requests = [
        (prompt(known, seed=i), SamplingParams(max_tokens=n, n_streams=1 + i % 4, seed=i, **mode))
        for i, mode in enumerate(MODES.values())
        for known, n in lengths
    ]
    replayed = 0

    def record(step: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor, memory: object) -> Any:
        logits = torch.empty(0, dtype=torch.float64)

        def replay() -> None:
            nonlocal replayed
            replayed += 1
            now = step(inputs)
            logits.resize_(now.shape).copy_(now)

        return recorder.Recorded(replay, logits, None)

    monkeypatch.setattr(recorder, "record", record)
    alone = [generate(model, [p], params)[0] for p, params in requests]
    engine = Engine(model, max_slots=max_slots, static_shapes=True)
    engine.decoder._recorder = recorder.Recorder()
    ids = [engine.submit(p, params) for p, params in requests]
    done = drain(engine)
    for request_id, expected in zip(ids, alone, strict=True):
        assert_same(done[request_id], expected)
    assert replayed > 20


def test_recorded_steps_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plans used last stay, and compute in one memory. Fails without move_to_end, and with no memory handed on."""
    recorded: list[tuple[int, object]] = []

    def record(step: Any, inputs: torch.Tensor, memory: object) -> recorder.Recorded:
        recorded.append((int(inputs), memory))
        return recorder.Recorded(lambda: None, inputs, memory or (1, len(recorded)))

    monkeypatch.setattr(recorder, "record", record)
    replay = recorder.Recorder(most=2)
    for plan in (1, 1, 2, 2, 1, 3, 1, 2, 2):  # 3 puts 2 out, and 2 puts 3 out
        assert int(replay(plan, torch.tensor(plan), lambda integers: integers)) == plan
    assert recorded == [(1, None), (2, (1, 1)), (2, (1, 1))]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_replayed_steps_on_a_gpu(sharp: ARMD) -> None:
    model = ARMD(sharp.config)
    model.load_state_dict(sharp.state_dict())
    expected = [generate(model, [p], params)[0].tokens for p, params in mixed_requests(16)]
    engine = Engine(model, max_slots=5, device="cuda", static_shapes=True)
    ids = [engine.submit(p, params) for p, params in mixed_requests(16)]
    done = drain(engine)
    assert [done[request_id].tokens for request_id in ids] == expected
