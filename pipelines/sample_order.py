"""Which window is sample i of an endless run through the training windows: a pure function of i and the seed.

Without weights every epoch is a permutation of all windows. With weights each source is gone through at its own pace,
in permutations of its own, and a fixed cycle says whose turn it is; a small source is read again while a large one is
still read for the first time. Needs no memory, and so no state to be saved.
"""

from collections.abc import Sequence

import numpy as np

from pipelines.errors import UserError
from pipelines.windows import Permutation, WindowIndex

_CYCLE = 1000  # samples after which each source has had its share, to a thousandth


class Turns:
    """A cycle in which each of several things has its turn as often as its weight says, spread evenly."""

    def __init__(self, weights: Sequence[float]) -> None:
        """`weights`: more than 0 each; they need not sum to 1."""
        exact = np.array(weights) / sum(weights) * _CYCLE
        counts = np.floor(exact).astype(np.int64)
        missing = _CYCLE - int(counts.sum())
        counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1  # to those that were cut most
        due = [((k + 0.5) / count, part) for part, count in enumerate(counts.tolist()) for k in range(count)]
        self._turns = np.array([part for _, part in sorted(due)])
        hits = self._turns[:, None] == np.arange(len(counts))
        self._before = np.cumsum(hits, axis=0) - hits
        self._counts = counts

    def __getitem__(self, sample: int) -> tuple[int, int]:
        """Whose turn sample `sample` is, and how many turns it has had before."""
        cycle, place = divmod(sample, _CYCLE)
        part = int(self._turns[place])
        return part, cycle * int(self._counts[part]) + int(self._before[place, part])


class SampleOrder:
    """The windows of a split in the order in which a run with this seed sees them."""

    def __init__(self, windows: WindowIndex, seed: int) -> None:
        """The order of `windows`, mixed by the weights that its manifest has.

        Raises:
            UserError: a source that has a weight is shorter than one window.
        """
        self._parts = windows.parts
        self._turns = Turns([part.weight for part in self._parts]) if len(self._parts) > 1 else None
        self._seed = seed
        self._permutations: dict[int, tuple[int, Permutation]] = {}
        for number, part in enumerate(self._parts):
            if self._turns and not len(part.windows):
                raise UserError(
                    f"source {number + 1} of {len(self._parts)} has a weight and less than one window of training text",
                    "give it more text, or leave it out of --corpus.sources and --corpus.weights",
                )

    def __getitem__(self, sample: int) -> int:
        """The window that is sample `sample`, from 0."""
        number, seen = self._turns[sample] if self._turns else (0, sample)
        windows = self._parts[number].windows
        epoch, place = divmod(seen, len(windows))
        known, permutation = self._permutations.get(number, (-1, None))
        if permutation is None or known != epoch:
            permutation = Permutation(len(windows), self._seed, epoch)
            self._permutations[number] = (epoch, permutation)
        return windows[permutation[place]]
