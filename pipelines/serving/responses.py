"""The bodies of answers: OpenAI's completion objects, whole and in chunks, with ARMD's additions beside them.

`armd` describes the decoding: `streams` and `order` always; `step_of_token`, `forward_passes`, `tokens_per_forward` and
`timings` beside them where there is one choice, and in an `armd` object of each choice where there are several. Where
the request wants its drafts verified, `verified`, `accepted` and `rejected` stand there too, and in `usage`.
"""

import json
import secrets
import time
from typing import Any

from pydantic import BaseModel, ConfigDict

from pipelines.serving.config import DeployConfig
from pipelines.serving.errors import ApiError
from pipelines.serving.messages import Admitted, Delta, Finish
from pipelines.serving.protocol import CompletionRequest

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"


class Choice(BaseModel):
    """One text, or in a stream a piece of it."""

    model_config = ConfigDict(extra="allow")

    index: int
    text: str
    logprobs: None = None
    finish_reason: str | None = None
    stop_reason: str | None = None


class Usage(BaseModel):
    """Tokens over all prompts and choices."""

    model_config = ConfigDict(extra="allow")

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(BaseModel):
    """The body of an answer, or of one event of a stream."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: str = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]


class Answer:
    """Builds the answer to one request, whole or event by event."""

    def __init__(self, request: CompletionRequest, admitted: Admitted, config: DeployConfig) -> None:
        self._request = request
        self._admitted = admitted
        self._head: dict[str, Any] = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": config.model_name,
            "system_fingerprint": admitted.fingerprint,
        }
        self._completion_tokens = self._accepted = self._rejected = 0

    def whole(self, deltas: list[Delta]) -> dict[str, Any]:
        """The body of an answer that is not streamed; `deltas` holds each choice once, finished, in any order."""
        choices = [self._choice(delta) for delta in sorted(deltas, key=lambda delta: delta.choice)]
        body = Completion(**self._head, choices=choices).model_dump()
        return {**body, "usage": self.usage(), "armd": self._armd(deltas)}

    def event(self, delta: Delta) -> bytes:
        """An event of a stream with a choice's next piece of text."""
        body = Completion(**self._head, choices=[self._choice(delta)]).model_dump()
        if delta.finish is not None:
            body["armd"] = self._armd([delta])
        if self._request.include_usage:
            body["usage"] = None
        return sse(body)

    def usage_event(self) -> bytes:
        """The last event before [DONE] where the client asked for include_usage."""
        return sse({**Completion(**self._head, choices=[]).model_dump(), "usage": self.usage()})

    def usage(self) -> dict[str, Any]:
        """Tokens of the choices that have finished."""
        prompt, completion = self._admitted.prompt_tokens, self._completion_tokens
        total = prompt + completion
        details: dict[str, Any] = {}
        if self._request.verify:
            counts = {"accepted_prediction_tokens": self._accepted, "rejected_prediction_tokens": self._rejected}
            details = {"completion_tokens_details": counts}
        return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=total, **details).model_dump()

    def _choice(self, delta: Delta) -> Choice:
        choice = Choice(index=delta.choice, text=delta.text)
        if delta.finish is None:
            return choice
        self._completion_tokens += delta.finish.tokens
        self._accepted += delta.finish.accepted
        self._rejected += delta.finish.rejected
        own: dict[str, Any] = {"armd": self._decoding(delta.finish)} if self._request.n_choices > 1 else {}
        return Choice(
            index=delta.choice,
            text=delta.text,
            finish_reason=delta.finish.reason,
            stop_reason=delta.finish.stop_reason,
            **own,
        )

    def _armd(self, deltas: list[Delta]) -> dict[str, Any]:
        head = {"streams": self._request.streams, "order": "strided" if self._request.streams > 1 else "ltr"}
        if self._request.n_choices > 1:
            return head
        (delta,) = deltas
        assert delta.finish is not None
        return {**head, **self._decoding(delta.finish)}

    def _decoding(self, finish: Finish) -> dict[str, Any]:
        drafts = {"verified": True, "accepted": finish.accepted, "rejected": finish.rejected}
        return {
            "step_of_token": finish.step_of_token,
            "forward_passes": finish.forward_passes,
            "tokens_per_forward": round(finish.tokens / max(1, finish.forward_passes), 4),
            **(drafts if self._request.verify else {}),
            "timings": finish.timings,
        }


def sse(body: dict[str, Any]) -> bytes:
    """One event of a text/event-stream."""
    return b"data: " + json.dumps(body, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n\n"


def sse_error(error: ApiError) -> bytes:
    """The event that ends a stream which cannot be finished."""
    return b"data: " + error.encoded() + b"\n\n" + DONE


def model_object(facts: dict[str, Any], config: DeployConfig) -> dict[str, Any]:
    """An entry of /v1/models."""
    return {
        "id": config.model_name,
        "object": "model",
        "created": facts["created"],
        "owned_by": "armd",
        "root": config.model_name,
        "max_model_len": facts["max_model_len"],
        "armd": {
            "streams": {"min": 1, "max": config.max_streams, "default": config.default_streams},
            "system_fingerprint": facts["fingerprint"],
            "vocab_size": facts["vocab_size"],
        },
    }
