"""The training objective and its schedules: what is predicted, and in which order at which step (sections 3 and 4).

Everything here is a pure function of the seed, the step and the sequence's place in the global batch, so a run split
over any number of workers, or resumed at any step, draws the same orders.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from armd.masked_diffusion import Noise
from armd.model import ARMD
from armd.models import Model
from armd.order import Order
from armd.randomness import seeded

SEGMENTS = (4, 32)
"""Lengths of the alternate segments of an infilling order, least and greatest."""


Drawn = Order | Noise | None
"""What a loss needs besides tokens: ARMD an order, masked diffusion its noise, an autoregressive model nothing."""


def nats(model: Model, tokens_BN: Tensor, drawn: Drawn) -> tuple[Tensor, int]:
    """(sum of negative log-likelihoods in nats, number of tokens), equation (1) over every sequence of the batch.

    ARMD's is computed in rank order: the logits are the largest tensor there is and are never permuted. The baselines
    bring their own: exact, or an estimate of the ELBO.
    """
    if not isinstance(model, ARMD):
        return model.nats(tokens_BN, drawn)  # type: ignore[arg-type]
    assert isinstance(drawn, Order)
    order = drawn.to(tokens_BN.device)
    logits_BNV = model.head(model.hidden_by_rank(tokens_BN, order))
    targets_BN = tokens_BN.gather(1, order.positions.expand(tokens_BN.shape))
    total = F.cross_entropy(logits_BNV.flatten(0, 1).float(), targets_BN.flatten(), reduction="sum")
    return total, targets_BN.numel()


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Which order at which step (docs/model.md, section 3); fields as in the training configuration.

    Progressive permutation for `steps` steps, into which strided and infilling steps may be mixed, then strided
    fine-tuning.
    """

    steps: int
    """Steps before strided fine-tuning."""
    strided_steps: int
    """Steps of strided fine-tuning."""
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
    strided_share: float = 0.0
    """Share of the steps between mix_after and fine-tuning that are strided."""
    infilling_share: float = 0.0
    """Share of them that fill holes."""
    mix_after: int = 0
    """Steps before which nothing is mixed in."""
    seed: int = 0
    """Seeds every draw."""

    def kind(self, step: int) -> Literal["progressive", "strided", "infilling"]:
        """The kind of order at `step`, counted from 0: the same for its whole batch."""
        if step >= self.steps:
            return "strided"
        if step < self.mix_after or not self.strided_share + self.infilling_share:
            return "progressive"
        drawn = torch.rand((), generator=seeded("kind", self.seed, step)).item()
        if drawn < self.strided_share:
            return "strided"
        return "infilling" if drawn < self.strided_share + self.infilling_share else "progressive"

    def n_shuffled(self, step: int) -> int:
        """Ranks shuffled at `step`, equation (10): 0 for i_ar steps, then linearly up to rho at i_perm.

        0 in other kinds of order."""
        if step < self.ar_steps or self.kind(step) != "progressive":
            return 0
        if step >= self.permutation_steps:
            return self.max_shuffled
        return round(self.max_shuffled * (step - self.ar_steps) / (self.permutation_steps - self.ar_steps))

    def strided_draw(self, step: int, length: int) -> tuple[int, int]:
        """(number of streams, prefix length) of a strided step, the same for its whole batch."""
        generator = seeded("strided", self.seed, step)
        n_streams = self.streams[_below(len(self.streams), generator)]
        has_prefix = torch.rand((), generator=generator).item() < self.prefix_probability
        prefix = 1 + _below(length - 1, generator) if has_prefix and length > 1 else 0
        return n_streams, prefix

    def infilling_draw(self, step: int, length: int) -> tuple[int, list[int]]:
        """(number of streams, holes) of an infilling step, the same for its whole batch.

        Half of the time one hole with both of its ends drawn, else every other segment of a length from `SEGMENTS`,
        which is dense in the places where a hole's end meets what is known behind it.
        """
        generator = seeded("infilling", self.seed, step)
        n_streams = self.streams[_below(len(self.streams), generator)]
        if torch.rand((), generator=generator).item() < 0.5:
            first, last = sorted(_below(length, generator) for _ in range(2))
            return n_streams, list(range(first, last + 1))
        segment = SEGMENTS[0] + _below(SEGMENTS[1] - SEGMENTS[0] + 1, generator)
        phase = _below(2, generator)
        return n_streams, [position for position in range(length) if position // segment % 2 == phase]

    def order(self, step: int, rows: Sequence[int], length: int) -> Order:
        """The order of the sequences at places `rows` of the global batch of `step`, shared where it is the same."""
        kind = self.kind(step)
        if kind == "strided":
            return Order.strided(length, *self.strided_draw(step, length))
        if kind == "infilling":
            n_streams, holes = self.infilling_draw(step, length)
            return Order.infilling(length, holes, n_streams)
        n_shuffled = self.n_shuffled(step)
        if n_shuffled < 2:
            return Order.left_to_right(length)
        return Order.stack(
            [Order.progressive(length, n_shuffled, generator=seeded("progressive", self.seed, step, r)) for r in rows]
        )


def _below(bound: int, generator: torch.Generator) -> int:
    return int(torch.randint(bound, (), generator=generator))
