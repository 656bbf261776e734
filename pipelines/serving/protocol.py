"""What a client may send to /v1/completions, checked before anything expensive happens.

`null` means absent, an option this server does not have is accepted at its neutral value, and everything that would
change the answer but cannot be honoured is refused by name.
"""

import hashlib
import json
import secrets
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipelines.serving.config import DeployConfig
from pipelines.serving.errors import ApiError, invalid, unsupported

MAX_STOPS = 4
MAX_STOP_CHARACTERS = 256
MAX_TEMPERATURE = 100.0
GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: dividing by them would overflow."""

_NO = (False,)
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "best_of": (1,),
    "logprobs": _NO,
    "prompt_logprobs": _NO,
    "echo": _NO,
    "stop_token_ids": ([],),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "min_p": (0,),
    "ignore_eos": _NO,
    "use_beam_search": _NO,
    "return_token_ids": _NO,
}
"""Known options this server does not have, with the values that change nothing."""


class _Fields(BaseModel):
    """The scalar fields; strict, so that "16" is not a number and true is not 1."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    model: str | None = None
    max_tokens: int = Field(default=16, ge=1, le=2**31 - 1)
    min_tokens: int = Field(default=0, ge=0, le=2**31 - 1)
    n: int = Field(default=1, ge=1, le=2**31 - 1)
    temperature: float = Field(default=1.0, ge=0, le=MAX_TEMPERATURE)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1, le=2**31 - 1)
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    stream: bool = False
    user: str | None = None


_KNOWN = {*_Fields.model_fields, *_NEUTRAL, "prompt", "stop", "stream_options", "armd"}


@dataclass(frozen=True, kw_only=True)
class CompletionRequest:
    """A request that passed every check which needs no model."""

    prompts: list[str | list[int]]
    """Texts or token ids; an empty one is the start of a document."""
    n: int
    """Choices for each prompt."""
    max_tokens: int
    min_tokens: int
    temperature: float
    """0 is greedy."""
    top_p: float
    top_k: int
    """0 keeps every token."""
    seed: int
    """Drawn here when the client gave none."""
    stop: tuple[str, ...]
    streams: int
    verify: bool
    """Decode in exact mode."""
    stream: bool
    include_usage: bool
    ignored: tuple[str, ...]
    """Top-level fields nobody here knows, reported back in a header."""

    @property
    def n_choices(self) -> int:
        """Sequences to decode; choice i continues prompt i // n."""
        return len(self.prompts) * self.n


def choice_seed(seed: int, k: int) -> int:
    """The seed of a prompt's k-th choice: the request's own for the first, so that n does not change it."""
    if k == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}/{k}".encode()).digest()[:8], "big") >> 1


def parse_request(body: bytes, config: DeployConfig) -> CompletionRequest:
    """Check a body against the protocol and the server's limits.

    Raises:
        ApiError: 400 naming the field, or 404 for a model that is not served here.
    """
    data = {key: value for key, value in _json_object(body).items() if value is not None}
    fields = _fields(data)
    if fields.model is not None and fields.model != config.model_name:
        raise model_not_found(fields.model, config)
    _refuse_unsupported(data, fields.n)
    prompts = _prompts(data.get("prompt", ""), config)
    if len(prompts) * fields.n > config.max_choices:
        raise invalid(
            "n" if fields.n > 1 else "prompt",
            f"{len(prompts)} prompts with n = {fields.n} ask for more than {config.max_choices} completions.",
        )
    if fields.min_tokens > fields.max_tokens:
        message = f"min_tokens ({fields.min_tokens}) must not exceed max_tokens ({fields.max_tokens})."
        raise invalid("min_tokens", message)
    streams, verify = _armd(data.get("armd"), config)
    include_usage, unknown_options = _stream_options(data.get("stream_options"), fields.stream)
    unknown = [key for key in data if key not in _KNOWN] + unknown_options
    return CompletionRequest(
        prompts=prompts,
        n=fields.n,
        max_tokens=fields.max_tokens,
        min_tokens=fields.min_tokens,
        temperature=0.0 if fields.temperature < GREEDY_BELOW else fields.temperature,
        top_p=fields.top_p,
        top_k=max(0, fields.top_k),
        seed=secrets.randbits(63) if fields.seed is None else fields.seed,
        stop=_stops(data.get("stop")),
        streams=streams,
        verify=verify,
        stream=fields.stream,
        include_usage=include_usage,
        ignored=tuple(sorted(unknown)),
    )


def model_not_found(model: str, config: DeployConfig) -> ApiError:
    """404: only one model is served."""
    message = f"The model {_quoted(model)} does not exist here; this server has {config.model_name!r}."
    return ApiError(404, "invalid_request_error", "model_not_found", message, "model")


def _json_object(body: bytes) -> dict[str, Any]:
    def no_constant(name: str) -> float:
        raise ValueError(f"{name} is not JSON")

    try:
        data = json.loads(body.decode("utf-8"), parse_constant=no_constant)
    except UnicodeDecodeError as error:
        raise invalid(None, f"The body is not UTF-8: {error.reason} at byte {error.start}.", "invalid_json") from None
    except RecursionError:
        raise invalid(None, "The body is nested too deeply.", "invalid_json") from None
    except ValueError as error:
        raise invalid(None, f"The body is not valid JSON: {error}.", "invalid_json") from None
    if not isinstance(data, dict):
        raise invalid(None, f"The body must be a JSON object, not {_kind(data)}.", "invalid_json")
    return data


