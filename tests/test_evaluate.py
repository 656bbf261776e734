"""The evaluation stage on a small untrained model and a corpus written by hand."""

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import armd
from armd.tokenizer import Tokenizer
from pipelines import evaluate, storage
from pipelines.errors import UserError
from pipelines.evaluate import EvaluateConfig
from pipelines.manifest import read_manifest, write_manifest

TEXTS = [
    "Return the naive cafe.\n",
    "Gr\u00fc\u00dfe \u2014 \u4f60\u597d \U0001f642 and more text.",
    "One more document.",
]
LENGTH = 16
CONFIG = EvaluateConfig(streams=(1, 2, 4), max_windows=5, batch_size=2, sample_tokens=12, prompts=("Re",), repeats=1)


def write_corpus(folder: Path, tokenizer: Tokenizer, validation: list[int]) -> None:
    (folder / "shards").mkdir(parents=True)
    half = len(validation) // 3
    shards = []
    for name, tokens in (("a", validation[:half]), ("b", validation[half:])):
        path = folder / "shards" / f"{name}.npy"
        np.save(path, np.array(tokens, dtype=np.uint16))
        entry = {"path": f"shards/{name}.npy", "tokens": len(tokens), "sha256": storage.sha256_file(str(path))}
        shards.append(entry)
    body = {
        "tokenizer_sha256": tokenizer.sha256,
        "sequence_length": LENGTH,
        "splits": {"validation": {"tokens": len(validation), "shards": shards}},
        "unigram": {"validation_nats_per_token": math.log(100)},
    }
    write_manifest(str(folder), "corpus", body, time.time())


def write_export(folder: Path, tokenizer: Tokenizer) -> None:
    architecture = armd.Architecture(n_layers=2, n_two_stream_layers=1, d_model=16, n_heads=2, d_prefix=8)
    config = architecture.model_config(vocab_size=tokenizer.vocab_size, max_length=LENGTH)
    model = armd.ARMD(config, generator=torch.Generator().manual_seed(0))
    # far from uniform, so that a wrong order or a wrong target changes every number
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    from armd.weights import save

    save(folder, model, tokenizer)
    write_manifest(str(folder), "export", {}, time.time())


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 280)


def stream_of(tokenizer: Tokenizer) -> list[int]:
    return [token for text in TEXTS for token in [*tokenizer.encode(text), tokenizer.eos_id]]


@pytest.fixture(scope="module")
def inputs(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("stages")
    write_corpus(root / "corpus", tokenizer, stream_of(tokenizer))
    write_export(root / "export", tokenizer)
    return {"corpus": str(root / "corpus"), "export": str(root / "export")}


@pytest.fixture(scope="module")
def result(inputs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("evaluate")
    manifest = evaluate.run(CONFIG, inputs, str(output))
    assert read_manifest(str(output)) == manifest
    return manifest


def windows_of(tokenizer: Tokenizer, count: int) -> torch.Tensor:
    return torch.tensor(stream_of(tokenizer)[: count * LENGTH]).view(count, LENGTH)


@pytest.mark.parametrize("n_streams", CONFIG.streams)
def test_the_likelihood_is_the_librarys(
    result: dict[str, Any], inputs: dict[str, str], tokenizer: Tokenizer, n_streams: int
) -> None:
    from armd.weights import load

    model, _ = load(inputs["export"])
    tokens = windows_of(tokenizer, result["windows"])
    logp = armd.score(model, tokens, armd.Order.strided(LENGTH, n_streams))
    measured = result["streams"][str(n_streams)]
    assert measured["tokens"] == tokens.numel() > 3 * LENGTH
    assert measured["nats_per_token"] == pytest.approx(-logp.mean().item(), rel=1e-5)
    assert measured["perplexity"] == pytest.approx(math.exp(measured["nats_per_token"]))


def test_orders_differ(result: dict[str, Any]) -> None:
    assert len({round(one["nats_per_token"], 6) for one in result["streams"].values()}) == 3


def test_known_probabilities_give_known_numbers(
    inputs: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(armd, "score", lambda model, tokens, order: torch.full(tokens.shape, -math.log(2)))
    manifest = evaluate.run(CONFIG, inputs, str(tmp_path))
    for measured in manifest["streams"].values():
        assert measured["perplexity"] == pytest.approx(2)
        assert measured["bits_per_byte"] == pytest.approx(measured["tokens"] / manifest["bytes"])
    assert manifest["unigram"]["perplexity"] == pytest.approx(100)


def test_bytes_are_those_of_the_scored_text(tokenizer: Tokenizer) -> None:
    stream = np.array(stream_of(tokenizer))
    assert evaluate._text_bytes(stream, tokenizer) == sum(len(text.encode("utf-8")) for text in TEXTS)


def test_what_stands_round_a_sequence_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "sat"]))
    tokenizer = Tokenizer.load(tmp_path / "vocab.txt")
    cls, sep, pad = tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id
    assert (cls, sep, pad) == (2, 3, 0)
    stream = np.array([cls, 5, 6, sep, cls, 6, sep, pad, pad])
    assert evaluate._text_bytes(stream, tokenizer) == len("cat sat") + len("sat")


