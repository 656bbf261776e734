"""`armd bench decode`: what streams buy, against the bare matrix products of the steps at the same row counts.

Exact mode is held against parallel mode with as many streams: its steps have more rows, and it needs fewer, as heads
are drafted together. Other kinds of model (baselines.py) write as many tokens beside them.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from armd import ARCHITECTURES, ARMD, Completion, Engine, ModelConfig, SamplingParams
from armd.order import stream_blocks
from armd.randomness import seeded
from jobs import model, options
from jobs.benchmarks import baselines
from jobs.benchmarks.baselines import Baseline, Evaluations
from jobs.benchmarks.measure import (
    Product,
    at_least_one,
    finish,
    forward_products,
    interleaved,
    products_runner,
    random_weights,
    spread,
)

COMMAND = "armd bench decode"

# By contestant: how many requests of which kind; texts that it wrote; minimum, median and maximum of its seconds; a
# baseline with the number of its texts.
_Requests = dict[str, tuple[int, SamplingParams]]
_Written = dict[str, list[Completion]]
_Seconds = dict[str, dict[str, float]]
_Baselines = Mapping[str, tuple[int, Evaluations]]


@dataclass(frozen=True, kw_only=True)
class DecodeBenchOptions:
    """Tokens a second and ms a step for each number of streams, of the products alone, and of other kinds of model."""

    model_dir: str | None = None
    """A trained model's folder; None: random weights of `architecture`."""
    architecture: Literal["tiny", "small", "medium"] = "tiny"
    """The shape of a model with random weights."""
    vocab_size: int = 2048
    """Its vocabulary."""
    tokens: int = 128
    """Tokens to write a text; at most as many as the model's length."""
    streams: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Numbers of streams in parallel mode."""
    exact_streams: tuple[int, ...] = (2, 4, 8, 16, 32)
    """Numbers of streams in exact mode, for one text at a time; parallel mode is measured beside them."""
    exact_texts: int = 4
    """Texts that exact mode writes one after the other, of seeds 0, 1 and so on: how many drafts stand depends on the
    text."""
    batches: tuple[int, ...] = (1, 8, 32)
    """Texts written together, in parallel mode and by the baselines that write left to right."""
    baselines: tuple[Baseline, ...] = ("autoregressive", "masked-diffusion", "gpt2")
    """Other kinds of model of the same shape, with random weights; gpt2 is the one of `transformers`."""
    diffusion_steps: tuple[int, ...] = (256, 1024)
    """Steps of the masked-diffusion sampler, which writes one text at a time."""
    static_shapes: bool = False
    """Pad rows to a few sizes; on a GPU, replay recorded steps."""
    rounds: int = 5
    """Times each is measured, in turns."""
    clock: Literal["wall", "cpu"] = "wall"
    """cpu: what the process computed, its threads together; for a machine that others use too."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of weights and activations."""
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to compute."""

    def __post_init__(self) -> None:
        at_least_one(self, "vocab_size", "tokens", "rounds", "exact_texts")
        at_least_one(self, "streams", "exact_streams", "batches", "diffusion_steps")
        if not self.streams or not self.batches:
            raise ValueError("streams and batches must hold a number each")


def main(arguments: Sequence[str]) -> None:
    """Run the benchmark and print its tables and its line of JSON."""
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
    n_tokens = min(chosen.tokens, config.max_length)
    parallel, exact = _requests(chosen, n_tokens)
    others, left_out = _baselines(chosen, config, n_tokens, device, dtype)

    written: _Written = {}
    contestants: dict[str, Callable[[], object]] = {}
    max_slots = max(batch for batch, _ in parallel.values())
    engine = Engine(network, max_slots=max_slots, static_shapes=chosen.static_shapes)
    for name, (batch, params) in parallel.items():
        contestants[name] = _decode(engine, [[params] * batch], name, written)
    for name, (_, params) in exact.items():
        texts = [[replace(params, seed=seed)] for seed in range(chosen.exact_texts)]
        contestants[name] = _decode(engine, texts, name, written)
    contestants |= {name: run for name, (_, run) in others.items()}
    weights = random_weights(step_products(config, 1, n_tokens, 1)[0], device, dtype)
    for name, (batch, params) in parallel.items():
        products = step_products(config, batch, n_tokens, params.n_streams)
        contestants[f"{name}, products"] = products_runner(products, weights)
    clock = time.process_time if chosen.clock == "cpu" else time.perf_counter
    seconds = {name: spread(each) for name, each in interleaved(contestants, chosen.rounds, device, clock).items()}

    n_parameters = sum(parameter.numel() for parameter in network.parameters())
    print(f"{n_parameters:,} parameters, {n_tokens} tokens, {chosen.dtype}, {chosen.clock} time")
    result = _parallel_table(parallel, written, seconds) | _exact_table(exact, written, seconds)
    result |= _baseline_table(others, chosen.streams[0], n_tokens, seconds)
    for name, why in left_out.items():
        print(f"{name} is left out: {why}")
    shape = {} if chosen.model_dir is None else {"architecture": None, "vocab_size": config.vocab_size}
    about = {**chosen.__dict__, **shape, "tokens": n_tokens, "n": chosen.rounds, "left_out": left_out}
    finish({"bench": "decode", **about, "contestants": result}, device)


def _requests(chosen: DecodeBenchOptions, n_tokens: int) -> tuple[_Requests, _Requests]:
    """What is written in parallel mode and what in exact mode; parallel mode has all that others are compared with."""
    parallel: _Requests = {}

    def add(batch: int, n_streams: int) -> SamplingParams:
        params = SamplingParams(max_tokens=n_tokens, n_streams=n_streams)
        parallel.setdefault(f"batch {batch}, S={n_streams}", (batch, params))
        return params

    for batch in chosen.batches:
        for n_streams in chosen.streams:
            add(batch, n_streams)
    if "masked-diffusion" in chosen.baselines:
        add(1, chosen.streams[0])
    exact = {f"exact, S={n}": (1, replace(add(1, n), mode="exact")) for n in chosen.exact_streams}
    return parallel, exact


def _baselines(
    chosen: DecodeBenchOptions, config: ModelConfig, n_tokens: int, device: torch.device, dtype: torch.dtype
) -> tuple[_Baselines, dict[str, str]]:
    """The other contestants, and those that cannot be measured here with the reason."""
    left_out: dict[str, str] = {name: why for name in chosen.baselines if (why := baselines.missing(name))}
    found: dict[str, tuple[int, Evaluations]] = {}
    for name in chosen.baselines:
        if name in left_out:
            continue
        if name == "masked-diffusion":
            found |= baselines.masked_diffusion(config, n_tokens, chosen.diffusion_steps, device, dtype)
        else:
            make = baselines.gpt2 if name == "gpt2" else baselines.autoregressive
            found |= make(config, n_tokens, chosen.batches, device, dtype)
    return found, left_out


def _parallel_table(parallel: _Requests, written: _Written, seconds: _Seconds) -> dict[str, dict[str, Any]]:
    """Print and return the figures of parallel mode, beside the first number of streams and the bare products."""
    result: dict[str, dict[str, Any]] = {}
    first: dict[int, float] = {}
    print(f"{'':18}{'tokens/s':>10}{'to first':>9}{'ms a step':>11}{'products':>10}{'ratio':>7}")
    for name, (batch, params) in parallel.items():
        one = result[name] = _measured(seconds[name], batch * params.max_tokens, written[name][0].steps)
        one["speed_up"] = one["tokens_per_second"] / first.setdefault(batch, one["tokens_per_second"])
        one["product_seconds"] = seconds[f"{name}, products"]["median"] / one["steps"]
        one["to_products"] = one["step_seconds"] / one["product_seconds"]
        print(
            f"{name:18}{one['tokens_per_second']:10,.0f}{one['speed_up']:9.2f}{one['step_seconds'] * 1e3:11.2f}"
            f"{one['product_seconds'] * 1e3:10.2f}{one['to_products']:7.2f}"
        )
    return result


def _exact_table(exact: _Requests, written: _Written, seconds: _Seconds) -> dict[str, dict[str, Any]]:
    """Print and return the figures of exact mode, beside the time of parallel mode."""
    result: dict[str, dict[str, Any]] = {}
    print(f"{'':18}{'tokens/s':>10}{'steps':>9}{'ms a step':>11}{'accepted':>10}{'time to parallel':>18}")
    for name, (_, params) in exact.items():
        texts = written[name]
        n_tokens = len(texts) * params.max_tokens
        one = result[name] = _measured(seconds[name], n_tokens, sum(text.steps for text in texts))
        one["accepted"], one["rejected"] = (sum(getattr(t, kind) for t in texts) for kind in ("accepted", "rejected"))
        parallel = seconds[f"batch 1, S={params.n_streams}"]["median"]
        one["to_parallel"] = seconds[name]["median"] / (len(texts) * parallel)
        print(
            f"{name:18}{one['tokens_per_second']:10,.0f}{one['steps'] / len(texts):9.1f}"
            f"{one['step_seconds'] * 1e3:11.2f}{one['accepted'] / n_tokens:10.1%}{one['to_parallel']:18.2f}"
        )
    return result


def _baseline_table(others: _Baselines, n_streams: int, n_tokens: int, seconds: _Seconds) -> dict[str, dict[str, Any]]:
    """Print and return the figures of other models, beside the time that ARMD takes with `n_streams` (usually one)."""
    result: dict[str, dict[str, Any]] = {}
    if others:
        print(f"{'':24}{'tokens/s':>10}{'passes':>9}{'ms a pass':>11}{f'ARMD S={n_streams} to it':>18}")
    for name, (batch, evaluations) in others.items():
        one = result[name] = _measured(seconds[name], batch * n_tokens, evaluations.count)
        one["armd_to_it"] = seconds[f"batch {batch}, S={n_streams}"]["median"] / seconds[name]["median"]
        print(
            f"{name:24}{one['tokens_per_second']:10,.0f}{one['steps']:9}{one['step_seconds'] * 1e3:11.2f}"
            f"{one['armd_to_it']:18.2f}"
        )
    return result


def step_products(config: ModelConfig, batch: int, n_tokens: int, n_streams: int) -> list[list[Product]]:
    """The products of each decoding step: content rows of the block before, query and head rows of the step's own."""
    sizes = [len(block) for block in stream_blocks(range(n_tokens), n_streams)]
    return [
        forward_products(config, batch * before, batch * own, batch * own)
        for before, own in zip([0, *sizes], sizes, strict=False)
    ]


def _decode(
    engine: Engine, batches: Sequence[Sequence[SamplingParams]], name: str, written: _Written
) -> Callable[[], object]:
    """A contestant that writes one batch after the other, and leaves its texts in `written`, the same in each round."""

    def run() -> None:
        written[name] = []
        for batch in batches:
            for params in batch:
                engine.submit([], params)
            while not engine.idle:
                written[name] += [event.completion for event in engine.step() if event.completion is not None]

    return run


def _measured(seconds: dict[str, float], n_tokens: int, n_steps: int) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "steps": n_steps,
        "tokens_per_second": n_tokens / seconds["median"],
        "step_seconds": seconds["median"] / n_steps,
    }
