"""`armd bench train`: forward and backward under each kind of order, against the baselines and the bare products."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from armd import ARCHITECTURES, ARMD, AutoregressiveLM, MaskedDiffusionLM, ModelConfig, Order
from armd.masked_diffusion import Noise
from armd.models import Model
from armd.objective import Drawn, nats
from armd.randomness import seeded
from jobs import costs, options
from jobs.benchmarks.measure import (
    at_least_one,
    finish,
    forward_products,
    interleaved,
    peak_bytes,
    products_runner,
    random_weights,
    spread,
)
from jobs.terminal import bytes_text
from pipelines import allocator

COMMAND = "armd bench train"
AUTOREGRESSIVE = "autoregressive"
MASKED_DIFFUSION = "masked diffusion"


@dataclass(frozen=True, kw_only=True)
class TrainBenchOptions:
    """A training step (forward and backward, no optimiser) of ARMD under each kind of order, of both baselines, and of
    ARMD's bare matrix products."""

    architecture: Literal["tiny", "small", "medium"] = "tiny"
    """The model's shape."""
    vocab_size: int = 2048
    """Entries of the vocabulary."""
    length: int = 256
    """Tokens a sequence."""
    batch: int = 8
    """Sequences a step."""
    rounds: int = 7
    """Times each is measured, in turns."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of weights and activations."""
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to compute."""

    def __post_init__(self) -> None:
        at_least_one(self, "vocab_size", "length", "batch", "rounds")


def main(arguments: Sequence[str]) -> None:
    """Run the benchmark and print its table and its line of JSON."""
    chosen = options.parse(TrainBenchOptions(), arguments, command=COMMAND, description=TrainBenchOptions.__doc__ or "")
    device, dtype = torch.device(chosen.device), getattr(torch, chosen.dtype)
    allocator.keep_freed_memory()  # as the workers do
    config = ARCHITECTURES[chosen.architecture].model_config(chosen.vocab_size, chosen.length)
    model = ARMD(config, generator=seeded("bench")).to(device, dtype)
    tokens = torch.randint(chosen.vocab_size, (chosen.batch, chosen.length), generator=seeded("tokens")).to(device)
    shuffled = [Order.progressive(chosen.length, 8, generator=seeded(row)) for row in range(chosen.batch)]
    orders = {
        "left-to-right": Order.left_to_right(chosen.length).to(device),
        "progressive": Order.stack(shuffled).to(device),
        "strided S=4": Order.strided(chosen.length, 4).to(device),
    }
    rows = chosen.batch * chosen.length
    forward = forward_products(config, rows, rows, rows)
    # The backward pass multiplies twice: for the inputs and for the weights.
    backward = [(m, n, k) for m, k, n in forward] + [(k, m, n) for m, k, n in forward]
    contestants: dict[str, Callable[[], object]] = {name: _step(model, tokens, order) for name, order in orders.items()}
    for name, kind, drawn in (
        (AUTOREGRESSIVE, AutoregressiveLM, None),
        (MASKED_DIFFUSION, MaskedDiffusionLM, Noise.draw(chosen.batch, chosen.length, seeded("noise")).to(device)),
    ):
        contestants[name] = _step(kind(config, generator=seeded("bench")).to(device, dtype), tokens, drawn)
    memory = {name: peak_bytes(run, device) for name, run in contestants.items()}
    products = forward + backward
    contestants["bare products"] = products_runner([products], random_weights(products, device, dtype))
    seconds = interleaved(contestants, chosen.rounds, device)
    flops = {name: rows * _flops(name, config) for name in memory}
    flops["bare products"] = 3 * sum(2 * m * k * n for m, k, n in forward)
    floor = spread(seconds["bare products"])["median"]
    baseline = spread(seconds[AUTOREGRESSIVE])["median"]
    result = {}
    print(f"{chosen.architecture}, {chosen.batch} x {chosen.length} tokens, {chosen.dtype}, n = {chosen.rounds}")
    print(f"{'':16}{'ms a step':>12}{'tokens/s':>12}{'GFLOP/s':>10}{'to products':>13}{'to AR':>8}{'peak':>10}")
    for name, values in seconds.items():
        median = spread(values)["median"]
        result[name] = {
            "seconds": spread(values),
            "tokens_per_second": rows / median,
            "flops": flops[name],
            "flops_per_second": flops[name] / median,
            "to_products": median / floor,
            "to_autoregressive": median / baseline,
            "peak_bytes": memory.get(name),
        }
        peak = bytes_text(memory[name]) if name in memory else ""
        print(
            f"{name:16}{median * 1e3:12.1f}{rows / median:12,.0f}{flops[name] / median / 1e9:10,.1f}"
            f"{median / floor:13.2f}{median / baseline:8.2f}{peak:>10}"
        )
    allowed = costs.allowed_ratio(config)
    print(
        f"by its weight products ARMD may take {allowed:.2f} of AR's time; peak: tensors of a step, without the weights"
    )
    finish({"bench": "train", **chosen.__dict__, "allowed_ratio": allowed, "contestants": result}, device)


def _flops(name: str, config: ModelConfig) -> float:
    """Operations a token that a contestant's forward and backward pass want."""
    if name == AUTOREGRESSIVE:
        return costs.autoregressive_flops(config).training
    if name == MASKED_DIFFUSION:
        return costs.masked_diffusion_flops(config).training
    return costs.flops(config).training


def _step(model: Model, tokens: torch.Tensor, drawn: Drawn) -> Callable[[], object]:
    def run() -> None:
        total, count = nats(model, tokens, drawn)
        (total / count).backward()
        model.zero_grad()

    return run
