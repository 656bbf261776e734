"""The objective and its schedules, at both ends and in between."""

import pytest
import torch

from armd import Order, score
from armd.objective import Schedule, nats, seeded
from armd.optim import adamw, learning_rate
from tests.models import tiny_model

PAPER = Schedule(
    steps=400_000,
    strided_steps=10_000,
    ar_steps=9_000,
    permutation_steps=48_000,
    max_shuffled=32,
    streams=(1, 2, 4),
    prefix_probability=0.5,
)


@pytest.mark.parametrize("order", [Order.left_to_right(9), Order.strided(9, 3, 2)])
def test_nats_are_the_negative_score(order: Order) -> None:
    model = tiny_model()
    tokens = torch.randint(13, (3, 9), generator=torch.Generator().manual_seed(0))
    total, count = nats(model, tokens, order)
    assert count == 27
    torch.testing.assert_close(total, -score(model, tokens, order).sum(), rtol=1e-5, atol=1e-4)


def test_permutation_grows_as_in_the_paper() -> None:
    at = PAPER.n_shuffled
    assert [at(0), at(8_999), at(9_000), at(48_000), at(399_999)] == [0, 0, 0, 32, 32]
    assert at(9_000 + 39_000 // 2) == 16
    assert [at(400_000), at(409_999)] == [0, 0]  # strided fine-tuning
    assert [PAPER.kind(step) for step in (399_999, 400_000)] == ["progressive", "strided"]


def test_permutation_without_growth() -> None:
    flat = Schedule(**{**PAPER.__dict__, "ar_steps": 0, "permutation_steps": 0, "max_shuffled": 8})
    assert flat.n_shuffled(0) == 8


def test_strided_steps_draw_all_streams_and_half_with_a_prefix() -> None:
    drawn = [PAPER.strided_draw(step, 64) for step in range(400_000, 402_000)]
    counts = [sum(n == s for n, _ in drawn) for s in (1, 2, 4)]
    assert min(counts) > 600
    prefixes = [prefix for _, prefix in drawn]
    assert 0.4 < sum(prefix > 0 for prefix in prefixes) / 2000 < 0.6
    assert max(prefixes) == 63  # one token is left to predict
    assert min(prefix for prefix in prefixes if prefix) == 1


def test_orders_depend_on_the_row_not_on_who_asks() -> None:
    whole = PAPER.order(50_000, range(4), 32)
    half = PAPER.order(50_000, range(2, 4), 32)
    assert torch.equal(whole.positions[2:], half.positions)
    assert not torch.equal(whole.positions[0], whole.positions[1])
    other_step = PAPER.order(50_001, range(4), 32)
    assert not torch.equal(whole.positions, other_step.positions)
    assert PAPER.order(0, range(4), 32).positions.ndim == 1


def test_seeded_generators_are_independent() -> None:
    a, b, again = (torch.rand(4, generator=seeded("x", n)) for n in (1, 2, 1))
    assert torch.equal(a, again)
    assert not torch.equal(a, b)


def test_learning_rate_at_both_ends() -> None:
    def rate(step: int, schedule: str) -> float:
        return learning_rate(
            step,
            total_steps=100,
            peak=1.0,
            warmup_steps=10,
            schedule=schedule,
            min_ratio=0.1,  # type: ignore[arg-type]
        )

    assert rate(0, "cosine") == pytest.approx(0.1)
    assert rate(9, "cosine") == rate(10, "cosine") == rate(99, "constant") == pytest.approx(1.0)
    assert rate(99, "cosine") == pytest.approx(0.1)
    assert rate(54, "cosine") == pytest.approx(0.1 + 0.9 * 0.5, abs=0.02)


def test_only_projections_are_decayed() -> None:
    model = tiny_model()
    decayed, kept = adamw(model, learning_rate=1e-3, betas=(0.9, 0.95), weight_decay=0.1).param_groups
    assert decayed["weight_decay"] == 0.1
    assert kept["weight_decay"] == 0.0
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)].split(".")[-2] for p in decayed["params"]} == {
        "query",
        "key_value",
        "out",
        "mlp_in",
        "mlp_out",
    }
    assert len(decayed["params"]) + len(kept["params"]) == len(names)
    assert "embedding.weight" in {names[id(p)] for p in kept["params"]}


MIXED = Schedule(
    **{
        **PAPER.__dict__,
        "steps": 1_000,
        "max_shuffled": 0,
        "strided_share": 0.5,
        "infilling_share": 0.2,
        "mix_after": 100,
        "seed": 4,
    }
)


def test_mixed_shares_hold_from_their_step_on() -> None:
    """Fails when `kind` compares with `infilling_share` alone."""
    assert {MIXED.kind(step) for step in range(100)} == {"progressive"}
    drawn = [MIXED.kind(step) for step in range(100, 1_000)]
    assert 0.44 < drawn.count("strided") / 900 < 0.56
    assert 0.15 < drawn.count("infilling") / 900 < 0.25
    assert MIXED.kind(1_000) == "strided"
    assert drawn == [MIXED.kind(step) for step in range(100, 1_000)]


def test_infilling_steps_leave_their_holes_for_last() -> None:
    steps = [step for step in range(100, 1_000) if MIXED.kind(step) == "infilling"]
    single = 0
    for step in steps:
        n_streams, holes = MIXED.infilling_draw(step, 64)
        order = MIXED.order(step, range(2), 64)
        assert n_streams in (1, 2, 4)
        assert sorted(order.positions.tolist()[len(order.positions) - len(holes) :]) == holes
        assert order.positions.tolist()[: 64 - len(holes)] == [p for p in range(64) if p not in holes]
        single += holes == list(range(holes[0], holes[-1] + 1)) if holes else 0
    assert 0.3 < single / len(steps) < 0.75
