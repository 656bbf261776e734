"""Shards on this machine's disk: fetched once a machine from an object store, into a folder that keeps to a size."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipelines import storage
from pipelines.errors import UserError
from pipelines.manifest import mismatch

DEFAULT_BYTES = 200_000_000_000
_ENDING = ".npy"
_ABANDONED = 86_400.0  # seconds after which a download that nobody wrote to is a killed process's


class ShardCache:
    """A folder of shards by their SHA-256, shared by the machine's processes; the longest unused ones make room.

    A shard that is local already is used where it is.
    """

    def __init__(self, folder: str | None = None, max_bytes: int = DEFAULT_BYTES) -> None:
        """`folder`: by default ~/.cache/armd/shards; `max_bytes`: what it may hold, but always the shard asked for."""
        self._folder = Path(folder or Path.home() / ".cache" / "armd" / "shards")
        self._max_bytes = max_bytes

    def array(self, uri: str, sha256: str, n_bytes: int, checked: bool = False) -> np.ndarray:
        """The .npy file at `uri`, mapped from this machine's disk.

        Args:
            uri: where the shard is.
            sha256: what its content must have; it is read through for that.
            n_bytes: what it has at least.
            checked: this process has seen it before and need not read it through again; its size still counts.

        Raises:
            UserError: the shard is missing or does not match; names it.
        """
        while True:
            with contextlib.suppress(FileNotFoundError):  # another process made room meanwhile
                path = self._path(uri, sha256, n_bytes, checked)
                return np.load(path, mmap_mode="r", allow_pickle=False)

    def _path(self, uri: str, sha256: str, n_bytes: int, checked: bool) -> Path:
        if storage.is_local(uri):
            path = Path(storage.absolute(uri))
            if not path.is_file():
                raise mismatch(uri, "is missing")
            if not _intact(path, sha256, n_bytes, checked):
                raise _changed(uri)
            return path
        target = self._folder / (sha256[:40] + _ENDING)
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._lock(target):
            if not target.is_file() or not _intact(target, sha256, n_bytes, checked):
                self._make_room(n_bytes, target)
                self._fetch(uri, sha256, target)
            os.utime(target)  # not touch, which would make an empty file of one that is gone
        return target

    def _fetch(self, uri: str, sha256: str, target: Path) -> None:
        with storage.scratch_file(str(self._folder)) as scratch:
            try:
                storage.download(uri, scratch)
            except FileNotFoundError:
                raise mismatch(uri, "is missing") from None
            if storage.sha256_file(scratch) != sha256:
                raise _changed(uri)
            storage.put_file(scratch, str(target))

    def _make_room(self, n_bytes: int, target: Path) -> None:
        """Remove shards, the longest unused first, until `n_bytes` more fit; the old `target` is in the way anyway."""
        target.unlink(missing_ok=True)
        storage.remove_unfinished(str(self._folder), older_than=_ABANDONED)
        found = []
        for path in self._folder.glob("*" + _ENDING):
            with contextlib.suppress(FileNotFoundError):  # another process makes room too
                found.append((path, path.stat()))
        held = sum(stat.st_size for _, stat in found)
        for path, stat in sorted(found, key=lambda one: one[1].st_mtime_ns):
            if held + n_bytes <= self._max_bytes:
                return
            path.unlink(missing_ok=True)
            held -= stat.st_size

    @contextlib.contextmanager
    def _lock(self, target: Path) -> Iterator[None]:
        """One process of this machine at a time for each shard; the system opens the lock where a process is killed."""
        with open(target.with_suffix(".lock"), "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _intact(path: Path, sha256: str, n_bytes: int, checked: bool) -> bool:
    return path.stat().st_size >= n_bytes and (checked or storage.sha256_file(str(path)) == sha256)


def _changed(uri: str) -> UserError:
    return mismatch(uri, "does not match its manifest: it was changed or damaged")
