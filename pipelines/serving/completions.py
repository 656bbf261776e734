"""A completion request against one model: token ids in, text out. Knows neither HTTP nor Ray."""

import asyncio
import time
from typing import Any

from armd import ARMD, Engine, SamplingParams, Tokenizer
from armd.text import TextBuilder
from pipelines.serving.config import DeployConfig
from pipelines.serving.engine_loop import EngineFailed, EngineLoop, QueueFull, Ticket
from pipelines.serving.errors import ApiError, invalid, queue_full, unavailable
from pipelines.serving.messages import Admitted, Delta, Finish, Items
from pipelines.serving.protocol import CompletionRequest, choice_seed


class Completions:
    """Serves requests on one model, all of them in one batch that changes from step to step."""

    def __init__(
        self, model: ARMD, tokenizer: Tokenizer, config: DeployConfig, *, device: str, fingerprint: str
    ) -> None:
        self._tokenizer = tokenizer
        self._max_length = model.config.max_length
        self._vocab_size = model.config.vocab_size
        self._fingerprint = fingerprint
        engine = Engine(model, max_slots=config.max_slots, device=device, static_shapes=config.static_shapes)
        self.loop = EngineLoop(engine, max_slots=config.max_slots, max_queued=config.max_queued)
        self._facts = {
            "max_model_len": self._max_length,
            "created": int(time.time()),
            "fingerprint": fingerprint,
            "vocab_size": self._vocab_size,
        }

    def describe(self) -> dict[str, Any]:
        """What /v1/models says about the model."""
        return self._facts

    def load(self) -> dict[str, int]:
        """How busy the engine is, and what it did since it started."""
        loop = self.loop
        return {
            "running": loop.running,
            "waiting": loop.waiting,
            "forward_passes": loop.steps,
            "tokens": loop.tokens,
            "cancelled": loop.cancelled,
        }

    async def generate(self, request: CompletionRequest) -> Items:
        """`Admitted`, then lists of `Delta` until every choice has finished; or one `ApiError` and nothing else.

        Without `request.stream` a choice gets one Delta, its last. Closing the iterator gives up what has not finished.
        """
        sink: asyncio.Queue = asyncio.Queue()
        try:
            prompts = await self._encode(request)
            tickets = self.loop.admit(self._jobs(request, prompts), sink)
        except ApiError as error:
            yield error
            return
        except QueueFull as error:
            yield queue_full(str(error))
            return
        except EngineFailed:
            yield unavailable("The engine has failed; it is being replaced.")
            return
        stop_ids = (self._tokenizer.eos_id,)
        builders = [TextBuilder(self._tokenizer, request.stop, stop_ids) for _ in tickets]
        fingerprint = f"{self._fingerprint}+S{request.streams}{'+exact' if request.verify else ''}"
        try:
            yield Admitted(prompt_tokens=sum(map(len, prompts)), fingerprint=fingerprint)
            unfinished = len(tickets)
            while unfinished:
                deltas = self._read(await _drain(sink), tickets, builders, every=request.stream)
                unfinished -= sum(delta.finish is not None for delta in deltas)
                if deltas:
                    yield deltas
        finally:
            for ticket in tickets:
                self.loop.cancel(ticket)

    def _read(self, items: list, tickets: list[Ticket], builders: list[TextBuilder], *, every: bool) -> list[Delta]:
        """Feed events to their texts; the deltas of the choices that grew (`every`) or finished."""
        touched: dict[int, Finish | None] = {}
        for item in items:
            if isinstance(item, BaseException):
                raise item
            choice, event = item
            builder = builders[choice]
            if builder.finish_reason is not None:  # ended by a stop string; this step was on its way already
                continue
            builder.feed(event)
            touched[choice] = None
            if builder.finish_reason is not None:
                self.loop.cancel(tickets[choice])
                touched[choice] = _finish(builder, tickets[choice])
        deltas = []
        for choice, finish in touched.items():
            if not every and finish is None:
                continue
            text = builders[choice].take()
            if text or finish is not None:
                deltas.append(Delta(choice=choice, text=text, finish=finish))
        return deltas

    async def _encode(self, request: CompletionRequest) -> list[list[int]]:
        """Token ids of every prompt; texts are encoded in a thread, since a long one takes a while."""
        texts = [prompt for prompt in request.prompts if isinstance(prompt, str)]
        if texts:
            prompts = await asyncio.to_thread(self._tokenizer.encode_batch, texts)
        else:
            prompts = [prompt for prompt in request.prompts if isinstance(prompt, list)]
        prompts = [prompt or [self._tokenizer.eos_id] for prompt in prompts]
        for prompt in prompts:
            if len(prompt) + request.max_tokens > self._max_length:
                raise invalid(
                    "max_tokens" if len(prompt) < self._max_length else "prompt",
                    f"max_tokens ({request.max_tokens}) + prompt ({len(prompt)}) exceeds the context of "
                    f"{self._max_length} tokens.",
                    "context_length_exceeded",
                )
            if (largest := max(prompt)) >= self._vocab_size:
                shown = largest if largest < 2**64 else "given"
                message = f"Token id {shown} is not in the vocabulary of {self._vocab_size}."
                raise invalid("prompt", message, "token_out_of_range")
        return prompts

    def _jobs(self, request: CompletionRequest, prompts: list[list[int]]) -> list[tuple[list[int], SamplingParams]]:
        return [
            (
                prompt,
                SamplingParams(
                    max_tokens=request.max_tokens,
                    min_tokens=request.min_tokens,
                    n_streams=request.streams,
                    mode="exact" if request.verify else "parallel",
                    temperature=request.temperature,
                    top_p=request.top_p,
                    top_k=request.top_k,
                    seed=choice_seed(request.seed, k),
                    stop_ids=(self._tokenizer.eos_id,),
                ),
            )
            for prompt in prompts
            for k in range(request.n)
        ]


async def _drain(queue: asyncio.Queue) -> list:
    """Everything that is in the queue, at least one item."""
    items = [await queue.get()]
    while not queue.empty():
        items.append(queue.get_nowait())
    return items


def _finish(builder: TextBuilder, ticket: Ticket) -> Finish:
    assert builder.finish_reason is not None
    assert ticket.first_step is not None
    assert ticket.first_written is not None
    end = ticket.finished or time.perf_counter()
    return Finish(
        reason=builder.finish_reason,
        stop_reason=builder.stop_reason,
        tokens=len(builder.tokens),
        step_of_token=builder.step_of_token,
        forward_passes=builder.steps,
        accepted=builder.accepted,
        rejected=builder.rejected,
        timings={
            "queue_ms": round(1e3 * (ticket.first_step - ticket.submitted), 3),
            "prefill_ms": round(1e3 * (ticket.first_written - ticket.first_step), 3),
            "decode_ms": round(1e3 * (end - ticket.first_written), 3),
        },
    )
