"""The benchmarks measure what they say: counted tokens, the products of the real steps, a fair opponent."""

import itertools
import json
import os
from collections.abc import Sequence
from typing import Any

import pytest
import serving_parts
import torch
from models import tiny_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import armd
from armd.decoder import Decoder
from armd.rows import Work
from jobs.benchmarks import baselines, corpus, decode, serve, train
from jobs.benchmarks.measure import Product, forward_products, peak_bytes

B, N = 2, 8


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result["machine"]) == {"device", "threads", "torch", "armd"}
    return result


def flops(products: Sequence[Product]) -> int:
    return sum(2 * rows * n_in * n_out for rows, n_in, n_out in products)


def count_linear(model: armd.ARMD, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by the operations of every product with a weight that `model` computes."""
    counted: list[int] = []

    def on_linear(layer: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        counted.append(2 * output.numel() * inputs[0].shape[-1])

    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(on_linear)
    head = model.head

    def counted_head(hidden: torch.Tensor) -> torch.Tensor:
        logits = head(hidden)
        counted.append(2 * logits.numel() * hidden.shape[-1])
        return logits

    monkeypatch.setattr(model, "head", counted_head)
    return counted


def test_forward_products_are_those_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(n_layers=5, n_two_stream_layers=3)
    counted = count_linear(model, monkeypatch)
    model(torch.zeros(B, N, dtype=torch.long), armd.Order.strided(N, 2))
    assert sum(counted) == flops(forward_products(model.config, B * N, B * N, B * N))


@pytest.mark.parametrize("n_streams", [1, 3, 4, 16])
def test_step_products_are_those_of_decoding(n_streams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products with weights are `mm` and `addmm`; those with other activations, of prefix and attention, are not."""
    model = tiny_model()
    step = Decoder.step
    each: list[int] = []

    def counting_step(self: Decoder, work: Sequence[Work]) -> torch.Tensor:
        with FlopCounterMode(display=False) as counter:
            logits = step(self, work)
        counts = counter.get_flop_counts()["Global"]
        each.append(sum(counts.get(product, 0) for product in (torch.ops.aten.mm, torch.ops.aten.addmm)))
        return logits

    monkeypatch.setattr(Decoder, "step", counting_step)
    armd.generate(model, [[]] * B, armd.SamplingParams(max_tokens=N, n_streams=n_streams, seed=0))
    assert each == [flops(step) for step in decode.step_products(model.config, B, N, n_streams)]


@pytest.mark.parametrize("static_shapes", [False, True])
def test_decode_counts_the_tokens_that_it_wrote(capsys: pytest.CaptureFixture[str], static_shapes: bool) -> None:
    sizes = ["--vocab-size", "16", "--tokens", "6", "--streams", "1", "4", "16", "--batches", "2"]
    options = ["--exact-streams", "2", "8", "--exact-texts", "3", "--rounds", "1", "--device", "cpu"]
    decode.main([*sizes, *options, "--baselines", "autoregressive", *(["--static-shapes"] if static_shapes else [])])
    result = last_line(capsys)
    assert (result["bench"], result["tokens"], result["n"]) == ("decode", 6, 1)
    assert result["static_shapes"] == static_shapes
    found = result["contestants"]
    parallel = {name: one for name, one in found.items() if name.startswith("batch")}
    assert {name: one["steps"] for name, one in parallel.items()} == {
        "batch 2, S=1": 6,
        "batch 2, S=4": 5,
        "batch 2, S=16": 6,
        "batch 1, S=2": 4,
        "batch 1, S=8": 6,
    }
    for name, one in parallel.items():
        assert one["tokens_per_second"] * one["seconds"]["median"] == pytest.approx(6 * (2 if "batch 2" in name else 1))
        assert one["step_seconds"] * one["steps"] == pytest.approx(one["seconds"]["median"])
        assert one["to_products"] == pytest.approx(one["step_seconds"] / one["product_seconds"])
    for name in ("exact, S=2", "exact, S=8"):
        assert found[name]["accepted"] + found[name]["rejected"] == 3 * 6
        same = found[name.replace("exact", "batch 1")]["seconds"]["median"]
        assert found[name]["to_parallel"] == pytest.approx(found[name]["seconds"]["median"] / 3 / same)


SMALL = ["--vocab-size", "16", "--tokens", "6", "--rounds", "1", "--device", "cpu", "--exact-streams", "2"]


def test_decode_times_other_models_on_as_many_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    """Passes are counted while they run. Fails when a contestant's hook stays for the next one's run."""
    decode.main([*SMALL, "--streams", "1", "--batches", "1", "3", "--diffusion-steps", "1", "1000"])
    result = last_line(capsys)
    assert result["left_out"] == {}
    found = result["contestants"]
    assert {
        name: one["steps"] for name, one in found.items() if name.partition(",")[0] in ("autoregressive", "GPT-2")
    } == {f"{name}, batch {batch}": 6 for name in ("autoregressive", "GPT-2") for batch in (1, 3)}
    assert found["MDLM T=1, batch 1"]["steps"] == 1
    assert found["MDLM T=1000, batch 1"]["steps"] == 6  # no two of six tokens in the same of a thousand steps
    for name in ("autoregressive, batch 3", "GPT-2, batch 3"):
        one = found[name]
        assert one["tokens_per_second"] * one["seconds"]["median"] == pytest.approx(18)
        armd_seconds = found["batch 3, S=1"]["seconds"]["median"]
        assert one["armd_to_it"] == pytest.approx(armd_seconds / one["seconds"]["median"])


def test_decode_says_what_it_leaves_out(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines.importlib.util, "find_spec", lambda name: None)
    decode.main([*SMALL, "--streams", "1", "--batches", "1", "--baselines", "gpt2"])
    out = capsys.readouterr().out
    assert "gpt2 is left out: transformers is not installed: pip install" in out
    result = json.loads(out.splitlines()[-1])
    assert "transformers is not installed" in result["left_out"]["gpt2"]
    assert set(result["contestants"]) == {"batch 1, S=1", "batch 1, S=2", "exact, S=2"}


def test_decode_may_count_the_time_of_its_process_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(decode.time, "process_time", lambda: 5.0 * next(ticks))
    decode.main([*SMALL, "--streams", "1", "--batches", "1", "--baselines", "autoregressive", "--clock", "cpu"])
    found = last_line(capsys)["contestants"].values()
    assert {one["seconds"]["median"] for one in found} == {5.0}


def test_decode_writes_no_more_than_the_model_holds(
    tmp_path: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = serving_parts.save(tmp_path / "saved", max_length=5)
    options = ["--model-dir", str(saved), "--tokens", "100", "--streams", "2", "--batches", "1", "--exact-streams", "2"]
    decode.main([*options, "--rounds", "1", "--device", "cpu", "--baselines", "masked-diffusion"])
    result = last_line(capsys)
    assert result["tokens"] == 5
    one = result["contestants"]["batch 1, S=2"]
    assert one["tokens_per_second"] * one["seconds"]["median"] == pytest.approx(5)


def test_train_counts_the_tokens_of_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    train.main(["--vocab-size", "16", "--length", "8", "--batch", "2", "--rounds", "1", "--device", "cpu"])
    result = last_line(capsys)
    assert result["bench"] == "train"
    orders, baselines = {"left-to-right", "progressive", "strided S=4"}, {"autoregressive", "masked diffusion"}
    assert set(result["contestants"]) == orders | baselines | {"bare products"}
    assert result["contestants"]["autoregressive"]["to_autoregressive"] == 1.0
    for one in result["contestants"].values():
        assert one["tokens_per_second"] * one["seconds"]["median"] == pytest.approx(16)
    assert result["contestants"]["bare products"]["to_products"] == 1.0
    assert result["contestants"]["left-to-right"]["peak_bytes"] > result["contestants"]["autoregressive"]["peak_bytes"]
    assert result["contestants"]["left-to-right"]["flops"] > result["contestants"]["bare products"]["flops"]


def test_the_peak_counts_what_is_alive_at_once() -> None:
    """4,000 bytes kept, 8,000 dropped, then 6,000: 12,000 at most. Fails without the finalizer."""
    device, kept = torch.device("cpu"), []

    def run() -> None:
        kept.append(torch.zeros(1000))
        torch.zeros(2000).view(2, 1000)
        kept[0].add_(1)
        torch.zeros(1500)

    assert peak_bytes(run, device) == 12_000


def test_the_bare_tokenizer_has_every_core_and_every_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(corpus.PARALLELISM, "false")
    monkeypatch.setattr(corpus, "_BATCH_CHARACTERS", 5)
    given: list[list[str]] = []

    def encode_batch(texts: list[str], add_special_tokens: bool) -> None:
        assert os.environ[corpus.PARALLELISM] == "true"
        assert not add_special_tokens
        given.append(texts)

    corpus.encode(encode_batch, ["ab", "cde", "f", "ghijklm", "n"])
    assert given == [["ab", "cde"], ["f", "ghijklm"], ["n"]]
    assert os.environ[corpus.PARALLELISM] == "false"


def test_corpus_compares_the_stage_with_the_library(
    tmp_path: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text(f"{serving_parts.TEXT} {number}")
    runs: list[int] = []

    def in_tasks(function: Any, units: list[Any]) -> Any:
        runs.append(sum(len(unit.files) for unit in units))
        return enumerate(function(unit) for unit in units)

    monkeypatch.setattr(corpus.runtime, "connect", lambda: None)
    monkeypatch.setattr(corpus.corpus, "in_tasks", in_tasks)
    monkeypatch.setattr(corpus, "_WINDOWS_READ", 10)
    corpus.main(["--rounds", "2", "--repeat", "3", "--sources", str(tmp_path), "--sequence-length", "8"])
    assert runs == [90] * 3, "one run to train the tokenizer and two that are measured, each of three copies"
    result = last_line(capsys)
    assert (result["documents"], result["n"]) == (90, 2)
    assert set(result["seconds"]) == {"corpus stage", "encode_batch", "encode_batch_fast"}
    stage, fast = (result["seconds"][name]["median"] for name in ("corpus stage", "encode_batch_fast"))
    assert result["ratios"]["encode_batch_fast"] == pytest.approx(fast / stage)
    assert result["peak_bytes"]["driver"] > 50e6
    assert 0 < result["cpu_seconds"]["corpus stage"]["min"] <= 2 * stage * (os.cpu_count() or 1)
    assert result["reader_tokens_per_second"] > 0


def test_serve_counts_tokens_and_stops_where_the_server_does(
    tmp_path: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = serving_parts.save(tmp_path / "saved")
    eos = serving_parts.tokenizer().eos_id
    given: list[armd.SamplingParams] = []

    def generate(network: armd.ARMD, prompts: Any, params: list[armd.SamplingParams]) -> list[armd.Completion]:
        given.extend(params)
        return [armd.Completion([1] * 3, [0.0] * 3, 3, "stop", [1, 2, 3]) for _ in params]

    def request(method: str, url: str, body: Any, timeout_s: float) -> tuple[int, dict[str, Any]]:
        return 200, {"usage": {"completion_tokens": 5}}

    monkeypatch.setattr(serve, "generate", generate)
    monkeypatch.setattr(serve.launch, "start", lambda *_: "http://127.0.0.1:1")
    monkeypatch.setattr(serve.launch, "stop", lambda _: None)
    monkeypatch.setattr(serve.launch, "request", request)
    serve.main([str(saved), "--requests", "4", "--concurrency", "2", "--rounds", "3"])
    found = last_line(capsys)["contestants"]
    assert {name: one["tokens"] for name, one in found.items()} == {"HTTP, 2 at once": 20, "engine, 2 at once": 12}
    assert len(given) == 12
    assert all(one.stop_ids == (eos,) for one in given)
