"""Continuous batching for asyncio: requests join, are cancelled and get their events while the model keeps stepping."""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from armd import Engine, Event, SamplingParams

_SELF_TEST = SamplingParams(max_tokens=1, n_streams=1, temperature=0.0)


class EngineFailed(Exception):
    """A step raised; nothing will come from this engine any more."""


class QueueFull(Exception):
    """There is no room for another request; str() says how many wait."""


@dataclass(eq=False)
class Ticket:
    """One sequence on its way through the engine."""

    prompt: Sequence[int]
    params: SamplingParams
    sink: asyncio.Queue
    """Gets (choice, Event) for each step, or an exception when the engine failed."""
    choice: int
    submitted: float = field(default_factory=time.perf_counter)
    first_step: float | None = None
    """When the step that first wrote for it began, in seconds of `perf_counter`."""
    first_written: float | None = None
    """When that step ended."""
    finished: float | None = None
    """When its last step ended."""
    engine_id: int | None = None
    cancelled: bool = False


class EngineLoop:
    """Owns an `Engine`, which knows one caller only, and steps it in a thread for as long as there is work.

    Everything here runs in one event loop; only `_turn` runs in the thread, and only it touches the engine.
    """

    def __init__(self, engine: Engine, *, max_slots: int, max_queued: int) -> None:
        self._engine = engine
        self._max_slots = max_slots
        self._max_queued = max_queued
        self._tickets: dict[int, Ticket] = {}  # by the engine's id
        self._joining: list[Ticket] = []
        self._leaving: list[Ticket] = []
        self._alive = 0  # tickets neither finished nor cancelled
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "armd-engine")  # its own: encoding long prompts must not delay a step
        self._task: asyncio.Task | None = None
        self._error: BaseException | None = None
        self._turn_started: float | None = None
        self._last_answer = float("-inf")
        self.steps = 0
        """Forward passes since the start."""
        self.tokens = 0
        """Tokens written since the start."""
        self.cancelled = 0
        """Sequences given up by their clients or ended by a stop string."""

    @property
    def running(self) -> int:
        """Sequences that hold a slot, or will with the next step."""
        return min(self._alive, self._max_slots)

    @property
    def waiting(self) -> int:
        """Sequences that wait for a slot."""
        return self._alive - self.running

    def admit(self, jobs: Sequence[tuple[Sequence[int], SamplingParams]], sink: asyncio.Queue) -> list[Ticket]:
        """Take all jobs in, or none; job i's events arrive in `sink` as (i, Event).

        Raises:
            QueueFull: there is not room for all of them.
            EngineFailed: there will be no answer.
        """
        if self._error is not None:
            raise EngineFailed(repr(self._error)) from self._error
        if self._alive + len(jobs) > self._max_slots + self._max_queued:
            raise QueueFull(
                f"{self.waiting} sequences wait for {self._max_slots} slots; at most {self._max_queued} may."
            )
        tickets = [Ticket(prompt, params, sink, choice) for choice, (prompt, params) in enumerate(jobs)]
        self._alive += len(tickets)
        self._joining += tickets
        self._start()
        return tickets

    def cancel(self, ticket: Ticket) -> None:
        """Give a sequence up; its slot is free from the next step on. Nothing happens when it has finished."""
        if ticket.cancelled or ticket.finished is not None:
            return
        ticket.cancelled = True
        self._alive -= 1
        self.cancelled += 1
        self._leaving.append(ticket)
        self._wake.set()

    async def self_test(self, deadline_s: float, recent_s: float = 0.0) -> None:
        """Prove that the engine answers: by a token written in the last `recent_s` seconds, else by asking for one.

        Raises:
            TimeoutError: no token came within `deadline_s` seconds.
            EngineFailed: there will be no answer.
        """
        if self._error is None and time.monotonic() - self._last_answer < recent_s:
            return
        sink: asyncio.Queue = asyncio.Queue()
        if self._alive >= self._max_slots:  # the test would have to queue; any new step is as good an answer
            await self._next_step(deadline_s)
            return
        (ticket,) = self.admit([([0], _SELF_TEST)], sink)
        try:
            item = await asyncio.wait_for(sink.get(), deadline_s)
        finally:
            self.cancel(ticket)
        if isinstance(item, BaseException):
            raise EngineFailed(repr(item)) from item

    def check(self, stuck_after_s: float) -> None:
        """Raise EngineFailed when it has, or when it has been in one step for longer than `stuck_after_s`."""
        if self._error is not None:
            raise EngineFailed(repr(self._error)) from self._error
        started = self._turn_started
        if started is not None and time.monotonic() - started > stuck_after_s:
            raise EngineFailed(f"the engine has been in one step for more than {stuck_after_s:g} s")

    async def _next_step(self, deadline_s: float) -> None:
        before, end = self.steps, time.monotonic() + deadline_s
        while self.steps == before:
            if self._error is not None:
                raise EngineFailed(repr(self._error)) from self._error
            if time.monotonic() > end:
                raise TimeoutError("the engine wrote nothing")
            await asyncio.sleep(0.01)

    def _start(self) -> None:
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())
        self._wake.set()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        joining: list[Ticket] = []
        try:
            while True:
                if not (self._joining or self._leaving or self._tickets):
                    self._wake.clear()
                    await self._wake.wait()
                joining, self._joining = self._joining, []
                leaving, self._leaving = self._leaving, []
                self._turn_started = time.monotonic()
                events, began = await loop.run_in_executor(self._thread, self._turn, joining, leaving)
                self._turn_started = None
                self._deliver(events, began)
        except Exception as error:
            self._error = error
            self._turn_started = None
            for ticket in [*self._tickets.values(), *self._joining, *joining]:
                ticket.sink.put_nowait(error)
            raise

    def _turn(self, joining: list[Ticket], leaving: list[Ticket]) -> tuple[list[Event], float]:
        """In the thread: those who left go, those who joined come, everybody advances by one step."""
        for ticket in leaving:
            if ticket.engine_id is not None:
                self._engine.cancel(ticket.engine_id)
                self._tickets.pop(ticket.engine_id, None)
        for ticket in joining:
            if not ticket.cancelled:
                ticket.engine_id = self._engine.submit(ticket.prompt, ticket.params)  # checked before: cannot fail
                self._tickets[ticket.engine_id] = ticket
        began = time.perf_counter()
        return ([] if self._engine.idle else self._engine.step()), began

    def _deliver(self, events: list[Event], began: float) -> None:
        now = time.perf_counter()
        if events:
            self.steps += 1
            self._last_answer = time.monotonic()
        for event in events:
            ticket = self._tickets[event.request_id]
            self.tokens += len(event.written)
            if ticket.first_step is None:
                ticket.first_step, ticket.first_written = began, now
            if event.completion is not None:
                del self._tickets[event.request_id]
                if not ticket.cancelled:
                    ticket.finished = now
                    self._alive -= 1
            ticket.sink.put_nowait((ticket.choice, event))
