"""Products of rows and weights: every way of computing them, and which is taken."""

import contextlib
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F

from armd import ARMD, Engine, ModelConfig, Order, SamplingParams, products
from armd.objective import nats
from tests.orders import generator

WIDE = (1024, 512)
"""The least weight of which few rows' products are computed in the fastest way."""

WAYS = [products.mirrored, *([products.by_onednn] if products.has_onednn() else [])]
needs_onednn = pytest.mark.skipif(not products.has_onednn(), reason="this PyTorch has no oneDNN")


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Callable[[products.Way], list[int]]:
    """Decides for the machine; gives the list in which the rows of every product in that way will be."""

    def decide(way: products.Way) -> list[int]:
        taken: list[int] = []

        def counting(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            taken.append(rows.numel() // rows.shape[-1])
            return way(rows, weight)

        monkeypatch.setattr(products, "_LEAST_WORK", 0)
        monkeypatch.setattr(products, "fastest", lambda *_: counting)
        monkeypatch.setattr(products, "by_onednn", counting)
        monkeypatch.setattr(products, "mkl_is_slow", lambda: True)
        return taken

    return decide


@pytest.mark.parametrize("onto", [False, True])
@pytest.mark.parametrize("n_rows", range(1, products.MOST_ROWS + 2))
@pytest.mark.parametrize("way", WAYS)
def test_every_way_is_the_product(
    choose: Callable[[products.Way], list[int]], way: products.Way, n_rows: int, onto: bool
) -> None:
    """Fails without `[:n_rows]` in mirrored, and without `onto` in product."""
    taken = choose(way)
    rows, weight = torch.randn(n_rows, 512, generator=generator()), torch.randn(WIDE, generator=generator(1))
    base = torch.randn(n_rows, 1024, generator=generator(2)) if onto else None
    expected = (rows.double() @ weight.double().t() + (0 if base is None else base.double())).float()
    with torch.no_grad():
        got = products.product(rows, weight, base)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert got.is_contiguous()
    assert taken == [n_rows]


@needs_onednn
@pytest.mark.parametrize("shape", [(5,), (2, 3, 7), (1,)])
def test_gradients_are_those_of_the_product(shape: tuple[int, ...]) -> None:
    """Fails where a gradient is that of another operand, or is computed without its transposition."""
    rows = torch.randn(*shape, 24, generator=generator()).transpose(0, -2).requires_grad_()  # rows that are not in line
    weight = torch.randn(16, 24, generator=generator(1)).requires_grad_()
    made = products.by_onednn(rows, weight)
    upstream = torch.randn(made.shape, generator=generator(2))
    exact = (rows.double() @ weight.double().t(), upstream.double())
    expected = torch.autograd.grad(*exact[:1], (rows, weight), exact[1])
    for got, one in zip(torch.autograd.grad(made, (rows, weight), upstream, retain_graph=True), expected, strict=True):
        torch.testing.assert_close(got, one, rtol=1e-4, atol=1e-4)
    (of_weight,) = torch.autograd.grad(products.by_onednn(rows.detach(), weight).sum(), weight)  # a sum's are expanded
    torch.testing.assert_close(of_weight, rows.detach().flatten(0, -2).sum(0).expand(16, 24), rtol=1e-4, atol=1e-4)


@needs_onednn
def test_a_model_learns_the_same_either_way(choose: Callable[[products.Way], list[int]]) -> None:
    config = ModelConfig(
        n_layers=3, n_two_stream_layers=2, d_model=32, n_heads=4, d_prefix=8, vocab_size=40, max_length=16
    )
    model = ARMD(config, generator=generator())
    tokens = torch.randint(40, (2, 16), generator=generator(1))

    def gradients() -> list[torch.Tensor]:
        total, _ = nats(model, tokens, Order.strided(16, 4))
        return list(torch.autograd.grad(total, list(model.parameters())))

    expected = gradients()
    taken = choose(products.by_onednn)
    got = gradients()
    assert len(taken) == 5 * 3 + 1, "every projection and the head"
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("rows", "weight", "context"),
    [
        (torch.ones(1, 511), torch.ones(1024, 511), contextlib.nullcontext()),
        (torch.ones(8, 64), torch.ones(64, 64), contextlib.nullcontext()),
        (torch.ones(1024), torch.ones(1024, 1024), contextlib.nullcontext()),
        (torch.ones(8, 512, dtype=torch.bfloat16), torch.ones(WIDE, dtype=torch.bfloat16), contextlib.nullcontext()),
        (torch.ones(8, 512, dtype=torch.float64), torch.ones(WIDE, dtype=torch.float64), contextlib.nullcontext()),
        (torch.ones(8, 512), torch.ones(WIDE), torch.autocast("cpu", dtype=torch.bfloat16)),
        (torch.ones(0, 512), torch.ones(WIDE), contextlib.nullcontext()),
    ],
    ids=["a weight that caches hold", "little work", "one dimension", "bfloat16", "float64", "autocast", "no rows"],
)
def test_the_rest_is_left_to_the_library(
    monkeypatch: pytest.MonkeyPatch,
    rows: torch.Tensor,
    weight: torch.Tensor,
    context: contextlib.AbstractContextManager,
) -> None:
    monkeypatch.setattr(products, "mkl_is_slow", lambda: True)
    monkeypatch.setattr(products, "fastest", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(products, "by_onednn", lambda *_: pytest.fail("taken"))
    with context, torch.no_grad():
        assert products.product(rows, weight).shape == (*rows.shape[:-1], len(weight))


@needs_onednn
def test_what_has_no_derivative_says_so() -> None:
    """Not zeros. Fails when what asks for no gradient goes past autograd."""
    rows, weight = torch.randn(3, 24, generator=generator()), torch.randn(16, 24, generator=generator(1))
    with pytest.raises(RuntimeError):
        torch.func.jvp(lambda one: products.by_onednn(one, weight), (rows,), (rows,))
    (gradient,) = torch.autograd.grad(
        products.by_onednn(rows.requires_grad_(), weight).square().sum(), rows, create_graph=True
    )
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.sum(), rows)


@pytest.mark.parametrize("length", range(1, products.MOST_ROWS + 1))
def test_the_parallel_pass_of_few_tokens_is_not_measured(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    """Its rows have a batch's dimension, which the mirror image does not know. Fails without `rows.ndim == 2`."""
    monkeypatch.setattr(products, "fastest", lambda *_: products.mirrored)
    config = ModelConfig(
        n_layers=2, n_two_stream_layers=1, d_model=512, n_heads=4, d_prefix=8, vocab_size=2048, max_length=12
    )
    model, tokens = ARMD(config, generator=generator()), torch.zeros(1, length, dtype=torch.long)
    with torch.no_grad():
        assert model(tokens, Order.left_to_right(length)).shape == (1, length, 2048)


@needs_onednn
@pytest.mark.parametrize(
    ("vendor", "capability", "slow"),
    [
        ("AuthenticAMD", "AVX512", True),
        ("AuthenticAMD", "AVX2", False),
        ("GenuineIntel", "AVX512", False),
        (None, "AVX512", False),
    ],
)
def test_mkl_is_slow_on_wide_processors_of_other_makers(
    monkeypatch: pytest.MonkeyPatch, vendor: str | None, capability: str, slow: bool
) -> None:
    monkeypatch.setattr(products, "_vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert products.mkl_is_slow.__wrapped__() == slow


def test_the_machine_is_asked_once_for_each_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """And believed only where it is clear. Fails without `_CLEARLY`."""
    products.fastest.cache_clear()
    monkeypatch.setattr(products, "has_onednn", lambda: True)
    seconds = {F.linear: 1.0, products.by_onednn: 0.8, products.mirrored: 0.5}
    asked = []

    def timed(ways: Sequence[products.Way], rows: torch.Tensor, weights: Sequence[torch.Tensor]) -> dict:
        asked.append((len(rows), weights[0].shape))
        return {way: seconds[way] for way in ways}

    monkeypatch.setattr(products, "_seconds", timed)
    assert [products.fastest(2, 512, 1024) for _ in range(3)] == [products.mirrored] * 3
    assert asked == [(2, (1024, 512))]
    seconds[products.mirrored] = 0.75
    assert products.fastest(3, 512, 1024) is products.by_onednn
    seconds[products.by_onednn] = 0.95
    seconds[products.mirrored] = 0.95
    assert products.fastest(4, 512, 1024) is F.linear
    monkeypatch.undo()
    products.fastest.cache_clear()
    assert products.fastest(1, 512, 512) in (F.linear, *WAYS)  # the real measurement


@pytest.mark.parametrize("mode", ["parallel", "exact"])
def test_texts_are_the_same_in_every_way(choose: Callable[[products.Way], list[int]], mode: str) -> None:
    config = ModelConfig(
        n_layers=2, n_two_stream_layers=1, d_model=512, n_heads=4, d_prefix=8, vocab_size=512, max_length=12
    )
    model = ARMD(config, generator=generator())
    texts = []
    for way in (F.linear, *WAYS):
        taken = choose(way)
        engine = Engine(model, max_slots=1)
        engine.submit([3, 4], SamplingParams(max_tokens=10, n_streams=2, mode=mode))
        while not engine.idle:
            events = engine.step()
        texts.append(events[-1].completion)
        assert taken
    for text in texts[1:]:
        assert text.tokens == texts[0].tokens
        assert text.logprobs == pytest.approx(texts[0].logprobs, abs=1e-4)
