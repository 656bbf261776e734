"""Steps that a GPU has recorded and replays: a step of few rows is hundreds of small kernels, and starting them one by
one takes longer than they do.

A recorded step may depend on nothing but its plan, which decides what was recorded, and on the integers that are copied
in before it is replayed. On a CPU there is nothing to record; tests hold steps to that rule there.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Step = Callable[[Tensor], Tensor]
"""A step's integers to its logits."""


class Recorded(NamedTuple):
    """A step that can be replayed."""

    replay: Callable[[], object]
    """Carries the step out on what its inputs hold by then."""
    logits: Tensor
    """Where its logits are after that."""
    memory: Any
    """Names the memory in which it computes."""


class Recorder:
    """Runs steps; from the second one of a plan on they are recorded ones.

    Recorded steps share the memory in which they compute, as they run one after the other; each keeps its logits alone,
    (rows, V). `most` are kept, those used last: with many texts and a large vocabulary they are what this costs.
    """

    def __init__(self, most: int = 64) -> None:
        self._most = most
        self._plans: OrderedDict[Hashable, tuple[Tensor, Recorded] | None] = OrderedDict()
        """What was there lately, the latest last: inputs and the recorded step; None for what was there once."""

    def __call__(self, plan: Hashable, integers: Tensor, step: Step) -> Tensor:
        """The logits of `step`; they stand until the next step."""
        if plan not in self._plans:  # the first one loads kernels and claims their workspace, which no recording can
            self._keep(plan, None)
            return step(integers)
        inputs, recorded = self._plans[plan] or self._record(integers, step)
        self._keep(plan, (inputs, recorded))
        inputs.copy_(integers)
        recorded.replay()
        return recorded.logits

    def _record(self, integers: Tensor, step: Step) -> tuple[Tensor, Recorded]:
        inputs = integers.clone()
        memory = next((entry[1].memory for entry in self._plans.values() if entry), None)
        return inputs, record(step, inputs, memory)

    def _keep(self, plan: Hashable, entry: tuple[Tensor, Recorded] | None) -> None:
        self._plans[plan] = entry
        self._plans.move_to_end(plan)
        if len(self._plans) > self._most:
            self._plans.popitem(last=False)


def record(step: Step, inputs: Tensor, memory: Any) -> Recorded:
    """Record `step` without carrying it out, in the memory of that name if there is one."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=memory):
        logits = step(inputs)
    return Recorded(graph.replay, logits, graph.pool())
