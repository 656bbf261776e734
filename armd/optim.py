"""The optimiser: AdamW on the weight matrices with decay, on everything else without; the learning rate of a step."""

import math
from typing import Literal

import torch


def adamw(
    model: torch.nn.Module, *, learning_rate: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """AdamW over all parameters; only the layers' projections are decayed.

    The embedding, the position table, norms, weights of neighbours and single vectors keep their size: the first two
    are looked up row by row, and decay would shrink the rare rows.
    """
    decayed: list[torch.nn.Parameter] = []
    kept: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_projection = parameter.ndim == 2 and "layers" in name
        (decayed if is_projection else kept).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=1e-8)


def learning_rate(
    step: int,
    *,
    total_steps: int,
    peak: float,
    warmup_steps: int,
    schedule: Literal["cosine", "constant"],
    min_ratio: float,
) -> float:
    """The learning rate of `step`, counted from 0: linear warm-up, then constant or a cosine to min_ratio * peak."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    return peak * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
