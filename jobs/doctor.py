"""`armd doctor`: the installation, this machine and the cluster, one line a finding with its mend. Starts nothing."""

import contextlib
import importlib
import importlib.metadata
import io
import os
import shutil
import socket
import stat
import sys
import tomllib
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jobs import options
from jobs.terminal import bytes_text
from pipelines import storage

GIB = 1 << 30


@dataclass(frozen=True)
class Finding:
    """One line of the examination."""

    level: Literal["ok", "warn", "fail"]
    text: str
    mend: str = ""


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Check the installation, this machine and the cluster that RAY_ADDRESS names. Starts no cluster."""

    root: str = "runs"
    """Where stages would go."""
    port: int = 8000
    """Port that the HTTP endpoint would take."""

    def __post_init__(self) -> None:
        storage.check_place(self.root, "root")
        if not 1 <= self.port <= 65535:
            raise ValueError(f"port must be between 1 and 65535, not {self.port}")


def main(arguments: Sequence[str]) -> int:
    """Run the command; exit status 1 when something fails."""
    chosen = options.parse(DoctorOptions(), arguments, command="armd doctor", description=DoctorOptions.__doc__ or "")
    worst = 0
    for finding in examine(chosen.root, chosen.port):
        print(f"{finding.level:<5} {finding.text}{f' -- {finding.mend}' if finding.mend else ''}", flush=True)
        worst = max(worst, finding.level == "fail")
    return worst


def examine(root: str, port: int) -> Iterator[Finding]:
    """All findings, as they are made."""
    checks: list[Callable[[], Iterator[Finding]]] = [
        python,
        packages,
        torch,
        lambda: imported("deepspeed"),
        lambda: imported("ray"),
        cluster,
        token_file,
        dashboard,
        lambda: disk(root),
        shared_memory,
        lambda: http_port(port),
    ]
    for check in checks:
        yield from check()


def python() -> Iterator[Finding]:
    """The interpreter, which pip has found new enough."""
    yield Finding("ok", f"Python {'.'.join(map(str, sys.version_info[:3]))}, {sys.executable}")


def packages(declared: Sequence[str] | None = None) -> Iterator[Finding]:
    """Every declared dependency is installed in a version that fits."""
    from packaging.requirements import Requirement

    fits = []
    for text in _declared() if declared is None else declared:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        mend = f"pip install -c constraints.txt '{requirement}'"
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding("fail", f"the package {requirement.name} is not installed", mend)
            continue
        if requirement.specifier.contains(version, prereleases=True):
            fits.append(f"{requirement.name} {version}")
        else:
            yield Finding("fail", f"{requirement.name} {version} is not {requirement.specifier}", mend)
    if fits:
        yield Finding("ok", f"packages: {', '.join(fits)}")


def torch() -> Iterator[Finding]:
    """PyTorch and its GPUs."""
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Finding("fail", f"torch cannot be imported: {_first_line(error)}", "install it again: make setup")
        return
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            yield Finding("ok", f"GPU {index}: {about.name}, {bytes_text(about.total_memory)}")
    else:
        yield Finding(
            "ok", f"no GPU: training runs on the CPU, {os.cpu_count()} cores, with gloo; no compiler is needed"
        )


def imported(name: str) -> Iterator[Finding]:
    """The package can be imported; what it prints meanwhile is dropped."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            if name == "deepspeed" and not _cuda():
                os.environ.setdefault("DS_ACCELERATOR", "cpu")
            importlib.import_module(name)
        yield Finding("ok", f"{name} can be imported")
    except Exception as error:  # a broken installation fails in any way it likes
        yield Finding("fail", f"{name} cannot be imported: {_first_line(error)}", "install it again: make setup")


def cluster() -> Iterator[Finding]:
    """What RAY_ADDRESS and RAY_AUTH_MODE say."""
    address, mode = os.environ.get("RAY_ADDRESS"), os.environ.get("RAY_AUTH_MODE")
    if not address:
        yield Finding("ok", "RAY_ADDRESS is not set: every run starts a private cluster on this machine")
        return
    yield Finding("ok", f"runs go to the Ray cluster at {address}")
    if mode == "token":
        if "RAY_AUTH_TOKEN" in os.environ or _token_path().is_file():
            yield Finding("ok", "RAY_AUTH_MODE=token, and there is a token")
        else:
            yield Finding(
                "fail", "RAY_AUTH_MODE=token, but there is no token", f"put the cluster's token into {_token_path()}"
            )
    elif mode == "disabled":
        yield Finding(
            "warn",
            "RAY_AUTH_MODE=disabled: whoever reaches the cluster can run code on it",
            "start the cluster with RAY_AUTH_MODE=token and set it here too",
        )
    else:
        yield Finding(
            "fail",
            f"RAY_AUTH_MODE is {mode or 'not set'}: whether this machine may join depends on the cluster",
            "export RAY_AUTH_MODE=token (or disabled, if the cluster is)",
        )


