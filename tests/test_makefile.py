"""`make test` and `make setup` with stand-ins for the environment's programs."""

import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


def make(target: str, *settings: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "-C", str(REPOSITORY), target, *settings]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """An installed environment whose Python exits with the statuses in the folder's files `first` and `second`."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text(
        f'#!/bin/sh\necho "ran $*"\ncd {tmp_path}\n'
        'case "$*" in *--ignore*) exit $(cat first);; *) exit $(cat second);; esac\n'
    )
    python.chmod(0o755)
    (tmp_path / ".installed").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("first", "second", "selection", "passes"),
    [
        (0, 0, "", True),
        (0, 5, "-k x", True),
        (5, 0, "-k x", True),
        (0, 5, "", False),
        (1, 0, "-k x", False),
        (0, 1, "-k x", False),
    ],
)
def test_a_selection_may_leave_nothing_for_one_of_the_runs(
    venv: Path, first: int, second: int, selection: str, passes: bool
) -> None:
    (venv / "first").write_text(str(first))
    (venv / "second").write_text(str(second))
    done = make("test", f"VENV={venv}", f"PYTEST_ARGS={selection}")
    assert (done.returncode == 0) == passes, done.stderr
    assert f"ran -m pytest {selection}".rstrip() in done.stdout


def test_an_environment_without_pip_is_made_again(tmp_path: Path) -> None:
    """What an interrupted `python -m venv` leaves: a Python that runs, and no pip."""
    calls = tmp_path / "calls"
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    for name, status in (("venv/bin/python", 1), ("python", 0)):
        path = tmp_path / name
        path.write_text(f'#!/bin/sh\necho "{name} $*" >> {calls}\nexit {status}\n')
        path.chmod(0o755)
    make("setup", f"VENV={tmp_path}/venv", f"PYTHON={tmp_path}/python")
    assert f"python -m venv {tmp_path}/venv" in calls.read_text()
