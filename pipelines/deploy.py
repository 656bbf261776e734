"""Deploy: the exported model behind its HTTP endpoint, proved by one real request."""

import time
from collections.abc import Mapping
from typing import Any

from pipelines import runtime
from pipelines.errors import UserError
from pipelines.manifest import read_manifest, write_manifest
from pipelines.progress import Progress, silent
from pipelines.serving.config import DeployConfig

__all__ = ["DeployConfig", "run", "still_served"]

PROMPT = "The"
MAX_TOKENS = 32


def run(
    config: DeployConfig, inputs: Mapping[str, str], output_dir: str, progress: Progress = silent
) -> dict[str, Any]:
    """Serve the model of `inputs["export"]` and ask it for a completion over HTTP.

    On a cluster that outlives this command the endpoint stays up; a private cluster's is taken down again, and
    `armd serve` holds one for as long as it is wanted.

    Returns:
        The manifest: url (without a path), model_dir, request and response (the bodies), status (of HTTP),
        fingerprint, start_seconds, request_seconds, stays_up.

    Raises:
        UserError: the endpoint did not start, or its answer is not 200.
    """
    from pipelines.serving import launch

    started = time.time()
    read_manifest(inputs["export"])
    stays_up = runtime.on_cluster()
    url = launch.start(inputs["export"], config, lambda what: progress.update(0, 1, "endpoint", what))
    proved = False
    try:
        start_seconds = time.time() - started
        progress.update(0, 1, "endpoint", "asking it over HTTP")
        proof = _prove(url, config)
        proved = True
    finally:
        if not (stays_up and proved):
            launch.stop(config.app_name)
    progress.update(1, 1, "endpoint", "answered and stays up" if stays_up else "answered")
    body = {
        "url": url,
        "model_dir": inputs["export"],
        "start_seconds": round(start_seconds, 3),
        "stays_up": stays_up,
        **proof,
    }
    return write_manifest(output_dir, "deploy", body, started)


def still_served(directory: str) -> bool:
    """True when the endpoint of a finished stage still answers, with the model it was deployed with."""
    from pipelines.serving import launch

    manifest = read_manifest(directory)
    try:
        status, body = launch.request("GET", f"{manifest['url']}/v1/models", timeout_s=10.0)
    except OSError:
        return False
    served = [model["armd"]["system_fingerprint"] for model in body.get("data", [])] if status == 200 else []
    return any(str(manifest["fingerprint"]).startswith(one + "+") for one in served)


def _prove(url: str, config: DeployConfig) -> dict[str, Any]:
    """One real request: what was asked, what came back, how long it took."""
    from pipelines.serving import launch

    try:
        _, models = launch.request("GET", f"{url}/v1/models")
        room = models["data"][0]["max_model_len"] // 2
        request = {"model": config.model_name, "prompt": PROMPT, "max_tokens": min(MAX_TOKENS, room), "seed": 0}
        asked = time.time()
        status, response = launch.request("POST", f"{url}/v1/completions", request, config.request_timeout_s)
    except OSError as error:
        raise UserError(f"the endpoint {url} does not answer: {error}", "run the same command again") from error
    if status != 200:
        message = response.get("error", {}).get("message", response)
        raise UserError(f"the endpoint {url} answered {status}: {message}", "look at Ray's logs of the application")
    return {
        "request": request,
        "response": response,
        "status": status,
        "fingerprint": response["system_fingerprint"],
        "request_seconds": round(time.time() - asked, 3),
    }
