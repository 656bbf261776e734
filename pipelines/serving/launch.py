"""Start, await and stop the endpoint on a Ray cluster."""

import contextlib
import json
import logging
import os
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from pipelines import runtime, storage
from pipelines.errors import UserError
from pipelines.serving import preflight, replicas
from pipelines.serving.config import DeployConfig
from pipelines.serving.preflight import KEY_VARIABLE
from pipelines.serving.replicas import Report

_POLL_S = 0.25
_SHUTDOWN_S = 30.0
_INGRESS_REQUESTS = 1000


def start(model_dir: str, config: DeployConfig, report: Report = lambda what: None) -> str:
    """Serve the model of `model_dir` (a folder or URI as `armd.save` writes it); the endpoint's URL once it is ready.

    Joins the cluster of RAY_ADDRESS or starts a private one, which ends with this process. Where our application runs
    on that cluster already, it is replaced. `report` is told what is being waited for.

    Raises:
        UserError: no such model, a port in use, an open host without a key, or replicas that do not start.
    """
    preflight.check_key(config)
    preflight.check_model(model_dir)
    if not runtime.on_cluster() and not _connected():
        preflight.check_port(config)  # before the cluster, which takes seconds to start
    report("starting Ray")
    runtime.connect(cpus=4)
    preflight.check_resources(config)
    report("starting Serve")
    _start_proxy(config)
    _run_application(model_dir, config)
    try:
        replicas.wait_running(config, report)
        report("waiting for the first token")
        wait_ready(config.url, config.start_timeout_s)
    except BaseException:
        stop(config.app_name)  # or Serve would go on trying
        raise
    return config.url


def wait_ready(url: str, timeout_s: float) -> None:
    """Return once GET /health answers 200.

    Raises:
        UserError: it did not within `timeout_s` seconds.
    """
    end = time.monotonic() + timeout_s
    while True:
        try:
            status, body = request("GET", f"{url}/health", timeout_s=min(10.0, timeout_s))
            answer = f"{status} {json.dumps(body)}"
            if status == 200:
                return
        except OSError as error:
            answer = str(error)
        if time.monotonic() > end:
            raise UserError(
                f"the endpoint {url} was not ready within {timeout_s:g} s; /health: {answer}",
                "run this on the cluster's head node, which alone reaches a loopback host; else see the replicas' logs",
            )
        time.sleep(_POLL_S)


def stop(app_name: str) -> None:
    """Take the application down; Serve itself too where nothing else runs on it."""
    from ray import serve

    if not _connected():
        return
    others = set(serve.status().applications) - {app_name}
    if others:
        serve.delete(app_name)
    else:
        _shut_serve_down()


def serve_forever(model_dir: str, config: DeployConfig) -> None:
    """Serve `model_dir` and block until SIGINT or SIGTERM; print where it is and how to ask it.

    Raises:
        UserError: see `start`.
    """
    import ray

    asked_to_stop = threading.Event()

    def on_signal(number: int, frame: object) -> None:
        if asked_to_stop.is_set():
            raise KeyboardInterrupt
        asked_to_stop.set()

    said: set[str] = set()

    def say_once(what: str) -> None:
        if what not in said:
            print(f"{what} ...", flush=True)
        said.add(what)

    try:
        url = start(model_dir, config, say_once)
        for number in (signal.SIGINT, signal.SIGTERM):  # after the start: Ray installs handlers of its own
            signal.signal(number, on_signal)
        try:
            print(_welcome(url, config), flush=True)
            while not asked_to_stop.wait(1.0):
                pass
            say_once("stopping")
        finally:
            stop(config.app_name)
    finally:
        if not runtime.on_cluster():
            ray.shutdown()


