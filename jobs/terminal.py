"""What a person sees while stages run: a live line on a terminal, a plain line every few seconds anywhere else.

Stages count; the rate and the time left are worked out here. No escape code is written unless the stream is a terminal.
"""

import contextlib
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import IO, Any

from jobs.graph import Event
from pipelines import storage
from pipelines.progress import Progress

WINDOW = 60.0
"""Seconds over which the rate is taken: long enough to be calm, short enough to follow a change of phase."""
STEADY = 1.0
"""Seconds that a rate needs at least: parts that several workers finish at the same moment say nothing."""
FEW = 10
"""Below this total the counted things are unlike each other, and a rate says nothing."""


@contextlib.contextmanager
def apart(log: str | None) -> Iterator[IO[str]]:
    """The screen, to write to; whatever else writes to standard output or error goes to the file `log` meanwhile.

    Below Python too: compiled libraries and child processes have the redirected descriptors. `log` None: nothing is
    redirected.
    """
    if log is None:
        yield sys.stdout
        return
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with contextlib.ExitStack() as stack:
        for descriptor, original in zip((1, 2), saved, strict=True):
            stack.callback(os.close, original)
            stack.callback(os.dup2, original, descriptor)
        screen = sys.stdout
        if _descriptor(screen) == 1:
            screen = stack.enter_context(open(saved[0], "w", encoding=screen.encoding, buffering=1, closefd=False))
        # Left open: a library may keep it as "standard output" and write to it when the process ends.
        file = open(log, "a", encoding="utf-8", errors="replace", buffering=1)  # noqa: SIM115
        stack.enter_context(contextlib.redirect_stdout(file))
        stack.enter_context(contextlib.redirect_stderr(file))
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        yield screen


def _descriptor(stream: IO[str]) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError):  # a test's or a notebook's stream
        return None


class Pace:
    """The rate of counts, from their times.

    It begins with the first count above 0 and needs a second one: what came before is start-up, not work.
    """

    def __init__(self) -> None:
        self._seen: deque[tuple[float, float]] = deque()
        self._unit = ""

    def update(self, now: float, done: float, unit: str) -> None:
        """`done` `unit`s are finished at time `now` (seconds)."""
        if unit != self._unit or (self._seen and done < self._seen[-1][1]):  # another phase, or a restart
            self._seen.clear()
            self._unit = unit
        if done <= 0:
            return
        self._seen.append((now, done))
        while len(self._seen) > 2 and now - self._seen[1][0] >= WINDOW:
            self._seen.popleft()

    @property
    def rate(self) -> float | None:
        """Units a second; None while nothing can be said."""
        if len(self._seen) < 2:
            return None
        (first, before), (last, done) = self._seen[0], self._seen[-1]
        return (done - before) / (last - first) if last - first >= STEADY and done > before else None


