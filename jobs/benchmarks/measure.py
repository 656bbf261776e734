"""Interleaved timing, the bare matrix products of a model, and the line of JSON at the end."""

import json
import platform
import statistics
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import armd
from armd import ModelConfig
from armd.products import product

Product = tuple[int, int, int]
"""Rows, columns in, columns out of one matrix product."""


def at_least_one(chosen: Any, *names: str) -> None:
    """Check the numbers of a benchmark's options.

    Raises:
        ValueError: naming the option, a number or numbers, that has one below 1.
    """
    for name in names:
        value = getattr(chosen, name)
        if any(number < 1 for number in (value if isinstance(value, tuple) else (value,))):
            raise ValueError(f"{name} must be at least 1, not {value}")


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


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Bytes of the tensors that `run` makes, at their peak; what was there before, such as weights, does not count."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with _Storages() as storages:
        run()
    return storages.peak


class _Storages(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, as long as they are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {tensor.untyped_storage().data_ptr() for tensor in tree_iter(args) if isinstance(tensor, torch.Tensor)}
        made = function(*args, **(kwargs or {}))
        for tensor in tree_iter(made):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()).data_ptr() not in given:
                self._count(storage)
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        place = storage.data_ptr()
        if place in self._alive or not storage.nbytes():
            return
        self._alive[place] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, place)

    def _free(self, place: int) -> None:
        self.now -= self._alive.pop(place)


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


def random_weights(products: Sequence[Product], device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """One for each product, stored by output, as a model's are."""
    return [torch.randn(n_out, n_in, device=device, dtype=dtype) for _, n_in, n_out in products]


def products_runner(steps: Sequence[Sequence[Product]], weights: Sequence[torch.Tensor]) -> Callable[[], object]:
    """A function that computes the products of every step on random rows, in the way that decoding computes them.

    All steps have the same weights and may differ in rows.
    """
    like = weights[0]
    shapes = {(rows, n_in) for products in steps for rows, n_in, _ in products}
    inputs = {shape: torch.randn(shape, device=like.device, dtype=like.dtype) for shape in shapes}

    @torch.inference_mode()
    def run() -> None:
        for products in steps:
            for (rows, n_in, _), weight in zip(products, weights, strict=True):
                if rows:
                    product(inputs[rows, n_in], weight)

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
