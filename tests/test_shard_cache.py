"""pipelines.shard_cache: one download a machine, a bound that holds, damage that is named."""

import hashlib
import io
import multiprocessing
import os
import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pipelines import storage
from pipelines.errors import UserError
from pipelines.shard_cache import ShardCache

Shard = tuple[str, str, int]


@pytest.fixture
def shards() -> Iterator[list[Shard]]:
    """Six remote shards of the same size."""
    made = []
    for number in range(6):
        buffer = io.BytesIO()
        np.save(buffer, np.full(1000, number, dtype=np.uint16))
        data = buffer.getvalue()
        uri = f"memory://cache-test/{number}.npy"
        storage.write_bytes(uri, data)
        made.append((uri, hashlib.sha256(data).hexdigest(), len(data)))
    yield made
    storage.remove_tree("memory://cache-test")


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    done: list[str] = []
    download = storage.download
    monkeypatch.setattr(storage, "download", lambda uri, path: done.append(uri) or download(uri, path))
    return done


def held(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.npy"))


def test_each_shard_is_fetched_once_by_however_many(tmp_path: Path, shards: list[Shard], downloads: list[str]) -> None:
    def read(number: int) -> int:
        return int(ShardCache(str(tmp_path)).array(*shards[number % 6])[-1])

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, range(48))) == [number % 6 for number in range(48)]
    assert sorted(downloads) == [uri for uri, _, _ in shards]
    assert [path for path in os.listdir(tmp_path) if path.endswith(".tmp")] == []


def test_the_bound_holds_and_the_longest_unused_goes_first(
    tmp_path: Path, shards: list[Shard], downloads: list[str]
) -> None:
    size = shards[0][2]
    cache = ShardCache(str(tmp_path), max_bytes=3 * size)
    kept = [cache.array(*shards[number]) for number in (0, 1, 2)]
    for age, number in enumerate((1, 0, 2)):  # used in this order, whatever the clock's resolution
        os.utime(tmp_path / (shards[number][1][:40] + ".npy"), ns=(age, age))
    cache.array(*shards[3])
    assert held(tmp_path) <= 3 * size
    assert kept[1][0] == 1, "who has it open keeps it"
    downloads.clear()
    cache.array(*shards[0])
    assert downloads == []
    cache.array(*shards[1])
    assert downloads == [shards[1][0]]
    cache.array(*shards[0])
    assert downloads == [shards[1][0]], "just used, so another one had to go"
    for number in (4, 5, 0, 1, 2, 3) * 3:
        assert cache.array(*shards[number])[0] == number
        assert held(tmp_path) <= 3 * size
    assert ShardCache(str(tmp_path), max_bytes=1).array(*shards[5])[0] == 5, "the shard asked for, always"


def _read_at_random(folder: str, shards: list[Shard], seed: int) -> int:
    generator = random.Random(seed)
    cache = ShardCache(folder, max_bytes=3 * shards[0][2])
    for _ in range(600):
        number = generator.randrange(len(shards))
        array = cache.array(*shards[number], checked=generator.random() < 0.5)
        assert len(array) == 1000
        assert array[0] == number
    return seed


def test_processes_that_make_room_do_not_disturb_each_other(tmp_path: Path, shards: list[Shard]) -> None:
    stored = []
    for number, (uri, sha256, size) in enumerate(shards):
        (tmp_path / f"{number}.npy").write_bytes(storage.read_bytes(uri))
        stored.append((f"local://{tmp_path}/{number}.npy", sha256, size))  # a store that all processes see
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("spawn")) as pool:
        done = [pool.submit(_read_at_random, str(tmp_path / "cache"), stored, seed) for seed in range(4)]
        assert [one.result() for one in done] == [0, 1, 2, 3]


def test_an_empty_file_in_its_place_is_fetched_again(tmp_path: Path, shards: list[Shard]) -> None:
    cache = ShardCache(str(tmp_path))
    cache.array(*shards[0])
    (tmp_path / (shards[0][1][:40] + ".npy")).write_bytes(b"")
    assert cache.array(*shards[0], checked=True)[0] == 0


def test_a_local_shard_that_was_cut_is_named_though_it_was_checked(tmp_path: Path, shards: list[Shard]) -> None:
    uri = str(tmp_path / "shard.npy")
    storage.write_bytes(uri, storage.read_bytes(shards[0][0])[:-2])
    with pytest.raises(UserError, match=r"shard\.npy does not match"):
        ShardCache(str(tmp_path / "cache")).array(uri, *shards[0][1:], checked=True)


def test_what_killed_downloads_left_is_removed_in_time(tmp_path: Path, shards: list[Shard]) -> None:
    old, new = (tmp_path / f".armd-{number}-abc.tmp" for number in (1, 2))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, ns=(5, 5))
    ShardCache(str(tmp_path)).array(*shards[0])
    assert not old.exists()
    assert new.exists(), "perhaps being written"


def test_a_copy_that_was_damaged_is_fetched_again(tmp_path: Path, shards: list[Shard], downloads: list[str]) -> None:
    cache = ShardCache(str(tmp_path))
    cache.array(*shards[0])
    copy = tmp_path / (shards[0][1][:40] + ".npy")
    copy.write_bytes(copy.read_bytes()[:-1] + b"x")
    assert cache.array(*shards[0])[-1] == 0
    assert len(downloads) == 2
    cache.array(*shards[0], checked=True)
    assert len(downloads) == 2


@pytest.mark.parametrize("remote", [True, False])
def test_a_shard_that_is_not_as_it_was_is_named(tmp_path: Path, shards: list[Shard], remote: bool) -> None:
    uri, sha256, size = shards[0]
    if not remote:
        uri = str(tmp_path / "shard.npy")
        storage.write_bytes(uri, storage.read_bytes(shards[0][0]))
    data = storage.read_bytes(uri)
    cache = ShardCache(str(tmp_path / "cache"))
    assert cache.array(uri, sha256, size)[0] == 0
    storage.remove_tree(str(tmp_path / "cache"))
    storage.write_bytes(uri, data[:-1] + b"x")
    with pytest.raises(UserError, match=f"{uri} does not match"):
        cache.array(uri, sha256, size)
    storage.remove_tree(uri)
    with pytest.raises(UserError, match=f"{uri} is missing"):
        cache.array(uri, sha256, size)
    assert held(tmp_path / "cache") == 0
