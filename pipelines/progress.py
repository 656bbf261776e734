"""How a stage says how far it is: it counts, and whoever renders works out the rate and the time left."""

from typing import Protocol


class Progress(Protocol):
    """Receives a stage's counts; called from the driver only, at most a few times a second."""

    def update(self, done: float, total: float | None, unit: str, note: str = "") -> None:
        """`done` of `total` `unit`s are finished (`total` None: not known yet); `note` is a short free text."""


class Silent:
    """A `Progress` for stages that nobody watches."""

    def update(self, done: float, total: float | None, unit: str, note: str = "") -> None:
        """Ignore the counts."""


silent = Silent()
