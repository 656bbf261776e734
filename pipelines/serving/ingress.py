"""The light deployment: HTTP in, HTTP out. What is costly happens behind it, in the engine."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol
from urllib.parse import quote

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.requests import ClientDisconnect

from pipelines.serving import errors
from pipelines.serving.config import DeployConfig
from pipelines.serving.errors import ApiError
from pipelines.serving.http_guard import Guard, install_error_handlers, read_body, request_id
from pipelines.serving.messages import Admitted, Items
from pipelines.serving.protocol import CompletionRequest, model_not_found, parse_request
from pipelines.serving.responses import DONE, KEEP_ALIVE, Answer, model_object, sse_error

KEEP_ALIVE_S = 10.0
"""Silence after which a stream gets a comment line."""
ADMISSION_S = 10.0
"""Time for an engine to take a request or refuse it; it does either at once unless it is gone or stuck."""
HEALTH_S = 6.0
"""Time for an engine to prove that it answers."""
_MAX_SHOWN = 20
_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_logger = logging.getLogger("ray.serve")


class EngineClient(Protocol):
    """The engine as the ingress sees it, wherever it runs; its errors are `ApiError`s."""

    def generate(self, request: CompletionRequest) -> Items:
        """`Admitted` or an `ApiError`, then lists of `Delta`; closing the iterator gives the request up."""

    async def describe(self) -> dict[str, Any]:
        """What /v1/models says about the model."""

    async def health(self) -> dict[str, Any]:
        """How busy the engine is; raises when it does not answer."""


class Ingress:
    """The Serve deployment; the application is built in the replica, so nothing of it travels."""

    def __init__(self, engine: Any, config: DeployConfig, digest: str | None, version: str) -> None:
        from ray.util.metrics import Counter

        from pipelines.serving.remote_engine import RemoteEngine

        requests = Counter("armd_http_requests", "Requests answered, by HTTP status", tag_keys=("status",))
        self._app = build_app(
            RemoteEngine(engine),
            config,
            digest=digest,
            version=version,
            count=lambda status: requests.inc(1, {"status": str(status)}),
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app


def build_app(
    engine: EngineClient,
    config: DeployConfig,
    *,
    digest: str | None = None,
    version: str = "0",
    count: Callable[[int], None] = lambda status: None,
) -> FastAPI:
    """The HTTP application in front of `engine`; `digest` is the API key's, None leaves it open."""
    app = FastAPI(title="ARMD", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.add_middleware(Guard, digest=digest, version=version, count=count)
    install_error_handlers(app)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        try:
            body = await read_body(request, config)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody is there to read it
        parsed = parse_request(body, config)
        answer = await _complete(engine, parsed, config, request_id(request.headers))
        if parsed.ignored:
            answer.headers["X-ARMD-Ignored"] = ", ".join(
                quote(name[:64], safe=" ._-", errors="replace") for name in parsed.ignored[:_MAX_SHOWN]
            )
        return answer

    @app.get("/v1/models")
    async def models() -> Response:
        facts = await _within(HEALTH_S, engine.describe())
        return JSONResponse({"object": "list", "data": [model_object(facts, config)]})

    @app.get("/v1/models/{model_id:path}")
    async def model(model_id: str) -> Response:
        if model_id != config.model_name:
            raise model_not_found(model_id, config)
        return JSONResponse(model_object(await _within(HEALTH_S, engine.describe()), config))

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok", **await _within(HEALTH_S, engine.health())})

    @app.get("/live")
    async def live() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/version")
    async def server_version() -> Response:
        return JSONResponse({"version": version})

    return app


async def _within(seconds: float, answer: Any) -> dict[str, Any]:
    """`answer`, or 503 when the engine fails or does not give it in time."""
    try:
        async with asyncio.timeout(seconds):
            return await answer
    except TimeoutError:
        raise errors.unavailable(f"The engine did not answer within {seconds:g} s.") from None
    except ApiError:
        raise
    except Exception as error:
        _logger.warning("the engine does not answer: %r", error)
        raise errors.unavailable("The engine does not answer.") from None


async def _complete(engine: EngineClient, request: CompletionRequest, config: DeployConfig, name: str) -> Response:
    """Serve a request that passed every check the ingress can do; `name` is its id in the log."""
    end = asyncio.get_running_loop().time() + config.request_timeout_s
    items = engine.generate(request)
    streaming = False
    try:
        try:
            async with asyncio.timeout(min(ADMISSION_S, config.request_timeout_s)):
                admitted = await anext(items)
        except TimeoutError:
            raise errors.unavailable("No engine took the request in time.") from None
        if isinstance(admitted, ApiError):
            raise admitted
        assert isinstance(admitted, Admitted)
        answer = Answer(request, admitted, config)
        if request.stream:
            streaming = True
            events = _events(items, answer, request, config, end, name)
            return StreamingResponse(events, media_type="text/event-stream", headers=_STREAM_HEADERS)
        try:
            async with asyncio.timeout_at(end):
                deltas = [delta async for batch in items if isinstance(batch, list) for delta in batch]
        except TimeoutError:
            raise errors.generation_timeout(config.request_timeout_s) from None
        return JSONResponse(answer.whole(deltas))
    finally:
        if not streaming:
            await items.aclose()


async def _events(
    items: Items, answer: Answer, request: CompletionRequest, config: DeployConfig, end: float, name: str
) -> AsyncIterator[bytes]:
    """The events of a stream; whatever goes wrong becomes its last event, since the status has been sent."""
    pending: asyncio.Task | None = None
    now = asyncio.get_running_loop().time
    try:
        while True:
            pending = asyncio.ensure_future(anext(items, None))
            while not pending.done():
                await asyncio.wait({pending}, timeout=max(0.0, min(KEEP_ALIVE_S, end - now())))
                if now() >= end:
                    raise errors.generation_timeout(config.request_timeout_s)
                if not pending.done():
                    yield KEEP_ALIVE
            batch = pending.result()
            if not isinstance(batch, list):  # the end
                break
            for delta in batch:
                yield answer.event(delta)
        if request.include_usage:
            yield answer.usage_event()
        yield DONE
    except ApiError as error:
        yield sse_error(error)
    except Exception as error:
        _logger.error("request %s failed in its stream", name, exc_info=error)
        yield sse_error(errors.internal(name))
    finally:
        if pending is not None and not pending.done():
            pending.cancel()
            await asyncio.wait({pending})
        await items.aclose()
