"""What can be known to be wrong with a deployment before anything is started, each with its mend."""

import errno
import os
import socket

from armd.config import MODEL_FILES
from pipelines import runtime, storage
from pipelines.errors import UserError
from pipelines.serving.config import DeployConfig

KEY_VARIABLE = "ARMD_API_KEY"
"""Environment variable with the API key that every path but /live asks for."""


def check_key(config: DeployConfig) -> None:
    """Refuse an address that others reach unless there is a key."""
    if not config.is_loopback and not os.environ.get(KEY_VARIABLE):
        raise UserError(
            f"host {config.host} can be reached from other machines, and there is no API key",
            f"set {KEY_VARIABLE} to a secret of your choice, or serve on 127.0.0.1",
        )


def check_model(model_dir: str) -> None:
    """Refuse a folder that is not an exported model; its content is verified where it is loaded."""
    names = storage.list_names(model_dir)
    missing = [name for name in MODEL_FILES if name not in names]
    if missing:
        raise UserError(
            storage.redacted(f"{storage.absolute(model_dir)} holds no exported model: {missing[0]} is missing"),
            "give the export stage's directory, which `armd run` prints",
        )


def check_port(config: DeployConfig) -> None:
    """Find out now whether the port can be bound; Serve would only say so from inside a process of its own."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections in TIME_WAIT do not count
        try:
            probe.bind((config.host, config.port))
            probe.listen(1)
        except OSError as error:
            raise _port_error(config, error) from None


def check_resources(config: DeployConfig) -> None:
    """Say at once what a cluster of fixed size will never have; one that grows is given its time."""
    import ray

    if runtime.on_cluster():
        return
    cpus, gpus = (ray.cluster_resources().get(kind, 0) for kind in ("CPU", "GPU"))
    need = config.n_replicas * config.cpus_per_replica
    if need > cpus or (gpus and config.n_replicas > gpus):
        have = f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
        raise UserError(
            f"{config.n_replicas} engines need {need:g} CPUs{' and a GPU each' if gpus else ''}; there are {have}",
            "ask for fewer: --deploy.n-replicas, --deploy.cpus-per-replica",
        )


def other_port(config: DeployConfig) -> int:
    """A port to propose instead."""
    return config.port + 1 if config.port < 65535 else config.port - 1


def _port_error(config: DeployConfig, error: OSError) -> UserError:
    if error.errno == errno.EADDRINUSE:
        return UserError(
            f"port {config.port} on {config.host} is in use",
            f"stop what listens there, or take another: --deploy.port {other_port(config)} (`armd serve`: --port)",
        )
    return UserError(
        f"cannot listen on {config.host}:{config.port}: {error.strerror or error}",
        "give an address of this machine with --deploy.host, and a port of 1024 or more with --deploy.port",
    )