def test_pieces_put_a_cut_character_together(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXTS[1])
    pieces = evaluate._pieces(tokenizer, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == TEXTS[1]
    assert "\ufffd" not in "".join(pieces)
    assert "" in pieces, "the text must hold a character of several tokens for this test to say anything"


def test_bytes_that_are_no_text_still_show_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXTS[1])
    cut = next(n for n in range(1, len(ids)) if tokenizer.decode(ids[:n]).endswith("\ufffd"))
    assert "".join(evaluate._pieces(tokenizer, ids[:cut])) == tokenizer.decode(ids[:cut])


def test_samples_tell_when_each_token_was_written(result: dict[str, Any]) -> None:
    assert [(one["prompt"], one["n_streams"]) for one in result["samples"]] == [
        (prompt, n_streams) for prompt in ("", "Re") for n_streams in CONFIG.streams
    ]
    for sample in result["samples"]:
        prompt = [token for token in sample["tokens"] if token["prompt"]]
        written = [token for token in sample["tokens"] if not token["prompt"]]
        assert "".join(token["text"] for token in prompt) == sample["prompt"]
        assert all(token["step"] is None for token in prompt)
        assert {token["step"] for token in written} == set(range(1, sample["steps"] + 1))
        n, streams = len(written), sample["n_streams"]
        assert n == CONFIG.sample_tokens
        assert sample["steps"] == streams + math.ceil(n / streams) - 1
    from_nothing = {one["n_streams"]: one for one in result["samples"] if not one["prompt"]}
    assert [token["step"] for token in from_nothing[1]["tokens"]] == list(range(1, 13))
    # four streams of three tokens: heads one by one, then the streams together
    assert [token["step"] for token in from_nothing[4]["tokens"]] == [1, 5, 6, 2, 5, 6, 3, 5, 6, 4, 5, 6]


def test_speed_is_measured_at_one_length(result: dict[str, Any]) -> None:
    for measured in result["streams"].values():
        assert measured["tokens_per_second"] > 0
        assert measured["sampled_tokens"] == CONFIG.sample_tokens
    assert result["streams"]["4"]["steps"] < result["streams"]["1"]["steps"]


def test_the_same_config_writes_the_same_text(result: dict[str, Any], inputs: dict[str, str], tmp_path: Path) -> None:
    again = evaluate.run(CONFIG, inputs, str(tmp_path / "again"))
    assert again["samples"] == result["samples"]
    other = evaluate.run(dataclasses.replace(CONFIG, seed=5), inputs, str(tmp_path / "other"))
    assert other["samples"] != result["samples"]


def test_progress_ends_at_the_total(inputs: dict[str, str], tmp_path: Path) -> None:
    seen = []

    class Recorder:
        def update(self, done: float, total: float | None, unit: str, note: str = "") -> None:
            seen.append((done, total))

    evaluate.run(CONFIG, inputs, str(tmp_path), Recorder())
    assert seen == sorted(seen)
    assert len(seen) > 10
    assert seen[-1][0] == seen[-1][1]


def test_a_long_sample_is_cut_to_the_models_length(inputs: dict[str, str], tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, sample_tokens=1000, streams=(2,))
    manifest = evaluate.run(config, inputs, str(tmp_path))
    assert [len(sample["tokens"]) for sample in manifest["samples"]] == [LENGTH, LENGTH]


def test_bad_inputs_are_named(inputs: dict[str, str], tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the model's length is 16"):
        evaluate.run(dataclasses.replace(CONFIG, prompts=("q " * 40,)), inputs, str(tmp_path / "prompt"))

    write_corpus(tmp_path / "short", tokenizer, stream_of(tokenizer)[: LENGTH - 1])
    with pytest.raises(UserError, match="shorter than one window of 16"):
        evaluate.run(CONFIG, {**inputs, "corpus": str(tmp_path / "short")}, str(tmp_path / "1"))

    other = Tokenizer.train(["quite another text, quite another tokenizer"], tokenizer.vocab_size)
    write_corpus(tmp_path / "other", other, stream_of(tokenizer))
    with pytest.raises(UserError, match="does not have the tokenizer"):
        evaluate.run(CONFIG, {**inputs, "corpus": str(tmp_path / "other")}, str(tmp_path / "2"))

    write_export(tmp_path / "torn", tokenizer)
    weights = tmp_path / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        evaluate.run(CONFIG, {**inputs, "export": str(tmp_path / "torn")}, str(tmp_path / "3"))
    assert not any((tmp_path / name / "manifest.json").exists() for name in ("prompt", "1", "2", "3"))


@pytest.mark.parametrize(
    ("name", "value"),
    [("streams", ()), ("streams", (0,)), ("max_windows", 0), ("temperature", -1.0), ("top_p", 0.0), ("repeats", 0)],
)
def test_bad_values_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be"):
        EvaluateConfig(**{name: value})


def test_the_file_beside_the_manifest_holds_the_same(
    result: dict[str, Any], inputs: dict[str, str], tmp_path: Path
) -> None:
    manifest = evaluate.run(CONFIG, inputs, str(tmp_path))
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert written == {name: manifest[name] for name in written}
    assert written["samples"] == result["samples"]
