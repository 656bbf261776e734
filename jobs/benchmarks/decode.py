"""`armd bench decode`: what streams buy, against the bare matrix products of the steps at the same row counts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from armd import ARCHITECTURES, ARMD, ModelConfig, SamplingParams, generate
from armd.order import stream_blocks
from armd.randomness import seeded
from jobs import model, options
from jobs.benchmarks.measure import Product, finish, forward_products, interleaved, products_runner, spread

COMMAND = "armd bench decode"


@dataclass(frozen=True, kw_only=True)
class DecodeBenchOptions:
    """Tokens a second and ms a step for each number of streams, and the products alone."""

    model_dir: str | None = None
    """A trained model's folder; None: random weights of `architecture`."""
    architecture: Literal["tiny", "small", "medium"] = "tiny"
    """The shape of a model with random weights."""
    vocab_size: int = 2048
    """Its vocabulary."""
    tokens: int = 128
    """Tokens to write a text; at most as many as the model's length."""
    streams: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Numbers of streams."""
    batches: tuple[int, ...] = (1, 8)
    """Texts written together."""
    rounds: int = 5
    """Times each is measured, in turns."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of weights and activations."""
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to compute."""


def main(arguments: Sequence[str]) -> None:
    """Run the benchmark and print its table and its line of JSON."""
    chosen = options.parse(
        DecodeBenchOptions(), arguments, command=COMMAND, description=DecodeBenchOptions.__doc__ or ""
    )
    device, dtype = torch.device(chosen.device), getattr(torch, chosen.dtype)
    if chosen.model_dir is not None:
        network, _ = model.load(chosen.model_dir)
    else:
        config = ARCHITECTURES[chosen.architecture].model_config(chosen.vocab_size, chosen.tokens)
        network = ARMD(config, generator=seeded("bench"))
    network = network.to(device, dtype).eval()
    config = network.config
    contestants: dict[str, Callable[[], object]] = {}
    steps = {}
    n_tokens = min(chosen.tokens, config.max_length)
    for batch in chosen.batches:
        for n_streams in chosen.streams:
            params = SamplingParams(max_tokens=n_tokens, n_streams=n_streams)
            name = f"batch {batch}, S={n_streams}"
            products = step_products(config, batch, n_tokens, n_streams)
            steps[name] = len(products)
            contestants[name] = _decode(network, batch, params)
            contestants[f"{name}, products"] = products_runner(products, device, dtype)
    seconds = interleaved(contestants, chosen.rounds, device)
    result = {}
    print(f"{sum(p.numel() for p in network.parameters()):,} parameters, {n_tokens} tokens, {chosen.dtype}")
    print(f"{'':16}{'tokens/s':>10}{'to S=' + str(chosen.streams[0]):>9}{'ms a step':>11}{'products':>10}{'ratio':>7}")
    for batch in chosen.batches:
        first = None
        for n_streams in chosen.streams:
            name = f"batch {batch}, S={n_streams}"
            whole = spread(seconds[name])
            rate = batch * n_tokens / whole["median"]
            first = first or rate
            step = whole["median"] / steps[name]
            floor = spread(seconds[f"{name}, products"])["median"] / steps[name]
            result[name] = {
                "seconds": whole,
                "steps": steps[name],
                "tokens_per_second": rate,
                "speed_up": rate / first,
                "step_seconds": step,
                "product_seconds": floor,
                "to_products": step / floor,
            }
            print(f"{name:16}{rate:10,.0f}{rate / first:9.2f}{step * 1e3:11.2f}{floor * 1e3:10.2f}{step / floor:7.2f}")
    finish(
        {"bench": "decode", **chosen.__dict__, "tokens": n_tokens, "n": chosen.rounds, "contestants": result}, device
    )


def step_products(config: ModelConfig, batch: int, n_tokens: int, n_streams: int) -> list[list[Product]]:
    """The products of each decoding step: content rows of the block before, query and head rows of the step's own."""
    sizes = [len(block) for block in stream_blocks(range(n_tokens), n_streams)]
    return [
        forward_products(config, batch * before, batch * own, batch * own)
        for before, own in zip([0, *sizes], sizes, strict=False)
    ]


def _decode(network: ARMD, batch: int, params: SamplingParams) -> Callable[[], object]:
    def run() -> None:
        generate(network, [[]] * batch, params)

    return run
