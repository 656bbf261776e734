"""armd.likelihood: many orders against enumeration, the bounds, batches, and what is refused."""

import itertools
import math
import re

import pytest
import torch

from armd import ARMD, Order, importance_weighted, score, score_orders, score_random_orders
from tests.models import tiny_model
from tests.oracle import all_sequences, logits_by_loop


@pytest.fixture(scope="module")
def model() -> ARMD:
    """Three words, up to four tokens: everything can be enumerated."""
    return tiny_model(vocab_size=3, max_length=4)


def every_order(length: int) -> list[Order]:
    return [Order.given(positions) for positions in itertools.permutations(range(length))]


def tokens(n_rows: int, length: int, vocab_size: int = 3) -> torch.Tensor:
    return torch.randint(vocab_size, (n_rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("length", [3, 4])
def test_all_orders_together_are_the_mixture(model: ARMD, length: int) -> None:
    """By loops over ranks. Seen to fail without the log K of `importance_weighted`."""
    orders, texts = every_order(length), tokens(3, length)
    logp_BK = score_orders(model, texts, orders)
    assert logp_BK.shape == (3, math.factorial(length))
    assert logp_BK.dtype == torch.float64
    with torch.no_grad():
        for row, text in enumerate(texts.tolist()):
            likelihoods = []
            for order in orders:
                logp_NV = logits_by_loop(model, text, order).log_softmax(dim=1)
                likelihoods.append(math.exp(sum(float(logp_NV[p, token]) for p, token in enumerate(text))))
            exact = math.log(sum(likelihoods) / len(likelihoods))
            assert float(importance_weighted(logp_BK)[row]) == pytest.approx(exact, abs=1e-5)
            assert float(logp_BK.mean(dim=1)[row]) < exact


def test_the_mixture_is_a_distribution(model: ARMD) -> None:
    logp_BK = score_orders(model, all_sequences(3, 4), every_order(4))
    assert float(importance_weighted(logp_BK).exp().sum()) == pytest.approx(1, abs=1e-5)


def test_one_order_has_one_bound(model: ARMD) -> None:
    logp_BK = score_random_orders(model, tokens(5, 4), 1)
    assert logp_BK.shape == (5, 1)
    torch.testing.assert_close(importance_weighted(logp_BK), logp_BK.mean(dim=1))


def test_random_orders_reach_the_mixture_from_below(model: ARMD) -> None:
    """The weighted bound rises with K on average, and is never below the mean. Seen to fail with logsumexp of -logp."""
    texts = tokens(40, 4)
    exact_B = importance_weighted(score_orders(model, texts, every_order(4)))
    logp_BK = score_random_orders(model, texts, 512, seed=1)
    bounds = []
    for k in (1, 2, 4, 16, 64):
        groups_BGK = logp_BK.unflatten(1, (-1, k))
        weighted_BG = importance_weighted(groups_BGK.flatten(0, 1)).unflatten(0, groups_BGK.shape[:2])
        assert bool((weighted_BG >= groups_BGK.mean(dim=2) - 1e-9).all())
        bounds.append(float(weighted_BG.mean()))
    assert bounds == sorted(bounds)
    assert bounds[0] < float(exact_B.mean()) - 0.05
    assert float(importance_weighted(logp_BK).mean()) == pytest.approx(float(exact_B.mean()), abs=0.02)


def test_orders_do_not_depend_on_the_batches() -> None:
    """Each sequence has orders of its own. Seen to fail with the row counted from the batch's beginning."""
    model = tiny_model()
    texts = tokens(7, 12, vocab_size=13)
    whole = score_random_orders(model, texts, 5, seed=3)
    for size in (1, 2, 4):
        parts = [
            score_random_orders(model, texts[first : first + size], 5, seed=3, first_row=first)
            for first in range(0, 7, size)
        ]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(score_random_orders(model, texts, 3, seed=3), whole[:, :3], rtol=1e-5, atol=1e-5)
    same = score_random_orders(model, texts[:1].expand(7, -1), 5, seed=3)
    assert len({round(float(value), 4) for value in same.flatten()}) == 35
    assert not torch.allclose(score_random_orders(model, texts, 5, seed=4), whole)


def test_orders_are_made_when_they_are_scored(model: ARMD, monkeypatch: pytest.MonkeyPatch) -> None:
    """One at a time, so that memory does not grow with their number."""
    texts = tokens(2, 4)
    made: list[int] = []
    scored: list[int] = []
    monkeypatch.setattr("armd.likelihood.score", lambda *arguments: scored.append(len(made)) or score(*arguments))
    logp_BK = score_orders(model, texts, (made.append(1) or order for order in every_order(4)))
    assert scored == list(range(1, 25))
    expected = torch.stack([score(model, texts, order).double().sum(dim=1) for order in every_order(4)], dim=1)
    assert torch.equal(logp_BK, expected)


@pytest.mark.parametrize(
    ("texts", "order", "message"),
    [
        (tokens(2, 4).float(), Order.left_to_right(4), "tokens must be int64, not torch.float32"),
        (torch.tensor([[0, 1, 3, 2]]), Order.left_to_right(4), "token 3 is not in the vocabulary, .* 0 to 2"),
        (torch.tensor([[0, -1, 1, 2]]), Order.left_to_right(4), "token -1 is not in the vocabulary, .* 0 to 2"),
        (tokens(2, 4)[0], Order.left_to_right(4), re.escape("tokens have shape (4,), the order wants (B, 4)")),
        (tokens(2, 3), Order.left_to_right(4), re.escape("tokens have shape (2, 3), the order wants (B, 4)")),
        (tokens(2, 5), Order.left_to_right(5), "5 tokens are more than the model's max_length of 4"),
        (tokens(3, 4), Order.stack([Order.left_to_right(4)] * 2), "2 orders were given for 3 sequences"),
    ],
)
def test_what_does_not_fit_is_refused(model: ARMD, texts: torch.Tensor, order: Order, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score(model, texts, order)
    with pytest.raises(ValueError, match=message):
        score_orders(model, texts, [order])


def test_too_few_orders_are_refused(model: ARMD) -> None:
    with pytest.raises(ValueError, match="n_orders must be at least 1, not 0"):
        score_random_orders(model, tokens(2, 4), 0)
    with pytest.raises(ValueError, match="at least one order"):
        score_orders(model, tokens(2, 4), [])
