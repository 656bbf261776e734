"""What the engine sends the ingress while it serves a request."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass

from pipelines.serving.errors import ApiError


@dataclass(frozen=True, kw_only=True)
class Admitted:
    """The first answer to a request that will be served."""

    prompt_tokens: int
    """Over all prompts, as they were encoded; an empty one counts its document start."""
    fingerprint: str
    """Code, weights and sampler, for clients that compare runs."""


@dataclass(frozen=True, kw_only=True)
class Finish:
    """How a choice ended, and what it took."""

    reason: str
    """`stop` or `length`."""
    stop_reason: str | None
    """The stop string that ended it."""
    tokens: int
    step_of_token: list[int]
    forward_passes: int
    accepted: int
    """Tokens written as they were drafted; all of them where nothing is verified."""
    rejected: int
    """Tokens written in place of a draft."""
    timings: dict[str, float]
    """Milliseconds: queue_ms before the first step, prefill_ms of the first step, decode_ms of all others."""


@dataclass(frozen=True, kw_only=True)
class Delta:
    """New text of a choice; the last one says how it ended."""

    choice: int
    text: str
    finish: Finish | None = None


Items = AsyncGenerator[ApiError | Admitted | list[Delta], None]
"""The answer to a request: `Admitted` and lists of `Delta` until every choice has finished, or one `ApiError`."""
