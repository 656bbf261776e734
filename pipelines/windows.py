"""The training reader's index: window i of a split is a pure function of the corpus manifest.

Needs numpy only; no torch, no ray. N is the corpus's sequence length.
"""

import bisect
import hashlib
import itertools
import json
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines import storage
from pipelines.errors import UserError
from pipelines.formation import FORMATIONS
from pipelines.manifest import read_manifest
from pipelines.shard_cache import ShardCache

_ROUNDS = 8
_MASK_64 = (1 << 64) - 1
_OPEN_SHARDS = 256  # mapped at once: each takes a file descriptor, of which a process has about a thousand
_CONTENT = ("splits", "formation", "sequence_length", "dtype", "tokenizer_sha256")  # of the manifest


@dataclass(frozen=True)
class Part:
    """A part of a split that is cut into windows by itself."""

    weight: float
    """Its share in training, beside those of the other parts."""
    windows: range
    """Its windows."""
    first_shard: int
    """The first of its shards."""


def corpus_sha256(corpus_dir: str) -> str:
    """Of what the windows of a finished corpus depend on: the same where the corpus is made again as it was.

    Raises:
        UserError: the corpus is not finished.
    """
    manifest = read_manifest(corpus_dir)
    content = {name: manifest.get(name) for name in _CONTENT}
    return storage.sha256_bytes(json.dumps(content, sort_keys=True).encode("utf-8"))


class WindowIndex:
    """The windows of N tokens of one split: its shards laid end to end and cut every N tokens, the remainder dropped.

    Where the corpus mixes sources by weight, each source's shards are laid end to end by themselves. Where its
    formation puts a begin and an end token round a sequence, N - 2 tokens lie between them. Shards are memory-mapped;
    each is checked against its SHA-256 when it is first used. May be pickled; a copy checks again for itself.
    """

    def __init__(self, corpus_dir: str, split: str, cache: ShardCache | None = None) -> None:
        """Read the manifest of the corpus at `corpus_dir`, a folder or URI.

        Args:
            corpus_dir: output directory of the corpus stage.
            split: "train" or "validation".
            cache: where shards of an object store go on this machine; by default as `ShardCache` has it.

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
        self._cache = cache or ShardCache()
        self._around = _around(manifest)
        self._body = self.sequence_length - len(self._around)
        self._item_bytes = np.dtype(manifest.get("dtype", "uint16")).itemsize
        self._shards: list[dict[str, Any]] = splits[split]["shards"]
        self._starts = list(itertools.accumulate((shard["tokens"] for shard in self._shards), initial=0))
        self._arrays: OrderedDict[int, np.ndarray] = OrderedDict()
        self._checked: set[int] = set()
        self.parts = self._cut(splits[split].get("mixture"))
        """The parts in the order of their windows; one, unless the corpus mixes sources by weight."""
        self.dropped_tokens: int = self._starts[-1] - len(self) * self._body
        """Tokens at the ends of the parts that fill no window."""

    def __len__(self) -> int:
        """Number of windows."""
        return self.parts[-1].windows.stop

    def __getitem__(self, index: int) -> np.ndarray:
        """Window `index`, (N,) int64, a copy.

        Raises:
            IndexError: `index` is not in 0 .. len - 1.
            UserError: a shard is missing or is not as the manifest says; names it.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        part = next(part for part in self.parts if index in part.windows)
        begin = self._starts[part.first_shard] + (index - part.windows.start) * self._body
        if not self._around:
            return self._tokens(begin, begin + self._body)
        first, last = self._around
        return np.concatenate([[first], self._tokens(begin, begin + self._body), [last]])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrays": OrderedDict(), "_checked": set()}

    def _cut(self, mixture: list[dict[str, Any]] | None) -> list[Part]:
        parts: list[Part] = []
        shard = window = 0
        for source in mixture or [{"weight": 1.0, "shards": len(self._shards)}]:
            n_tokens = self._starts[shard + source["shards"]] - self._starts[shard]
            n_windows = n_tokens // self._body
            parts.append(Part(source["weight"], range(window, window + n_windows), shard))
            shard, window = shard + source["shards"], window + n_windows
        return parts

    def _tokens(self, begin: int, end: int) -> np.ndarray:
        """Tokens `begin` to `end` of the shards laid end to end."""
        tokens = np.empty(end - begin, dtype=np.int64)
        shard = bisect.bisect_right(self._starts, begin) - 1
        at = begin
        while at < end:
            first = self._starts[shard]
            stop = min(end, self._starts[shard + 1])
            tokens[at - begin : stop - begin] = self._array(shard)[at - first : stop - first]
            at, shard = stop, shard + 1
        return tokens

    def _array(self, shard: int) -> np.ndarray:
        """The shard, mapped; of those that are, the longest unused is given up where there are too many."""
        if shard in self._arrays:
            self._arrays.move_to_end(shard)
            return self._arrays[shard]
        entry = self._shards[shard]
        uri = storage.join(self._corpus_dir, entry["path"])
        n_bytes = entry["tokens"] * self._item_bytes
        self._arrays[shard] = self._cache.array(uri, entry["sha256"], n_bytes, checked=shard in self._checked)
        self._checked.add(shard)
        if len(self._arrays) > _OPEN_SHARDS:
            self._arrays.popitem(last=False)
        return self._arrays[shard]


def _around(manifest: dict[str, Any]) -> list[int]:
    """The tokens that stand before and after those of the stream in every window."""
    formation = manifest.get("formation")
    if formation is None or not FORMATIONS[formation["name"]].block_specials:
        return []
    return [formation["specials"]["begin"], formation["specials"]["end"]]


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
