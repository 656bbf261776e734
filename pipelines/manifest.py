"""manifest.json: written last, so that a folder that has one is a finished stage."""

import datetime
import importlib.metadata
import json
import platform
import socket
import time
from collections.abc import Iterable, Mapping
from typing import Any

from pipelines import storage
from pipelines.errors import UserError

NAME = "manifest.json"
_PACKAGES = ("torch", "ray", "deepspeed", "pyarrow", "armd")


def write_manifest(output_dir: str, stage: str, body: Mapping[str, Any], started: float) -> dict[str, Any]:
    """Commit the stage: write manifest.json, atomically, after everything else in `output_dir` is in place.

    Args:
        output_dir: the stage's folder or URI.
        stage: the stage's name.
        body: what the stage has to say; JSON-able, finite numbers only.
        started: `time.time()` when the stage began.

    Returns:
        `body` with stage, started (ISO 8601, UTC), seconds, host and versions added: what was written.
    """
    began = datetime.datetime.fromtimestamp(started, datetime.UTC)
    manifest: dict[str, Any] = {
        **body,
        "stage": stage,
        "started": began.isoformat(timespec="seconds"),
        "seconds": round(max(0.0, time.time() - started), 3),
        "host": socket.gethostname(),
        "versions": versions(),
    }
    storage.write_json(storage.join(output_dir, NAME), manifest)
    written: dict[str, Any] = json.loads(json.dumps(manifest))  # as `read_manifest` gives it: lists for tuples
    return written


def read_manifest(directory: str) -> dict[str, Any]:
    """The manifest of a finished stage.

    Raises:
        UserError: there is none, so the stage did not finish; or it cannot be read.
    """
    path = storage.join(directory, NAME)
    try:
        manifest = storage.read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            storage.redacted(f"{storage.absolute(directory)} holds no {NAME}: the stage did not finish"),
            "run the same `armd run` command again; it resumes",
        ) from None
    except (ValueError, OSError) as error:
        raise _unreadable(path, str(error)) from None
    if not isinstance(manifest, dict):
        raise _unreadable(path, "not a JSON object")
    return manifest


def is_done(directory: str) -> bool:
    """True where the stage that writes to `directory` has committed a manifest that can be read."""
    try:
        return isinstance(storage.read_json(storage.join(directory, NAME)), dict)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False


def verify_files(directory: str, entries: Iterable[Mapping[str, Any]]) -> None:
    """Check that each entry's `path` in `directory` has the content that its `sha256` says.

    Raises:
        UserError: naming the first file that is missing or different.
    """
    for entry in entries:
        path = storage.join(directory, entry["path"])
        try:
            actual = storage.sha256_file(path)
        except FileNotFoundError:
            raise mismatch(path, "is missing") from None
        if actual != entry["sha256"]:
            raise mismatch(path, "does not match its manifest: it was changed or damaged")


def mismatch(path: str, what: str) -> UserError:
    """The error for a file of a finished stage that is not as its manifest says."""
    return UserError(
        storage.redacted(f"{path} {what}"),
        f"remove {NAME} in its stage's folder and run the same command again to make it anew",
    )


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that results depend on; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def _unreadable(path: str, reason: str) -> UserError:
    return UserError(
        storage.redacted(f"{path} cannot be read: {reason}"),
        "remove it and run the same `armd run` command again to make the stage anew",
    )
