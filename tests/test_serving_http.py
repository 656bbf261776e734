"""The HTTP application and the engine's loop in this process, without Ray: every answer but the proxy's own."""

import asyncio
import dataclasses
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import pytest
from serving_parts import Server

import armd
from pipelines.serving import ingress
from pipelines.serving.config import DeployConfig
from pipelines.serving.engine_loop import EngineFailed
from pipelines.serving.http_guard import key_digest
from pipelines.serving.messages import Admitted, Delta

CONFIG = DeployConfig(max_slots=4, max_queued=4, max_choices=8, max_body_bytes=20_000, body_timeout_s=0.3)
LONG = {"prompt": "a", "max_tokens": 250, "temperature": 0, "armd": {"streams": 1}}
"""About 250 steps."""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server(CONFIG)
    yield server
    server.close()


@pytest.fixture
def made() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def make(*arguments: Any, **options: Any) -> Server:
        servers.append(Server(*arguments, **options))
        return servers[-1]

    yield make
    for one in servers:
        one.close()


def error_of(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    return error


def expected(server: Server, prompt: str, max_tokens: int, streams: int, **sampling: Any) -> armd.Completion:
    params = armd.SamplingParams(
        max_tokens=max_tokens, n_streams=streams, stop_ids=(server.tokenizer.eos_id,), **{"temperature": 0, **sampling}
    )
    ids = server.tokenizer.encode(prompt) or [server.tokenizer.eos_id]
    return armd.generate(server.model, [ids], params)[0]


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1] if line.startswith("data: ")]


@pytest.mark.parametrize("streams", [1, 4])
def test_an_answer_is_the_librarys_own(server: Server, streams: int) -> None:
    body = server.complete(prompt="the quick", max_tokens=30, temperature=0, armd={"streams": streams}).json()
    own = expected(server, "the quick", 30, streams)
    (choice,) = body["choices"]
    assert choice["text"] == server.tokenizer.decode(own.tokens)
    assert choice["finish_reason"] == own.finish_reason
    prompt_tokens = len(server.tokenizer.encode("the quick"))
    assert body["usage"] == {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": len(own.tokens),
        "total_tokens": prompt_tokens + len(own.tokens),
    }
    assert (body["armd"]["streams"], body["armd"]["order"]) == (streams, "ltr" if streams == 1 else "strided")
    assert body["armd"]["step_of_token"] == own.step_of_token
    assert body["armd"]["forward_passes"] == own.steps
    assert body["armd"]["tokens_per_forward"] == pytest.approx(len(own.tokens) / own.steps, abs=1e-4)
    assert set(body["armd"]["timings"]) == {"queue_ms", "prefill_ms", "decode_ms"}
    assert body["system_fingerprint"] == f"armd-test+S{streams}"
    assert (body["object"], body["model"]) == ("text_completion", "armd")


def test_token_ids_and_text_give_the_same(server: Server) -> None:
    ids = server.tokenizer.encode("the lazy")
    for prompt in (ids, [ids], ["the lazy"]):
        body = server.complete(prompt=prompt, max_tokens=8, temperature=0).json()
        assert (
            body["choices"][0]["text"]
            == server.complete(prompt="the lazy", max_tokens=8, temperature=0).json()["choices"][0]["text"]
        )


def test_an_empty_prompt_is_the_start_of_a_document(server: Server) -> None:
    for prompt in ("", [], [""], None):
        body = server.complete(prompt=prompt, max_tokens=8, temperature=0).json()
        assert body["usage"]["prompt_tokens"] == 1
        assert body["choices"][0]["text"] == server.tokenizer.decode(expected(server, "", 8, 4).tokens)


def test_choices_are_ordered_by_prompt_and_k(server: Server) -> None:
    body = server.complete(prompt=["the", "a fox"], n=2, max_tokens=12, seed=5).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    texts = [choice["text"] for choice in body["choices"]]
    assert len(set(texts)) == 4
    assert texts[0] == server.complete(prompt="the", max_tokens=12, seed=5).json()["choices"][0]["text"]
    assert texts[2] == server.complete(prompt="a fox", max_tokens=12, seed=5).json()["choices"][0]["text"]
    assert texts[:2] == [c["text"] for c in server.complete(prompt="the", n=2, max_tokens=12, seed=5).json()["choices"]]
    assert body["armd"] == {"streams": 4, "order": "strided"}
    steps = [choice["armd"]["step_of_token"] for choice in body["choices"]]
    assert body["usage"]["completion_tokens"] == sum(map(len, steps)) > 12


