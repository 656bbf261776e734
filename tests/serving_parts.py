"""A served model for tests: a random one with a small tokenizer, in this process or saved for Serve."""

import asyncio
import threading
from collections.abc import AsyncIterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import httpx
import torch

import armd
from pipelines.serving.completions import Completions
from pipelines.serving.config import DeployConfig
from pipelines.serving.ingress import build_app

TEXT = "the quick brown fox jumps over the lazy dog, and 7 wizards jinxed 42 gnomes; "


def tokenizer() -> armd.Tokenizer:
    """Byte-level, a few merges: most characters beyond ASCII are several tokens."""
    return armd.Tokenizer.train([TEXT * 4], 300)


def model(vocab_size: int, *, max_length: int = 256, seed: int = 0) -> armd.ARMD:
    """Random weights, large enough for greedy texts that do not repeat one token."""
    shape = {"n_layers": 2, "n_two_stream_layers": 1, "d_model": 32, "n_heads": 2, "d_prefix": 8}
    config = armd.ModelConfig(**shape, vocab_size=vocab_size, max_length=max_length)
    made = armd.ARMD(config, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" not in name:
                parameter.mul_(4.0)
    return made.eval()


def save(folder: Path, **options: int) -> Path:
    """A model as the export stage leaves it."""
    words = tokenizer()
    armd.save(folder, model(words.vocab_size, **options), words)
    return folder


class LocalEngine:
    """The engine without Ray in between."""

    def __init__(self, completions: Completions) -> None:
        self.completions = completions

    def generate(self, request: Any) -> AsyncIterator[Any]:
        return self.completions.generate(request)

    async def describe(self) -> dict[str, Any]:
        return self.completions.describe()

    async def health(self) -> dict[str, Any]:
        await self.completions.loop.self_test(4.0)
        return self.completions.load()


class Server:
    """The HTTP application in this process, its event loop in a thread of its own."""

    def __init__(self, config: DeployConfig, engine: Any = None, **options: Any) -> None:
        self.tokenizer = tokenizer()
        self.model = model(self.tokenizer.vocab_size)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.engine = engine or LocalEngine(self.run(self._completions(config)))
        self.app = build_app(self.engine, config, version="test", **options)

    async def _completions(self, config: DeployConfig) -> Completions:
        return Completions(self.model, self.tokenizer, config, device="cpu", fingerprint="armd-test")

    def submit(self, coroutine: Any) -> "Future[Any]":
        """Start `coroutine` in the server's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, coroutine: Any) -> Any:
        """The result of `coroutine`, run in the server's loop."""
        return self.submit(coroutine).result(60)

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """One request, answered whole."""

        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(app=self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
                return await client.request(method, path, **options)

        return self.run(send())

    def complete(self, **body: Any) -> httpx.Response:
        """POST /v1/completions."""
        return self.request("POST", "/v1/completions", json=body)

    def close(self) -> None:
        """End the loop's thread."""

        async def cancel_all() -> None:
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self.run(cancel_all())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()
