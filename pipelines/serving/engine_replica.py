"""The bounded deployment: loads the model, proves that it answers, and serves requests from its batch."""

import time
from pathlib import Path
from typing import Any

import armd
from armd.config import MODEL_FILES
from pipelines.model_folder import local_model
from pipelines.serving.completions import Completions
from pipelines.serving.config import DeployConfig
from pipelines.serving.messages import Items
from pipelines.serving.protocol import CompletionRequest

_SELF_TEST_S = 4.0
"""Deadline of the token that readiness asks for."""
_RECENT_S = 5.0
"""A token that came within this time is proof enough."""
_STUCK_S = 60.0
"""A step that takes longer means that the replica is to be replaced."""
_METRICS_EVERY_S = 1.0


class EngineReplica:
    """One engine. Requests join its batch as they come; more than it has room for are refused, not queued elsewhere."""

    async def __init__(self, model_dir: str, config: DeployConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        with local_model(model_dir) as folder:
            model, tokenizer = armd.load(folder, device=device)
            fingerprint = f"armd-{armd.__version__}+ckpt:{_weights_id(folder)}"
        self._completions = Completions(model, tokenizer, config, device=device, fingerprint=fingerprint)
        self._metrics = _Metrics(config.model_name)
        await self._completions.loop.self_test(config.start_timeout_s)

    async def generate(self, request: CompletionRequest) -> Items:
        """See `Completions.generate`; Serve cancels it when the client goes, which frees its slots."""
        items = self._completions.generate(request)
        try:
            async for item in items:
                self._metrics.update(self._completions)
                yield item
        finally:
            await items.aclose()
            self._metrics.update(self._completions, now=True)

    async def describe(self) -> dict[str, Any]:
        """What /v1/models says about the model."""
        return self._completions.describe()

    async def health(self) -> dict[str, Any]:
        """Readiness: the engine wrote a token just now. Raises when it did not."""
        await self._completions.loop.self_test(_SELF_TEST_S, _RECENT_S)
        return self._completions.load()

    async def check_health(self) -> None:
        """Serve's own check: raises when this replica is to be replaced."""
        self._completions.loop.check(_STUCK_S)


def _weights_id(folder: str) -> str:
    lines = Path(folder, MODEL_FILES[-1]).read_text(encoding="utf-8").splitlines()
    return next(line[:8] for line in lines if line.endswith("  model.safetensors"))


class _Metrics:
    """What the engine does, for Ray's dashboard and Prometheus."""

    def __init__(self, model_name: str) -> None:
        from ray.util.metrics import Counter, Gauge

        def made(kind: type, name: str, text: str) -> Any:
            metric = kind(name, text, tag_keys=("model",))
            metric.set_default_tags({"model": model_name})
            return metric

        self._tokens = made(Counter, "armd_generated_tokens", "Tokens written")
        self._running = made(Gauge, "armd_running_sequences", "Sequences that hold a slot")
        self._waiting = made(Gauge, "armd_waiting_sequences", "Sequences that wait for a slot")
        self._per_forward = made(Gauge, "armd_tokens_per_forward", "Tokens a forward pass wrote, over the whole batch")
        self._seen = (0, 0)
        self._next = 0.0

    def update(self, completions: Completions, *, now: bool = False) -> None:
        """Report what changed since the last time, once a second or `now`."""
        if not now and time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _METRICS_EVERY_S
        loop = completions.loop
        tokens, steps = loop.tokens - self._seen[0], loop.steps - self._seen[1]
        self._seen = (loop.tokens, loop.steps)
        self._running.set(loop.running)
        self._waiting.set(loop.waiting)
        if tokens:
            self._tokens.inc(tokens)
        if steps:
            self._per_forward.set(tokens / steps)
