"""How a model is served: where, how many at once, how long. Imports neither ray nor torch."""

import ipaddress
import re
from dataclasses import dataclass

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


@dataclass(frozen=True, kw_only=True)
class DeployConfig:
    """An ingress on `host:port` and `n_replicas` engines of `max_slots` sequences each.

    Raises:
        ValueError: naming the field and the value that does not fit.
    """

    host: str = "127.0.0.1"
    """Address that the HTTP proxy listens on; anything but loopback needs an API key in ARMD_API_KEY."""
    port: int = 8000
    """Port that the HTTP proxy listens on."""
    app_name: str = "armd"
    """Name of the Serve application; deploying again under the same name replaces it."""
    model_name: str = "armd"
    """The model's id in the API."""
    default_streams: int = 4
    """Streams decoded in parallel when a request does not say."""
    max_streams: int = 32
    """Most streams a request may ask for."""
    max_slots: int = 8
    """Sequences an engine decodes together."""
    static_shapes: bool = False
    """Pad what a step computes to a few sizes; on a GPU, replay recorded steps. On a CPU it only costs."""
    max_queued: int = 64
    """Sequences that may wait for a slot; a request beyond them is answered 429."""
    max_choices: int = 64
    """Most sequences one request may ask for, its prompts times n."""
    n_replicas: int = 1
    """Engines; each takes a GPU where the cluster has any."""
    cpus_per_replica: float = 1.0
    """CPUs an engine reserves, and threads it computes with where there is no GPU."""
    request_timeout_s: float = 300.0
    """Seconds after which an unfinished request is answered 504."""
    max_body_bytes: int = 1 << 20
    """Largest request body; a larger one is answered 413."""
    body_timeout_s: float = 10.0
    """Seconds within which a request's body must have arrived; a slower one is answered 408."""
    wait_for_nodes: float = 45.0
    """Seconds to wait for a cluster to have room for every replica, by growing if it can, before giving up."""
    start_timeout_s: float = 180.0
    """Seconds within which replicas that have their place must run and have answered their self-test."""

    def __post_init__(self) -> None:
        for name in ("app_name", "model_name"):
            if not _NAME.fullmatch(getattr(self, name)):
                raise ValueError(
                    f"{name} must be letters, digits, '.', '_' and '-', 63 at most, not {getattr(self, name)!r}"
                )
        if not 1 <= self.port <= 65535:
            raise ValueError(f"port must be between 1 and 65535, not {self.port}")
        if not self.host:
            raise ValueError("host must not be empty")
        for name in ("default_streams", "max_slots", "max_choices", "n_replicas", "max_body_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.max_queued < 0:
            raise ValueError(f"max_queued must be at least 0, not {self.max_queued}")
        if self.max_streams < self.default_streams:
            raise ValueError(
                f"max_streams = {self.max_streams} must not be less than default_streams = {self.default_streams}"
            )
        if self.max_choices > self.max_slots + self.max_queued:
            raise ValueError(
                f"max_choices = {self.max_choices} must not exceed max_slots + max_queued = "
                f"{self.max_slots + self.max_queued}: such a request would never be admitted"
            )
        for name in ("cpus_per_replica", "request_timeout_s", "body_timeout_s", "wait_for_nodes", "start_timeout_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be more than 0 and finite, not {getattr(self, name)}")

    @property
    def is_loopback(self) -> bool:
        """True when only this machine can reach `host`."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def url(self) -> str:
        """Where a client on the proxy's machine finds the endpoint."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"