def test_verified_answers_are_the_engines_and_say_what_was_rejected(server: Server) -> None:
    request = {"prompt": "the", "max_tokens": 40, "seed": 1, "armd": {"streams": 4, "verify": "exact"}}
    body = server.complete(**request).json()
    eos = server.tokenizer.eos_id
    params = armd.SamplingParams(max_tokens=40, n_streams=4, mode="exact", seed=1, stop_ids=(eos,))
    own = armd.generate(server.model, [server.tokenizer.encode("the")], params)[0]
    assert body["choices"][0]["text"] == server.tokenizer.decode(own.tokens)
    told = body["armd"]
    assert (told["verified"], told["accepted"], told["rejected"]) == (True, own.accepted, own.rejected)
    assert (told["forward_passes"], told["step_of_token"]) == (own.steps, own.step_of_token)
    details = {"accepted_prediction_tokens": own.accepted, "rejected_prediction_tokens": own.rejected}
    assert body["usage"]["completion_tokens_details"] == details
    assert body["system_fingerprint"].endswith("+S4+exact")
    *_, last, usage = events_of(server.complete(**request, stream=True, stream_options={"include_usage": True}))
    assert last["armd"]["rejected"] == own.rejected
    assert usage["usage"] == body["usage"]
    plain = server.complete(**{**request, "armd": {"verify": "none"}}).json()
    assert "verified" not in plain["armd"]
    assert "completion_tokens_details" not in plain["usage"]


def test_min_tokens_puts_the_end_off(server: Server) -> None:
    def shortest(least: int) -> int:
        request = {"prompt": "the", "max_tokens": 60, "n": 8, "temperature": 3.0, "min_tokens": least}
        answers = [server.complete(**request, seed=seed).json() for seed in range(4)]
        return min(len(one["armd"]["step_of_token"]) for answer in answers for one in answer["choices"])

    assert shortest(0) < 30 <= shortest(30)


def test_without_a_seed_two_answers_differ(server: Server) -> None:
    texts = {server.complete(prompt="the", max_tokens=20).json()["choices"][0]["text"] for _ in range(3)}
    assert len(texts) == 3


@pytest.mark.parametrize("streams", [1, 4])
def test_a_stream_says_the_same_as_an_answer(server: Server, streams: int) -> None:
    request = {"prompt": ["the quick", "b"], "n": 2, "max_tokens": 40, "seed": 3, "armd": {"streams": streams}}
    whole = server.complete(**request).json()
    response = server.complete(**request, stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    *chunks, last = events_of(response)
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert len({chunk["id"] for chunk in [*chunks, last]}) == 1
    for choice in whole["choices"]:
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == choice["index"]]
        assert "".join(one["text"] for one in own) == choice["text"]
        assert [one["finish_reason"] for one in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1]["finish_reason"] == choice["finish_reason"]
        assert own[-1]["armd"]["step_of_token"] == choice["armd"]["step_of_token"]
        assert len(own) > 3  # it does stream


def test_a_stop_string_ends_the_text_and_frees_the_slot(server: Server) -> None:
    whole = server.complete(**LONG).json()["choices"][0]["text"]
    stop = whole[20:24]
    before = server.engine.completions.load()
    body = server.complete(**LONG, stop=["never there", stop]).json()
    (choice,) = body["choices"]
    assert choice["text"] == whole[: whole.find(stop)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    assert body["usage"]["completion_tokens"] < 200
    after = server.engine.completions.load()
    assert after["forward_passes"] - before["forward_passes"] < 200
    assert after["running"] == 0
    streamed = events_of(server.complete(**LONG, stop=stop, stream=True))
    assert "".join(chunk["choices"][0]["text"] for chunk in streamed) == choice["text"]
    assert streamed[-1]["choices"][0]["stop_reason"] == stop


def test_a_stop_string_frees_its_slot_while_others_go_on(server: Server) -> None:
    first, second = (
        choice["text"] for choice in server.complete(**{**LONG, "prompt": ["a", "7 wizards"]}).json()["choices"]
    )
    stop = next(first[i : i + 6] for i in range(20, len(first)) if first[i : i + 6] not in second)
    before = server.engine.completions.load()["tokens"]
    body = server.complete(**{**LONG, "prompt": ["a", "7 wizards"]}, stop=stop).json()
    assert [choice["finish_reason"] for choice in body["choices"]] == ["stop", "length"]
    assert body["choices"][1]["text"] == second
    written = server.engine.completions.load()["tokens"] - before
    assert written - body["usage"]["completion_tokens"] <= 2


def test_parallel_requests_equal_their_solo_answers(server: Server) -> None:
    prompts = ["the", "quick brown", "a", "7 wizards", "42", "fox", "over", "lazy dog"]
    bodies = [{"prompt": prompt, "max_tokens": 30, "temperature": 0} for prompt in prompts]

    async def all_at_once() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app=server.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))

    before = server.engine.completions.load()["forward_passes"]
    together = [response.json()["choices"][0]["text"] for response in server.run(all_at_once())]
    passes = server.engine.completions.load()["forward_passes"] - before
    assert together == [server.tokenizer.decode(expected(server, prompt, 30, 4).tokens) for prompt in prompts]
    assert len(set(together)) == len(prompts)
    assert passes < 8 * 12 / 2  # four slots: they shared forward passes


