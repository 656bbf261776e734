"""The documents of a unit of work, in order, every record of its files accounted for."""

from collections.abc import Collection, Iterator
from typing import Any

from pipelines import storage
from pipelines.corpus_config import Reading
from pipelines.records import Record, counted_from, read_records
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
        """{source, line, reason} of each record that cannot be read, so far; line 0 is the whole file.

        Where the unit's part of a large file begins further on, `from_byte` is the byte that line 1 begins at.
        """

    def __iter__(self) -> Iterator[str]:
        for file in self._unit.files:
            start: tuple[int, int] | None = None
            for record in read_records(file, self._reading):
                kind = self._kind(record)
                self.counts["read"] += 1
                self.counts[kind] += 1
                if kind == "quarantined":
                    start = start or counted_from(file)
                    self._note(file, record, *start)
                elif kind == "used" or (kind == "empty" and self._empty_rows):
                    yield record.text if kind == "used" else ""

    def _kind(self, record: Record) -> str:
        if record.reason:
            return "quarantined"
        if not record.text.strip():
            return "empty"
        number = self.counts["used"] + self.counts["duplicate"]
        return "duplicate" if number in self._dropped else "used"

    def _note(self, file: InputFile, record: Record, from_byte: int, rows_before: int) -> None:
        line = record.line + rows_before if record.line else 0
        entry = {"source": storage.redacted(file.uri), "line": line, "reason": record.reason}
        self.quarantine.append({**entry, "from_byte": from_byte} if line and from_byte else entry)
