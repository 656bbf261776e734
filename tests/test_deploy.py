"""The deploy stage: a real endpoint, a real request, and nothing left behind on a private cluster."""

import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import serving_parts

import armd
from pipelines import deploy
from pipelines.errors import UserError
from pipelines.manifest import read_manifest, write_manifest
from pipelines.serving import launch


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Heard:
    """A `Progress` that remembers."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def update(self, done: float, total: float | None, unit: str, note: str = "") -> None:
        if note not in self.notes:
            self.notes.append(note)


@pytest.fixture
def exported(tmp_path: Path) -> str:
    folder = serving_parts.save(tmp_path / "export")
    write_manifest(str(folder), "export", {}, 0.0)
    return str(folder)


def test_an_unfinished_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did not finish"):
        deploy.run(deploy.DeployConfig(), {"export": str(tmp_path)}, str(tmp_path / "out"))


@pytest.mark.ray
def test_the_stage_proves_itself_and_cleans_up(
    ray_cluster: None, exported: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    port = free_port()
    heard = Heard()
    out = tmp_path / "deploy"
    config = deploy.DeployConfig(port=port, model_name="fox", default_streams=2)
    manifest = deploy.run(config, {"export": exported}, str(out), heard)
    assert manifest == read_manifest(str(out)) == json.loads((out / "manifest.json").read_text())
    assert (manifest["stage"], manifest["status"], manifest["stays_up"]) == ("deploy", 200, False)
    assert manifest["url"] == f"http://127.0.0.1:{port}"
    assert manifest["seconds"] >= manifest["start_seconds"] > manifest["request_seconds"] > 0
    request, response = manifest["request"], manifest["response"]
    assert (response["model"], response["armd"]["streams"]) == ("fox", 2)
    assert heard.notes[-1] == "answered"
    model, tokenizer = armd.load(exported)
    params = armd.SamplingParams(
        max_tokens=request["max_tokens"], n_streams=2, seed=request["seed"], stop_ids=(tokenizer.eos_id,)
    )
    own = armd.generate(model, [tokenizer.encode(request["prompt"])], params)[0]
    assert response["choices"][0]["text"] == tokenizer.decode(own.tokens)
    with pytest.raises(OSError, match="refused"):
        launch.request("GET", manifest["url"] + "/live")
    assert not deploy.still_served(str(out))


@pytest.mark.ray
def test_on_a_lasting_cluster_it_stays_up(
    ray_cluster: None, exported: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.runtime.on_cluster", lambda: True)
    out = str(tmp_path / "deploy")
    config = deploy.DeployConfig(port=free_port())
    try:
        manifest = deploy.run(config, {"export": exported}, out)
        assert manifest["stays_up"]
        assert deploy.still_served(out)
        edited: dict[str, Any] = {**manifest, "fingerprint": "armd-0+ckpt:00000000+S4"}
        (tmp_path / "deploy" / "manifest.json").write_text(json.dumps(edited))
        assert not deploy.still_served(out)  # somebody deployed another model meanwhile
    finally:
        launch.stop(config.app_name)


@pytest.mark.ray
def test_a_lasting_cluster_without_room_is_told(
    ray_cluster: None, exported: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.runtime.on_cluster", lambda: True)
    config = deploy.DeployConfig(port=free_port(), cpus_per_replica=1000, wait_for_nodes=2)
    began = time.monotonic()
    with pytest.raises(UserError, match="no room for 1 of 1 engines after 2 s"):
        deploy.run(config, {"export": exported}, str(tmp_path / "deploy"))
    assert time.monotonic() - began < 60


@pytest.mark.ray
def test_more_engines_than_the_cluster_has_are_refused_at_once(
    ray_cluster: None, exported: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = deploy.DeployConfig(port=free_port(), n_replicas=1000)
    with pytest.raises(UserError, match="1000 engines need 1000 CPUs") as caught:
        deploy.run(config, {"export": exported}, str(tmp_path / "deploy"))
    assert "--deploy.n-replicas" in caught.value.fix
    assert not (tmp_path / "deploy" / "manifest.json").exists()
