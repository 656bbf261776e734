"""Temperature, top-k, top-p and the draw, by exact figures."""

import pytest
import torch

from armd import SamplingParams
from armd.sampling import distribution, draw

PROBABILITIES = torch.tensor([[0.5, 0.25, 0.15, 0.1]], dtype=torch.float64)
LOGITS = PROBABILITIES.log().float()


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


def test_draws_follow_the_distribution() -> None:
    """Chi-square with 3 degrees of freedom: 16.3 has probability 0.001 under the right distribution."""
    n = 20_000
    tokens = draw(PROBABILITIES.expand(n, -1), torch.Generator().manual_seed(0))
    expected = PROBABILITIES[0] * n
    observed = tokens.bincount(minlength=4)
    assert float(((observed - expected) ** 2 / expected).sum()) < 16.3


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    probabilities = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]], dtype=torch.float64).expand(5_000, -1)
    assert set(draw(probabilities, torch.Generator().manual_seed(1)).tolist()) == {1, 3}


def test_a_seed_means_the_same_every_time() -> None:
    first, second = (draw(PROBABILITIES.expand(50, -1), SamplingParams(seed=-5).generator()) for _ in range(2))
    assert torch.equal(first, second)
    above_32_bits = [draw(PROBABILITIES.expand(50, -1), SamplingParams(seed=s).generator()) for s in (1, 1 + 2**32)]
    assert not torch.equal(*above_32_bits)
    fresh = [draw(PROBABILITIES.expand(50, -1), SamplingParams(seed=None).generator()) for _ in range(2)]
    assert not torch.equal(*fresh)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", -1),
        ("n_streams", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -1),
    ],
)
def test_values_out_of_range_are_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field} .*{value}"):
        SamplingParams(**{field: value})
