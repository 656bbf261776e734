"""The training loop on real DeepSpeed and gloo, without Ray: repeatable, resumable, the same for any split of work."""

import dataclasses
import functools
import json
import math
import os
import pkgutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from armd.config import Architecture
from pipelines import checkpoint, export, storage, zero
from pipelines.errors import UserError
from pipelines.metrics import read_metrics
from pipelines.train_config import TrainConfig
from pipelines.train_loop import Job
from tests.corpora import make_corpus
from tests.gloo import Prepare, run_workers

pytestmark = pytest.mark.slow

ARCHITECTURE = Architecture(n_layers=3, n_two_stream_layers=2, d_model=32, n_heads=2, d_prefix=8)
CONFIG = TrainConfig(
    architecture=ARCHITECTURE,
    batch_size=8,
    micro_batch_size=2,
    steps=6,
    strided_steps=4,
    ar_steps=1,
    permutation_steps=3,
    max_shuffled=8,
    warmup_steps=2,
    learning_rate=3e-3,
    log_every=1,
    validate_every=5,
    validation_windows=5,
    checkpoint_every=4,
    n_workers=1,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def run(corpus: str, output: Path | str, prepare: Prepare | None = None, **changes: Any) -> Any:
    """Rank 0's summary or error; None where the workers died."""
    config = dataclasses.replace(CONFIG, **changes)
    results = run_workers(Job(config=config, corpus=corpus, output=str(output)), prepare)
    return results[0] if results else None


def losses(output: Path) -> list[tuple[str, int, str]]:
    """Kind, step and exact loss of every line of metrics."""
    return [(r["kind"], r["step"], float(r["loss"]).hex()) for r in read_metrics(str(output))]


def weights(output: Path) -> dict[str, str]:
    """SHA-256 of every file of the newest checkpoint."""
    found = checkpoint.newest(str(output / "checkpoints"))
    assert found is not None
    return {entry["path"]: entry["sha256"] for entry in found[1]["files"]}


@pytest.fixture(scope="module")
def uninterrupted(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("uninterrupted")
    summary = run(corpus, output, ema_decay=0.9)
    assert summary["steps"] == 10
    return output


def test_the_run_learns_and_says_so(uninterrupted: Path) -> None:
    records = read_metrics(str(uninterrupted))
    train = [r for r in records if r["kind"] == "train"]
    assert [r["step"] for r in train] == list(range(1, 11))
    assert train[-1]["loss"] < train[0]["loss"] - 0.1
    assert abs(train[0]["loss"] - math.log(280)) < 0.5
    assert [r["n_shuffled"] for r in train] == [0, 0, 4, 8, 8, 8, 0, 0, 0, 0]
    assert train[-1]["tokens"] == 10 * 8 * 16
    held_out = [(r["step"], r["n_streams"]) for r in records if r["kind"] == "validation"]
    assert held_out == [(5, 1), (10, 1), (10, 2), (10, 4)]


def die(target: str, call: int, after: bool = False) -> None:
    """Exit without a word before (or after) the `call`-th call of `target`, as after a SIGKILL."""
    module_name, _, name = target.rpartition(".")
    module = pkgutil.resolve_name(module_name)
    original = getattr(module, name)
    calls = 0

    def replacement(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and not after:
            os._exit(9)
        result = original(*args, **kwargs)
        if calls == call:
            os._exit(9)
        return result

    setattr(module, name, replacement)


def partition_everything() -> None:
    """Make ZeRO-3 shard parameters of any size; by default it keeps those as small as a test's whole."""
    original = zero.deepspeed_config

    def config(*args: Any, **kwargs: Any) -> dict[str, Any]:
        made = original(*args, **kwargs)
        made["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return made

    zero.deepspeed_config = config


WORKER = "pipelines.train_loop.Worker"


@pytest.mark.parametrize(
    ("death", "resumes_from"),
    [
        (partial(die, f"{WORKER}._train_step", 3), 0),
        (partial(die, f"{WORKER}._held_out", 1), 4),
        (partial(die, "pipelines.checkpoint.put_shards", 2, after=True), 4),
        (partial(die, "pipelines.storage.write_text", 6), 4),  # owner, metrics, and for each: manifest, mark
        (partial(die, "pipelines.checkpoint.prune", 2), 8),
        (partial(die, f"{WORKER}._summary", 1), 10),
    ],
    ids=["in a step", "in validation", "before the manifest", "before the mark", "before pruning", "after the last"],
)
def test_resuming_is_never_having_stopped(
    corpus: str, uninterrupted: Path, tmp_path: Path, death: Prepare, resumes_from: int
) -> None:
    """Bit for bit, wherever it was killed: losses, validation, weights, optimiser.

    Seen to fail without loading the EMA, with the data taken from step 0, and with the learning rate left as loaded.
    """
    assert run(corpus, tmp_path, death, ema_decay=0.9) is None
    before = checkpoint.newest(str(tmp_path / "checkpoints"))
    assert (before[1]["step"] if before else 0) == resumes_from
    run(corpus, tmp_path, ema_decay=0.9)
    assert losses(tmp_path) == losses(uninterrupted)
    assert weights(tmp_path) == weights(uninterrupted)
    names = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert not [name for name in names if name.startswith(checkpoint.SCRATCH)]


def test_resuming_sharded_parameters(corpus: str, tmp_path: Path) -> None:
    """ZeRO-3 on two workers with everything partitioned, the average too: stopped in the middle and not."""
    sharded = {"n_workers": 2, "zero_stage": 3, "ema_decay": 0.9, "steps": 5, "strided_steps": 0}
    one, other = tmp_path / "one", tmp_path / "other"
    run_prepared = partial(die_when_partitioned, f"{WORKER}._train_step", 5)
    run(corpus, one, partition_everything, **sharded)
    assert run(corpus, other, run_prepared, **sharded) is None
    summary = run(corpus, other, partition_everything, **sharded)
    assert losses(other) == losses(one)
    assert weights(other) == weights(one)
    assert exported(corpus, other, summary) == pytest.approx(summary["final"]["validation_nats_per_token"], rel=1e-5)


def die_when_partitioned(target: str, call: int) -> None:
    partition_everything()
    die(target, call)


def test_a_finished_run_trains_no_further(corpus: str, uninterrupted: Path) -> None:
    before = weights(uninterrupted)
    summary = run(corpus, uninterrupted, ema_decay=0.9)
    assert summary["steps"] == 10
    assert weights(uninterrupted) == before
    assert summary["final"]["validation_nats_per_token"] > 0


def test_two_workers_and_any_zero_stage_give_one_workers_losses(
    corpus: str, uninterrupted: Path, tmp_path: Path
) -> None:
    """To rounding, with the average of the weights in place for validation."""
    reference = [record["loss"] for record in read_metrics(str(uninterrupted))]
    for stage in (1, 2, 3):
        output = tmp_path / str(stage)
        summary = run(corpus, output, partition_everything, n_workers=2, zero_stage=stage, ema_decay=0.9)
        got = [record["loss"] for record in read_metrics(str(output))]
        assert got == pytest.approx(reference, rel=1e-5)
        loaded = exported(corpus, output, summary)
        assert loaded == pytest.approx(reference[-3], rel=1e-5)  # the last validation, left to right


@pytest.mark.parametrize("stage", [2, 3])
def test_activations_computed_again_change_nothing(corpus: str, tmp_path: Path, stage: int) -> None:
    """Where parameters are sharded too, and gathered anew for it. Fails where the option is not handed to the model."""
    changes = {"activation_checkpointing": True, "steps": 2, "strided_steps": 1}
    assert run(corpus, tmp_path / "asked", functools.partial(die, "armd.model.checkpoint", 1), **changes) is None
    run(corpus, tmp_path / "plain", ema_decay=0.9, **{**changes, "activation_checkpointing": False})
    run(corpus, tmp_path / "again", partition_everything, n_workers=2, zero_stage=stage, ema_decay=0.9, **changes)
    plain, again = ([r["loss"] for r in read_metrics(str(tmp_path / name))] for name in ("plain", "again"))
    assert again == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bfloat16_learns_what_float32_learns(corpus: str, uninterrupted: Path, tmp_path: Path, stage: int) -> None:
    summary = run(corpus, tmp_path, n_workers=2, zero_stage=stage, dtype="bfloat16")
    assert summary["dtype"] == "bfloat16"
    reference = [r["loss"] for r in read_metrics(str(uninterrupted)) if r["kind"] == "train"]
    assert [r["loss"] for r in read_metrics(str(tmp_path)) if r["kind"] == "train"] == pytest.approx(
        reference, rel=5e-3
    )
    exported(corpus, tmp_path, summary)
    error = run(corpus, tmp_path, n_workers=2, zero_stage=stage)
    assert isinstance(error, UserError)
    assert "--train.dtype bfloat16" in error.fix


def exported(corpus: str, output: Path | str, summary: dict[str, Any]) -> float:
    """Held-out loss of the exported model, by the export stage; it compares with training's by itself."""
    storage.write_text(storage.join(str(output), "manifest.json"), json.dumps(summary))
    inputs = {"corpus": corpus, "train": str(output)}
    target = storage.join(str(output), "export")
    return export.run(export.ExportConfig(), inputs, target)["validation_nats_per_token"]


def test_an_object_store_holds_a_run_from_start_to_export(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In process, on fsspec's `memory://`: train, stop, resume, export."""
    import torch.distributed as dist

    from pipelines.train_loop import train

    for name, value in {"DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    dist.init_process_group("gloo", init_method=(tmp_path / "store").as_uri(), rank=0, world_size=1)
    try:
        output = "memory://bucket/train"
        for steps in (4, 6):
            config = dataclasses.replace(CONFIG, steps=steps, strided_steps=0, ema_decay=0.9)
            summary = train(Job(config=config, corpus=corpus, output=output), lambda record: None)
    finally:
        dist.destroy_process_group()
    assert [r["step"] for r in read_metrics(output) if r["kind"] == "train"] == list(range(1, 7))
    assert summary["checkpoint"].startswith("checkpoints/step-00000006-")
    assert exported(corpus, output, summary) == pytest.approx(summary["final"]["validation_nats_per_token"], rel=1e-5)


def test_export_without_averaging(corpus: str, tmp_path: Path) -> None:
    summary = run(corpus, tmp_path, n_workers=2, zero_stage=3, steps=2, strided_steps=0)
    assert exported(corpus, tmp_path, summary) == pytest.approx(summary["final"]["validation_nats_per_token"], rel=1e-5)


def test_export_refuses_a_model_that_is_not_the_trained_one(corpus: str, uninterrupted: Path, tmp_path: Path) -> None:
    summary = run(corpus, uninterrupted, ema_decay=0.9)
    summary["final"]["validation_nats_per_token"] += 0.01
    with pytest.raises(UserError, match="training reported"):
        exported(corpus, uninterrupted, summary)
    assert not (uninterrupted / "export" / "manifest.json").exists()


def test_a_loss_that_is_not_finite_stops_before_it_is_saved(corpus: str, tmp_path: Path) -> None:
    error = run(corpus, tmp_path, learning_rate=1e30, clip=0.0, warmup_steps=0, checkpoint_every=1)
    assert isinstance(error, UserError)
    assert "learning rate" in error.what
    assert "--train.learning-rate" in error.fix
    found = checkpoint.newest(str(tmp_path / "checkpoints"))
    if found is not None:
        for entry in found[1]["files"]:
            state = torch.load(Path(found[0], entry["path"]), weights_only=False)
            for tensor in state.get("module", {}).values():
                assert torch.isfinite(tensor).all()


def test_another_corpus_is_refused(corpus: str, uninterrupted: Path, tmp_path: Path) -> None:
    other = make_corpus(tmp_path, n_documents=170, seed=1)
    error = run(other, uninterrupted, ema_decay=0.9)
    assert isinstance(error, UserError)
    assert "another corpus" in error.what


def test_a_corpus_that_was_made_again_as_it_was_is_the_same(uninterrupted: Path, tmp_path: Path) -> None:
    again = make_corpus(tmp_path)
    manifest = storage.read_json(str(tmp_path / "manifest.json"))
    storage.write_json(str(tmp_path / "manifest.json"), {**manifest, "started": "later", "host": "elsewhere"})
    assert run(again, uninterrupted, ema_decay=0.9)["steps"] == 10


def test_a_tokenizer_that_is_not_the_corpuss_is_refused(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder, seed in ((one, 0), (other, 1)):
        folder.mkdir()
        make_corpus(folder, n_documents=150 + 20 * seed, seed=seed)
    text = (other / "tokenizer.json").read_text().replace('"the"', '"teh"')
    (one / "tokenizer.json").write_text(text)
    error = run(str(one), tmp_path / "out", steps=1, strided_steps=0)
    assert isinstance(error, UserError)
    assert "tokenizer" in error.what


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "autoregressive"},
        {"model": "masked_diffusion"},
        {"strided_share": 0.4, "infilling_share": 0.4, "mix_after": 1, "strided_steps": 0, "steps": 6},
    ],
    ids=["autoregressive", "masked diffusion", "mixed"],
)
def test_two_workers_train_what_one_does(corpus: str, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Baselines and mixed schedules too: what is drawn depends on the step and the row, not on who computes it."""
    one = run(corpus, tmp_path / "one", n_workers=1, micro_batch_size=1, **changes)
    two = run(corpus, tmp_path / "two", n_workers=2, micro_batch_size=1, **changes)
    assert one["final"]["validation_nats_per_token"] == pytest.approx(
        two["final"]["validation_nats_per_token"], rel=1e-5
    )
    assert one["parameters"] == two["parameters"]
    streams = one["final"]["validation_nats_per_token_by_streams"]
    assert set(streams) == ({"1"} if "model" in changes else {"1", *map(str, CONFIG.streams)})
