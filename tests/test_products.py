"""Products of few rows: both ways of computing them, and which is taken."""

from collections.abc import Callable

import pytest
import torch

from armd import ARMD, Engine, ModelConfig, SamplingParams, products
from tests.orders import generator

WIDE = (1024, 512)
"""The least weight that is computed either way."""


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], list[int]]:
    """Decides for the machine; gives the list in which the rows of every mirrored product will be."""

    def decide(mirror: bool) -> list[int]:
        taken: list[int] = []
        compute = products.mirrored
        monkeypatch.setattr(products, "mirror_is_faster", lambda *_: mirror)
        monkeypatch.setattr(products, "mirrored", lambda rows, weight: taken.append(len(rows)) or compute(rows, weight))
        return taken

    return decide


@pytest.mark.parametrize("onto", [False, True])
@pytest.mark.parametrize("n_rows", range(1, products.MOST_ROWS + 2))
def test_the_mirror_image_is_the_product(choose: Callable[[bool], list[int]], n_rows: int, onto: bool) -> None:
    """Fails without `[:n_rows]` in mirrored, and without `onto` in product."""
    taken = choose(True)
    rows, weight = torch.randn(n_rows, 512, generator=generator()), torch.randn(WIDE, generator=generator(1))
    base = torch.randn(n_rows, 1024, generator=generator(2)) if onto else None
    expected = (rows.double() @ weight.double().t() + (0 if base is None else base.double())).float()
    got = products.product(rows, weight, base)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert got.is_contiguous()
    assert taken == ([n_rows] if n_rows <= products.MOST_ROWS else [])


@pytest.mark.parametrize(("shape", "dtype"), [((1024, 511), torch.float32), (WIDE, torch.bfloat16)])
def test_small_weights_and_other_types_are_left_to_the_library(
    choose: Callable[[bool], list[int]], shape: tuple[int, int], dtype: torch.dtype
) -> None:
    taken = choose(True)
    products.product(torch.ones(1, shape[1], dtype=dtype), torch.ones(shape, dtype=dtype))
    assert taken == []


def test_the_machine_is_asked_once_for_each_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """And believed only where it is clear. Fails with `straight > other`."""
    products.mirror_is_faster.cache_clear()
    seconds = {torch.nn.functional.linear: 1.0, products.mirrored: 0.5}
    asked = []

    def timed(compute: Callable, rows: torch.Tensor, weights: tuple[torch.Tensor, ...]) -> float:
        asked.append((len(rows), weights[0].shape))
        return seconds[compute]

    monkeypatch.setattr(products, "_seconds", timed)
    assert [products.mirror_is_faster(2, 512, 1024) for _ in range(3)] == [True] * 3
    assert asked == [(2, (1024, 512))] * 2
    seconds[products.mirrored] = 0.85
    assert not products.mirror_is_faster(3, 512, 1024)
    monkeypatch.undo()
    products.mirror_is_faster.cache_clear()
    assert products.mirror_is_faster(1, 512, 512) in (True, False)  # the real measurement


@pytest.mark.parametrize("mode", ["parallel", "exact"])
def test_texts_are_the_same_either_way(choose: Callable[[bool], list[int]], mode: str) -> None:
    config = ModelConfig(
        n_layers=2, n_two_stream_layers=1, d_model=512, n_heads=4, d_prefix=8, vocab_size=512, max_length=12
    )
    model = ARMD(config, generator=generator())
    texts = []
    for mirror in (False, True):
        taken = choose(mirror)
        engine = Engine(model, max_slots=1)
        engine.submit([3, 4], SamplingParams(max_tokens=10, n_streams=2, mode=mode))
        while not engine.idle:
            events = engine.step()
        texts.append(events[-1].completion)
        assert bool(taken) == mirror
    assert texts[0].tokens == texts[1].tokens
    assert texts[0].logprobs == pytest.approx(texts[1].logprobs, abs=1e-4)
