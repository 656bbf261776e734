"""The served model through Ray Serve's real proxy: clients as people use them, and clients that misbehave."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import serving_parts

import armd
from pipelines.errors import UserError
from pipelines.serving import launch
from pipelines.serving.config import DeployConfig
from pipelines.serving.preflight import KEY_VARIABLE

LONG = {"prompt": "a", "max_tokens": 1000, "temperature": 0, "armd": {"streams": 1}}
"""About a thousand steps: seconds."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return serving_parts.save(tmp_path_factory.mktemp("served"), max_length=1024)


@pytest.fixture(scope="module")
def config() -> DeployConfig:
    return DeployConfig(port=free_port(), max_slots=4, max_queued=4, max_choices=8, body_timeout_s=1.0)


@pytest.fixture(scope="module")
def url(ray_cluster: None, model_dir: Path, config: DeployConfig) -> Iterator[str]:
    yield launch.start(str(model_dir), config)
    launch.stop(config.app_name)


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def test_an_open_host_needs_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    with pytest.raises(UserError, match=r"0\.0\.0\.0") as caught:
        launch.start(str(tmp_path), DeployConfig(host="0.0.0.0"))
    assert KEY_VARIABLE in caught.value.fix


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json is missing"):
        launch.start(str(tmp_path), DeployConfig())


def test_a_port_in_use_is_named_with_another(model_dir: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        start = time.monotonic()
        with pytest.raises(UserError, match=f"port {port}") as caught:
            launch.start(str(model_dir), DeployConfig(port=port))
    assert f"--deploy.port {port + 1}" in caught.value.fix
    assert time.monotonic() - start < 10


@pytest.mark.ray
def test_openai_client(client: openai.OpenAI, model_dir: Path) -> None:
    model, tokenizer = armd.load(model_dir)
    params = armd.SamplingParams(max_tokens=24, temperature=0, stop_ids=(tokenizer.eos_id,))
    own = armd.generate(model, [tokenizer.encode("the quick")], params)[0]
    body = client.completions.create(model="armd", prompt="the quick", max_tokens=24, temperature=0)
    assert body.choices[0].text == tokenizer.decode(own.tokens)
    assert body.choices[0].finish_reason == own.finish_reason
    assert body.usage is not None
    assert body.usage.completion_tokens == len(own.tokens)
    assert body.model_extra is not None
    assert body.model_extra["armd"]["step_of_token"] == own.step_of_token
    weights = next(line[:8] for line in (model_dir / "SHA256SUMS").read_text().splitlines() if "safetensors" in line)
    assert body.system_fingerprint == f"armd-{armd.__version__}+ckpt:{weights}+S4"
    assert body._request_id
    extra = {"armd": {"streams": 1}}
    one = client.completions.create(model="armd", prompt="the quick", max_tokens=8, extra_body=extra)
    assert one.model_extra is not None
    assert one.model_extra["armd"]["forward_passes"] == 8
    assert [model.id for model in client.models.list()] == ["armd"]
    assert client.models.retrieve("armd").model_extra["max_model_len"] == 1024  # type: ignore[index]


@pytest.mark.ray
def test_openai_stream(client: openai.OpenAI) -> None:
    request: dict[str, Any] = {"model": "armd", "prompt": "fox", "max_tokens": 40, "seed": 7}
    whole = client.completions.create(**request)
    chunks = list(client.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    assert len(chunks) > 5


@pytest.mark.ray
def test_a_stream_arrives_while_it_is_written(url: str) -> None:
    arrivals = []
    with httpx.stream("POST", f"{url}/v1/completions", json={**LONG, "stream": True}, timeout=60) as response:
        for line in response.iter_lines():
            if line:
                arrivals.append(time.monotonic())
    assert arrivals[0] < arrivals[-1] - 0.5


@pytest.mark.ray
def test_openai_errors_have_their_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-4", prompt="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="armd", prompt="a", suffix="b")
    assert (bad.value.code, bad.value.param) == ("unsupported_parameter", "suffix")
    with pytest.raises(openai.BadRequestError, match="context of 1024"):
        client.completions.create(model="armd", prompt="a", max_tokens=1024, stream=True)


@pytest.mark.ray
def test_parallel_requests_equal_their_solo_answers(client: openai.OpenAI, model_dir: Path) -> None:
    model, tokenizer = armd.load(model_dir)
    prompts = ["the", "quick brown", "a", "7 wizards", "42", "fox", "over", "lazy dog"]

    def ask(prompt: str) -> str:
        body = client.completions.create(model="armd", prompt=prompt, max_tokens=30, temperature=0)
        return body.choices[0].text

    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(ask, prompts))
    params = armd.SamplingParams(max_tokens=30, temperature=0, stop_ids=(tokenizer.eos_id,))
    alone = [armd.generate(model, [tokenizer.encode(prompt)], params)[0] for prompt in prompts]
    assert together == [tokenizer.decode(one.tokens) for one in alone]


