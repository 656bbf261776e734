"""Answers that are errors, in the body OpenAI's clients understand."""

import json


class ApiError(Exception):
    """An HTTP error with its body; travels from the engine to the ingress, so all parts are positional arguments."""

    def __init__(
        self,
        status: int,
        kind: str,
        code: str,
        message: str,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status, kind, code, message, param, headers)
        self.status = status
        self.kind = kind
        self.code = code
        self.message = message
        self.param = param
        self.headers = headers or {}

    def __str__(self) -> str:
        return self.message

    def body(self) -> dict[str, dict[str, str | None]]:
        """The JSON body."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def encoded(self) -> bytes:
        """The JSON body as ASCII: a message may quote what a client sent, lone surrogates included."""
        return json.dumps(self.body()).encode("ascii")


def invalid(param: str | None, message: str, code: str = "invalid_value") -> ApiError:
    """400: the request cannot be served as it is; `param` names the field."""
    return ApiError(400, "invalid_request_error", code, message, param)


def unsupported(param: str, message: str) -> ApiError:
    """400: the field is known, its value asks for something this server does not do."""
    return invalid(param, message, "unsupported_parameter")


def queue_full(message: str) -> ApiError:
    """429: come back soon."""
    return ApiError(429, "rate_limit_error", "queue_full", message, None, {"Retry-After": "1"})


def unavailable(message: str) -> ApiError:
    """503: no engine answers right now."""
    return ApiError(503, "service_unavailable_error", "engine_unavailable", message, None, {"Retry-After": "2"})


def body_timeout(seconds: float) -> ApiError:
    """408: the body did not arrive; clients that retry it on their own would only double the load."""
    message = f"The request's body did not arrive within {seconds:g} s."
    return ApiError(408, "timeout_error", "request_timeout", message, None, {"x-should-retry": "false"})


def generation_timeout(seconds: float) -> ApiError:
    """504: the generation took too long; a retry would take as long."""
    message = f"The generation did not finish within {seconds:g} s; ask for fewer tokens or choices."
    return ApiError(504, "timeout_error", "generation_timeout", message, None, {"x-should-retry": "false"})


def internal(request_id: str) -> ApiError:
    """500: our mistake; the log has the details under the request's id."""
    return ApiError(
        500, "server_error", "internal_error", f"Internal error; the server's log has request {request_id}."
    )
