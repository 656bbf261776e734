"""The engine behind a Serve handle, its absence and overload told in the protocol's own errors."""

from collections.abc import Awaitable
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from pipelines.serving import errors
from pipelines.serving.messages import Items
from pipelines.serving.protocol import CompletionRequest

_GONE = (RayActorError, DeploymentUnavailableError, ReplicaUnavailableError)


class RemoteEngine:
    """`EngineClient` for the engine deployment."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle
        self._stream = handle.options(stream=True)

    async def generate(self, request: CompletionRequest) -> Items:
        """Relay what an engine says; closing this iterator cancels the call, and with it the work."""
        items = self._stream.generate.remote(request)
        finished = False
        try:
            async for item in items:
                yield item
            finished = True
        except BackPressureError:
            raise errors.queue_full("All engines are full.") from None
        except _GONE:
            raise errors.unavailable("The engine went away; it is being replaced.") from None
        finally:
            if not finished:
                items.cancel()

    async def describe(self) -> dict[str, Any]:
        """What /v1/models says about the model."""
        return await _translated(self._handle.describe.remote())

    async def health(self) -> dict[str, Any]:
        """How busy an engine is; raises when it does not answer."""
        return await _translated(self._handle.health.remote())


async def _translated(answer: Awaitable[Any]) -> Any:
    try:
        return await answer
    except BackPressureError:
        raise errors.queue_full("All engines are full.") from None
    except _GONE:
        raise errors.unavailable("The engine is not there; it is being replaced.") from None
