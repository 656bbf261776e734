"""pipelines.windows: windows against the plain concatenation, damaged shards, the permutation."""

import os
import pickle
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines import storage, windows
from pipelines.errors import UserError
from pipelines.manifest import write_manifest
from pipelines.shard_cache import ShardCache
from pipelines.windows import Permutation, WindowIndex, corpus_sha256


def make_corpus(folder: str, lengths: list[int], sequence_length: int) -> np.ndarray:
    """A corpus whose training split is 0, 1, 2, .. cut into shards of these lengths; returns the whole stream."""
    stream = np.arange(sum(lengths), dtype=np.uint16)
    shards, start = [], 0
    storage.make_dir(storage.join(folder, "shards"))
    for number, length in enumerate(lengths):
        path = f"shards/{number}.npy"
        np.save(storage.join(folder, path), stream[start : start + length])
        start += length
        shards.append({"path": path, "tokens": length, "sha256": storage.sha256_file(storage.join(folder, path))})
    splits = {"train": {"shards": shards}, "validation": {"shards": []}}
    write_manifest(folder, "corpus", {"sequence_length": sequence_length, "splits": splits}, time.time())
    return stream


@pytest.mark.parametrize("lengths", [[100], [7, 0, 3, 50, 1, 0], [16, 16], [3], [0]])
@pytest.mark.parametrize("sequence_length", [1, 8, 16, 33])
def test_windows_are_those_of_the_concatenated_stream(tmp_path, lengths: list[int], sequence_length: int) -> None:
    stream = make_corpus(str(tmp_path), lengths, sequence_length)
    index = WindowIndex(str(tmp_path), "train")
    expected = stream[: len(stream) // sequence_length * sequence_length].reshape(-1, sequence_length)
    assert len(index) == len(expected)
    assert index.dropped_tokens == len(stream) - expected.size
    for number in range(len(index)):
        assert index[number].dtype == np.int64
        np.testing.assert_array_equal(index[number], expected[number])


def test_the_digest_is_that_of_the_content(tmp_path) -> None:
    folder = str(tmp_path)
    make_corpus(folder, [100], 8)
    manifest = storage.read_json(f"{folder}/manifest.json")
    digest = corpus_sha256(folder)
    for name in ("started", "seconds", "host", "versions", "identity"):
        storage.write_json(f"{folder}/manifest.json", {**manifest, name: "other"})
        assert corpus_sha256(folder) == digest, name
    for name in ("splits", "formation", "sequence_length", "dtype", "tokenizer_sha256"):
        storage.write_json(f"{folder}/manifest.json", {**manifest, name: "other"})
        assert corpus_sha256(folder) != digest, name


def test_bounds_and_splits(tmp_path) -> None:
    make_corpus(str(tmp_path), [20], 8)
    index = WindowIndex(str(tmp_path), "train")
    for wrong in (-1, 2):
        with pytest.raises(IndexError):
            index[wrong]
    assert len(WindowIndex(str(tmp_path), "validation")) == 0
    with pytest.raises(UserError, match="no split 'test'"):
        WindowIndex(str(tmp_path), "test")
    with pytest.raises(UserError, match="did not finish"):
        WindowIndex(str(tmp_path / "nowhere"), "train")


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_shard_is_named(tmp_path, damage: str) -> None:
    make_corpus(str(tmp_path), [20, 20], 8)
    shard = tmp_path / "shards" / "1.npy"
    content = bytearray(shard.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
        shard.write_bytes(content)
    elif damage == "cut":
        shard.write_bytes(content[:-2])
    else:
        shard.unlink()
    index = WindowIndex(str(tmp_path), "train")
    np.testing.assert_array_equal(index[0], np.arange(8))
    with pytest.raises(UserError, match=r"shards/1\.npy"):
        index[4]


def test_pickled_copy_reads_the_same(tmp_path) -> None:
    make_corpus(str(tmp_path), [20, 20], 8)
    index = WindowIndex(str(tmp_path), "train")
    expected = index[2]
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(index))[2], expected)
    assert len(pickle.dumps(index)) < 2000


def test_remote_shards_are_fetched_once(tmp_path) -> None:
    import fsspec

    stream = make_corpus(str(tmp_path / "local"), [20, 20], 8)
    remote = fsspec.filesystem("memory")
    remote.put(str(tmp_path / "local"), "/windows-corpus", recursive=True)
    cache = tmp_path / "cache"
    try:
        index = WindowIndex("memory://windows-corpus", "train", ShardCache(str(cache)))
        np.testing.assert_array_equal(index[2], stream[16:24])
        assert len(list(cache.glob("*.npy"))) == 2
        np.testing.assert_array_equal(index[3], stream[24:32])
        assert len(list(cache.glob("*.npy"))) == 2
    finally:
        remote.rm("/windows-corpus", recursive=True)


def test_open_files_are_bounded_and_checked_once(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = make_corpus(str(tmp_path), [8] * 12, 8)
    monkeypatch.setattr(windows, "_OPEN_SHARDS", 3)
    sums: list[str] = []
    sha256_file = storage.sha256_file
    monkeypatch.setattr(storage, "sha256_file", lambda uri: sums.append(uri) or sha256_file(uri))
    index = WindowIndex(str(tmp_path), "train")
    before = len(os.listdir("/proc/self/fd"))
    for number in [*range(12), *reversed(range(12))]:
        np.testing.assert_array_equal(index[number], stream[8 * number : 8 * number + 8])
        assert len(os.listdir("/proc/self/fd")) <= before + 3
    assert len(sums) == 12


def test_needs_neither_torch_nor_ray() -> None:
    code = "import sys, pipelines.windows; print([m for m in ('torch', 'ray') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@given(n=st.integers(0, 700), seed=st.integers(0, 2**63), epoch=st.integers(0, 1000))
def test_permutation_is_a_bijection(n: int, seed: int, epoch: int) -> None:
    permutation = Permutation(n, seed, epoch)
    assert len(permutation) == n
    assert sorted(permutation[i] for i in range(n)) == list(range(n))


def test_permutation_depends_on_seed_and_epoch_and_never_changes() -> None:
    def first(seed: int, epoch: int) -> list[int]:
        permutation = Permutation(1000, seed, epoch)
        return [permutation[i] for i in range(8)]

    assert first(0, 0) == [
        403,
        260,
        142,
        919,
        899,
        575,
        438,
        819,
    ]  # a run resumed by a later version must see the same order
    assert len({tuple(first(seed, epoch)) for seed in range(5) for epoch in range(5)}) == 25


def test_permutation_is_near_uniform() -> None:
    n, seeds = 10, 4000
    for place in (0, 9):
        counts = Counter(Permutation(n, seed, 0)[place] for seed in range(seeds))
        chi_square = sum((counts[value] - seeds / n) ** 2 / (seeds / n) for value in range(n))
        assert chi_square < 33.7  # 9 degrees of freedom, p = 0.0001
    big = Permutation(100_000, 1, 0)
    neighbours = [abs(big[i] - big[i + 1]) for i in range(2000)]
    assert 0.9 < np.mean(neighbours) / (100_000 / 3) < 1.1


def test_permutation_bounds() -> None:
    for wrong in (-1, 5):
        with pytest.raises(IndexError):
            Permutation(5, 0, 0)[wrong]
    with pytest.raises(IndexError):
        Permutation(0, 0, 0)[0]
    with pytest.raises(ValueError, match="-1"):
        Permutation(-1, 0, 0)
    huge = Permutation(10**12, 0, 0)
    assert 0 <= huge[10**12 - 1] < 10**12