def _fields(data: dict[str, Any]) -> _Fields:
    try:
        return _Fields.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        param = str(first["loc"][0])
        raise invalid(param, f"{param}: {first['msg']}, not {_quoted(first['input'])}.") from None


def _refuse_unsupported(data: dict[str, Any], n: int) -> None:
    for name, neutral in _NEUTRAL.items():
        if name not in data:
            continue
        value = data[name]
        accepted = (*neutral, n) if name == "best_of" else neutral
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in accepted):
            raise unsupported(name, f"{name} is not supported by this server; leave it out.")


def _prompts(value: Any, config: DeployConfig) -> list[str | list[int]]:
    """The four forms as one list; lengths are checked before contents, so that a hostile body costs nothing."""
    if isinstance(value, str):
        return [_text(value, "prompt")]
    if not isinstance(value, list):
        raise invalid("prompt", f"prompt must be a string, token ids, or a list of either, not {_kind(value)}.")
    if not value:
        return [[]]
    if _is_token(value[0]):
        return [_token_ids(value)]
    if len(value) > config.max_choices:
        raise invalid("prompt", f"{len(value)} prompts are more than the {config.max_choices} a request may have.")
    if all(isinstance(one, str) for one in value):
        return [_text(one, "prompt") for one in value]
    if all(isinstance(one, list) for one in value):
        return [_token_ids(one) for one in value]
    raise invalid("prompt", "prompt must hold only strings, only token ids, or only lists of token ids.")


def _token_ids(value: list[Any]) -> list[int]:
    strange = next((one for one in value if type(one) is not int), None)
    if strange is not None or None in value:
        raise invalid("prompt", f"Token ids must be integers, not {_quoted(strange)}.")
    if value and min(value) < 0:
        raise invalid("prompt", f"Token id {_quoted(min(value))} is negative.", "token_out_of_range")
    return value


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _stops(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list):
        raise invalid("stop", f"stop must be a string or a list of up to {MAX_STOPS}, not {_kind(value)}.")
    if len(stops) > MAX_STOPS:
        raise invalid("stop", f"stop may hold up to {MAX_STOPS} strings, not {len(stops)}.")
    for stop in stops:
        if not isinstance(stop, str) or not 0 < len(stop) <= MAX_STOP_CHARACTERS:
            raise invalid(
                "stop", f"A stop string must have 1 to {MAX_STOP_CHARACTERS} characters, not {_quoted(stop)}."
            )
    return tuple(_text(stop, "stop") for stop in stops)


def _armd(value: Any, config: DeployConfig) -> tuple[int, bool]:
    """Streams, and whether to verify what they draft."""
    if value is None:
        return config.default_streams, False
    if not isinstance(value, dict):
        raise invalid("armd", f"armd must be an object, not {_kind(value)}.")
    unknown = [key for key in value if key not in ("streams", "verify")]
    if unknown:
        names = ", ".join(_quoted(key) for key in unknown[:8])
        raise invalid("armd", f"Unknown in armd: {names}; known: 'streams', 'verify'.", "unsupported_parameter")
    streams = value.get("streams")
    if streams is None:
        streams = config.default_streams
    if not _is_token(streams) or not 1 <= streams <= config.max_streams:
        raise invalid(
            "armd.streams", f"armd.streams must be an integer from 1 to {config.max_streams}, not {_quoted(streams)}."
        )
    verify = value.get("verify")
    if not (verify is None or (isinstance(verify, str) and verify in ("none", "exact"))):
        raise invalid("armd.verify", f"armd.verify must be 'none' or 'exact', not {_quoted(verify)}.")
    return int(streams), verify == "exact"


def _stream_options(value: Any, stream: bool) -> tuple[bool, list[str]]:
    """include_usage, and the names of the options that are ignored."""
    if value is None:
        return False, []
    if not isinstance(value, dict):
        raise invalid("stream_options", f"stream_options must be an object, not {_kind(value)}.")
    if not stream:
        raise invalid("stream_options", "stream_options only goes with stream = true.")
    include_usage = value.get("include_usage")
    if include_usage is not None and not isinstance(include_usage, bool):
        raise invalid("stream_options", f"include_usage must be true or false, not {_quoted(include_usage)}.")
    return bool(include_usage), [f"stream_options.{key}" for key in value if key != "include_usage"]


def _text(value: str, param: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        message = f"{param} holds half a surrogate pair at character {error.start}; it cannot be encoded."
        raise invalid(param, message) from None
    return value


_KINDS: dict[type, str] = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), "an object" if isinstance(value, dict) else "null")


def _quoted(value: Any) -> str:
    """`value` as ASCII, short enough for a message; containers and huge numbers by kind, as spelling them out costs."""
    if isinstance(value, (list, dict)) or (isinstance(value, int) and abs(value) >= 2**64):
        return _kind(value)
    text = ascii(value[:80] if isinstance(value, str) else value)
    return text if len(text) <= 100 else text[:97] + "..."
