"""Checkpoints that are whole or do not count.

DeepSpeed's own files are not safe against a crash: its `latest` pointer is written before all shards are there. So a
checkpoint is a folder `step-STEP-ATTEMPT` with every rank's files, a manifest of their SHA-256 sums written after a
barrier of all ranks, and COMMITTED, which names the manifest's sum, last. The newest one is found by listing; folders
without the mark, or with a file that is not as the manifest says, are passed over and named. DeepSpeed unpickles what
it loads, so nothing unverified is ever given to it.
"""

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines import storage
from pipelines.errors import UserError

COMMITTED = "COMMITTED"
MANIFEST = "manifest.json"
SCRATCH = ".save-"  # how the folders begin in which a save is prepared
TAG = "state"  # DeepSpeed's tag: the folder below ours that it puts its files in
_NAME = re.compile(r"^step-(\d{8})-[0-9a-f]{8}$")

logger = logging.getLogger(__name__)


def name(step: int, attempt: str) -> str:
    """The folder of the checkpoint after `step` steps; `attempt` (8 hex digits) keeps two tries apart."""
    return f"step-{step:08d}-{attempt}"


def put_shards(scratch: str, destination: str) -> list[dict[str, Any]]:
    """Move a rank's files from its scratch folder into the checkpoint; their path, size and sha256."""
    entries = []
    for path in sorted(Path(scratch).rglob("*")):
        if path.is_file() and path.suffix in (".pt", ".safetensors"):  # DeepSpeed adds scripts that nobody needs
            relative = path.relative_to(scratch).as_posix()
            entries.append({"path": relative, "size": path.stat().st_size, "sha256": storage.sha256_file(str(path))})
            storage.put_file(str(path), storage.join(destination, relative))
    return entries


def commit(destination: str, files: Sequence[dict[str, Any]], about: dict[str, Any]) -> None:
    """Make the checkpoint count: its manifest, then the mark. To be called when the files of all ranks are there.

    Raises:
        UserError: one of them is gone, which only another writer can have done.
    """
    for entry in files:
        if not storage.exists(storage.join(destination, entry["path"])):
            raise UserError(
                f"{storage.join(destination, entry['path'])} was removed before it was committed",
                "make sure that nothing else writes to this directory, then run the same command again",
            )
    storage.write_json(storage.join(destination, MANIFEST), {**about, "files": sorted(files, key=lambda f: f["path"])})
    digest = storage.sha256_file(storage.join(destination, MANIFEST))
    storage.write_text(storage.join(destination, COMMITTED), digest + "\n")


def verified(path: str) -> dict[str, Any]:
    """The manifest of a committed checkpoint whose every file is what was saved.

    Raises:
        UserError: it was never committed, or naming the first file that is not as the manifest says.
    """
    fix = f"remove {path}; training then resumes from the checkpoint before it"
    try:
        digest = storage.read_bytes(storage.join(path, COMMITTED)).strip()
    except FileNotFoundError:
        raise UserError(f"checkpoint {path} was never committed", fix) from None
    try:
        if storage.sha256_file(storage.join(path, MANIFEST)).encode() != digest:
            raise UserError(f"checkpoint {path}: {MANIFEST} does not match {COMMITTED}", fix)
        manifest: dict[str, Any] = storage.read_json(storage.join(path, MANIFEST))
        for entry in manifest["files"]:
            if storage.sha256_file(storage.join(path, entry["path"])) != entry["sha256"]:
                raise UserError(f"checkpoint {path}: {entry['path']} does not match its manifest", fix)
    except FileNotFoundError as error:
        raise UserError(f"checkpoint {path} lacks a file: {error}", fix) from None
    return manifest


def newest(folder: str) -> tuple[str, dict[str, Any]] | None:
    """Path and manifest of the newest good checkpoint in `folder`, None where there is none."""
    for candidate in reversed(_names(folder)):
        path = storage.join(folder, candidate)
        if not storage.exists(storage.join(path, COMMITTED)):
            continue  # a crash in the middle of saving: nothing was promised
        try:
            return path, verified(path)
        except UserError as error:
            logger.warning("passed over: %s", error.what)
    return None


def prune(folder: str, latest: str, keep: int) -> None:
    """Keep `latest`, which was just committed, and the `keep - 1` before it; remove the others.

    One that claims a later step, or the same step by another attempt, is one that resuming refused as damaged.
    """
    own = latest.rstrip("/").rsplit("/", 1)[-1]
    step = _step(own)
    earlier = [n for n in _names(folder) if _step(n) < step and storage.exists(storage.join(folder, n, COMMITTED))]
    kept = {own, *earlier[len(earlier) - (keep - 1) :]}
    _remove(folder, [name for name in _names(folder) if name not in kept])


def sweep(folder: str) -> None:
    """Remove what killed attempts left half-written; to be called by one that has claimed the folder."""
    scratch = [name for name in storage.list_names(folder) if name.startswith(SCRATCH)]
    unmarked = [name for name in _names(folder) if not storage.exists(storage.join(folder, name, COMMITTED))]
    _remove(folder, scratch + unmarked)


def _remove(folder: str, names: Sequence[str]) -> None:
    for name in names:
        path = storage.join(folder, name)
        try:
            storage.remove_tree(storage.join(path, COMMITTED))  # the mark first: never a marked half
            storage.remove_tree(path)
        except Exception as error:  # every object store has exceptions of its own; a purge must not end a run
            logger.warning("could not remove %s: %s", path, error)


def local_copy(path: str, manifest: dict[str, Any], scratch: str) -> str:
    """A local folder with the checkpoint's files: `path` itself, or a verified download into `scratch`.

    Raises:
        UserError: naming the downloaded file that does not match the manifest.
    """
    if storage.is_local(path):
        return path
    for entry in manifest["files"]:
        target = Path(scratch, entry["path"])
        target.parent.mkdir(parents=True, exist_ok=True)
        fetched = storage.fetch_file(storage.join(path, entry["path"]), os.path.join(scratch, "downloads"))
        if storage.sha256_file(fetched) != entry["sha256"]:
            raise UserError(f"{path}/{entry['path']} changed while it was fetched", "run the same command again")
        os.replace(fetched, target)
    return scratch


def _step(candidate: str) -> int:
    return int(candidate.split("-")[1])


def _names(folder: str) -> list[str]:
    return sorted(candidate for candidate in storage.list_names(folder) if _NAME.match(candidate))