class Terminal:
    """Renders the events of a run and the counts of its stages; a context manager around the run.

    `stream` is written to; `every` is the least number of seconds between two plain lines of a stage; `clock` counts
    seconds.
    """

    def __init__(
        self, stream: IO[str] | None = None, *, every: float = 5.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = stream or sys.stdout
        self._every = every
        self._clock = clock
        self._live: Any = None
        self._task: Any = None
        if self._stream.isatty():
            self._live = _live(self._stream)

    def __enter__(self) -> "Terminal":
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live:
            self._end_task()
            self._live.stop()

    def line(self, text: str = "") -> None:
        """Print one line of text, above the live line where there is one."""
        if self._live:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)

    def on_event(self, event: Event) -> None:
        """Tell what happened to a step."""
        name, where = event.step.name, storage.redacted(event.directory)
        if event.kind == "started":
            if self._live:
                self._task = self._live.add_task(name, total=None, counts="", pace="", note="")
            else:
                self.line(f"[{name}] started")
            return
        self._end_task()
        interrupted = event.error is not None and not isinstance(event.error, Exception)
        said = {
            "reused": "already there",
            "finished": f"done in {seconds_text(event.seconds)}",
            "failed": f"{'interrupted' if interrupted else 'failed'} after {seconds_text(event.seconds)}",
            "skipped": "not run: a stage that it needs failed",
            "waiting": "another command is writing it; waiting for that one",
        }[event.kind]
        self.line(f"[{name}] {said}  {where}")

    def progress(self, name: str) -> Progress:
        """The `Progress` to hand to the stage `name`."""
        return _Counts(self, name)

    def _end_task(self) -> None:
        if self._task is not None:
            self._live.remove_task(self._task)
            self._task = None

    def _show(self, name: str, done: float, total: float | None, unit: str, note: str, pace: Pace) -> None:
        counts = f"{count_text(done)}{f'/{count_text(total)}' if total is not None else ''} {unit}"
        few = total is not None and total < FEW
        rate = f"{count_text(pace.rate)} {unit}/s" if pace.rate and not few else ""
        left = (
            f"{clock_text((total - done) / pace.rate)} left"
            if rate and pace.rate and total is not None and total > done
            else ""
        )
        if self._live:
            if self._task is not None:
                self._live.update(
                    self._task, completed=done, total=total, counts=counts, pace=f"{rate}  {left}".strip(), note=note
                )
        else:
            self.line("  ".join(part for part in (f"[{name}] {counts}", rate, left, note) if part))


class _Counts:
    """A stage's `Progress`."""

    def __init__(self, terminal: Terminal, name: str) -> None:
        self._terminal = terminal
        self._name = name
        self._pace = Pace()
        self._shown: tuple[float, str] | None = None

    def update(self, done: float, total: float | None, unit: str, note: str = "") -> None:
        terminal = self._terminal
        now = terminal._clock()
        self._pace.update(now, done, unit)
        last = self._shown
        finished = total is not None and done >= total
        # The first count of a phase and the last are always shown, else one every few seconds.
        due = last is None or last[1] != unit or finished or now - last[0] >= terminal._every
        if terminal._live or due:
            self._shown = (now, unit)
            terminal._show(self._name, done, total, unit, note, self._pace)


def printable(text: str) -> str:
    """`text` without what would steer the terminal, for text that a model or a stranger wrote."""
    return "".join(one if one.isprintable() or one in "\n\t" else "\ufffd" for one in text)


def count_text(count: float) -> str:
    """`count` in at most about six characters: 0.83, 12.5, 600, 12,000, 1.25M."""
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(count) >= size:
            return f"{count / size:#.3g}".rstrip(".") + suffix
    if float(count).is_integer() or abs(count) >= 1000:
        return f"{count:,.0f}"
    return f"{count:.3g}"


def bytes_text(count: float) -> str:
    """`count` bytes in decimal units: 512 B, 1.5 MB, 4.83 GB."""
    for size, suffix in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= size:
            return f"{count / size:.3g} {suffix}" if count < 1000 * size else f"{count / size:,.0f} {suffix}"
    return f"{count:.0f} B"


def clock_text(seconds: float) -> str:
    """m:ss, h:mm:ss or `3 d 4 h`."""
    whole = round(seconds)
    if whole >= 2 * 86_400:
        return f"{whole // 86_400} d {whole % 86_400 // 3600} h"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def seconds_text(seconds: float) -> str:
    """`0.3 s`, `42 s`, else as `clock_text`."""
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s" if seconds < 100 else clock_text(seconds)


def _live(stream: IO[str]) -> Any:
    from rich import progress
    from rich.console import Console

    return progress.Progress(
        progress.SpinnerColumn(),
        progress.TextColumn("{task.description}", style="bold"),
        progress.BarColumn(bar_width=20),
        progress.TimeElapsedColumn(),
        progress.TextColumn("{task.fields[counts]}"),
        progress.TextColumn("{task.fields[pace]}", style="cyan"),
        progress.TextColumn("{task.fields[note]}", style="dim"),
        console=Console(file=stream),
        transient=True,
        redirect_stdout=False,  # `apart` has done it
        redirect_stderr=False,
    )
