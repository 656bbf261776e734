"""Steps that a GPU has recorded and replays: a step of few rows is hundreds of small kernels, and starting them one by
one takes longer than they do.

A recorded step may depend on nothing but its plan, which decides what was recorded, and on the integers that are copied
in before it is replayed. On a CPU there is nothing to record; tests hold steps to that rule there.
"""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

Step = Callable[[Tensor], Tensor]
"""A step's integers to its logits."""


class Recorder:
    """Runs steps; from the second one of a plan on they are recorded ones."""

    def __init__(self) -> None:
        self._seen: set[Hashable] = set()
        self._recorded: dict[Hashable, tuple[Tensor, Callable[[], object], Tensor]] = {}

    def __call__(self, plan: Hashable, integers: Tensor, step: Step) -> Tensor:
        """The logits of `step`; they stand until the next step of the same plan."""
        if plan not in self._seen:  # the first one loads kernels and claims their workspace, which no recording can
            self._seen.add(plan)
            return step(integers)
        if plan not in self._recorded:
            inputs = integers.clone()
            self._recorded[plan] = inputs, *record(step, inputs)
        inputs, replay, logits = self._recorded[plan]
        inputs.copy_(integers)
        replay()
        return logits


def record(step: Step, inputs: Tensor) -> tuple[Callable[[], object], Tensor]:
    """Record `step` without carrying it out: what replays it on what `inputs` hold by then; where its logits are."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step(inputs)
    return graph.replay, logits