def health(url: str) -> dict[str, Any]:
    status, body = launch.request("GET", f"{url}/health")
    assert status == 200
    return body


def wait_until_free(url: str, seconds: float) -> dict[str, Any]:
    end = time.monotonic() + seconds
    while (state := health(url))["running"] and time.monotonic() < end:
        time.sleep(0.02)
    return state


@pytest.mark.ray
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_slots(url: str, stream: bool) -> None:
    before = health(url)
    body = json.dumps({**LONG, "n": 4, "stream": stream})
    with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=10) as connection:
        connection.sendall(post(body.encode()))
        while health(url)["running"] < 4:
            time.sleep(0.01)
        if stream:
            assert b"200 OK" in connection.recv(4096)
    state = wait_until_free(url, 2.0)
    assert (state["running"], state["waiting"]) == (0, 0)
    assert state["cancelled"] - before["cancelled"] == 4
    assert state["forward_passes"] - before["forward_passes"] < 900


@pytest.mark.ray
def test_a_full_queue_is_429(url: str) -> None:
    filling = threading.Thread(target=launch.request, args=("POST", f"{url}/v1/completions", {**LONG, "n": 8}))
    filling.start()
    while health(url)["waiting"] < 4:
        time.sleep(0.01)
    refused = httpx.post(f"{url}/v1/completions", json={"prompt": "a"})
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "queue_full"
    assert 1 <= int(refused.headers["retry-after"]) <= 5
    filling.join(60)
    assert launch.request("POST", f"{url}/v1/completions", {"prompt": "a"})[0] == 200


def post(body: bytes, *, length: int | None = None, headers: str = "") -> bytes:
    return (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{headers}"
        f"Content-Length: {len(body) if length is None else length}\r\n\r\n"
    ).encode() + body


