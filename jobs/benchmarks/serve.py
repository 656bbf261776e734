"""`armd bench serve`: requests over HTTP, one at a time and many at once, against the engine without HTTP."""

import json
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import tyro

from armd import SamplingParams, generate
from jobs import model, options
from jobs.benchmarks.measure import finish, spread
from pipelines.serving import launch
from pipelines.serving.config import DeployConfig

COMMAND = "armd bench serve"


@dataclass(frozen=True, kw_only=True)
class ServeBenchOptions:
    """Tokens a second and latency of the endpoint, and of the engine alone with the same requests."""

    model_dir: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL_DIR")] = tyro.MISSING
    """The export stage's directory: a folder or a URI."""
    requests: int = 16
    """Requests a round."""
    concurrency: tuple[int, ...] = (1, 8)
    """Requests under way at once."""
    tokens: int = 64
    """Tokens a request."""
    streams: int = 4
    """Streams a request."""
    rounds: int = 3
    """Times each is measured, in turns."""
    deploy: Annotated[DeployConfig, tyro.conf.arg(name="")] = field(default_factory=DeployConfig)
    """The endpoint."""


def main(arguments: Sequence[str]) -> None:
    """Run the benchmark and print its table and its line of JSON."""
    chosen = options.parse(ServeBenchOptions(), arguments, command=COMMAND, description=ServeBenchOptions.__doc__ or "")
    network, tokenizer = model.load(chosen.model_dir)
    params = [
        SamplingParams(max_tokens=chosen.tokens, n_streams=chosen.streams, seed=seed) for seed in range(chosen.requests)
    ]
    seconds: dict[str, list[float]] = {}
    latencies: dict[str, list[float]] = {}
    url = launch.start(chosen.model_dir, chosen.deploy)
    try:
        for _ in range(chosen.rounds):
            for n in chosen.concurrency:
                name = f"HTTP, {n} at once"
                since = time.perf_counter()
                with ThreadPoolExecutor(n) as pool:
                    latencies.setdefault(name, []).extend(pool.map(lambda p: _request(url, chosen, p), params))
                seconds.setdefault(name, []).append(time.perf_counter() - since)
                name = f"engine, {n} at once"
                since = time.perf_counter()
                for first in range(0, chosen.requests, n):
                    generate(network, [[tokenizer.eos_id]] * len(params[first : first + n]), params[first : first + n])
                seconds.setdefault(name, []).append(time.perf_counter() - since)
    finally:
        launch.stop(chosen.deploy.app_name)
    result: dict[str, Any] = {}
    print(f"{chosen.requests} requests of {chosen.tokens} tokens, S={chosen.streams}, n = {chosen.rounds}")
    for name, values in seconds.items():
        rate = chosen.requests * chosen.tokens / spread(values)["median"]
        result[name] = {"seconds": spread(values), "tokens_per_second": rate}
        if name in latencies:
            result[name]["latency_seconds"] = spread(latencies[name])
        print(f"{name:20}{rate:8,.0f} tokens/s")
    about = {"requests": chosen.requests, "tokens": chosen.tokens, "streams": chosen.streams, "n": chosen.rounds}
    finish({"bench": "serve", **about, "contestants": result}, torch.device("cpu"))


def _request(url: str, chosen: ServeBenchOptions, params: SamplingParams) -> float:
    """Seconds of one request; end of text is not a stop here, so that all write the same number of tokens."""
    body = {
        "model": chosen.deploy.model_name,
        "prompt": "",
        "max_tokens": params.max_tokens,
        "seed": params.seed,
        "armd": {"streams": params.n_streams},
    }
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    since = time.perf_counter()
    with urllib.request.urlopen(request, timeout=chosen.deploy.request_timeout_s) as response:
        response.read()
    return time.perf_counter() - since
