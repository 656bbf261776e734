"""The plan against the model: its parameters, the operations PyTorch counts, the tensors autograd keeps."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import armd
from armd.objective import nats
from armd.tokenizer import Tokenizer
from jobs import costs, pipeline, plan
from jobs.cli import main
from jobs.recipes import RECIPES
from pipelines.train_config import TrainConfig

REPOSITORY = Path(__file__).resolve().parent.parent

MODELS = [
    armd.ModelConfig(
        vocab_size=1000, max_length=256, n_layers=4, n_two_stream_layers=2, d_model=64, n_heads=4, d_prefix=32
    ),
    armd.ModelConfig(
        vocab_size=300, max_length=128, n_layers=3, n_two_stream_layers=3, d_model=64, n_heads=2, d_prefix=16
    ),
    armd.ModelConfig(
        vocab_size=300, max_length=384, n_layers=3, n_two_stream_layers=1, d_model=96, n_heads=2, d_prefix=16
    ),
]


def counted(config: armd.ModelConfig, *, backward: bool = False) -> dict[str, float]:
    """Operations a token by kind, as PyTorch counts them; attention over the whole square."""
    model, order = armd.ARMD(config), armd.Order.left_to_right(config.max_length)
    return counted_of(lambda tokens: model(tokens, order), config, backward=backward)


def counted_of(
    model: Callable[[torch.Tensor], torch.Tensor], config: armd.ModelConfig, *, backward: bool = False
) -> dict[str, float]:
    tokens = torch.zeros(1, config.max_length, dtype=torch.long)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits = model(tokens)
        if backward:
            logits.sum().backward()
    return {str(kind): n / config.max_length for kind, n in counter.get_flop_counts()["Global"].items()}


@pytest.fixture(autouse=True)
def plain_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch counts the products of its own library."""
    monkeypatch.setattr(armd.products, "mkl_is_slow", lambda: False)


@pytest.mark.parametrize("config", MODELS)
def test_parameters_are_the_models(config: armd.ModelConfig) -> None:
    assert costs.parameters(config) == sum(parameter.numel() for parameter in armd.ARMD(config).parameters())


@pytest.mark.parametrize("config", MODELS)
def test_forward_operations_are_those_that_pytorch_counts(config: armd.ModelConfig) -> None:
    flops = costs.flops(config)
    seen = counted(config)
    assert seen["aten.mm"] == flops.layers + flops.head
    assert seen["aten.bmm"] == 2 * flops.attention + flops.prefix  # it counts the hidden half of the square too


@pytest.mark.parametrize("config", MODELS)
def test_forward_operations_of_the_baselines_are_those_that_pytorch_counts(config: armd.ModelConfig) -> None:
    plain, diffusion = costs.autoregressive_flops(config), costs.masked_diffusion_flops(config)
    seen = counted_of(armd.AutoregressiveLM(config), config)
    assert seen == {"aten.mm": plain.layers + plain.head, "aten.bmm": 2 * plain.attention}  # the hidden half too
    seen = counted_of(armd.MaskedDiffusionLM(config), config)
    assert seen == {"aten.mm": diffusion.layers + diffusion.head, "aten.bmm": diffusion.attention}


def test_training_is_three_times_the_forward() -> None:
    config = MODELS[0]
    ratio = sum(counted(config, backward=True).values()) / sum(counted(config).values())
    assert ratio == pytest.approx(costs.flops(config).training / costs.flops(config).forward, rel=0.01)


def test_the_ratio_to_an_autoregressive_model_is_the_papers() -> None:
    """Section 2.4: 194 against 144 d^2 for 12 layers, half of them two-stream; the 1.24 counts no attention."""
    config = armd.ARCHITECTURES["small"].model_config(50_257, 1024)
    armd_, plain = costs.flops(config), costs.autoregressive_flops(config)
    assert armd_.layers / plain.layers == 194 / 144
    assert costs.allowed_ratio(config) == pytest.approx(1.24, abs=0.005)
    assert armd_.training / plain.training == pytest.approx(1.25, abs=0.005)  # with attention and prefix aggregation


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("config", MODELS)
def test_activations_are_what_autograd_keeps(config: armd.ModelConfig, checkpointing: bool) -> None:
    """At the end of the forward pass; the layer that is computed again comes on top."""
    model, batch = armd.ARMD(config), 4
    model.activation_checkpointing = checkpointing
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        nats(
            model, torch.zeros(batch, config.max_length, dtype=torch.long), armd.Order.left_to_right(config.max_length)
        )
    measured = sum(t.untyped_storage().nbytes() for t in kept.values() if config.vocab_size not in t.shape)
    train = TrainConfig(batch_size=batch, micro_batch_size=batch, activation_checkpointing=checkpointing)
    estimate = costs.memory(config, train, costs.parameters(config), bfloat16=False).activations
    again = 0
    if checkpointing:
        row = batch * config.max_length * config.d_model * 4
        again = costs._KEPT_A_ROW[False] * (2 if config.n_two_stream_layers > 1 else 1) * row
    assert estimate - again == pytest.approx(measured, rel=0.2)


