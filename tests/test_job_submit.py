"""`ray job submit` against a head started on this machine does what `armd run` does, and the model stays served.

The head is a process tree of its own, as a user would start it. `make test` runs this file in a pytest of its own: two
clusters at once are too much for two cores.
"""

import contextlib
import json
import os
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).parent.parent
READY_SECONDS = 90
JOB_SECONDS = 420
STAGES = ("corpus", "train", "export", "evaluate", "deploy", "report")


@dataclass(frozen=True)
class Head:
    """A running head."""

    url: str
    token: str

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now; all different, since all are held while they are found."""
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in held:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in held]


def get(url: str, headers: dict[str, str]) -> int:
    """The status of a GET, 0 where nothing answers."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=5) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def head_command(ports: list[int], folder: Path) -> list[str]:
    gcs, dashboard, client, agent, metrics = ports
    return [
        str(Path(sys.executable).parent / "ray"),
        "start",
        "--head",
        "--block",
        f"--port={gcs}",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard}",
        f"--ray-client-server-port={client}",
        f"--dashboard-agent-listen-port={agent}",
        f"--metrics-export-port={metrics}",
        "--num-cpus=6",  # logical: the stages hold several small processes at once
        "--object-store-memory=200000000",
        f"--temp-dir={folder}",
        "--disable-usage-stats",
    ]


def head_environment(folder: Path, token_file: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {
        **kept,
        "HOME": str(folder),
        "RAY_TMPDIR": str(folder),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "RAY_USAGE_STATS_ENABLED": "0",
        # without it a head with a living Serve application takes half a minute to stop
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "OMP_NUM_THREADS": "1",  # several processes share two cores
    }


def stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the head, then an end to whatever of its process tree is left. Never `ray stop`: it kills by name."""
    try:
        tree = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        tree = []
    process.terminate()
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _, alive = psutil.wait_procs(tree, timeout=5)
    for child in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(alive, timeout=10)


@contextlib.contextmanager
def session_cluster_suspended() -> Iterator[None]:
    """Ends the session's own cluster, if it runs, for as long as the block lasts."""
    import ray

    from pipelines import runtime

    was_up = ray.is_initialized()
    if was_up:
        ray.shutdown()
    yield
    if was_up:
        runtime.connect(cpus=4)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    folder = Path(tempfile.mkdtemp(prefix="armd-", dir="/tmp"))  # short: socket paths end at 107 bytes
    token_file = folder / "token"
    token_file.touch(mode=0o600)
    token = secrets.token_hex(32)
    token_file.write_text(token)
    ports = free_ports(5)
    head = Head(f"http://127.0.0.1:{ports[1]}", token)
    with session_cluster_suspended(), (folder / "head.log").open("wb") as log:
        process = subprocess.Popen(
            head_command(ports, folder),
            env=head_environment(folder, token_file),
            cwd=folder,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            until = time.monotonic() + READY_SECONDS
            while get(f"{head.url}/api/version", head.headers) != 200:
                said = (folder / "head.log").read_text(errors="replace")
                assert process.poll() is None, said
                assert time.monotonic() < until, said
                time.sleep(0.3)
            yield head
        finally:
            stop(process)
            shutil.rmtree(folder, ignore_errors=True)


def write_source(path: Path) -> None:
    """Some sixty documents, enough for a few held-out windows."""
    subjects = ("The list", "A string", "The file", "This module", "An iterator", "The class")
    endings = ("is returned.", "holds the items.", "was not found.", "raises an error.", "may be None.")
    documents = [f"{one} {other} Number {i}." for i, one in enumerate(subjects * 2) for other in endings]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")


def overrides(source: Path, root: Path, port: int) -> list[str]:
    """The demo made tiny: the path through all stages is what is tested."""
    train = {
        "architecture.n-layers": 2,
        "architecture.n-two-stream-layers": 1,
        "architecture.d-model": 32,
        "architecture.n-heads": 2,
        "architecture.d-prefix": 8,
        "n-workers": 1,
        "batch-size": 4,
        "micro-batch-size": 4,
        "steps": 4,
        "strided-steps": 2,
        "ar-steps": 1,
        "permutation-steps": 2,
        "warmup-steps": 1,
        "log-every": 1,
        "validate-every": 3,
        "validation-windows": 2,
        "checkpoint-every": 3,
    }
    corpus = {"sources": source, "vocab-size": 300, "sequence-length": 32, "validation-fraction": 0.2}
    evaluate = {"max-windows": 2, "sample-tokens": 8, "repeats": 1}
    options = {
        "root": root,
        **{f"corpus.{name}": value for name, value in corpus.items()},
        **{f"train.{name}": value for name, value in train.items()},
        **{f"evaluate.{name}": value for name, value in evaluate.items()},
        "deploy.port": port,
    }
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


def run_job(client: Any, command: list[str]) -> str:
    """Submit the command with the repository as its working directory and wait; the job's log."""
    job = client.submit_job(entrypoint=shlex.join(command), runtime_env={"working_dir": str(ROOT)})
    until = time.monotonic() + JOB_SECONDS
    while not (status := client.get_job_status(job)).is_terminal():
        if time.monotonic() > until:
            client.stop_job(job)
            pytest.fail(f"the job took more than {JOB_SECONDS} s:\n{client.get_job_logs(job)}")
        time.sleep(1)
    log = str(client.get_job_logs(job))
    assert status == "SUCCEEDED", log
    return log


def complete(port: int) -> dict[str, Any]:
    """One completion from the served model."""
    body = {"model": "armd", "prompt": "The list", "max_tokens": 8, "seed": 1}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        answer: dict[str, Any] = json.loads(response.read())
    return answer


def test_strangers_are_refused(head: Head) -> None:
    assert get(f"{head.url}/api/jobs/", {}) == 401
    assert get(f"{head.url}/api/jobs/", {"Authorization": "Bearer " + "0" * 64}) in (401, 403)
    assert get(f"{head.url}/api/jobs/", head.headers) == 200


def test_a_submitted_job_runs_every_stage_and_the_model_stays_up(head: Head, tmp_path: Path) -> None:
    from ray.job_submission import JobSubmissionClient

    source, root, (port,) = tmp_path / "text.jsonl", tmp_path / "runs", free_ports(1)
    write_source(source)
    command = [sys.executable, "-m", "jobs", "run", "demo", *overrides(source, root, port)]
    client = JobSubmissionClient(head.url, headers=head.headers)

    log = run_job(client, command)

    manifests = {path.parent.name.rsplit("-", 1)[0]: path for path in root.glob("*/manifest.json")}
    assert set(manifests) == set(STAGES), log
    deploy = json.loads(manifests["deploy"].read_text())
    assert deploy["stays_up"] is True
    assert (root / "report.html").stat().st_size > 10_000
    assert head.token not in log + (root / "run.json").read_text() + (root / "report.html").read_text()

    # the job is over, its driver gone, and the application answers
    first = complete(port)
    assert first["usage"]["completion_tokens"] > 0
    assert complete(port)["choices"] == first["choices"]

    # submitting again resumes: everything is there, nothing is written anew
    before = {name: path.stat().st_mtime_ns for name, path in manifests.items()}
    again = run_job(client, command)
    assert {name: path.stat().st_mtime_ns for name, path in manifests.items()} == before, again
    assert complete(port)["choices"] == first["choices"]
