"""Texts that fill in on a terminal, each stream in a colour of its own; what exact mode has not verified is dim."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from armd.order import stream_blocks
from jobs.terminal import printable

if TYPE_CHECKING:
    from rich.console import Console

    from armd import Event, Tokenizer

_COLOURS = ("cyan", "yellow", "green", "magenta", "blue", "red")
_HOLE = "_"
_MOST_HOLES = 3
"""Open places that are shown in a row: a text of a thousand must not begin as a screen of underscores."""


class Watch:
    """A live view of several texts with one template; a context manager around the steps.

    `template` holds token ids, None for a hole.
    """

    def __init__(
        self, console: "Console", tokenizer: "Tokenizer", template: Sequence[int | None], n_streams: int, n_texts: int
    ) -> None:
        from rich.live import Live

        self._tokenizer = tokenizer
        self._template = template
        self._holes = [position for position, token in enumerate(template) if token is None]
        heads = [block[0] for block in stream_blocks(self._holes, n_streams)[:n_streams]]
        self._colour = {
            position: _COLOURS[(sum(head <= position for head in heads) - 1) % len(_COLOURS)]
            for position in self._holes
        }
        self._styled: list[dict[int, tuple[int, str]]] = [{} for _ in range(n_texts)]
        """By text: position -> token and style."""
        self._ended = [False] * n_texts
        self._live = Live(console=console, auto_refresh=False, transient=True, vertical_overflow="ellipsis")

    def __enter__(self) -> "Watch":
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def show(self, text: int, event: "Event") -> None:
        """Add what a step did for the text of this number, and draw everything again."""
        styled = {at: one for at, one in self._styled[text].items() if one[1] != "dim"}  # drafts may come otherwise
        for one in event.drafted:
            styled[self._holes[one.index]] = one.token, "dim"
        for one in event.written:
            position = self._holes[one.index]
            styled[position] = one.token, self._colour[position]
        self._styled[text] = styled
        self._ended[text] = event.completion is not None
        self._live.update(self.render(), refresh=True)

    def render(self) -> Any:
        """The texts as they stand."""
        from rich.console import Group
        from rich.text import Text

        return Group(*(Text.assemble(*self._parts(number)) for number in range(len(self._styled))))

    def _parts(self, number: int) -> list[tuple[str, str]]:
        """Pieces of a text with their styles; neighbours of one style are decoded together, as characters need."""
        parts: list[tuple[list[int], str]] = []
        holes = 0
        for position, known in enumerate(self._template):
            token, style = (known, "bold") if known is not None else self._styled[number].get(position, (None, ""))
            if token is None:
                holes += 1
                if holes <= _MOST_HOLES and not self._ended[number]:
                    parts.append(([], ""))
                continue
            holes = 0
            if not parts or parts[-1][1] != style:
                parts.append(([], style))
            parts[-1][0].append(token)
        return [(printable(self._tokenizer.decode(tokens)) if tokens else _HOLE, style) for tokens, style in parts]
