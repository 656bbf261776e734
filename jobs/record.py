"""run.json: what a command ran, with which configuration, where each stage is and how it went; kept up to date."""

import datetime
import json
import shlex
import socket
import time
from collections.abc import Sequence
from typing import Any

from jobs.graph import Event, Step
from pipelines import manifest, storage
from pipelines.report import source_commit

NAME = "run.json"


class Record:
    """Writes `root/run.json` when the run starts, whenever a stage changes, and at the end."""

    def __init__(
        self, root: str, recipe: str, config: dict[str, Any], steps: Sequence[Step], command: Sequence[str]
    ) -> None:
        self._path = storage.join(root, NAME)
        self._began = time.monotonic()
        self._run: dict[str, Any] = {
            "recipe": recipe,
            "config": config,
            "command": shlex.join(command),
            "status": "running",
            "started": _now(),
            "seconds": 0.0,
            "host": socket.gethostname(),
            "versions": manifest.versions(),
            "commit": source_commit(),
            "steps": {
                step.name: {
                    "directory": step.directory(root),
                    "hash": step.hash,
                    "status": "pending",
                    "reused": False,
                    "started": None,
                    "seconds": 0.0,
                }
                for step in steps
            },
        }
        self._write()

    def on_event(self, event: Event) -> None:
        """Note what happened to a step."""
        entry = self._run["steps"][event.step.name]
        entry["status"] = {"reused": "finished", "started": "running"}.get(event.kind, event.kind)
        entry["reused"] = event.kind == "reused"
        if event.kind == "started":
            entry["started"] = _now()
        if event.seconds:
            entry["seconds"] = round(event.seconds, 3)
        if event.error is not None:
            entry["error"] = f"{type(event.error).__name__}: {event.error}"
        self._write()

    def finish(self, status: str) -> None:
        """Note how the run ended: finished, failed or interrupted."""
        self._run["status"] = status
        self._write()

    @property
    def all_reused(self) -> bool:
        """True when every stage was there already."""
        return all(entry["reused"] for entry in self._run["steps"].values())

    def _write(self) -> None:
        self._run["seconds"] = round(time.monotonic() - self._began, 3)
        storage.write_json(self._path, json.loads(storage.redacted(json.dumps(self._run))))


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