def test_a_full_queue_is_429_and_recovers(server: Server) -> None:
    async def scene() -> tuple[httpx.Response, httpx.Response]:
        transport = httpx.ASGITransport(app=server.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            filling = asyncio.ensure_future(client.post("/v1/completions", json={**LONG, "n": 8}))
            while server.engine.completions.load()["waiting"] < 4:
                await asyncio.sleep(0.005)
            refused = await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
            health = await client.get("/health")
            assert health.status_code == 200  # busy is not ill
            return refused, await filling

    refused, filled = server.run(scene())
    error = error_of(refused, 429, "queue_full")
    assert error["type"] == "rate_limit_error"
    assert 1 <= int(refused.headers["retry-after"]) <= 5
    assert filled.status_code == 200
    assert server.complete(prompt="a", max_tokens=1).status_code == 200


def test_static_shapes_change_no_text(made: Callable[..., Server], server: Server) -> None:
    static = made(dataclasses.replace(CONFIG, static_shapes=True))
    assert static.engine.completions.loop._engine.decoder.static_shapes
    body = {"prompt": "the quick", "max_tokens": 20, "seed": 5}
    texts = [one.complete(**body).json()["choices"][0]["text"] for one in (server, static)]
    assert texts[0] == texts[1]


def test_a_client_that_goes_frees_its_slots_within_a_step(server: Server) -> None:
    from pipelines.serving.protocol import parse_request

    completions = server.engine.completions

    async def scene() -> tuple[dict[str, int], dict[str, int]]:
        request = parse_request(json.dumps({**LONG, "n": 6, "stream": True}).encode(), CONFIG)
        items = completions.generate(request)
        assert isinstance(await anext(items), Admitted)
        await anext(items)
        busy = completions.load()
        await items.aclose()
        before = completions.loop.steps
        while completions.loop._tickets:
            await asyncio.sleep(0.001)
        assert completions.loop.steps - before <= 1
        return busy, completions.load()

    busy, after = server.run(scene())
    assert (busy["running"], busy["waiting"]) == (4, 2)
    assert (after["running"], after["waiting"]) == (0, 0)
    assert after["cancelled"] - busy["cancelled"] == 6


def test_models_health_version(server: Server) -> None:
    models = server.request("GET", "/v1/models").json()
    (model,) = models["data"]
    assert model["root"] == "armd"
    assert (models["object"], model["id"], model["max_model_len"]) == ("list", "armd", 256)
    assert model["armd"]["streams"] == {"min": 1, "max": 32, "default": 4}
    assert server.request("GET", "/v1/models/armd").json() == model
    assert server.request("GET", "/health").json()["status"] == "ok"
    assert server.request("GET", "/live").json() == {"status": "ok"}
    version = server.request("GET", "/version")
    assert version.json() == {"version": "test"}
    assert version.headers["x-armd-version"] == "test"


@pytest.mark.parametrize("path", ["/v1/models/other", "/v1/models/%2e%2e%2f", "/v1/models/..%2farmd"])
def test_an_unknown_model_is_404(server: Server, path: str) -> None:
    error_of(server.request("GET", path), 404, "model_not_found")


def test_unknown_paths_and_methods(server: Server) -> None:
    error_of(server.request("GET", "/nothing/here"), 404, "not_found")
    error_of(server.request("GET", "/v1/models/"), 404, "model_not_found")
    response = server.request("GET", "/v1/completions")
    error_of(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_a_body_that_is_not_called_json_is_415(server: Server, content_type: str | None) -> None:
    headers = {"content-type": content_type} if content_type else {}
    response = server.request("POST", "/v1/completions", content=b"{}", headers=headers)
    error_of(response, 415, "unsupported_media_type")


def test_a_large_body_is_413(server: Server) -> None:
    error_of(server.complete(prompt="a" * 20_000), 413, "request_too_large")

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(30):
            yield b" " * 1000

    headers = {"content-type": "application/json"}
    response = server.request("POST", "/v1/completions", content=pieces(), headers=headers)  # no content-length
    error_of(response, 413, "request_too_large")


def test_a_body_that_does_not_come_is_408(server: Server) -> None:
    async def stalls() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(5)

    headers = {"content-type": "application/json"}
    response = server.request("POST", "/v1/completions", content=stalls(), headers=headers)
    error_of(response, 408, "request_timeout")
    assert response.headers["x-should-retry"] == "false"


def test_what_only_the_model_knows_is_checked_too(server: Server) -> None:
    error = error_of(server.complete(prompt="the", max_tokens=256), 400, "context_length_exceeded")
    assert error["param"] == "max_tokens"
    error_of(server.complete(prompt=[1] * 300, max_tokens=1), 400, "context_length_exceeded")
    error_of(server.complete(prompt=[server.tokenizer.vocab_size], max_tokens=1), 400, "token_out_of_range")
    error_of(server.complete(prompt=[1, 10**30], max_tokens=1), 400, "token_out_of_range")
    streamed = server.complete(prompt="the", max_tokens=256, stream=True)  # before the first byte: a real status
    error_of(streamed, 400, "context_length_exceeded")


def test_ignored_fields_are_listed_in_a_header(server: Server) -> None:
    response = server.complete(prompt="a", max_tokens=1, **{"session_id": 1, "sch\u00f6n\r\nx": 2})
    assert response.status_code == 200
    assert response.headers["x-armd-ignored"] == "sch%C3%B6n%0D%0Ax, session_id"
    assert "x-armd-ignored" not in server.complete(prompt="a", max_tokens=1).headers


def test_the_key_covers_everything_but_live(made: Callable[..., Server]) -> None:
    server = made(CONFIG, digest=key_digest("s3cret"))
    for method, path in [("GET", "/v1/models"), ("GET", "/health"), ("POST", "/v1/completions"), ("GET", "/none")]:
        error_of(server.request(method, path), 401, "missing_api_key")
        empty = server.request(method, path, headers={"authorization": "Bearer "})
        assert error_of(empty, 401, "missing_api_key")["type"] == "authentication_error"
        wrong = server.request(method, path, headers={"authorization": "Bearer s3cre"})
        error_of(wrong, 401, "invalid_api_key")
    assert server.request("GET", "/live").status_code == 200
    assert server.request("GET", "/v1/models", headers={"authorization": "Bearer s3cret"}).status_code == 200


def test_answers_are_counted_by_status(made: Callable[..., Server]) -> None:
    counted: list[int] = []
    server = made(CONFIG, count=counted.append)
    server.request("GET", "/live")
    server.request("GET", "/none")
    server.complete(prompt="a", n=0)
    assert counted == [200, 404, 400]


def test_the_deadline_is_504_and_frees_the_slots(made: Callable[..., Server]) -> None:
    server = made(DeployConfig(request_timeout_s=0.1))
    response = server.complete(**LONG)
    error = error_of(response, 504, "generation_timeout")
    assert error["type"] == "timeout_error"
    assert response.headers["x-should-retry"] == "false"
    streamed = server.complete(**LONG, stream=True)
    assert streamed.status_code == 200
    assert events_of(streamed)[-1]["error"]["code"] == "generation_timeout"
    time.sleep(0.1)
    assert server.engine.completions.load()["running"] == 0


class Scripted:
    """An engine that does what a test wants to see handled."""

    def __init__(self, *steps: Any) -> None:
        self._steps = steps

    async def generate(self, request: Any) -> AsyncIterator[Any]:
        for step in self._steps:
            if isinstance(step, float):
                await asyncio.sleep(step)
            elif isinstance(step, Exception):
                raise step
            else:
                yield step

    async def describe(self) -> dict[str, Any]:
        raise RuntimeError("gone")

    async def health(self) -> dict[str, Any]:
        await asyncio.sleep(60)
        return {}


ADMITTED = Admitted(prompt_tokens=1, fingerprint="f")


def test_silence_is_filled_with_comments(made: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingress, "KEEP_ALIVE_S", 0.05)
    server = made(CONFIG, Scripted(ADMITTED, 0.2, [Delta(choice=0, text="x")]))
    lines = server.complete(prompt="a", stream=True).text.split("\n\n")
    assert 2 <= lines.count(": keep-alive") <= 4
    assert json.loads(lines[-3].removeprefix("data: "))["choices"][0]["text"] == "x"


def test_a_failure_in_a_stream_is_its_last_event(made: Callable[..., Server]) -> None:
    server = made(CONFIG, Scripted(ADMITTED, [Delta(choice=0, text="x")], ValueError("secret path /root")))
    response = server.complete(prompt="a", stream=True)
    first, last = events_of(response)
    assert first["choices"][0]["text"] == "x"
    assert last["error"]["code"] == "internal_error"
    assert "secret" not in response.text


def test_a_failure_before_the_first_byte_has_its_status(
    made: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    response = made(CONFIG, Scripted(ValueError("secret"))).complete(prompt="a", stream=True)
    error_of(response, 500, "internal_error")
    assert "secret" not in response.text
    assert response.headers["x-armd-version"] == "test"
    monkeypatch.setattr(ingress, "ADMISSION_S", 0.05)
    response = made(CONFIG, Scripted(1.0)).complete(prompt="a")
    error_of(response, 503, "engine_unavailable")
    assert response.headers["retry-after"] == "2"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("given", "kept"),
    [("my.id-7", True), ("x" * 128, True), ("x" * 129, False), ("", False), ("a b", False), ("<b>\u00e9", False)],
)
def test_only_a_plain_request_id_is_taken_from_the_caller(
    made: Callable[..., Server],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    given: str,
    kept: bool,
    stream: bool,
) -> None:
    # Ray, once started in this process, keeps its loggers' records from the root's handlers.
    monkeypatch.setattr(logging.getLogger("ray.serve"), "handlers", [caplog.handler])
    first = [ADMITTED] if stream else []
    server = made(CONFIG, Scripted(*first, ValueError("oops")))
    body = {"prompt": "a", "stream": stream}
    headers = {"x-request-id": given.encode("utf-8")}
    text = server.request("POST", "/v1/completions", json=body, headers=headers).text
    own = re.search(r"[0-9a-f]{32}", text)
    assert (f" {given}" in text) if kept else (own and (not given or given not in text))
    shown = given if kept else own.group() if own else ""
    assert f"request {shown} failed" in caplog.text


def test_health_is_503_when_the_engine_does_not_answer(
    made: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingress, "HEALTH_S", 0.05)
    server = made(CONFIG, Scripted())
    error_of(server.request("GET", "/health"), 503, "engine_unavailable")
    error_of(server.request("GET", "/v1/models"), 503, "engine_unavailable")
    assert server.request("GET", "/live").status_code == 200


def test_a_failed_step_fails_the_requests_and_the_health(made: Callable[..., Server]) -> None:
    server = made(CONFIG)
    loop = server.engine.completions.loop
    assert server.request("GET", "/health").status_code == 200
    loop.check(60.0)

    def broken() -> None:
        raise RuntimeError("out of memory")

    server.engine.completions.loop._engine.step = broken
    error_of(server.complete(prompt="a", max_tokens=4), 500, "internal_error")
    error_of(server.complete(prompt="a", max_tokens=4), 503, "engine_unavailable")
    error_of(server.request("GET", "/health"), 503, "engine_unavailable")
    with pytest.raises(EngineFailed, match="out of memory"):
        loop.check(60.0)


def test_a_stuck_step_is_noticed(made: Callable[..., Server]) -> None:
    server = made(CONFIG)
    loop = server.engine.completions.loop
    step = loop._engine.step
    loop._engine.step = lambda: (time.sleep(0.5), step())[1]
    waiting = server.submit(loop.self_test(0.05))
    with pytest.raises(TimeoutError):
        waiting.result(5)
    with pytest.raises(EngineFailed, match="one step"):
        loop.check(0.04)
    time.sleep(0.6)
    loop.check(0.04)
    assert server.engine.completions.load()["running"] == 0
