"""Waiting for replicas: no room is said in time, a slow start is told from it, and a cluster may grow."""

import time
from types import SimpleNamespace
from typing import Any

import pytest
from ray import serve

from pipelines.errors import UserError
from pipelines.serving import replicas
from pipelines.serving.config import DeployConfig


class Cluster:
    """A Serve that says what it is told: how many replicas have no node, and the application's status."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.unplaced, self.status, self.message = 0, "DEPLOYING", ""
        self.placed_at = self.running_at = float("inf")
        self.began = time.monotonic()
        monkeypatch.setattr(serve, "status", self.answer)
        monkeypatch.setattr(
            "ray.serve.context._get_global_client", lambda: SimpleNamespace(get_serve_details=self.details)
        )
        monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2.0})

    @property
    def age(self) -> float:
        return time.monotonic() - self.began

    def answer(self) -> Any:
        status = "RUNNING" if self.age > self.running_at else self.status
        deployment = SimpleNamespace(message=self.message)
        application = SimpleNamespace(status=SimpleNamespace(value=status), deployments={"engine": deployment})
        return SimpleNamespace(applications={"armd": application})

    def details(self) -> dict[str, Any]:
        unplaced = 0 if self.age > self.placed_at else self.unplaced
        nodes: list[dict[str, Any]] = [{}, *({"node_id": None} for _ in range(unplaced - 1))][:unplaced]
        engine = {"replicas": [*nodes, {"node_id": "abc"}]}
        return {"applications": {"armd": {"deployments": {"engine": engine, "ingress": {}}}}}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(monkeypatch)


def refusal(config: DeployConfig) -> UserError:
    with pytest.raises(UserError) as caught:
        replicas.wait_running(config, lambda what: None)
    return caught.value


def test_no_room_is_said_within_a_minute(cluster: Cluster) -> None:
    config = DeployConfig()
    assert config.wait_for_nodes < 60 < config.start_timeout_s
    cluster.unplaced = 2
    error = refusal(DeployConfig(n_replicas=3, wait_for_nodes=0.3))
    assert cluster.age < 2
    assert "no room for 2 of 3 engines after 0.3 s" in error.what
    for option in ("--deploy.n-replicas", "--deploy.wait-for-nodes"):
        assert option in error.fix


def test_a_slow_start_is_not_a_lack_of_room(cluster: Cluster) -> None:
    cluster.message = "taken more than 30s to initialize"
    error = refusal(DeployConfig(wait_for_nodes=0.1, start_timeout_s=0.6))
    assert cluster.age > 0.6
    assert "taken more than 30s to initialize" in error.what
    assert "--deploy.start-timeout-s 1.2" in error.fix


def test_a_cluster_that_grows_has_its_time(cluster: Cluster) -> None:
    cluster.unplaced, cluster.placed_at, cluster.running_at = 1, 0.6, 0.9
    said: list[str] = []
    replicas.wait_running(DeployConfig(wait_for_nodes=5, start_timeout_s=0.5), said.append)
    assert list(dict.fromkeys(said)) == ["waiting for room for 1", "loading the model"]


def test_a_replica_that_fails_ends_the_wait(cluster: Cluster) -> None:
    cluster.status, cluster.message = "DEPLOY_FAILED", "Traceback\n  ...\nValueError: weights are damaged"
    assert "weights are damaged" in refusal(DeployConfig()).what