@pytest.mark.parametrize(
    ("stage", "workers", "bfloat16", "bytes_a_parameter"),
    [
        # weights + gradients + (float32 copy + two moments) by DeepSpeed's definition of the stages
        (1, 1, False, 4 + 4 + 12),
        (1, 4, True, 2 + 2 + 12 / 4),
        (2, 4, True, 2 + 2 / 4 + 12 / 4),
        (3, 4, True, 2 / 4 + 2 / 4 + 12 / 4),
    ],
)
def test_states_a_rank_by_zero_stage(stage: int, workers: int, bfloat16: bool, bytes_a_parameter: float) -> None:
    train = TrainConfig(batch_size=8, micro_batch_size=1, n_workers=workers, zero_stage=stage)  # type: ignore[arg-type]
    memory = costs.memory(MODELS[0], train, 1000, bfloat16=bfloat16)
    states = memory.total - memory.activations - memory.logits
    assert states == pytest.approx(1000 * bytes_a_parameter)
    averaged = costs.memory(MODELS[0], dataclasses.replace(train, ema_decay=0.9), 1000, bfloat16=bfloat16)
    assert averaged.total - memory.total == pytest.approx(4000 / (workers if stage == 3 else 1))


def test_what_is_computed_again_takes_time(capsys: pytest.CaptureFixture[str]) -> None:
    """All of the layers' forward pass, so less than a third more. Fails where the plan counts the memory alone."""
    made = []
    for options in ([], ["--train.activation-checkpointing"]):
        assert main(["plan", "small", "--json", *options]) == 0
        made.append(json.loads(capsys.readouterr().out))
    plain, again = (next(iter(one["seconds"].values())) for one in made)
    assert 1.2 < again / plain < 1.34
    assert made[1]["memory_per_rank"]["activations"] < 0.25 * made[0]["memory_per_rank"]["activations"]


def test_small_is_the_papers_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "small", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert 120e6 < made["parameters"] < 130e6
    assert made["config"]["train"]["architecture"]["n_neighbours"] == 0
    assert made["tokens"] == 410_000 * 512 * 1024
    assert made["vocab_size"] == 50_257
    assert made["config"]["train"]["learning_rate"] == 3e-4
    assert made["checkpoint_bytes"] == 14 * made["parameters"]
    assert made["disk"]["total"] == 3 * made["checkpoint_bytes"] + 4 * made["parameters"]
    assert made["epochs"] is None


def test_the_time_is_work_over_throughput() -> None:
    recipe = RECIPES["small"]()
    given = plan.make(recipe, tokens_per_second=1e6)
    assert list(given["seconds"].values()) == [given["tokens"] / 1e6]
    assumed = plan.make(recipe)
    (gpu,) = (seconds for words, seconds in assumed["seconds"].items() if "H200" in words)
    assert gpu == pytest.approx(assumed["tokens"] * assumed["flops_per_token"]["training"] / (8 * 0.4 * 989e12))


def test_overrides_change_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "demo", "--json", "--train.steps", "10", "--train.strided-steps", "0"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 10


def test_a_corpus_that_is_there_gives_the_epochs(tmp_path: Path) -> None:
    recipe = RECIPES["demo"]()
    assert plan.make(recipe, root=str(tmp_path))["epochs"] is None
    corpus = Path(pipeline.build(recipe)["corpus"].directory(str(tmp_path)))
    corpus.mkdir()
    (corpus / "manifest.json").write_text(json.dumps({"splits": {"train": {"tokens": 1_000_000}}}))
    made = plan.make(recipe, root=str(tmp_path))
    assert made["epochs"] == made["tokens"] / 1_000_000
    assert made["disk"]["corpus"] == 2_000_000


def test_the_table_says_it_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "demo"]) == 0
    out = capsys.readouterr().out
    for word in ("Parameters", "FLOPs a token", "Memory a rank", "Checkpoint", "Training time", "--train.zero-stage 2"):
        assert word in out
    assert "\x1b" not in out


def test_a_tokenizer_that_is_not_there_is_said_to_be_assumed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "demo", "--corpus.tokenizer", "nowhere/gpt2"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "taken as GPT-2's 50,257 entries; nowhere/gpt2 is not there" in out


def test_a_tokenizer_in_an_object_store_is_looked_at(capsys: pytest.CaptureFixture[str]) -> None:
    import fsspec

    store = fsspec.filesystem("memory")
    store.pipe("/plan-test/gpt2/tokenizer.json", Tokenizer.train(["some text"], 260).to_json().encode())
    try:
        assert main(["plan", "demo", "--corpus.tokenizer", "memory://plan-test/gpt2", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["vocab_size"] < 261
        assert main(["plan", "demo", "--corpus.tokenizer", "memory://plan-test/none"]) == 1
        assert "memory://plan-test/none" in capsys.readouterr().err
    finally:
        store.rm("/plan-test", recursive=True)


def test_an_unknown_tokenizer_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "demo", "--corpus.tokenizer", "nowhere/mine"]) == 1
    assert "nowhere/mine" in capsys.readouterr().err


def test_neither_plan_nor_help_imports_ray() -> None:
    code = (
        "import sys; from jobs.cli import main; main(['plan', 'demo']); main(['run', '--help']);"
        "sys.exit(str([name for name in ('ray', 'deepspeed', 'pyarrow') if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.stderr.strip().endswith("[]")
