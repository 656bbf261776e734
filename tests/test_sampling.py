"""Temperature, top-k, top-p and the draw, by exact figures."""

from typing import Any

import numpy as np
import pytest
import torch

from armd import SamplingParams
from armd.choice import Ask, choose
from armd.sampling import distribution, draw, verify

PROBABILITIES = torch.tensor([[0.5, 0.25, 0.15, 0.1]], dtype=torch.float64)
LOGITS = PROBABILITIES.log().float()


def uniform(n: int, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(n, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, [0.5, 0.25, 0.15, 0.1]),
        ({"temperature": 0.0}, [1, 0, 0, 0]),
        ({"temperature": 0.5}, [0.25 / 0.345, 0.0625 / 0.345, 0.0225 / 0.345, 0.01 / 0.345]),
        ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_k": 9}, [0.5, 0.25, 0.15, 0.1]),
        ({"top_p": 0.6}, [2 / 3, 1 / 3, 0, 0]),  # the token that crosses 0.6 stays
        ({"top_p": 0.49}, [1, 0, 0, 0]),
        ({"top_p": 0.8}, [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0]),
        ({"top_k": 3, "top_p": 0.6}, [2 / 3, 1 / 3, 0, 0]),
    ],
)
def test_distribution(params: dict, expected: list[float]) -> None:
    got = distribution(LOGITS, SamplingParams(**params))
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, torch.tensor([expected], dtype=torch.float64), rtol=1e-5, atol=1e-6)


def test_distribution_keeps_the_places_of_tokens() -> None:
    shuffled = LOGITS[:, [3, 0, 2, 1]]
    got = distribution(shuffled, SamplingParams(top_p=0.6))
    torch.testing.assert_close(got, torch.tensor([[0, 2 / 3, 0, 1 / 3]], dtype=torch.float64), rtol=1e-5, atol=1e-6)


def test_a_bias_is_not_rounded_to_the_models_type() -> None:
    """At 64 bfloat16 knows no number between 64 and 64.5."""
    logits = torch.full((1, 2), 64.0, dtype=torch.bfloat16)
    params = SamplingParams(logit_bias={0: 0.1}, mode="exact")
    (choice,) = choose(logits, [Ask(params, params.generator(), 1, [], [], None)])
    torch.testing.assert_close(choice.probabilities, torch.tensor([[0.1, 0.0]], dtype=torch.float64).softmax(1))


def test_draws_follow_the_distribution() -> None:
    """Chi-square with 3 degrees of freedom: 16.3 has probability 0.001 under the right distribution."""
    n = 20_000
    tokens = draw(PROBABILITIES.expand(n, -1), uniform(n, torch.Generator().manual_seed(0)))
    expected = PROBABILITIES[0] * n
    observed = tokens.bincount(minlength=4)
    assert float(((observed - expected) ** 2 / expected).sum()) < 16.3


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    probabilities = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]], dtype=torch.float64).expand(5_000, -1)
    assert set(draw(probabilities, uniform(5_000, torch.Generator().manual_seed(1))).tolist()) == {1, 3}


def test_the_largest_uniform_number_draws_the_last_token_that_has_weight() -> None:
    """Seen to fail for the rare token when the cumulative sums are in float32, which cuts off the tail."""
    largest = torch.nextafter(torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
    for total in (0.1, 1.0, 1 + 2**-52, 1.5, 3.0):
        assert draw(torch.tensor([[total, 0.0]], dtype=torch.float64), largest).tolist() == [0]
        assert draw(torch.tensor([[total, 1e-9, 0.0]], dtype=torch.float64), largest).tolist() == [1]


def test_kept_drafts_and_replacements_follow_the_target() -> None:
    """Exactly: p(x) min(1, q(x) / p(x)) kept, the rest from what replaces it, is q."""
    target = torch.tensor([[0.5, 0.2, 0.3, 0.0]], dtype=torch.float64)
    draft = torch.tensor([[0.25, 0.25, 0.25, 0.25]], dtype=torch.float64)
    n = 1_000
    grid = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    written = torch.zeros(4, dtype=torch.float64)
    for token in range(4):
        replacement = target.repeat(n, 1)
        kept = verify(replacement, torch.arange(n), draft.expand(n, -1), torch.full((n,), token), grid)
        share = kept.double().mean()
        written[token] += draft[0, token] * share
        written += draft[0, token] * (1 - share) * replacement[0] / replacement[0].sum()
    torch.testing.assert_close(written, target[0], rtol=0, atol=2 / n)


def test_a_draft_from_the_target_itself_is_kept() -> None:
    numbers = uniform(1_000, torch.Generator().manual_seed(0))
    same = PROBABILITIES.repeat(1_001, 1)
    kept = verify(same, torch.arange(1, 1_001), same[1:].clone(), torch.full((1_000,), 3), numbers)
    assert kept.all()
    assert torch.equal(same[:1], PROBABILITIES), "a row without a draft"


def test_a_seed_means_the_same_every_time() -> None:
    first, second = (uniform(50, SamplingParams(seed=-5).generator()) for _ in range(2))
    assert torch.equal(first, second)
    above_32_bits = [uniform(50, SamplingParams(seed=s).generator()) for s in (1, 1 + 2**32)]
    assert not torch.equal(*above_32_bits)
    fresh = [uniform(50, SamplingParams(seed=None).generator()) for _ in range(2)]
    assert not torch.equal(*fresh)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", -1),
        ("min_tokens", -2),
        ("top_logprobs", -1),
        ("mode", "fast"),
        ("max_tokens", 2.5),
        ("n_streams", 1.5),
        ("top_k", "all"),
        ("seed", "lucky"),
        ("threshold", -0.5),
        ("threshold", 1.5),
        ("max_entropy", -0.1),
        ("max_entropy", float("nan")),
        ("n_streams", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("temperature", None),
        ("temperature", "hot"),
        ("top_p", None),
        ("threshold", "high"),
        ("max_entropy", "low"),
        ("stop_ids", 3),
        ("top_p", "0.5"),
        ("logit_bias", 3),
    ],
)
def test_values_of_no_use_are_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field} .*{value}"):
        SamplingParams(**{field: value})


def test_values_that_do_not_go_together_are_named() -> None:
    with pytest.raises(ValueError, match=r"threshold must be 0 in exact mode.*0\.5"):
        SamplingParams(mode="exact", threshold=0.5)
    with pytest.raises(ValueError, match=r"max_entropy must be None in exact mode.*0\.5"):
        SamplingParams(mode="exact", max_entropy=0.5)
    with pytest.raises(ValueError, match=r"threshold \(0\.5\) must be left out with max_entropy \(0\.0\)"):
        SamplingParams(threshold=0.5, max_entropy=0.0)
    with pytest.raises(ValueError, match="logit_bias must be finite, not nan for token 7"):
        SamplingParams(logit_bias={7: float("nan")})
    with pytest.raises(ValueError, match="logit_bias of token 7 must be a number, not None"):
        SamplingParams(logit_bias={7: None})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    "changed", [{"min_tokens": 1}, {"logit_bias": {1: 2.0}}, {"mode": "exact"}, {"max_entropy": 0.0}]
)
def test_the_baselines_refuse_what_only_an_engine_does(changed: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(changed))} must be left out here"):
        SamplingParams(**changed).check_plain()
    SamplingParams(n_streams=8, top_k=3, stop_ids=(1,)).check_plain()


def test_a_seed_is_a_number_whatever_its_type() -> None:
    one, other = (SamplingParams(seed=seed).generator().initial_seed() for seed in (3, np.int64(3)))
    assert one == other
