"""What stands before every route: the key, the headers of every answer, the body's cap and deadline, errors as JSON."""

import asyncio
import hashlib
import hmac
import logging
import re
import secrets
from collections.abc import Callable

from fastapi import FastAPI, Request, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipelines.serving import errors
from pipelines.serving.config import DeployConfig
from pipelines.serving.errors import ApiError

OPEN_PATH = "/live"
"""The one path that needs no key."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_CODES = {404: "not_found", 405: "method_not_allowed"}
_logger = logging.getLogger("ray.serve")


def key_digest(key: str) -> str:
    """What is handed to the cluster instead of the key itself."""
    return hashlib.sha256(key.encode("utf-8")).hexdigest()


class Guard:
    """ASGI middleware: refuses callers without the key, adds the version to every answer, counts answers by status.

    A caller's request id that is not plain and short is replaced, so that the log and the error bodies hold no other.
    An exception that nobody expected is logged here with the request's id, and told to the client as a 500.
    """

    def __init__(self, app: ASGIApp, *, digest: str | None, version: str, count: Callable[[int], None]) -> None:
        self._app = app
        self._digest = digest
        self._version = version
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        received = MutableHeaders(scope=scope)
        if not _REQUEST_ID.fullmatch(received.get("x-request-id", "")):
            received["x-request-id"] = secrets.token_hex(16)
        begun = False

        async def send_counted(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                MutableHeaders(scope=message)["X-ARMD-Version"] = self._version
                self._count(message["status"])
            await send(message)

        error = None if scope["path"] == OPEN_PATH else self._refusal(Headers(scope=scope))
        app = self._app if error is None else error_response(error)
        try:
            await app(scope, receive, send_counted)
        except Exception:
            if begun:
                raise
            name = request_id(Headers(scope=scope))
            _logger.exception("request %s failed", name)
            await error_response(errors.internal(name))(scope, receive, send_counted)

    def _refusal(self, headers: Headers) -> ApiError | None:
        if self._digest is None:
            return None
        kind, _, key = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not key.strip():
            return _unauthorized("missing_api_key", "Give the API key in the header 'Authorization: Bearer KEY'.")
        if not hmac.compare_digest(key_digest(key.strip()), self._digest):
            return _unauthorized("invalid_api_key", "The API key is not this server's.")
        return None


def error_response(error: ApiError) -> Response:
    """The answer that `error` describes."""
    return Response(error.encoded(), error.status, error.headers, media_type="application/json")


def request_id(headers: Headers) -> str:
    """The id that Serve's proxy gave the request or took from the caller and sends back, or our own (see `Guard`)."""
    return headers["x-request-id"]


async def read_body(request: Request, config: DeployConfig) -> bytes:
    """The body, if it is JSON by its header, small enough and here in time.

    Raises:
        ApiError: 415, 413 or 408.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        message = "The body must be sent with the header 'Content-Type: application/json'."
        raise ApiError(415, "invalid_request_error", "unsupported_media_type", message)
    if int(request.headers.get("content-length") or 0) > config.max_body_bytes:
        raise _too_large(config)
    body = bytearray()
    try:
        async with asyncio.timeout(config.body_timeout_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > config.max_body_bytes:
                    raise _too_large(config)
    except TimeoutError:
        raise errors.body_timeout(config.body_timeout_s) from None
    return bytes(body)


def install_error_handlers(app: FastAPI) -> None:
    """Give every error, the framework's own included, the body that clients understand."""

    async def on_api_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error_response(error)

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = _CODES.get(error.status_code, "http_error")
        message = f"{ascii(request.method)[1:-1]} {ascii(request.url.path)[1:-1][:200]}: {error.detail}."
        answer = error_response(ApiError(error.status_code, "invalid_request_error", code, message))
        answer.headers.update(error.headers or {})
        return answer

    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(HTTPException, on_http_error)


def _unauthorized(code: str, message: str) -> ApiError:
    return ApiError(401, "authentication_error", code, message, None, {"WWW-Authenticate": "Bearer"})


def _too_large(config: DeployConfig) -> ApiError:
    message = f"The body is larger than {config.max_body_bytes} bytes."
    return ApiError(413, "invalid_request_error", "request_too_large", message)
