"""The baselines against their definitions: enumeration, the cache against the parallel pass, the ELBO integrated."""

from itertools import product

import pytest
import torch

import armd
from armd import AutoregressiveLM, MaskedDiffusionLM, SamplingParams
from armd.config import Architecture
from armd.masked_diffusion import Noise
from armd.models import MODELS, name_of
from armd.objective import nats
from tests.oracle import all_sequences

SHAPE = Architecture(n_layers=2, n_two_stream_layers=1, d_model=16, n_heads=2, d_prefix=8)


def built(name: str, vocab_size: int = 7, max_length: int = 12) -> torch.nn.Module:
    model = MODELS[name](SHAPE.model_config(vocab_size, max_length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.mul_(1.0 if "norm" in parameter_name else 5.0)
    return model.double().eval()


def tokens(rows: int = 3, length: int = 9, vocab_size: int = 7) -> torch.Tensor:
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(2))


def test_names_are_those_of_the_models() -> None:
    assert [name_of(built(name)) for name in MODELS] == list(MODELS)


@pytest.mark.parametrize("n", range(9))
def test_an_autoregressive_prediction_sees_the_tokens_before_it_alone(n: int) -> None:
    """Fails when `_hidden` embeds all tokens without the start vector in front."""
    model, text = built("autoregressive"), tokens()
    before = model(text)
    changed = text.clone()
    changed[:, n] = (changed[:, n] + 1) % 7
    after = model(changed)
    assert torch.equal(before[:, : n + 1], after[:, : n + 1])
    assert n == 8 or not torch.allclose(before[:, n + 1], after[:, n + 1])


def test_autoregressive_probabilities_of_all_texts_sum_to_one() -> None:
    model, texts = built("autoregressive", vocab_size=3, max_length=4), all_sequences(3, 4)
    logp = torch.stack([-model.nats(text[None])[0] for text in texts])
    torch.testing.assert_close(logp.exp().sum().item(), 1.0, rtol=1e-5, atol=0)


@pytest.mark.parametrize("prompts", [[[]], [[], [], []], [[1, 2, 3], [4]], [[], [5, 6, 1, 2]]])
def test_the_cache_writes_what_the_parallel_pass_would(prompts: list[list[int]]) -> None:
    """Greedy text by whole passes, one a token.

    Fails when `_Decoder` rotates by a position one further on, or lets a prompt's rows see those behind them.
    """
    model = built("autoregressive")
    written = model.generate(prompts, SamplingParams(max_tokens=6, temperature=0))
    for prompt, ids in zip(prompts, written, strict=True):
        text = list(prompt)
        for _ in range(6):
            text.append(int(model(torch.tensor([[*text, 0]]))[0, -1].argmax()))
        assert ids == text[len(prompt) :]


def test_a_text_does_not_depend_on_its_neighbours_and_ends_at_a_stop_token() -> None:
    model = built("autoregressive")
    params = SamplingParams(max_tokens=8, seed=3)
    (alone,) = model.generate([[1, 2]], params)
    together = model.generate([[3, 4, 5], [1, 2], []], params)
    assert together[1] == alone
    (stopped,) = model.generate([[1, 2]], SamplingParams(max_tokens=8, seed=3, stop_ids=(alone[3],)))
    assert stopped == alone[: alone.index(alone[3])]
    # The short text has ended before the long prompt is read.
    assert (
        model.generate([[1], [2] * 6], SamplingParams(max_tokens=2))[1]
        == model.generate([[2] * 6], SamplingParams(max_tokens=2))[0]
    )
    # Nor does it while a long prompt is still read behind it.
    (cut, _) = model.generate([[1, 2], [3] * 4], SamplingParams(max_tokens=8, seed=3, stop_ids=(alone[3],)))
    assert cut == stopped
    assert model.generate([], params) == []
    assert model.generate([[]], SamplingParams(max_tokens=0)) == [[]]
    assert model.generate([[1]], SamplingParams(max_tokens=0)) == [[]]
    with pytest.raises(ValueError, match="13 tokens are more than"):
        model.generate([[0] * 5], params)


def test_the_elbo_is_the_integral_over_times_and_masks() -> None:
    """By enumeration: at time t each of the 2^N sets of masked tokens has its probability.

    The average of many estimates comes near it; fails when `nats` forgets the weight 1/t, or counts tokens that are
    not masked.
    """
    model, text = built("masked_diffusion", vocab_size=5, max_length=4), tokens(1, 4, 5)
    expected = 0.0
    with torch.no_grad():
        for masked in product((False, True), repeat=4):
            masked_BN = torch.tensor([masked])
            if not any(masked):
                continue
            logp = model(text.masked_fill(masked_BN, model.mask_id)).log_softmax(dim=-1)
            lost = -(logp.gather(2, text[..., None]).squeeze(2) * masked_BN).sum().item()
            k = sum(masked)
            # the integral of t^(k-1) (1-t)^(4-k) over [0, 1] is the beta function B(k, 5-k)
            beta = torch.exp(torch.lgamma(torch.tensor([k, 5 - k, 5.0])) @ torch.tensor([1.0, 1.0, -1.0])).item()
            expected += beta * lost
        total, count = model.elbo(text.expand(40_000, -1), generator=torch.Generator().manual_seed(0))
    assert count == 160_000
    assert total.item() / 40_000 == pytest.approx(expected, rel=0.03)


def test_noise_covers_time_evenly_and_does_not_depend_on_who_asks() -> None:
    whole = Noise.of_rows(range(16), 16, 6, "x", 1)
    part = Noise.of_rows(range(4, 8), 16, 6, "x", 1)
    assert torch.equal(whole.times_B[4:8], part.times_B)
    assert torch.equal(whole.masked_BN[4:8], part.masked_BN)
    assert whole.times_B.sort().values.diff().max() < 1.1 / 16
    assert not torch.equal(whole.masked_BN, Noise.of_rows(range(16), 16, 6, "x", 2).masked_BN)


def test_masked_diffusion_neither_reads_masked_tokens_nor_writes_the_mask() -> None:
    model, text = built("masked_diffusion"), tokens()
    noise = Noise.draw(3, 9, generator=torch.Generator().manual_seed(4))
    logits = model(text.masked_fill(noise.masked_BN, model.mask_id))
    assert logits.shape == (3, 9, 7)
    other = torch.where(noise.masked_BN, (text + 1) % 7, text)
    assert torch.equal(logits, model(other.masked_fill(noise.masked_BN, model.mask_id)))


@pytest.mark.parametrize("n_steps", [None, 1, 3, 100])
def test_diffusion_samples_are_whole_and_repeat_with_their_seed(n_steps: int | None) -> None:
    model = built("masked_diffusion")
    params = SamplingParams(seed=5)
    texts = model.sample(4, 10, params, n_steps=n_steps)
    assert texts.shape == (4, 10)
    assert int(texts.max()) < model.mask_id
    assert torch.equal(texts, model.sample(4, 10, params, n_steps=n_steps))


def test_the_first_hitting_sampler_draws_from_the_mean_over_orders() -> None:
    """Chi-square against the enumerated joint of two tokens; fails when the first position is always filled first."""
    model = built("masked_diffusion", vocab_size=2, max_length=2)
    with torch.no_grad():
        mask = model.mask_id
        joint = torch.zeros(2, 2, dtype=torch.float64)
        for first, second in ((0, 1), (1, 0)):
            p_first = model(torch.tensor([[mask, mask]]))[0, first].softmax(-1)
            for a in range(2):
                half = torch.full((1, 2), mask)
                half[0, first] = a
                p_second = model(half)[0, second].softmax(-1)
                for b in range(2):
                    cell = (a, b) if first == 0 else (b, a)
                    joint[cell] += 0.5 * p_first[a] * p_second[b]
    n = 20_000
    texts = model.sample(n, 2, SamplingParams(seed=6))
    counts = torch.bincount(texts[:, 0] * 2 + texts[:, 1], minlength=4).double().view(2, 2)
    assert float(((counts - n * joint) ** 2 / (n * joint)).sum()) < 16.3  # 0.1% with 3 degrees of freedom


def test_bad_sampling_is_refused() -> None:
    model = built("masked_diffusion")
    with pytest.raises(ValueError, match="max_length 12: 13"):
        model.sample(1, 13)
    with pytest.raises(ValueError, match="n_steps must be at least 1, not 0"):
        model.sample(1, 4, n_steps=0)


@pytest.mark.parametrize(("name", "drawn"), [("autoregressive", None), ("masked_diffusion", Noise.draw(3, 9))])
def test_the_objective_takes_a_baselines_own_loss(name: str, drawn: Noise | None) -> None:
    model, text = built(name), tokens()
    total, count = nats(model, text, drawn)
    assert count == 27
    assert torch.equal(total, model.nats(text, drawn)[0])
    total.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_baselines_have_armds_parameters_but_for_what_is_its_own() -> None:
    config = armd.ARCHITECTURES["tiny"].model_config(100, 64)
    counts = {name: sum(p.numel() for p in model(config).parameters()) for name, model in MODELS.items()}
    null_keys = config.n_two_stream_layers * 2 * config.d_model
    first_query = 64 * config.d_prefix + config.d_model + 2 * config.d_model  # table, start vector, neighbours
    assert counts["armd"] - counts["autoregressive"] == first_query + null_keys
    assert counts["masked_diffusion"] - counts["autoregressive"] == 0  # [mask] for the start vector
    assert AutoregressiveLM is armd.AutoregressiveLM
    assert MaskedDiffusionLM is armd.MaskedDiffusionLM
