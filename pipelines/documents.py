"""The documents of a unit of work, in order, every record of its files accounted for."""

from collections.abc import Collection, Iterator
from typing import Any

from pipelines import storage
from pipelines.corpus_config import Reading
from pipelines.records import Record, read_records, records_before
from pipelines.sources import InputFile, Unit

KINDS = ("used", "empty", "duplicate", "quarantined")
"""What becomes of a record."""


class Documents:
    """Iterates over the texts of a unit; counts what it read, and notes what it could not."""

    def __init__(
        self, unit: Unit, reading: Reading, *, empty_rows: bool = False, dropped: Collection[int] = ()
    ) -> None:
        """`dropped`: numbers of the documents to leave out, among those with text; `empty_rows`: give empty ones."""
        self._unit, self._reading = unit, reading
        self._empty_rows, self._dropped = empty_rows, dropped
        self.counts = dict.fromkeys(("read", *KINDS), 0)
        """Records so far: `read` is the sum of the others."""
        self.quarantine: list[dict[str, Any]] = []
        """{source, line, reason} of each record that cannot be read, so far."""

    def __iter__(self) -> Iterator[str]:
        for file in self._unit.files:
            before: int | None = None
            for record in read_records(file, self._reading):
                kind = self._kind(record)
                self.counts["read"] += 1
                self.counts[kind] += 1
                if kind == "quarantined":
                    before = records_before(file) if before is None else before
                    self._note(file, record, before)
                elif kind == "used" or (kind == "empty" and self._empty_rows):
                    yield record.text if kind == "used" else ""

    def _kind(self, record: Record) -> str:
        if record.reason:
            return "quarantined"
        if not record.text.strip():
            return "empty"
        number = self.counts["used"] + self.counts["duplicate"]
        return "duplicate" if number in self._dropped else "used"

    def _note(self, file: InputFile, record: Record, before: int) -> None:
        line = record.line + before if record.line else 0
        self.quarantine.append({"source": storage.redacted(file.uri), "line": line, "reason": record.reason})
