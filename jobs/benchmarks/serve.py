"""`armd bench serve`: requests over HTTP, one at a time and many at once, against the engine without HTTP."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro

from armd import SamplingParams, generate
from jobs import model, options
from jobs.benchmarks.measure import finish, spread
from pipelines.errors import UserError
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
    """Tokens a request, at most: a text may end earlier."""
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
    stop_ids = (tokenizer.eos_id,)  # the server stops there, so the engine does
    params = [
        SamplingParams(max_tokens=chosen.tokens, n_streams=chosen.streams, seed=seed, stop_ids=stop_ids)
        for seed in range(chosen.requests)
    ]
    seconds: dict[str, list[float]] = {}
    tokens: dict[str, int] = {}
    latencies: dict[str, list[float]] = {}
    url = launch.start(chosen.model_dir, chosen.deploy)
    try:
        for _ in range(chosen.rounds):
            for n in chosen.concurrency:
                name = f"HTTP, {n} at once"
                since = time.perf_counter()
                with ThreadPoolExecutor(n) as pool:
                    answers = list(pool.map(lambda one: _request(url, chosen, one), params))
                seconds.setdefault(name, []).append(time.perf_counter() - since)
                latencies.setdefault(name, []).extend(latency for latency, _ in answers)
                tokens[name] = tokens.get(name, 0) + sum(written for _, written in answers)
                name = f"engine, {n} at once"
                since = time.perf_counter()
                written = 0
                for first in range(0, chosen.requests, n):
                    some = params[first : first + n]
                    texts = generate(network, [[tokenizer.eos_id]] * len(some), some)
                    written += sum(len(text.tokens) for text in texts)
                seconds.setdefault(name, []).append(time.perf_counter() - since)
                tokens[name] = tokens.get(name, 0) + written
    finally:
        launch.stop(chosen.deploy.app_name)
    result: dict[str, Any] = {}
    print(f"{chosen.requests} requests of up to {chosen.tokens} tokens, S={chosen.streams}, n = {chosen.rounds}")
    for name, values in seconds.items():
        a_round = tokens[name] / chosen.rounds
        rate = a_round / spread(values)["median"]
        result[name] = {"seconds": spread(values), "tokens": a_round, "tokens_per_second": rate}
        if name in latencies:
            result[name]["latency_seconds"] = spread(latencies[name])
        print(f"{name:20}{rate:8,.0f} tokens/s")
    about = {"requests": chosen.requests, "max_tokens": chosen.tokens, "streams": chosen.streams, "n": chosen.rounds}
    finish({"bench": "serve", **about, "contestants": result}, network.embedding.weight.device)


def _request(url: str, chosen: ServeBenchOptions, params: SamplingParams) -> tuple[float, int]:
    """Seconds and tokens of one request."""
    body = {
        "model": chosen.deploy.model_name,
        "prompt": "",
        "max_tokens": params.max_tokens,
        "seed": params.seed,
        "armd": {"streams": params.n_streams},
    }
    since = time.perf_counter()
    status, answer = launch.request("POST", f"{url}/v1/completions", body, chosen.deploy.request_timeout_s)
    if status != 200:
        raise UserError(
            f"the endpoint answered {status}: {answer.get('error', {}).get('message', answer)}",
            "ask for fewer at once, or give the endpoint more room: --max-slots, --max-queued",
        )
    return time.perf_counter() - since, int(answer["usage"]["completion_tokens"])
