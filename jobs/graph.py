"""Steps with an identity: what is done is reused, what changed gets a new directory, a failure stops what needs it.

A step is a name, a configuration, the steps it depends on and a function. Its identity is a hash of the name, the
configuration and the identities of its dependencies, never of a path; its output goes to `root/name-hash`. The function
commits its output; whether it is committed, the injected `is_done` says, since the root may be an object store.

Two commands on one root: the second waits for the step that the first is writing, then reuses it. A lock file on this
machine keeps them apart (`flock`: the system drops it with the process, SIGKILL included). Below a root that several
machines share - an object store, a network disk without locks - nothing keeps commands of different machines apart.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

StepFunction = Callable[[Mapping[str, str], str], Any]
"""Called with the directories of the dependencies by name and the directory to write to; commits its output last."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One node of the graph.

    Raises:
        TypeError: `config` cannot be written as JSON, so that it has no identity.
    """

    name: str
    """Names the directory and, to its dependents, the input."""
    config: Any
    """Everything that decides the output besides the dependencies; JSON-able."""
    dependencies: tuple["Step", ...] = ()
    """Steps whose output this one reads."""
    function: StepFunction = field(compare=False, repr=False)
    """Does the work; not part of the identity."""
    still_good: Callable[[str], bool] | None = field(default=None, compare=False, repr=False)
    """Asked about a finished step whose effect lies outside its directory (a served model); False: run it again."""

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the canonical JSON of the name, the configuration and the dependencies' hashes."""
        identity = [self.name, self.config, [dependency.hash for dependency in self.dependencies]]
        text = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def directory(self, root: str) -> str:
        """Where the output goes below `root`, a path or a URI."""
        return f"{root.rstrip('/')}/{self.name}-{self.hash[:12]}"


@dataclass(frozen=True, kw_only=True)
class Event:
    """What happened to a step."""

    step: Step
    """The step."""
    kind: Literal["waiting", "started", "reused", "finished", "failed", "skipped"]
    """waiting: another command writes it; skipped: something that it depends on failed."""
    directory: str
    """The step's directory."""
    seconds: float = 0.0
    """How long it ran (finished and failed)."""
    error: BaseException | None = None
    """What it raised (failed)."""


class StepsFailed(Exception):
    """Raised at the end of a run in which steps failed.

    `failures` holds the name and the exception of each, in the order of the run; the cause is the first exception.
    """

    def __init__(self, failures: Sequence[tuple[str, Exception]]) -> None:
        super().__init__("; ".join(f"{name}: {type(error).__name__}: {error}" for name, error in failures))
        self.failures = tuple(failures)


def in_order(steps: Sequence[Step]) -> list[Step]:
    """`steps` and everything they depend on, dependencies first, each once."""
    ordered: dict[str, Step] = {}

    def visit(step: Step) -> None:
        if step.hash not in ordered:
            for dependency in step.dependencies:
                visit(dependency)
            ordered[step.hash] = step

    for step in steps:
        visit(step)
    return list(ordered.values())


def run(
    steps: Sequence[Step],
    root: str,
    *,
    is_done: Callable[[str], bool],
    on_event: Callable[[Event], None],
    lock_dir: Path,
) -> None:
    """Bring `steps` and what they depend on up to date below `root`, one after the other.

    A step whose directory is done is not run again. When one fails, the steps that do not depend on it still run.

    Args:
        steps: the steps wanted.
        root: path or URI below which every step has its directory.
        is_done: whether the output in a directory has been committed.
        on_event: told what happens as it happens.
        lock_dir: local directory for the lock files, one a step; commands that share a root must share it.

    Raises:
        StepsFailed: at the end, when steps failed.
    """
    failures: list[tuple[str, Exception]] = []
    not_done: set[str] = set()
    for step in in_order(steps):
        directory = step.directory(root)
        if any(dependency.hash in not_done for dependency in step.dependencies):
            not_done.add(step.hash)
            on_event(Event(step=step, kind="skipped", directory=directory))
            continue
        try:
            _bring_up_to_date(step, root, is_done, on_event, lock_dir)
        except Exception as error:
            not_done.add(step.hash)
            failures.append((step.name, error))
    if failures:
        raise StepsFailed(failures) from failures[0][1]


def _bring_up_to_date(
    step: Step, root: str, is_done: Callable[[str], bool], on_event: Callable[[Event], None], lock_dir: Path
) -> None:
    directory = step.directory(root)
    started = time.monotonic()

    def tell(
        kind: Literal["waiting", "started", "reused", "finished", "failed"], error: BaseException | None = None
    ) -> None:
        seconds = time.monotonic() - started if kind in ("finished", "failed") else 0.0
        on_event(Event(step=step, kind=kind, directory=directory, seconds=seconds, error=error))

    def good() -> bool:
        return is_done(directory) and (step.still_good is None or step.still_good(directory))

    try:
        if good():
            return tell("reused")
        with _alone(lock_dir / f"{step.name}-{step.hash[:12]}.lock", lambda: tell("waiting")):
            if good():  # the command that we waited for finished it
                return tell("reused")
            started = time.monotonic()
            tell("started")
            step.function({dependency.name: dependency.directory(root) for dependency in step.dependencies}, directory)
            if not is_done(directory):
                raise RuntimeError(f"step {step.name} returned without committing its output in {directory}")
    except BaseException as error:  # told also of an interrupt, which then ends the run
        tell("failed", error)
        raise
    tell("finished")


@contextlib.contextmanager
def _alone(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the lock file at `path`; `on_wait` is called once when another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
