"""metrics.jsonl: one JSON line a measurement, exact across restarts; and gauges for the Ray dashboard."""

import json
import os
import tempfile
from typing import IO, Any, ClassVar

from pipelines import storage

FILE = "metrics.jsonl"


class MetricsLog:
    """Appends to a run's metrics.jsonl; lines after `resumed_step` are from an attempt whose steps are done again.

    A local file grows line by line. On an object store, where nothing can be appended, `flush` uploads the whole.
    """

    def __init__(self, uri: str, resumed_step: int) -> None:
        self._uri = uri
        lines = storage.read_text(uri).splitlines() if storage.exists(uri) else []
        kept = [line for line in lines if _step(line) is not None and _step(line) <= resumed_step]  # type: ignore[operator]
        text = "".join(line + "\n" for line in kept)
        storage.write_text(uri, text)
        # Kept open for the length of the run.
        self._file: IO[str]
        if storage.is_local(uri):
            self._file = open(storage.absolute(uri), "a", encoding="utf-8")  # noqa: SIM115
        else:
            self._file = tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".jsonl")  # noqa: SIM115
            self._file.write(text)

    def write(self, record: dict[str, Any]) -> None:
        """Add a line; numbers must be finite."""
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def flush(self) -> None:
        """Make what was written last: before a checkpoint that promises these steps is committed."""
        self._file.flush()
        os.fsync(self._file.fileno())
        if not storage.is_local(self._uri):
            with open(self._file.name, "rb") as file:
                storage.write_bytes(self._uri, file.read())


def read_metrics(folder: str) -> list[dict[str, Any]]:
    """All lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in storage.read_text(storage.join(folder, FILE)).splitlines()]


class Gauges:
    """What the Ray dashboard and Prometheus show of a run, as ray_armd_train_*."""

    NAMES: ClassVar = {
        "loss": "training loss in nats a token",
        "validation_loss": "held-out loss in nats a token",
        "tokens_per_second": "tokens trained on a second, all workers together",
        "step_seconds": "seconds a step",
        "learning_rate": "learning rate",
        "n_shuffled": "ranks shuffled by the progressive permutation",
        "step": "steps done",
    }

    def __init__(self, run: str) -> None:
        from ray.util.metrics import Gauge

        self._tags = {"run": run}
        self._gauges = {
            name: Gauge(f"armd_train_{name}", description=text, tag_keys=("run",)) for name, text in self.NAMES.items()
        }

    def set(self, record: dict[str, Any]) -> None:
        """Show the fields of a metrics record that have a gauge."""
        for field, value in record.items():
            name = "validation_loss" if field == "loss" and record["kind"] == "validation" else field
            if name in self._gauges:
                self._gauges[name].set(float(value), tags=self._tags)


def _step(line: str) -> int | None:
    """The step of a metrics line, None for a line that a crash tore."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None
