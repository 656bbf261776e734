"""The command line with stages that cost nothing: what is printed, what is written, what a second run does."""

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs import pipeline, summary
from jobs.cli import COMMANDS, main
from jobs.graph import Event, Step
from jobs.terminal import Pace, Terminal, apart, bytes_text, clock_text, count_text
from pipelines import runtime
from pipelines.errors import UserError
from pipelines.manifest import write_manifest
from pipelines.serving import preflight

REPOSITORY = Path(__file__).resolve().parent.parent

BODIES: dict[str, dict[str, Any]] = {
    "corpus": {},
    "train": {},
    "export": {},
    "evaluate": {
        "streams": {
            str(s): {"perplexity": 20.0 + s, "bits_per_byte": 1.5, "tokens_per_second": 100.0 * s} for s in (1, 2, 4)
        },
        "unigram": {"perplexity": 420.0},
        "samples": [
            {"prompt": "", "n_streams": 4, "text": "from nothing", "steps": 9},
            {"prompt": "The", "n_streams": 4, "text": " parrot\nis resting.", "steps": 7},
        ],
    },
    "deploy": {
        "url": "http://127.0.0.1:8000",
        "status": 200,
        "request_seconds": 0.25,
        "stays_up": False,
        "response": {"choices": [{"text": " an answer"}]},
    },
    "report": {},
}


class Stages:
    """Stand-ins for the stage modules: they write what the real ones write for the summary, and count."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.broken: dict[str, BaseException] = {}
        self.before: Callable[[str], None] = lambda stage: None
        self.reserved: list[int] = []

    def module(self, stage: str) -> SimpleNamespace:
        def run(config: Any, inputs: dict[str, str], output_dir: str, progress: Any) -> None:
            self.ran.append(stage)
            self.before(stage)
            progress.update(1, 2, "things", "half way")
            if stage in self.broken:
                raise self.broken[stage]
            assert all(Path(directory, "manifest.json").exists() for directory in inputs.values())
            os.makedirs(output_dir, exist_ok=True)
            if stage == "report":
                Path(output_dir, "report.html").write_text("<html>a report</html>")
            write_manifest(output_dir, stage, BODIES[stage], time.time())

        return SimpleNamespace(run=run, still_served=lambda directory: False)


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Stages:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)
    stages = Stages()
    monkeypatch.setattr(pipeline, "_module", stages.module)
    monkeypatch.setattr(preflight, "check_port", lambda config: None)  # it may well be in use here
    monkeypatch.setattr(runtime, "reserve", stages.reserved.append)
    return stages


def run(*arguments: str) -> int:
    return main(["run", "demo", *arguments])


def record(root: str = "runs") -> dict[str, Any]:
    return json.loads(Path(root, "run.json").read_text())


def test_a_run_goes_through_all_stages_and_says_what_came_of_it(
    stages: Stages, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run() == 0
    assert tuple(stages.ran) == pipeline.STAGES
    out, err = capsys.readouterr()
    assert err == ""
    for stage in pipeline.STAGES:
        assert f"[{stage}] started\n" in out
        assert re.search(rf"\[{stage}\] done in \d+\.\d s  {tmp_path}/runs/{stage}-[0-9a-f]{{12}}\n", out)
    assert "Held-out perplexity 21.00, 1.500 bits per byte; the unigram baseline has 420.0, 20.0 times as much" in out
    for streams in (1, 2, 4):
        assert re.search(rf"S={streams} .* {20 + streams}\.00 .* {100 * streams} tokens/s", out)
    assert "The parrot is resting." in out
    assert "POST http://127.0.0.1:8000/v1/completions answered 200 in 0.25 s: 'an answer'" in out
    assert f"Report: {tmp_path}/runs/report.html" in out
    assert Path("runs/report.html").read_text() == "<html>a report</html>"
    model = record()["steps"]["export"]["directory"]
    model = os.path.relpath(model)
    for command in (f"sample {model} --prompt", f"serve {model}", "run demo --train.seed 1"):
        assert f"-m jobs {command}" in out
    assert "\x1b" not in out


def program_file(path: Path) -> str:
    path.parent.mkdir(parents=True)
    path.touch(mode=0o755)
    return str(path)


def test_the_program_is_named_as_it_can_be_typed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make demo` calls .venv/bin/armd, which is not on the PATH of whoever typed `make`."""
    monkeypatch.chdir(tmp_path)
    called = program_file(tmp_path / "a b" / "bin" / "armd")
    elsewhere = program_file(tmp_path / "elsewhere" / "armd")

    def program(argument: str, path: str) -> str:
        monkeypatch.setattr(sys, "argv", [argument])
        monkeypatch.setenv("PATH", path)
        return summary.program()

    assert program(called, str(tmp_path)) == "'a b/bin/armd'"
    assert program("a b/bin/armd", os.path.dirname(elsewhere)) == "'a b/bin/armd'"
    assert program(called, os.path.dirname(called)) == "armd"
    monkeypatch.chdir(os.path.dirname(called))
    assert program("armd", "") == "./armd"
    monkeypatch.chdir("/")
    assert program(called, "") == f"'{called.lstrip('/')}'"
    monkeypatch.setattr(sys, "executable", called.replace("armd", "python"))
    assert program("/x/jobs/__main__.py", "") == f"'{called.lstrip('/').replace('armd', 'python')}' -m jobs"
    monkeypatch.setattr(sys, "executable", program_file(tmp_path / "active" / "python"))
    assert program("/x/jobs/__main__.py", str(tmp_path / "active")) == "python -m jobs"


