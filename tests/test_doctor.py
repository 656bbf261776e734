"""The doctor's findings, one by one, each in the state of health and of illness."""

import http.server
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs import doctor
from jobs.cli import main
from jobs.doctor import Finding

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def only(findings: Iterator[Finding]) -> Finding:
    (finding,) = findings
    return finding


def levels(findings: Iterator[Finding]) -> list[str]:
    return [finding.level for finding in findings]


def test_everything_is_examined_and_no_cluster_is_started(tmp_path: Path) -> None:
    code = (
        "import sys; from jobs.cli import main; status = main(['doctor', '--root', sys.argv[1]]);"
        "import ray; assert not ray.is_initialized(); sys.exit(status)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert all(line.split()[0] in ("ok", "warn") for line in lines)
    for word in (
        "Python 3",
        "packages: ray",
        "deepspeed can",
        "ray can",
        "RAY_ADDRESS is not set",
        "free for",
        "port 80",
    ):
        assert any(word in line for line in lines), word


def test_a_failure_is_exit_status_1_with_its_mend(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ill(root: str, port: int) -> Iterator[Finding]:
        yield Finding("ok", "fine")
        yield Finding("fail", f"{root} is ill", "cure it")

    monkeypatch.setattr(doctor, "examine", ill)
    assert main(["doctor", "--root", "here"]) == 1
    assert capsys.readouterr().out == "ok    fine\nfail  here is ill -- cure it\n"


def test_packages() -> None:
    assert only(doctor.packages(["numpy>=1", "not-there>=2; extra == 'dev'"])).level == "ok"
    wrong, missing = doctor.packages(["numpy<1", "surely-not-installed>=2"])
    assert (wrong.level, missing.level) == ("fail", "fail")
    assert "is not <1" in wrong.text
    assert "numpy<1" in wrong.mend
    assert "surely-not-installed is not installed" in missing.text


def test_the_declared_packages_are_the_projects() -> None:
    names = " ".join(doctor._declared())
    assert all(name in names for name in ("ray", "deepspeed", "torch", "tyro"))


def test_a_package_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "brokenpackage.py").write_text("print('noise'); raise OSError('libmissing.so: cannot open')")
    monkeypatch.syspath_prepend(str(tmp_path))
    finding = only(doctor.imported("brokenpackage"))
    assert finding.level == "fail"
    assert "libmissing.so" in finding.text
    assert only(doctor.imported("json")).level == "ok"


def test_the_authentication_mode_must_be_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert levels(doctor.cluster()) == ["ok"]
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert levels(doctor.cluster()) == ["ok", "fail"]
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert levels(doctor.cluster()) == ["ok", "warn"]
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert levels(doctor.cluster()) == ["ok", "fail"]
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("t")
    assert levels(doctor.cluster()) == ["ok", "ok"]


def test_the_token_must_be_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(doctor.token_file()) == []
    path = tmp_path / "token"
    path.write_text("secret-value")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    path.chmod(0o644)
    finding = only(doctor.token_file())
    assert (finding.level, finding.mend) == ("warn", f"chmod 600 {path}")
    assert "secret-value" not in finding.text
    path.chmod(0o600)
    assert only(doctor.token_file()).level == "ok"


@pytest.fixture
def server() -> Iterator[http.server.HTTPServer]:
    """A dashboard that answers `server.answer`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(self.server.answer)  # type: ignore[attr-defined]
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(("answer", "level"), [(401, "ok"), (403, "ok"), (200, "warn"), (500, "warn")])
def test_a_dashboard_must_want_a_token(
    server: http.server.HTTPServer, answer: int, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.answer = answer  # type: ignore[attr-defined]
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # a proxy must not come between
    assert only(doctor.dashboard()).level == level


def test_an_open_dashboard_on_another_machine_fails(
    server: http.server.HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.answer = 200  # type: ignore[attr-defined]
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(doctor, "_is_loopback", lambda url: False)
    assert only(doctor.dashboard()).level == "fail"


def test_a_dashboard_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, free_port: int) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{free_port}")
    assert only(doctor.dashboard()).level == "warn"


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("", "http://127.0.0.1:8265"),
        ("auto", "http://127.0.0.1:8265"),
        ("10.0.0.1:6379", "http://10.0.0.1:8265"),
        ("ray://head:10001", "http://head:8265"),
        ("https://ray.example.org/", "https://ray.example.org"),
    ],
)
def test_where_the_dashboard_is(address: str, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert doctor._dashboard_url() == url


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("arguments", [["--port", "99999999"], ["--port", "0"], ["--root", ""]])
def test_values_out_of_range(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"error: {arguments[0]} must be ")


def test_the_port_must_be_free(free_port: int) -> None:
    assert only(doctor.http_port(free_port)).level == "ok"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", free_port))
        taken.listen()
        finding = only(doctor.http_port(free_port))
    assert finding.level == "warn"
    assert str(free_port) in finding.text


@pytest.mark.parametrize(("free", "level"), [(50e9, "ok"), (2e9, "warn"), (1e8, "fail")])
def test_room_on_the_disk(free: float, level: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = type("Usage", (), {"free": free, "total": free})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    assert only(doctor.disk(str(tmp_path / "not" / "yet"))).level == level


def test_a_root_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    finding = only(doctor.disk(str(tmp_path)))
    assert finding.level == "fail"
    assert str(tmp_path) in finding.text


@pytest.mark.parametrize(("total", "level"), [(2 << 30, "ok"), (64 << 20, "warn")])
def test_shared_memory(total: int, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("Usage", (), {"total": total}))
    monkeypatch.setattr(doctor.os.path, "isdir", lambda path: True)
    assert only(doctor.shared_memory()).level == level
