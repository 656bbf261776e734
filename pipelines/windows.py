"""The training reader's index: window i of a split is a pure function of the corpus manifest.

Needs numpy only; no torch, no ray. N is the corpus's sequence length.
"""

import bisect
import hashlib
import itertools
import os
from typing import Any

import numpy as np

from pipelines import storage
from pipelines.errors import UserError
from pipelines.manifest import mismatch, read_manifest

_ROUNDS = 8
_MASK_64 = (1 << 64) - 1


class WindowIndex:
    """The windows of N tokens of one split: its shards laid end to end and cut every N tokens, the remainder dropped.

    Shards are memory-mapped; each is checked against its SHA-256 when it is first used. May be pickled; a copy checks
    again for itself.
    """

    def __init__(self, corpus_dir: str, split: str, cache_dir: str | None = None) -> None:
        """Read the manifest of the corpus at `corpus_dir`, a folder or URI.

        Args:
            corpus_dir: output directory of the corpus stage.
            split: "train" or "validation".
            cache_dir: local folder for shards fetched from an object store; by default ~/.cache/armd/shards.

        Raises:
            UserError: the corpus is not finished or has no such split.
        """
        manifest = read_manifest(corpus_dir)
        splits = manifest.get("splits", {})
        if split not in splits:
            raise UserError(
                f"{storage.redacted(corpus_dir)} has no split {split!r}, only {', '.join(sorted(splits))}",
                "make the corpus anew with `armd run`",
            )
        self.sequence_length: int = manifest["sequence_length"]
        """Tokens a window, N."""
        self._corpus_dir = corpus_dir
        self._cache_dir = cache_dir or os.path.join(os.path.expanduser("~"), ".cache", "armd", "shards")
        self._shards: list[dict[str, Any]] = splits[split]["shards"]
        self._starts = list(itertools.accumulate((shard["tokens"] for shard in self._shards), initial=0))
        self._arrays: dict[int, np.ndarray] = {}
        self.dropped_tokens: int = self._starts[-1] % self.sequence_length
        """Tokens at the split's end that fill no window."""

    def __len__(self) -> int:
        """Number of windows."""
        return int(self._starts[-1] // self.sequence_length)

    def __getitem__(self, index: int) -> np.ndarray:
        """Window `index`, (N,) int64, a copy.

        Raises:
            IndexError: `index` is not in 0 .. len - 1.
            UserError: a shard is missing or is not as the manifest says; names it.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        begin = index * self.sequence_length
        end = begin + self.sequence_length
        window = np.empty(self.sequence_length, dtype=np.int64)
        shard = bisect.bisect_right(self._starts, begin) - 1
        at = begin
        while at < end:
            first = self._starts[shard]
            stop = min(end, self._starts[shard + 1])
            window[at - begin : stop - begin] = self._array(shard)[at - first : stop - first]
            at, shard = stop, shard + 1
        return window

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrays": {}}

    def _array(self, shard: int) -> np.ndarray:
        if shard not in self._arrays:
            entry = self._shards[shard]
            uri = storage.join(self._corpus_dir, entry["path"])
            try:
                path = storage.fetch_file(uri, self._cache_dir)
                intact = storage.sha256_file(path) == entry["sha256"]
            except FileNotFoundError:
                raise mismatch(uri, "is missing") from None
            if not intact:
                raise mismatch(uri, "does not match its manifest: it was changed or damaged")
            self._arrays[shard] = np.load(path, mmap_mode="r", allow_pickle=False)
        return self._arrays[shard]


class Permutation:
    """A fixed pseudo-random order of 0 .. n-1 that takes no memory: a Feistel network over the next power of four.

    A value that falls outside is sent through the network again until it falls inside (cycle walking), which keeps the
    map a bijection. The order depends on (n, seed, epoch) only, on any machine and in any version.
    """

    def __init__(self, n: int, seed: int, epoch: int) -> None:
        """The order of `n` things in epoch `epoch` of a run seeded `seed`.

        Raises:
            ValueError: `n` is negative.
        """
        if n < 0:
            raise ValueError(f"n must be at least 0, not {n}")
        self._n = n
        self._half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
        digest = hashlib.shake_256(f"armd permutation {seed} {epoch}".encode()).digest(8 * _ROUNDS)
        self._keys = [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS)]

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: int) -> int:
        """The thing at place `index`.

        Raises:
            IndexError: `index` is not in 0 .. n - 1.
        """
        if not 0 <= index < self._n:
            raise IndexError(f"place {index} of {self._n}")
        value = self._encrypt(index)
        while value >= self._n:
            value = self._encrypt(value)
        return value

    def _encrypt(self, value: int) -> int:
        mask = (1 << self._half_bits) - 1
        left, right = value >> self._half_bits, value & mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        return left << self._half_bits | right


def _mix(value: int) -> int:
    """The finalizer of SplitMix64: every input bit reaches every output bit."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK_64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK_64
    return value ^ (value >> 31)