def request(
    method: str, url: str, body: Mapping[str, Any] | None = None, timeout_s: float = 60.0
) -> tuple[int, dict[str, Any]]:
    """One HTTP request with our key: its status and its JSON body, an error's included.

    Raises:
        OSError: nobody answered in time.
    """
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(KEY_VARIABLE):
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode("utf-8")
    sent = urllib.request.Request(url, data, headers, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # our own server is never behind a proxy
    try:
        with opener.open(sent, timeout=timeout_s) as answer:
            status, content = answer.status, answer.read()
    except urllib.error.HTTPError as error:
        status, content = error.code, error.read()
    try:
        return status, json.loads(content)
    except ValueError:
        return status, {"error": {"message": content[:200].decode("utf-8", "replace")}}


def _shut_serve_down() -> None:
    """`serve.shutdown()`, but without its last call, which waits for the controller's death and so is always reported
    on the terminal as a failed task."""
    import ray
    from ray import serve

    end = time.monotonic() + _SHUTDOWN_S
    with contextlib.suppress(ValueError, ray.exceptions.RayActorError):  # it is gone
        controller = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
        # Once only: a second call could leave its mark for the next controller, which would then go down as well.
        ray.get(controller.graceful_shutdown.remote(wait=False))
        while time.monotonic() < end:
            time.sleep(_POLL_S)
            ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    serve.shutdown()  # forgets the controller; shuts down what is still there


def _welcome(url: str, config: DeployConfig) -> str:
    key = ' -H "Authorization: Bearer $ARMD_API_KEY"' if os.environ.get(KEY_VARIABLE) else ""
    body = json.dumps({"model": config.model_name, "prompt": "The", "max_tokens": 32})
    return (
        f"Serving {config.model_name} at {url}/v1 (Ctrl-C ends it). Try:\n"
        f"  curl {url}/v1/completions -H 'Content-Type: application/json'{key} -d '{body}'"
    )


def _connected() -> bool:
    import ray

    return ray.is_initialized()


def _start_proxy(config: DeployConfig) -> None:
    """Start Serve with its proxy on our address; where Serve runs already, its proxy must be there."""
    import ray
    from ray import serve
    from ray.serve.context import _get_global_client  # the only place that knows the running proxy's address

    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # the driver's; its lines would cut through the progress
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is not None:
        running = client.http_config
        if (running.host, running.port) != (config.host, config.port):
            there = f"{running.host}:{running.port}"
            raise UserError(
                f"Serve runs on this cluster already, on {there}, not on {config.host}:{config.port}",
                f"take {there} with --deploy.host and --deploy.port, or stop what runs: serve shutdown",
            )
        return
    preflight.check_port(config)
    options = {"host": config.host, "port": config.port}
    try:
        serve.start(proxy_location="HeadOnly", http_options=options)
    except (ray.exceptions.RayError, RuntimeError, TimeoutError) as error:
        with contextlib.suppress(Exception):
            serve.shutdown()
        raise UserError(
            f"Serve did not start on {config.host}:{config.port}: {replicas.last_line(str(error))}",
            f"is the port free on the head node? Or take another: --deploy.port {preflight.other_port(config)}",
        ) from error


def _run_application(model_dir: str, config: DeployConfig) -> None:
    import ray
    from ray import serve
    from ray.serve.exceptions import RayServeException

    import armd
    from pipelines.serving.engine_replica import EngineReplica
    from pipelines.serving.http_guard import key_digest
    from pipelines.serving.ingress import Ingress

    key = os.environ.get(KEY_VARIABLE)
    gpus = ray.cluster_resources().get("GPU", 0)
    # An engine refuses by itself, exactly; Serve's own limits are a second line that ordinary load never reaches.
    engine = serve.deployment(
        EngineReplica,
        name="engine",
        num_replicas=config.n_replicas,
        ray_actor_options={"num_cpus": config.cpus_per_replica, "num_gpus": 1 if gpus else 0},
        max_ongoing_requests=config.max_slots + config.max_queued + 16,
        max_queued_requests=config.max_slots + config.max_queued + 16,
        max_constructor_retry_count=1,  # a model that cannot be loaded will not load the next time
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=2.0,
        health_check_timeout_s=10.0,
    )
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name="ingress",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=_INGRESS_REQUESTS,
        max_queued_requests=_INGRESS_REQUESTS,
        backpressure_config={"status_code": 429, "retry_after_s": 1},
        max_constructor_retry_count=1,
        graceful_shutdown_wait_loop_s=0.2,
    )
    digest = key_digest(key) if key else None
    where = storage.absolute(model_dir)
    application = ingress.bind(engine.bind(where, config), config, digest, armd.__version__)
    try:
        serve.run_many(
            [serve.RunTarget(application, name=config.app_name, route_prefix="/")],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )
    except (RayServeException, ValueError) as error:
        raise UserError(
            f"the application {config.app_name} cannot be deployed: {replicas.last_line(str(error))}",
            "stop the application that is in the way: serve shutdown",
        ) from error
