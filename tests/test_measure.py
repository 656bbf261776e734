"""The measurements of a comparison, against sums over windows and positions taken one at a time."""

import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import armd
from armd.masked_diffusion import Noise
from armd.models import MODELS
from armd.weights import save
from pipelines import held_out, measure
from pipelines.errors import UserError
from pipelines.manifest import read_manifest, write_manifest
from pipelines.measure import MeasureConfig
from tests.corpora import make_corpus

N = 16
CONFIG = MeasureConfig(
    streams=(2, 4, 16), max_windows=6, random_windows=5, random_orders=3, noise_draws=2, batch_size=4
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_corpus(tmp_path_factory.mktemp("corpus"), N)


def export(folder: Path, corpus: str, kind: str) -> Any:
    """A model of `kind` with loud random weights, as the export stage leaves it."""
    tokenizer = armd.Tokenizer.load(Path(corpus, "tokenizer.json"))
    architecture = armd.Architecture(n_layers=2, n_two_stream_layers=1, d_model=16, n_heads=2, d_prefix=8)
    model = MODELS[kind](architecture.model_config(tokenizer.vocab_size, N), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    save(folder, model, tokenizer)
    write_manifest(str(folder), "export", {"parameters": 123}, time.time())
    return model.eval()


def measured(tmp_path: Path, corpus: str, kind: str) -> tuple[Any, torch.Tensor, dict[str, Any]]:
    """The model, the windows (n, N) and what the stage measured."""
    model = export(tmp_path / "export", corpus, kind)
    windows = held_out.windows(corpus, CONFIG.max_windows, str(tmp_path), spread=True)
    found = measure.run(CONFIG, {"corpus": corpus, "export": str(tmp_path / "export")}, str(tmp_path / "out"))
    assert found == read_manifest(str(tmp_path / "out"))
    assert (found["model"], found["parameters"]) == (kind, 123)
    assert (found["windows"], found["window_tokens"]) == windows.shape == (6, N)
    return model, torch.from_numpy(windows), found


def test_armd_under_every_order(tmp_path: Path, corpus: str) -> None:
    """Each number from `armd.score` a window at a time. Fails with the blocks' order for the one-by-one order."""
    model, windows, found = measured(tmp_path, corpus, "armd")

    def nats(order: armd.Order) -> torch.Tensor:
        return -torch.stack([armd.score(model, window[None], order)[0] for window in windows]).double()

    plain = nats(armd.Order.left_to_right(N))
    assert found["left_to_right"] == pytest.approx(plain.mean().item(), rel=1e-5)
    assert set(found["streams"]) == {"2", "4"}, "16 streams of one token are no streams"
    for name, streams in found["streams"].items():
        strided = armd.Order.strided(N, int(name))
        blocks, one_by_one = nats(strided), nats(armd.Order.given(strided.positions))
        order_gap = one_by_one.mean().item() - plain.mean().item()
        assert streams["nats_per_token"] == pytest.approx(blocks.mean().item(), rel=1e-5)
        assert streams["one_by_one"] == pytest.approx(one_by_one.mean().item(), rel=1e-5)
        assert streams["order_gap"] == pytest.approx(order_gap, abs=1e-5)
        assert streams["order_gap"] + streams["independence_gap"] == pytest.approx(
            streams["nats_per_token"] - found["left_to_right"], abs=1e-5
        )
        assert abs(streams["independence_gap"]) > 1e-4, "the model is too mild for this test"
        assert streams["cost_of_a_stream"] == pytest.approx(order_gap * N / (int(name) - 1), abs=1e-4)
        # what the streams behind the first pay, place by place, is what the order costs them in all
        behind = (one_by_one - plain).mean(dim=0)[N // int(name) :].sum().item()
        assert sum(streams["by_place"]) * (int(name) - 1) == pytest.approx(behind, abs=1e-4)
    logp = armd.score_random_orders(model, windows[:5], 3, seed=0)
    bounds = found["random_orders"]
    assert bounds["mean"] == pytest.approx(-logp.mean().item() / N, rel=1e-5)
    assert bounds["weighted"] == pytest.approx(-armd.importance_weighted(logp).mean().item() / N, rel=1e-5)
    assert (bounds["orders"], bounds["windows"]) == (3, 5)


def test_the_autoregressive_baseline(tmp_path: Path, corpus: str) -> None:
    model, windows, found = measured(tmp_path, corpus, "autoregressive")
    with torch.no_grad():
        total, count = model.nats(windows)
    assert found["left_to_right"] == pytest.approx(float(total) / count, rel=1e-5)
    assert "streams" not in found


def test_masked_diffusion_by_its_elbo(tmp_path: Path, corpus: str) -> None:
    """The mean over windows and draws, whatever the batch. Fails with the batch's rows counted anew in each batch."""
    model, windows, found = measured(tmp_path, corpus, "masked_diffusion")
    with torch.no_grad():
        draws = [Noise.of_rows(range(6), 6, N, "measure", 0, draw) for draw in range(2)]
        nats = [float(model.nats(windows, noise)[0]) for noise in draws]
    assert found["elbo"] == pytest.approx(sum(nats) / 2 / windows.numel(), rel=1e-5)
    assert "left_to_right" not in found


def test_places_of_ragged_streams() -> None:
    """Seven positions in three streams of 3, 2 and 2: the first stream pays nothing, only shared places count."""
    costs = torch.tensor([9.0, 9.0, 9.0, 1.0, 2.0, 3.0, 6.0])
    assert measure.by_place(costs, 3).tolist() == [2.0, 4.0]


def test_windows_are_spread_over_the_split(tmp_path: Path, corpus: str) -> None:
    everything = held_out.windows(corpus, 10_000, str(tmp_path))
    some = held_out.windows(corpus, 4, str(tmp_path), spread=True)
    assert [everything.tolist().index(window) for window in some.tolist()] == [
        i * len(everything) // 4 for i in range(4)
    ]
    assert held_out.windows(corpus, 4, str(tmp_path)).tolist() == everything[:4].tolist()


def test_a_foreign_tokenizer_is_refused(tmp_path: Path, corpus: str) -> None:
    other = make_corpus(tmp_path / "other", N, seed=1)
    export(tmp_path / "export", corpus, "armd")
    with pytest.raises(UserError, match="does not have the tokenizer"):
        measure.run(CONFIG, {"corpus": other, "export": str(tmp_path / "export")}, str(tmp_path / "out"))
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("field", "value"), [("max_windows", 0), ("noise_draws", 0), ("streams", ()), ("streams", (1, 2))]
)
def test_bad_settings_are_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        MeasureConfig(**{field: value})  # type: ignore[arg-type]


def test_perplexity_ratio_is_a_share() -> None:
    from pipelines.compare import perplexity_ratio

    assert perplexity_ratio(math.log(1.03)) == pytest.approx(0.03)