def token_file() -> Iterator[Finding]:
    """The token is readable by its owner alone."""
    path = _token_path()
    if not path.is_file():
        return
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        yield Finding("warn", f"the token {path} can be read by others (mode {mode:04o})", f"chmod 600 {path}")
    else:
        yield Finding("ok", f"the token {path} is private")


def dashboard() -> Iterator[Finding]:
    """The cluster's dashboard answers, and not to everybody."""
    url = _dashboard_url()
    named = "RAY_ADDRESS" in os.environ or "RAY_API_SERVER_ADDRESS" in os.environ
    try:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(f"{url}/api/version", timeout=3):
            open_to_all = True
    except urllib.error.HTTPError as error:
        open_to_all = error.code not in (401, 403)
    except (OSError, ValueError) as error:
        if named:
            yield Finding(
                "warn",
                f"the dashboard {url} does not answer: {_first_line(error)}",
                "set RAY_API_SERVER_ADDRESS to its address, or open a tunnel to it",
            )
        return
    if open_to_all:
        yield Finding(
            "warn" if _is_loopback(url) else "fail",
            f"the dashboard {url} answers without a token: whoever reaches it can run code on the cluster",
            "start the cluster with RAY_AUTH_MODE=token and --dashboard-host=127.0.0.1",
        )
    else:
        yield Finding("ok", f"the dashboard {url} answers, and wants a token")


def disk(root: str) -> Iterator[Finding]:
    """Room where the stages go."""
    if not storage.is_local(root):
        yield Finding("ok", f"stages go to {storage.redacted(root)}")
        return
    place = Path(storage.absolute(root))
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK):
        yield Finding("fail", f"{place} cannot be written", "choose another --root")
        return
    free = shutil.disk_usage(place).free
    level: Literal["ok", "warn", "fail"] = "ok" if free > 5e9 else "warn" if free > 1e9 else "fail"
    mend = "" if level == "ok" else "free some, or choose another --root; `armd plan RECIPE` says what a run needs"
    yield Finding(level, f"{bytes_text(free)} free for {storage.absolute(root)}", mend)


def shared_memory() -> Iterator[Finding]:
    """Room for Ray's object store."""
    if not os.path.isdir("/dev/shm"):
        return
    total = shutil.disk_usage("/dev/shm").total
    if total < GIB:
        yield Finding(
            "warn",
            f"/dev/shm has {bytes_text(total)}: Ray puts its objects on disk instead, which is slow",
            "start the container with --shm-size=2g or more",
        )
    else:
        yield Finding("ok", f"/dev/shm has {bytes_text(total)}")


def http_port(port: int) -> Iterator[Finding]:
    """The endpoint's port is free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            yield Finding(
                "warn", f"port {port} cannot be used: {error.strerror}", "give another: --deploy.port, or serve --port"
            )
            return
    yield Finding("ok", f"port {port} is free")


def _declared() -> list[str]:
    """The dependencies of the installed package, or of the source tree that runs."""
    try:
        return importlib.metadata.requires("armd") or []
    except importlib.metadata.PackageNotFoundError:
        project = Path(__file__).resolve().parent.parent / "pyproject.toml"
        declared: list[str] = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]
        return declared


def _token_path() -> Path:
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def _dashboard_url() -> str:
    named = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS", "")
    if named.startswith(("http://", "https://")):
        return named.rstrip("/")
    host = urllib.parse.urlsplit(named if "://" in named else f"//{named}").hostname
    return f"http://{'127.0.0.1' if host in (None, 'auto', 'local') else host}:8265"


def _is_loopback(url: str) -> bool:
    return (urllib.parse.urlsplit(url).hostname or "") in ("127.0.0.1", "localhost", "::1")


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
