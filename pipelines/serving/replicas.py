"""The wait for an application's replicas: first for room on the cluster, then for their start."""

import time
from collections.abc import Callable

from pipelines import storage
from pipelines.errors import UserError
from pipelines.serving.config import DeployConfig

Report = Callable[[str], None]

_POLL_S = 0.25


def wait_running(config: DeployConfig, report: Report) -> None:
    """Wait until every replica of the application runs; `report` is told what for.

    Raises:
        UserError: one cannot start, or the cluster has no room for it.
    """
    from ray import serve

    place_end = time.monotonic() + config.wait_for_nodes
    end = time.monotonic() + config.start_timeout_s
    while True:
        application = serve.status().applications.get(config.app_name)
        status = "NOT_STARTED" if application is None else application.status.value
        if status == "RUNNING":
            return
        reasons = (
            [] if application is None else [one.message for one in application.deployments.values() if one.message]
        )
        if status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise UserError(
                f"the engine did not start: {last_line(' '.join(reasons))}",
                "if the model is at fault, export it again; Ray's logs of the replica have the details",
            )
        if unplaced := _unplaced(config.app_name):
            if time.monotonic() > place_end:
                raise _no_room(config, unplaced)
            end = time.monotonic() + config.start_timeout_s
        elif time.monotonic() > end:
            why = last_line(reasons[0]) if reasons else f"Serve says {status}"
            raise UserError(
                f"the application {config.app_name} did not start within {config.start_timeout_s:g} s: {why}",
                f"give it more time: --deploy.start-timeout-s {2 * config.start_timeout_s:g}",
            )
        report(f"waiting for room for {unplaced}" if unplaced else "loading the model")
        time.sleep(_POLL_S)


def _unplaced(app_name: str) -> int:
    """Replicas that no node of the cluster has taken yet."""
    from ray.serve.context import _get_global_client  # `serve.status()` has the same answer, without the nodes

    application = _get_global_client().get_serve_details()["applications"].get(app_name, {})
    deployments = application.get("deployments", {}).values()
    return sum(
        replica.get("node_id") is None for deployment in deployments for replica in deployment.get("replicas", [])
    )


def last_line(text: str) -> str:
    """The line of a traceback that says what happened."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return storage.redacted(lines[-1]) if lines else "no reason was given"


def _no_room(config: DeployConfig, unplaced: int) -> UserError:
    """What to say when `unplaced` replicas, the light ingress among them, have found no place in time."""
    import ray

    gpus = ray.cluster_resources().get("GPU", 0)
    need = f"{config.cpus_per_replica:g} CPUs" + (" and a GPU" if gpus else "")
    return UserError(
        f"the cluster has no room for {min(unplaced, config.n_replicas)} of {config.n_replicas} engines after "
        f"{config.wait_for_nodes:g} s; "
        f"each needs {need} that nobody uses",
        "free some or add nodes, ask for fewer (--deploy.n-replicas, --deploy.cpus-per-replica), or give a growing "
        "cluster more time (--deploy.wait-for-nodes 600)",
    )