def raw(url: str, sent: bytes, timeout: float = 5.0) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the answer to bytes on a socket; the connection stays open for writing."""
    with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=timeout) as connection:
        connection.sendall(sent)
        data = b""
        while b"\r\n\r\n" not in data:
            data += connection.recv(65536) or pytest.fail(f"closed after {data!r}")
        head, _, body = data.partition(b"\r\n\r\n")
        status, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        while len(body) < int(headers.get("content-length", 0)):
            body += connection.recv(65536)
        return int(status.split()[1]), headers, body


@pytest.mark.ray
@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (post(b"{"), 400, "invalid_json"),
        (post(b"\xff\x00"), 400, "invalid_json"),
        (post(b'{"temperature": NaN}'), 400, "invalid_json"),
        (post(b"[" * 50_000), 400, "invalid_json"),
        (post(b'{"prompt": "\\ud800"}'), 400, "invalid_value"),
        (post(b'{"prompt": "a", "n": 1' + b"0" * 300 + b"}"), 400, "invalid_value"),
        (post(b"{}", headers="Transfer-Encoding: chunked\r\n"), 400, None),
        (post(b"{}", headers="Content-Length: 5\r\n"), 400, None),
        (post(b"{", length=50), 408, "request_timeout"),
        (post(b"", length=1 << 30), 413, "request_too_large"),
        (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}", 415, "unsupported_media_type"),
        (b"DELETE /v1/completions HTTP/1.1\r\nHost: x\r\n\r\n", 405, "method_not_allowed"),
        (b"GET /v1/models/%2e%2e%2fetc HTTP/1.1\r\nHost: x\r\n\r\n", 404, "model_not_found"),
        (b"nonsense\r\n\r\n", 400, None),
    ],
)
def test_bad_bytes_get_an_answer(url: str, sent: bytes, status: int, code: str | None) -> None:
    answered, headers, body = raw(url, sent)
    assert answered == status
    if code is not None:  # without one, the proxy itself refused what is not HTTP
        assert json.loads(body)["error"]["code"] == code
        assert headers["x-request-id"]
        assert headers["x-armd-version"] == armd.__version__


@pytest.mark.ray
def test_the_callers_request_id_comes_back_once(url: str) -> None:
    response = httpx.get(f"{url}/live", headers={"x-request-id": "my.id-7"})
    assert response.headers.get_list("x-request-id") == ["my.id-7"]


@pytest.mark.ray
def test_half_sent_bodies_do_not_delay_others(url: str) -> None:
    address = ("127.0.0.1", int(url.rsplit(":", 1)[1]))
    stuck = [socket.create_connection(address) for _ in range(100)]
    try:
        for connection in stuck:
            connection.sendall(post(b"{", length=100))
        start = time.monotonic()
        assert launch.request("POST", f"{url}/v1/completions", {"prompt": "a", "max_tokens": 4})[0] == 200
        assert time.monotonic() - start < 8  # one after the other they last longer
    finally:
        for connection in stuck:
            connection.close()


@pytest.mark.ray
def test_long_texts_do_not_keep_the_server_from_answering(url: str) -> None:
    body = {"prompt": "the quick brown fox " * 45_000, "max_tokens": 1}
    with ThreadPoolExecutor(2) as pool:
        long = [pool.submit(launch.request, "POST", f"{url}/v1/completions", body) for _ in range(2)]
        slowest = 0.0
        while not all(one.done() for one in long):
            start = time.monotonic()
            assert launch.request("GET", f"{url}/live")[0] == 200
            slowest = max(slowest, time.monotonic() - start)
        assert [one.result()[1]["error"]["code"] for one in long] == ["context_length_exceeded"] * 2
    assert slowest < 1.0


@pytest.mark.ray
def test_an_engine_that_dies_in_a_stream_is_told_and_replaced(url: str) -> None:
    import ray

    with httpx.stream("POST", f"{url}/v1/completions", json={**LONG, "stream": True}, timeout=60) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
        (engine,) = [name for name in names if name.startswith("SERVE_REPLICA::armd#engine#")]
        killed = time.monotonic()
        ray.kill(ray.get_actor(engine, namespace="serve"))
        *_, error, done = [line for line in lines if line]
        assert time.monotonic() - killed < 5
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "engine_unavailable"
    assert done == "data: [DONE]"
    assert launch.request("GET", f"{url}/live")[0] == 200
    launch.wait_ready(url, 60)
    assert health(url)["forward_passes"] < 100  # another one, which has done nothing yet


@pytest.mark.ray
def test_deploying_again_replaces_the_model_and_takes_the_key(
    url: str, config: DeployConfig, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last test on this application, which it takes down: the damaged model leaves nothing to serve."""
    before = launch.request("GET", f"{url}/v1/models")[1]["data"][0]
    monkeypatch.setenv(KEY_VARIABLE, "s3cret")
    other = serving_parts.save(tmp_path / "other", max_length=512, seed=1)
    assert launch.start(str(other), config) == url
    after = launch.request("GET", f"{url}/v1/models")[1]["data"][0]
    assert (before["max_model_len"], after["max_model_len"]) == (1024, 512)
    assert before["armd"]["system_fingerprint"] != after["armd"]["system_fingerprint"]
    assert httpx.get(f"{url}/v1/models").status_code == 401
    with pytest.raises(UserError, match="Serve runs on this cluster already") as caught:
        launch.start(str(other), DeployConfig(port=config.port + 1 if config.port < 65535 else 1024))
    assert str(config.port) in caught.value.fix
    damaged = serving_parts.save(tmp_path / "damaged")
    with (damaged / "model.safetensors").open("r+b") as file:
        file.seek(1000)
        file.write(b"\0" * 8)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        launch.start(str(damaged), config)
    assert time.monotonic() - start < 60


@pytest.mark.ray
def test_a_second_driver_serves_until_it_is_told_to_stop(ray_cluster: None, model_dir: Path) -> None:
    """`armd serve` against a cluster that runs already."""
    import ray

    port = free_port()
    code = (
        "import sys; from pipelines.serving import launch; from pipelines.serving.config import DeployConfig; "
        "launch.serve_forever(sys.argv[1], DeployConfig(port=int(sys.argv[2])))"
    )
    environment = {
        **os.environ,
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(model_dir), str(port)], env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        printed = []
        for line in process.stdout:
            printed.append(line)
            if "curl" in line:
                break
        assert f"http://127.0.0.1:{port}/v1" in "".join(printed)
        command = shlex.split(printed[-1])
        answer = subprocess.run([*command, "-s"], capture_output=True, text=True, timeout=60, check=True)
        assert json.loads(answer.stdout)["choices"][0]["text"]
        process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        assert rest.split() == ["stopping", "..."]
    finally:
        process.kill()
    with pytest.raises(OSError, match="refused"):
        launch.request("GET", f"http://127.0.0.1:{port}/live")
