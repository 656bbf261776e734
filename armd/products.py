"""Products of few rows, as a decoding step of few texts has them.

On a CPU such a product should take as long as reading its weight. Some libraries on some processors take two or three
times as long for `rows @ weight.T`, and not for its mirror image `weight @ rows.T` (docs/decisions.md has figures);
which of them is fast is asked of the machine, once a process for each shape.

Shapes: M rows, I columns in, O columns out.
"""

import functools
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_ROWS = 4
"""With more, `rows @ weight.T` is as fast as its mirror image, or faster."""

_LEAST_WEIGHT = 1 << 19
"""Elements of a weight below which there is nothing to gain."""

_MEASURED = 1 << 24
"""Elements of all weights of a measurement, 64 MB: more than the caches hold, as a model's weights are."""

_CLEARLY = 1.25
"""How many times faster the mirror image must be. What is near this may be decided otherwise in another process, whose
results then differ by rounding."""


def product(rows_MI: Tensor, weight_OI: Tensor, onto_MO: Tensor | None = None) -> Tensor:
    """`rows @ weight.T` (M, O), added to `onto` where that is given."""
    n_out, n_in = weight_OI.shape
    few = 0 < rows_MI.shape[0] <= MOST_ROWS and n_out * n_in >= _LEAST_WEIGHT and rows_MI.device.type == "cpu"
    if few and rows_MI.dtype == torch.float32 and mirror_is_faster(rows_MI.shape[0], n_in, n_out):
        made_MO = mirrored(rows_MI, weight_OI)
        return made_MO if onto_MO is None else onto_MO + made_MO
    return F.linear(rows_MI, weight_OI) if onto_MO is None else torch.addmm(onto_MO, rows_MI, weight_OI.t())


def mirrored(rows_MI: Tensor, weight_OI: Tensor) -> Tensor:
    """`rows @ weight.T` from the other side. One row is taken twice: a matrix times a vector may be slow as well."""
    n_rows = len(rows_MI)
    if n_rows == 1:
        rows_MI = rows_MI.repeat(2, 1)
    return (weight_OI @ rows_MI.t()).t()[:n_rows].contiguous()


@functools.cache
def mirror_is_faster(n_rows: int, n_in: int, n_out: int) -> bool:
    """Whether this machine computes the mirror image clearly faster, in float32, with the threads of the first call."""
    n_out = min(n_out, max(1, _MEASURED // n_in))  # a part of a large vocabulary says as much
    rows_MI, weights = torch.ones(n_rows, n_in), torch.ones(-(-_MEASURED // (n_in * n_out)), n_out, n_in).unbind()
    straight, other = (_seconds(compute, rows_MI, weights) for compute in (F.linear, mirrored))
    return straight > _CLEARLY * other


def _seconds(compute: Callable[[Tensor, Tensor], Tensor], rows_MI: Tensor, weights: tuple[Tensor, ...]) -> float:
    """What all the products take, the least of three measurements."""
    times = []
    for _ in range(3):
        since = time.perf_counter()
        for weight_OI in weights:
            compute(rows_MI, weight_OI)
        times.append(time.perf_counter() - since)
    return min(times)
