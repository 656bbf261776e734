"""The Ray cluster that a stage runs on: the one RAY_ADDRESS names, else a private one on this machine."""

import atexit
import logging
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines.errors import UserError, user_error_in
from pipelines.progress import Progress, silent

# Settings that every process of the cluster must agree on, driver and workers alike; all are no-ops on a remote cluster
# whose nodes set their own.
WORKER_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # 5 by default: a busy machine needs longer to start a process
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",  # without it the dashboard's Train tab stays empty
}


def on_cluster() -> bool:
    """True when the work goes to a cluster that outlives this command."""
    return bool(os.environ.get("RAY_ADDRESS"))


_LEAST_CPUS = 4
_reserved = [_LEAST_CPUS]


def reserve(cpus: int) -> None:
    """Make a private cluster that `connect` will start offer at least `cpus` logical CPUs.

    Called before the first stage connects, since a cluster does not grow for the second.
    """
    _reserved.append(cpus)


def connect(cpus: int = _LEAST_CPUS) -> None:
    """Join the cluster of RAY_ADDRESS, or start a private one that offers at least `cpus` logical CPUs.

    Does nothing where this process is connected already. Logical CPUs may exceed the cores: stages of the demo need a
    few small processes at once, and a queue that never moves is worse than two processes sharing a core.

    Raises:
        UserError: the cluster cannot be reached or started.
    """
    for name, value in WORKER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not on_cluster():
        _use_private_token()
    import ray

    if ray.is_initialized():
        return
    options: dict = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    if on_cluster():
        options["address"] = os.environ["RAY_ADDRESS"]
    else:
        options.update(address="local", num_cpus=max(cpus, *_reserved, os.cpu_count() or 1), include_dashboard=False)
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, TimeoutError, ValueError) as error:
        where = f"the Ray cluster at {options['address']}" if on_cluster() else "a local Ray cluster"
        raise UserError(
            f"{where} did not answer: {str(error).splitlines()[0]}",
            "run `armd doctor`; unset RAY_ADDRESS to use this machine, or give RAY_AUTH_MODE and the cluster's token",
        ) from error


def near_a_gpu(function: Callable[..., Any], *arguments: Any, progress: Progress) -> Any:
    """`function(*arguments, progress)`, run as one task on a GPU where the work goes to a cluster that has any.

    The driver's machine, a cluster's head, may have none. Elsewhere it runs here.

    Raises:
        UserError: as `function` does.
    """
    if not on_cluster():
        return function(*arguments, progress)
    connect()
    import ray

    if not ray.cluster_resources().get("GPU", 0):
        return function(*arguments, progress)
    result = ray.remote(num_gpus=1, max_retries=1)(function).remote(*arguments, silent)
    while not ray.wait([result], timeout=2.0)[0]:
        progress.update(0, None, "steps", "on a GPU worker")
    try:
        return ray.get(result)
    except ray.exceptions.RayTaskError as error:
        raise (user_error_in(error) or error) from None


def _use_private_token() -> None:
    """Guard a local cluster by a token of its own: its ports listen on every interface.

    Ray reads these settings when it is imported. Where that has happened already its own default holds, which is a
    token too, shared by all of the user's clusters.
    """
    if "ray" in sys.modules or {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
        return
    os.environ["RAY_AUTH_MODE"] = "token"
    folder = tempfile.mkdtemp(prefix="armd-token-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = Path(folder, "token")
    path.touch(mode=0o600)
    path.write_text(secrets.token_hex(32))
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)
