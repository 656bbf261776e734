"""The draws of a step do not depend on how its rows are cut into parts."""

from typing import Any

import pytest
import torch

from armd import SamplingParams, sampling
from armd.choice import Ask, Choice, choose
from tests.orders import generator

WORDS = 11


def ask(n_rows: int, n_drafts: int = 0, rows_without_stop: tuple[int, ...] = (), **options: Any) -> Ask:
    params = SamplingParams(stop_ids=(4, 7), seed=n_rows, mode="exact" if n_drafts else "parallel", **options)
    drawn_from = torch.rand(n_drafts, WORDS, dtype=torch.float64, generator=generator(n_drafts))
    drawn_from /= drawn_from.sum(dim=1, keepdim=True)
    drafts = [row % WORDS for row in range(n_drafts)]
    return Ask(params, params.generator(), n_rows, rows_without_stop, drafts, drawn_from if n_drafts else None)


def chosen() -> list[Choice]:
    asks = [
        ask(3, top_k=4, top_logprobs=2),
        ask(9, 5),
        ask(4, threshold=0.5),
        ask(7, 6, rows_without_stop=(0, 3, 6), logit_bias={2: 1.5, 9: -3.0}, top_p=0.9),
        ask(2, temperature=0.5),
    ]
    n_rows = sum(one.n_rows for one in asks)
    return choose(2 * torch.randn(n_rows, WORDS, generator=generator(7)), asks)


@pytest.mark.parametrize("rows", [1, 2, 5, 24])
def test_parts_make_no_difference(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Fails when a part takes the first rows' numbers, drafts or biases instead of its own."""
    expected = chosen()
    assert sum(len(one.tokens) for one in expected) == 25
    monkeypatch.setattr(sampling, "_PART", rows * WORDS + 1)
    for got, one in zip(chosen(), expected, strict=True):
        assert (got.tokens, got.kept, got.sureness) == (one.tokens, one.kept, one.sureness)
        assert got.logprobs == pytest.approx(one.logprobs)
        assert got.entropies == pytest.approx(one.entropies)
        assert got.tops == one.tops
        if one.probabilities is None:
            assert got.probabilities is None
        else:
            assert len(one.probabilities) == len(one.tokens) - len(one.kept)
            torch.testing.assert_close(got.probabilities, one.probabilities)


def test_parts_are_what_a_cache_holds() -> None:
    assert sampling.parts(torch.empty(10, 50_257)) == [slice(0, 5), slice(5, 10)]
    assert sampling.parts(torch.empty(3, 1 << 20)) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert sampling.parts(torch.empty(10, 50_257, device="meta")) == [slice(0, 10)]