@pytest.mark.parametrize(
    ("typed", "proposed"),
    [
        (["--until", "export"], "run demo --until export --train.seed 1\n"),
        (["--root", "my runs"], "run demo --root 'my runs' --train.seed 1\n"),
        (["--train.seed", "7", "--until", "export"], "run demo --train.seed 8 --until export\n"),
        (["--train.seed=7"], "run demo --train.seed=8\n"),
    ],
)
def test_the_proposed_run_keeps_what_was_typed(
    stages: Stages, typed: list[str], proposed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*typed) == 0
    out = capsys.readouterr().out
    assert out.endswith(proposed)
    if "my runs" in typed:
        assert "serve 'my runs/export-" in out


def test_a_cluster_for_all_stages_is_reserved_before_the_first(stages: Stages) -> None:
    def before(stage: str) -> None:
        assert stages.reserved

    stages.before = before
    four = ["--train.n-workers", "4", "--train.batch-size", "4", "--train.micro-batch-size", "1"]
    assert run(*four, "--until", "train") == 0
    assert stages.reserved == [6]
    assert run(*four, "--until", "export") == 0
    assert stages.reserved == [6]


def test_too_many_workers_are_refused_before_anything_runs(
    stages: Stages, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    many = ["--train.n-workers", "16", "--train.batch-size", "16", "--train.micro-batch-size", "1", "--until", "train"]
    assert run(*many) == 1
    assert stages.ran == []
    error, fix = capsys.readouterr().err.splitlines()
    assert error == "error: 16 training workers are too many for the 2 cores of this machine"
    assert "--train.n-workers of at most 8" in fix
    monkeypatch.setattr(runtime, "on_cluster", lambda: True)
    assert run(*many) == 0


def test_a_port_in_use_is_found_before_anything_runs(
    stages: Stages, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(config: Any) -> None:
        raise UserError(f"port {config.port} is in use", "take another")

    monkeypatch.setattr(preflight, "check_port", refuse)
    assert run() == 1
    assert capsys.readouterr().err == "error: port 8000 is in use\nfix: take another\n"
    assert stages.ran == []
    assert run("--until", "evaluate") == 0
    monkeypatch.setattr(preflight, "check_port", lambda config: None)
    assert run() == 0
    monkeypatch.setattr(preflight, "check_port", refuse)
    assert run() == 0  # it has been deployed already


def test_the_evaluation_is_told_though_a_later_stage_failed(stages: Stages, capsys: pytest.CaptureFixture[str]) -> None:
    stages.broken["deploy"] = UserError("the endpoint is odd", "try again")
    assert run() == 1
    out = capsys.readouterr().out
    assert "Held-out perplexity 21.00" in out
    assert "Try next" not in out


def test_credentials_in_the_root_are_not_shown() -> None:
    root = "s3://me:sesame@bucket/runs"
    step = Step(name="train", config=None, function=lambda inputs, directory: None)
    out = io.StringIO()
    Terminal(out).on_event(Event(step=step, kind="finished", directory=step.directory(root)))
    closing = summary.text(root, {"export": f"{root}/export-0"}, ["demo", "--root", root], 0, all_reused=False)
    report = summary.text(root, {"report": f"{root}/report-0"}, ["demo"], 0, all_reused=False)
    for said in (out.getvalue(), closing, report):
        assert "s3://bucket/runs" in said
        assert "sesame" not in said


def test_run_json_says_everything(stages: Stages) -> None:
    assert run("--train.steps", "100", "--train.learning-rate", "1e-3") == 0
    written = record()
    assert written["recipe"] == "demo"
    assert written["command"] == "armd run demo --train.steps 100 --train.learning-rate 1e-3"
    assert (written["config"]["train"]["steps"], written["config"]["train"]["learning_rate"]) == (100, 1e-3)
    assert written["status"] == "finished"
    assert list(written["versions"])
    assert {"host", "started", "seconds", "commit"} <= set(written)
    for stage in pipeline.STAGES:
        step = written["steps"][stage]
        assert (step["status"], step["reused"]) == ("finished", False)
        assert step["directory"].endswith(f"{stage}-{step['hash'][:12]}")
        assert step["started"] is not None


def test_a_second_run_says_that_all_was_there(stages: Stages, capsys: pytest.CaptureFixture[str]) -> None:
    run()
    stages.ran.clear()
    capsys.readouterr()
    assert run() == 0
    assert stages.ran == []
    out = capsys.readouterr().out
    assert "Every stage was already there" in out
    assert "Held-out perplexity 21.00" in out
    assert all(step["reused"] for step in record()["steps"].values())


@pytest.mark.parametrize(
    ("override", "again"),
    [
        (["--corpus.sequence-length", "128"], list(pipeline.STAGES)),
        (["--train.seed", "5"], ["train", "export", "evaluate", "deploy", "report"]),
        (["--evaluate.seed", "5"], ["evaluate", "report"]),
        (["--deploy.port", "9001"], ["deploy", "report"]),
        (["--deploy.host", "localhost"], ["deploy", "report"]),
        # How often to save and how often to try again change nothing that is trained.
        (["--train.checkpoint-every", "7", "--train.keep-checkpoints", "1"], ["report"]),
    ],
)
def test_an_override_runs_only_what_depends_on_it(stages: Stages, override: list[str], again: list[str]) -> None:
    run()
    stages.ran.clear()
    assert run(*override) == 0
    assert stages.ran == again


def test_sources_count_by_what_they_hold(stages: Stages) -> None:
    texts = Path("texts")
    texts.mkdir()
    (texts / "a.txt").write_text("some text")
    assert run("--corpus.sources", "texts", "--until", "corpus") == 0
    assert run("--corpus.sources", "./texts/", "--until", "corpus") == 0
    assert stages.ran == ["corpus"]
    (texts / "a.txt").write_text("some other text")
    assert run("--corpus.sources", "texts", "--until", "corpus") == 0
    assert stages.ran == ["corpus", "corpus"]


def test_held_out_sources_count_by_what_they_hold(stages: Stages) -> None:
    for name in ("train", "rest"):
        Path(name).mkdir()
        Path(name, "a.txt").write_text(f"some {name}")
    options_ = ["--corpus.sources", "train", "--until", "corpus", "--corpus.validation-sources"]
    assert run(*options_, "rest") == 0
    assert run(*options_, "./rest/*.txt") == 0
    assert stages.ran == ["corpus"]
    Path("rest/a.txt").write_text("some other text")
    assert run(*options_, "rest") == 0
    assert run(*options_, "python-docs") == 0
    assert run("--corpus.sources", "train", "--until", "corpus") == 0
    assert stages.ran == ["corpus"] * 4


@pytest.mark.parametrize("stage", pipeline.STAGES)
def test_until_stops_after_the_stage(stages: Stages, stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--until", stage) == 0
    assert stages.ran == list(pipeline.STAGES[: pipeline.STAGES.index(stage) + 1])
    assert Path("runs/report.html").exists() == (stage == "report")


def test_a_failed_stage_is_two_lines_and_its_dependents_do_not_run(
    stages: Stages, capsys: pytest.CaptureFixture[str]
) -> None:
    stages.broken["evaluate"] = UserError("the model is odd", "train it\nagain")
    assert run() == 1
    out, err = capsys.readouterr()
    assert err == "error: the model is odd\nfix: train it again\n"
    assert "[evaluate] failed after" in out
    assert "[deploy] done in" in out
    assert "[report] not run" in out
    written = record()
    assert written["status"] == "failed"
    assert [written["steps"][stage]["status"] for stage in pipeline.STAGES[2:]] == [
        "finished",
        "failed",
        "finished",
        "skipped",
    ]
    assert "the model is odd" in written["steps"]["evaluate"]["error"]
    stages.broken.clear()
    stages.ran.clear()
    assert run() == 0
    assert stages.ran == ["evaluate", "report"]


def test_a_user_error_is_found_however_it_is_wrapped(stages: Stages, capsys: pytest.CaptureFixture[str]) -> None:
    wrapped = RuntimeError("a worker failed")
    wrapped.__cause__ = UserError("no such shard", "make it anew")
    stages.broken["train"] = wrapped
    assert run() == 1
    assert capsys.readouterr().err == "error: no such shard\nfix: make it anew\n"


def test_a_fault_of_ours_is_two_lines_without_debug_and_raised_with_it(
    stages: Stages, capsys: pytest.CaptureFixture[str]
) -> None:
    stages.broken["train"] = ZeroDivisionError("division by zero")
    assert run() == 1
    error, fix = capsys.readouterr().err.splitlines()
    assert error == "error: ZeroDivisionError: division by zero"
    assert fix.startswith("fix: ")
    assert "--debug" in fix
    with pytest.raises(Exception, match="division by zero"):
        run("--debug")


def ray_errors() -> list[BaseException]:
    from ray.exceptions import RayTaskError

    trace = "\x1b[36mray::work()\x1b[39m (pid=1, ip=10.0.0.1)\n  File x.py, line 1\n"
    chain = f"{trace}KeyError: 'text'\n\nThe above exception was ..:\n\nray.exceptions.UserCodeException: a block"
    trainer = type("WorkerGroupError", (Exception,), {"__module__": "ray.train.errors"})("training failed:\n[Rank 0]")
    trainer.worker_failures = {0: RayTaskError("work", trace, ValueError("bad\nmore"))}  # type: ignore[attr-defined]
    return [
        RayTaskError("work", f"{trace}ValueError: bad\nmore", ValueError("bad\nmore")).as_instanceof_cause(),
        RayTaskError("work", f"{trace}ValueError: bad", None),
        RayTaskError("work", chain, None),
        trainer,
        ValueError("\x1b[31mbad\x1b[0m\nmore"),
    ]


@pytest.mark.parametrize("kind", range(5))
def test_an_error_in_a_task_is_told_by_what_the_task_raised(
    kind: int, stages: Stages, capsys: pytest.CaptureFixture[str]
) -> None:
    stages.broken["train"] = ray_errors()[kind]
    assert run() == 1
    said = capsys.readouterr().err.splitlines()[0]
    assert said == ("error: KeyError: 'text'" if kind == 2 else "error: ValueError: bad")


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(0)], ids=["Ctrl-C", "Ctrl-C in Ray Train"])
def test_an_interrupt_is_one_clean_line(
    stop: BaseException, stages: Stages, capsys: pytest.CaptureFixture[str]
) -> None:
    stages.broken["train"] = stop
    assert run() == 130
    out, err = capsys.readouterr()
    assert "[train] interrupted after" in out
    assert "Traceback" not in err
    assert "stopped" in err
    assert record()["status"] == "interrupted"


def test_sigterm_ends_the_run_with_its_status(stages: Stages) -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    stages.before = lambda stage: os.kill(os.getpid(), signal.SIGTERM)
    assert run() == 143
    assert stages.ran == ["corpus"]
    assert record()["status"] == "interrupted"
    assert signal.signal(signal.SIGTERM, before) == signal.SIG_IGN


def test_a_stage_that_takes_ctrl_c_gives_it_back(stages: Stages) -> None:
    handler = signal.getsignal(signal.SIGINT)
    stages.before = lambda stage: signal.signal(signal.SIGINT, signal.SIG_IGN) and None
    assert run("--until", "corpus") == 0
    assert signal.getsignal(signal.SIGINT) == handler


def test_on_a_cluster_a_model_that_is_no_longer_served_is_deployed_again(
    stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    run()
    stages.ran.clear()
    monkeypatch.setattr(runtime, "on_cluster", lambda: True)
    assert run() == 0
    assert stages.ran == ["deploy"]


def test_what_libraries_print_goes_to_the_log(stages: Stages, capfd: pytest.CaptureFixture[str]) -> None:
    def noise(stage: str) -> None:
        print("python noise")
        print("more noise", file=sys.stderr)
        os.write(1, b"compiled noise\n")
        subprocess.run(["sh", "-c", "echo child noise >&2"], check=True)

    stages.before = noise
    assert run("--until", "corpus") == 0
    out, err = capfd.readouterr()
    assert "noise" not in out + err
    assert "[corpus] done" in out
    log = Path("runs/run.log").read_text()
    for kind in ("python", "more", "compiled", "child"):
        assert f"{kind} noise" in log
    os.write(1, b"after")
    assert capfd.readouterr().out == "after"


def test_the_root_may_be_anywhere(stages: Stages, tmp_path: Path) -> None:
    assert run("--root", str(tmp_path / "deep" / "root"), "--until", "train") == 0
    assert Path(record(str(tmp_path / "deep" / "root"))["steps"]["train"]["directory"]).parent == tmp_path / "deep/root"


def test_in_a_submitted_job_a_relative_root_is_below_the_home_folder(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job's working directory is a copy that goes with the job."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert run("--until", "corpus") == 0
    assert (tmp_path / "home" / "runs" / "run.json").exists()
    assert not Path("runs").exists()


def test_what_a_remote_root_keeps_here_is_the_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jobs.run import _lock_dir, _log_file

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    log = Path(_log_file("s3://bucket/runs"))
    assert log.parent == _lock_dir("s3://bucket/runs")
    assert log.parent != _lock_dir("s3://bucket/others")
    own = log.parent.parent
    assert own.parent == tmp_path
    assert own.stat().st_mode & 0o777 == 0o700
    own.chmod(0o755)
    with pytest.raises(UserError, match="not a folder of this user alone"):
        _log_file("s3://bucket/runs")


def test_commands_with_one_root_share_their_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jobs.run import _lock_dir

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert _lock_dir(str(tmp_path)) == tmp_path / ".locks"
    bucket = _lock_dir("s3://bucket/runs")
    assert bucket == _lock_dir("s3://bucket/runs")
    assert bucket != _lock_dir("s3://bucket/others")
    assert bucket.is_absolute()


# Terminal


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_plain_lines_come_every_few_seconds_with_rate_and_time_left() -> None:
    clock, out = Clock(), io.StringIO()
    progress = Terminal(out, every=5, clock=clock).progress("train")
    for step in range(1, 601):
        clock.now = step / 10
        progress.update(step, 600, "steps", f"loss {step / 100:.2f}")
    lines = out.getvalue().splitlines()
    assert lines[0] == "[train] 1/600 steps  loss 0.01"
    assert lines[1] == "[train] 51/600 steps  10 steps/s  0:55 left  loss 0.51"
    assert lines[-1] == "[train] 600/600 steps  10 steps/s  loss 6.00"
    assert len(lines) == 13


def test_a_new_phase_starts_a_new_rate() -> None:
    pace = Pace()
    pace.update(1, 100, "documents")
    pace.update(2, 200, "documents")
    assert pace.rate == 100
    pace.update(2, 1, "shards")
    assert pace.rate is None
    pace.update(4, 2, "shards")
    assert pace.rate == 0.5
    pace.update(5, 0, "shards")
    assert pace.rate is None


def test_start_up_is_not_work() -> None:
    """Half a minute until the first of the steps, then ten a second."""
    pace = Pace()
    for now, done in ((0, 0), (20, 0), (30, 1)):
        pace.update(now, done, "steps")
        assert pace.rate is None
    pace.update(31, 11, "steps")
    assert pace.rate == 10


def test_parts_that_are_finished_together_make_no_rate() -> None:
    pace = Pace()
    for now, done in ((60, 64), (60.1, 128), (60.9, 192)):
        pace.update(now, done, "MB")
        assert pace.rate is None


def test_the_rate_follows_the_last_minute() -> None:
    pace = Pace()
    for second in range(200):
        pace.update(second, 10 * second if second < 100 else 1000 + (second - 100), "steps")
    assert pace.rate == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (count_text(0.8333), "0.833"),
        (count_text(600), "600"),
        (count_text(12_345), "12,345"),
        (count_text(1_058_688), "1.06M"),
        (count_text(124e6), "124M"),
        (bytes_text(4.83e9), "4.83 GB"),
        (bytes_text(512), "512 B"),
        (clock_text(62), "1:02"),
        (clock_text(3 * 3600 + 61), "3:01:01"),
        (clock_text(3 * 86_400 + 7200), "3 d 2 h"),
    ],
)
def test_figures_are_short(text: str, expected: str) -> None:
    assert text == expected


@pytest.fixture
def screen() -> Iterator[tuple[io.TextIOWrapper, int]]:
    """A terminal of 100 columns to write to, and the descriptor that shows what arrived."""
    shown, inner = pty.openpty()
    with open(inner, "w", encoding="utf-8", buffering=1) as stream:
        yield stream, shown
    os.close(shown)


def test_on_a_terminal_there_is_one_live_line(
    screen: tuple[io.TextIOWrapper, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, shown = screen
    for name, value in {"TERM": "xterm-256color", "COLUMNS": "100"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    step = Step(name="train", config=None, function=lambda inputs, directory: None)
    with Terminal(stream) as terminal:
        terminal.on_event(Event(step=step, kind="started", directory="runs/train-0"))
        terminal.progress("train").update(120, 600, "steps", "loss 4.31")
        time.sleep(0.3)
        terminal.on_event(Event(step=step, kind="finished", directory="runs/train-0", seconds=12.0))
    seen = ""
    while "runs/train-0" not in seen:
        seen += os.read(shown, 1 << 16).decode()
    assert "\x1b[" in seen
    assert "120/600 steps" in seen
    assert "loss 4.31" in seen
    assert "[train] done in 12 s  runs/train-0" in seen


def test_apart_restores_the_streams_when_the_run_fails(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def run_and_fail() -> None:
        with apart(str(tmp_path / "log")):
            print("hidden")
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        run_and_fail()
    print("shown")
    assert capfd.readouterr().out == "shown\n"


# Help


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_the_commands(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {command}" in out for command in COMMANDS)


def test_help_of_run_lists_the_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--help"]) == 0
    out = capsys.readouterr().out
    assert "The paper's 125M model on OpenWebText." in out
    assert "--until" in out


def test_help_of_a_recipe_lists_every_option_with_its_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    out = capsys.readouterr().out
    assert "\n  Command: armd run demo\n  Hardware: 2 CPU cores" in out
    for option in ("--until", "--root", "--corpus.sources", "--corpus.validation-sources", "--train.zero-stage"):
        assert option in out
    assert "Stop after this stage" in out
    assert "--recipe" not in out


@pytest.mark.parametrize("command", ["sample", "score", "serve", "doctor"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert f"usage: armd {command}" in capsys.readouterr().out


def test_help_is_quick() -> None:
    began = time.perf_counter()
    command = [sys.executable, "-X", "importtime", "-m", "jobs", "--help"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "usage: armd" in done.stdout
    assert time.perf_counter() - began < 5  # 0.05 s on an idle machine
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "jobs.cli" in imported
    assert not imported & {"torch", "ray", "tyro", "rich", "numpy"}
