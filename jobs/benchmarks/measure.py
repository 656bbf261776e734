"""Interleaved timing, the bare matrix products of a model, and the line of JSON at the end."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

import armd
from armd import ModelConfig

Product = tuple[int, int, int]
"""Rows, columns in, columns out of one matrix product."""


def interleaved(
    contestants: Mapping[str, Callable[[], Any]],
    rounds: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each contestant in each round, after one round that does not count.

    Taking turns keeps the comparison fair on a machine whose speed drifts.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for round_ in range(rounds + 1):
        for name, run in contestants.items():
            _finish(device)
            since = clock()
            run()
            _finish(device)
            if round_:
                seconds[name].append(clock() - since)
    return seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    """Minimum, median and maximum."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def forward_products(config: ModelConfig, content_rows: int, query_rows: int, head_rows: int) -> list[Product]:
    """Every weight product of one forward pass; content and query rows share theirs in the two-stream layers."""
    d, n_two = config.d_model, config.n_two_stream_layers
    both = content_rows + query_rows
    products: list[Product] = []
    for depth in range(config.n_layers):
        two_stream = depth < n_two
        rows = both if depth < n_two - 1 else query_rows  # the last two-stream layer computes no content rows
        products += [(rows, d, d), (rows, d, d), (rows, d, 4 * d), (rows, 4 * d, d)]  # query, out, MLP
        products.append((content_rows if two_stream else query_rows, d, 2 * d))  # keys and values
    return [*products, (head_rows, d, config.vocab_size)]


def products_runner(
    steps: Sequence[Sequence[Product]], device: torch.device, dtype: torch.dtype
) -> Callable[[], object]:
    """A function that computes the products of every step on random matrices.

    Within a step weights are distinct and stored by output, as a model's are; all steps have the same weights and may
    differ in rows.
    """
    weights = [torch.randn(n_out, n_in, device=device, dtype=dtype).t() for _, n_in, n_out in steps[0]]
    shapes = {(rows, n_in) for products in steps for rows, n_in, _ in products}
    inputs = {shape: torch.randn(shape, device=device, dtype=dtype) for shape in shapes}

    @torch.inference_mode()
    def run() -> None:
        for products in steps:
            for (rows, n_in, _), weight in zip(products, weights, strict=True):
                if rows:
                    inputs[rows, n_in] @ weight

    return run


def finish(result: dict[str, Any], device: torch.device) -> None:
    """Print the result as one line of JSON, with what it was measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    machine = {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__, "armd": armd.__version__}
    print(json.dumps({**result, "machine": machine}))


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
