"""The training objective and its schedules: what is predicted, and in which order at which step (sections 3 and 4).

Everything here is a pure function of the seed, the step and the sequence's place in the global batch, so a run split
over any number of workers, or resumed at any step, draws the same orders.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from armd.model import ARMD
from armd.order import Order
from armd.randomness import seeded


def nats(model: ARMD, tokens_BN: Tensor, order: Order) -> tuple[Tensor, int]:
    """(sum of negative log-likelihoods in nats, number of tokens), over all N tokens of every sequence (gamma = 1).

    Computed in rank order: the logits are the largest tensor there is and are never permuted.
    """
    order = order.to(tokens_BN.device)
    logits_BNV = model.head(model.hidden_by_rank(tokens_BN, order))
    targets_BN = tokens_BN.gather(1, order.positions.expand(tokens_BN.shape))
    total = F.cross_entropy(logits_BNV.flatten(0, 1).float(), targets_BN.flatten(), reduction="sum")
    return total, targets_BN.numel()


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Progressive permutation, then strided fine-tuning (section 3); fields as in the training configuration."""

    steps: int
    """Steps of progressive permutation."""
    strided_steps: int
    """Steps of strided fine-tuning after them."""
    ar_steps: int
    """Steps before any rank is shuffled (i_ar)."""
    permutation_steps: int
    """Step at which max_shuffled is reached (i_perm)."""
    max_shuffled: int
    """Ranks shuffled in the end (rho)."""
    streams: tuple[int, ...]
    """Numbers of streams to draw from."""
    prefix_probability: float
    """Share of strided steps with a known prefix."""

    def is_strided(self, step: int) -> bool:
        """Whether `step`, counted from 0, belongs to strided fine-tuning."""
        return step >= self.steps

    def n_shuffled(self, step: int) -> int:
        """Ranks shuffled at `step`: 0 for i_ar steps, then linearly up to rho at i_perm; 0 in strided fine-tuning."""
        if step < self.ar_steps or self.is_strided(step):
            return 0
        if step >= self.permutation_steps:
            return self.max_shuffled
        return round(self.max_shuffled * (step - self.ar_steps) / (self.permutation_steps - self.ar_steps))

    def strided_draw(self, step: int, length: int, seed: int) -> tuple[int, int]:
        """(number of streams, prefix length) of a strided step, the same for its whole batch."""
        generator = seeded("strided", seed, step)
        n_streams = self.streams[_below(len(self.streams), generator)]
        has_prefix = torch.rand((), generator=generator).item() < self.prefix_probability
        prefix = 1 + _below(length - 1, generator) if has_prefix and length > 1 else 0
        return n_streams, prefix

    def order(self, step: int, rows: Sequence[int], length: int, seed: int) -> Order:
        """The order of the sequences at places `rows` of the global batch of `step`, shared where it is the same."""
        if self.is_strided(step):
            n_streams, prefix = self.strided_draw(step, length, seed)
            return Order.strided(length, n_streams, prefix)
        n_shuffled = self.n_shuffled(step)
        if n_shuffled < 2:
            return Order.left_to_right(length)
        return Order.stack(
            [Order.progressive(length, n_shuffled, generator=seeded("progressive", seed, step, row)) for row in rows]
        )


def _below(bound: int, generator: torch.Generator) -> int:
    return int(torch.randint(bound, (), generator=generator))
