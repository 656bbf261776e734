"""Products of rows and weights: the library's, unless this processor is known or measured to have a faster way.

PyTorch leaves float32 products on a CPU to MKL, which does well on Intel's processors. On an AMD EPYC with AVX-512 it
takes twice as long as oneDNN, which PyTorch brings too, for bfloat16 and compiled code; and products of few rows, as a
decoding step has them, take two or three times as long as reading the weight (docs/decisions.md has figures), which
their mirror image, `weight @ rows.T`, may not. Elsewhere this is `torch.nn.functional.linear`.

Shapes: M rows, I columns in, O columns out.
"""

import functools
import math
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

MOST_ROWS = 4
"""Up to here, which way is fastest depends on the shape, and is measured."""

_LEAST_WORK = 3 << 18
"""Multiplications below which oneDNN's overhead costs more than it gains."""

_LEAST_WEIGHT = 1 << 19
"""Elements of a weight that caches hold, which is read quickly in any way."""

_MEASURED = 1 << 24
"""Elements of all weights of a measurement, 64 MB: more than the caches hold, as a model's weights are."""

_CLEARLY = 1.1
"""How many times faster another way must be. What is near this may be decided otherwise in another process, whose
results then differ by rounding."""

Way = Callable[[Tensor, Tensor], Tensor]
"""Computes `rows @ weight.T`."""


class Projection(nn.Linear):
    """A weight without a bias, and its product with rows."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out, bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        """(..., O) from rows (..., I)."""
        return product(rows, self.weight)


def product(rows: Tensor, weight_OI: Tensor, onto: Tensor | None = None) -> Tensor:
    """`rows @ weight.T` (..., O) of rows (..., I), added to `onto` (M, O) where that is given, with rows (M, I)."""
    compute = _way(rows, weight_OI)
    if compute is not F.linear:
        made = compute(rows, weight_OI)
        return made if onto is None else onto + made
    return F.linear(rows, weight_OI) if onto is None else torch.addmm(onto, rows, weight_OI.t())


def _way(rows: Tensor, weight_OI: Tensor) -> Way:
    """How to compute a product of these."""
    n_out, n_in = weight_OI.shape
    n_rows = rows.numel() // n_in
    if (
        rows.ndim < 2
        or n_rows * n_in * n_out < _LEAST_WORK
        or not rows.dtype == weight_OI.dtype == torch.float32
        or rows.device.type != "cpu"
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
    ):
        return F.linear
    if rows.ndim == 2 and n_rows <= MOST_ROWS and n_in * n_out >= _LEAST_WEIGHT and not torch.is_grad_enabled():
        return fastest(n_rows, n_in, n_out)
    # Not measured: training must come to the same numbers, to the bit, when it goes on in another process.
    return by_onednn if mkl_is_slow() else F.linear


def by_onednn(rows: Tensor, weight_OI: Tensor) -> Tensor:
    """`rows @ weight.T` (..., O) by oneDNN; it can be differentiated once, backwards."""
    if torch.is_grad_enabled():  # whatever wants what kind of derivative: where there is none, this says so
        made: Tensor = _ByOneDNN.apply(rows, weight_OI)
        return made
    return _onednn(rows, weight_OI)


def mirrored(rows_MI: Tensor, weight_OI: Tensor) -> Tensor:
    """`rows @ weight.T` (M, O) from the other side. One row is taken twice, as a matrix times a vector may be slow."""
    n_rows = len(rows_MI)
    if n_rows == 1:
        rows_MI = rows_MI.repeat(2, 1)
    return (weight_OI @ rows_MI.t()).t()[:n_rows].contiguous()


@functools.cache
def mkl_is_slow() -> bool:
    """Whether this is a processor like the one on which MKL takes twice as long as oneDNN: another maker's, AVX-512."""
    return (
        torch.backends.mkl.is_available()
        and has_onednn()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and _vendor() not in ("GenuineIntel", None)
    )


def has_onednn() -> bool:
    """Whether oneDNN's product is here, under the name that PyTorch's compiler calls it by."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@functools.cache
def fastest(n_rows: int, n_in: int, n_out: int) -> Way:
    """The way in which this machine computes a product of this shape fastest; another than the library's where it is
    clearly faster.

    Measured in float32, with the threads of the first call, once a process for each shape.
    """
    n_out = min(n_out, max(1, _MEASURED // n_in))  # a part of a large vocabulary says as much
    ones = functools.partial(torch.ones, dtype=torch.float32, device="cpu")
    rows_MI, weights = ones(n_rows, n_in), ones(-(-_MEASURED // (n_in * n_out)), n_out, n_in).unbind()
    ways: list[Way] = [F.linear, by_onednn, mirrored] if has_onednn() else [F.linear, mirrored]
    seconds = _seconds(ways, rows_MI, weights)
    best = ways[0]
    for way in ways[1:]:
        if seconds[best] > _CLEARLY * seconds[way]:
            best = way
    return best


@torch.inference_mode()
def _seconds(ways: Sequence[Way], rows_MI: Tensor, weights: Sequence[Tensor]) -> dict[Way, float]:
    """What all the products take in each way, the least of three measurements, in turns."""
    seconds = dict.fromkeys(ways, math.inf)
    for _ in range(3):
        for compute in ways:
            since = time.perf_counter()
            for weight_OI in weights:
                compute(rows_MI, weight_OI)
            seconds[compute] = min(seconds[compute], time.perf_counter() - since)
    return seconds


class _ByOneDNN(torch.autograd.Function):
    """Both gradients are products too."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight_OI)
        return _onednn(rows, weight_OI)

    @staticmethod
    @once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        rows, weight_OI = ctx.saved_tensors  # type: ignore[attr-defined]
        of_rows, of_weight = ctx.needs_input_grad  # type: ignore[attr-defined]
        gradient = gradient.contiguous()
        gradient_MO, rows_MI = gradient.flatten(0, -2), rows.flatten(0, -2)
        return (
            _onednn(gradient, weight_OI.t()) if of_rows else None,
            _onednn(gradient_MO.t(), rows_MI.t()) if of_weight else None,
        )


def _onednn(rows: Tensor, weight_OI: Tensor) -> Tensor:
    made: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight_OI, None, "none", [], "")
    return made


def _vendor() -> str | None:
    """The processor's maker, as x86 processors name it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("vendor_id"))
    except (OSError, StopIteration):
        return None
