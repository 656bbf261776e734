"""The cluster files pass Ray's own validation, and ours: nothing is reachable that should not be."""

import copy
import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

FILES = sorted((Path(__file__).parent.parent / "cluster").glob("*.yaml"))
CLOUDS = [path for path in FILES if path.stem in ("aws", "gcp")]
TOKEN = "~/.ray/auth_token"
SSH_KEYS = ["ray-autoscaler_us-west-2.pem", "ray-autoscaler_gcp_us-central1_p_ubuntu_0.pem", "id_ed25519"]
"""Keys as Ray or a person names them; Ray sends the head its key as one more mounted file, by the same rsync."""


def load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def strings(value: Any) -> list[str]:
    """Every string inside `value`, keys included."""
    if isinstance(value, dict):
        return [text for key, item in value.items() for text in [*strings(key), *strings(item)]]
    if isinstance(value, list):
        return [text for item in value for text in strings(item)]
    return [value] if isinstance(value, str) else []


def lint(config: dict[str, Any]) -> list[str]:
    """What is wrong with a cluster file beyond Ray's schema, one phrase a finding."""
    found = []
    starts = {kind: config.get(f"{kind}_start_ray_commands", []) for kind in ("head", "worker")}
    for kind, commands in starts.items():
        lines = [command for command in commands if "ray start" in command]
        if not lines:
            found.append(f"no ray start on the {kind}")
        for line in lines:
            if "RAY_AUTH_MODE=token" not in line.split("ray start")[0]:
                found.append(f"ray start on the {kind} without token authentication")
            if kind == "head" and "--dashboard-host=127.0.0.1" not in line.split():
                found.append("dashboard not on loopback")
    if any("0.0.0.0" in text or "::/0" in text for text in strings(config)):
        found.append("something is open to every address")
    rules = config.get("provider", {}).get("security_group", {}).get("IpPermissions", [])
    if any((rule.get("FromPort"), rule.get("ToPort")) != (22, 22) for rule in rules):
        found.append("a port other than SSH is opened")
    if config.get("file_mounts", {}).get(TOKEN) != TOKEN:
        found.append("the token file does not reach the nodes")
    sent = [PurePosixPath(source).name for source in config.get("file_mounts", {}).values()] + SSH_KEYS
    for pattern in config.get("rsync_exclude", []):
        # for a single file rsync takes its folder as the root of the transfer, so "/name" meets it too
        found += [f"{pattern} keeps back {name}" for name in sent if fnmatch.fnmatchcase(name, pattern.lstrip("/"))]
    if ".rayignore" not in config.get("rsync_filter", []):
        found.append("secrets of the project's folder are copied")
    if f"chmod 600 {TOKEN}" not in config.get("setup_commands", []):
        found.append("the token file is readable by others")
    if any("RAY_AUTH_TOKEN=" in text for text in strings(config)):
        found.append("the token stands in a command")
    if not any("-c ~/armd/constraints.txt ~/armd" in text for text in config.get("setup_commands", [])):
        found.append("nodes do not install the project from its constraints")
    return found


def test_the_three_files_are_there() -> None:
    assert [path.stem for path in FILES] == ["aws", "gcp", "local"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_ray_accepts_it(path: Path) -> None:
    validate_config(prepare_config(load(path)))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_nothing_is_left_open(path: Path) -> None:
    assert lint(load(path)) == []


@pytest.mark.parametrize("path", CLOUDS, ids=lambda path: path.stem)
def test_gpu_workers_come_and_go(path: Path) -> None:
    config = load(path)
    types = config["available_node_types"]
    gpu_types = [kind for kind in types.values() if kind["resources"].get("GPU", 0) > 0]
    assert gpu_types
    assert all(kind["min_workers"] == 0 < kind["max_workers"] for kind in gpu_types)
    assert "GPU" not in types[config["head_node_type"]]["resources"]
    assert 0 < config["idle_timeout_minutes"] <= 30
    assert config["max_workers"] >= sum(kind["max_workers"] for kind in gpu_types)  # Ray does not check this


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_unknown_key_is_refused_by_ray(path: Path) -> None:
    config = load(path) | {"idle_timeout": 10}
    with pytest.raises(Exception, match="idle_timeout"):
        validate_config(prepare_config(config))


def replace_in_commands(config: dict[str, Any], key: str, old: str, new: str) -> None:
    assert any(old in command for command in config[key])
    config[key] = [command.replace(old, new) for command in config[key]]


@pytest.mark.parametrize(
    ("finding", "break_it"),
    [
        (
            "dashboard not on loopback",
            lambda c: replace_in_commands(c, "head_start_ray_commands", "127.0.0.1", "10.0.0.1"),
        ),
        (
            "ray start on the worker without token authentication",
            lambda c: replace_in_commands(
                c, "worker_start_ray_commands", "RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled"
            ),
        ),
        ("no ray start on the worker", lambda c: c.pop("worker_start_ray_commands")),
        (
            "something is open to every address",
            lambda c: replace_in_commands(c, "head_start_ray_commands", "127.0.0.1", "0.0.0.0"),
        ),
        (
            "a port other than SSH is opened",
            lambda c: c["provider"].update(security_group={"IpPermissions": [{"FromPort": 8265, "ToPort": 8265}]}),
        ),
        ("the token file does not reach the nodes", lambda c: c["file_mounts"].pop(TOKEN)),
        ("*token keeps back auth_token", lambda c: c.update(rsync_exclude=[".git", "*token"])),
        ("/auth_* keeps back auth_token", lambda c: c.update(rsync_exclude=["/auth_*"])),
        ("*.pem keeps back ray-autoscaler_us-west-2.pem", lambda c: c.update(rsync_exclude=["*.pem"])),
        ("secrets of the project's folder are copied", lambda c: c.update(rsync_filter=[".gitignore"])),
        ("the token file is readable by others", lambda c: c["setup_commands"].remove(f"chmod 600 {TOKEN}")),
        (
            "the token stands in a command",
            lambda c: replace_in_commands(c, "head_start_ray_commands", "export ", "export RAY_AUTH_TOKEN=abc "),
        ),
        (
            "nodes do not install the project from its constraints",
            lambda c: replace_in_commands(c, "setup_commands", "-c ~/armd/constraints.txt", ""),
        ),
    ],
)
def test_the_lint_sees_a_broken_copy(finding: str, break_it: Any) -> None:
    config = copy.deepcopy(load(FILES[0]))
    break_it(config)
    assert finding in lint(config)
