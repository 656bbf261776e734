"""The job graph with toy steps: no cluster, nothing but files."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from jobs import graph
from jobs.graph import Step, StepsFailed


def is_done(directory: str) -> bool:
    return os.path.exists(os.path.join(directory, "manifest.json"))


class Toy:
    """Steps that write their inputs' contents and their configuration, and count how often they ran."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.ran: list[str] = []
        self.events: list[graph.Event] = []
        self.broken: set[str] = set()

    def step(self, name: str, config: object = None, *dependencies: Step, still_good=None) -> Step:
        def work(inputs, directory: str) -> None:
            self.ran.append(name)
            if name in self.broken:
                raise OSError(f"{name} is broken")
            os.makedirs(directory, exist_ok=True)
            text = json.dumps([name, config, {k: Path(v, "manifest.json").read_text() for k, v in inputs.items()}])
            Path(directory, "manifest.json").write_text(text)

        return Step(name=name, config=config, dependencies=dependencies, function=work, still_good=still_good)

    def run(self, *steps: Step) -> list[str]:
        """Names and kinds of the events of this run."""
        self.events.clear()
        graph.run(steps, str(self.root), is_done=is_done, on_event=self.events.append, lock_dir=self.root / ".locks")
        return self.told()

    def told(self) -> list[str]:
        return [f"{event.step.name} {event.kind}" for event in self.events]


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    return Toy(tmp_path)


def chain(toy: Toy, a: object = 1, b: object = 2, c: object = 3) -> Step:
    first = toy.step("first", a)
    return toy.step("third", c, toy.step("second", b, first), first)


def test_runs_dependencies_first_and_hands_their_directories_over(toy: Toy) -> None:
    third = chain(toy)
    told = toy.run(third)
    assert toy.ran == ["first", "second", "third"]
    assert told == [f"{name} {kind}" for name in toy.ran for kind in ("started", "finished")]
    name, config, inputs = json.loads(Path(third.directory(str(toy.root)), "manifest.json").read_text())
    assert (name, config, sorted(inputs)) == ("third", 3, ["first", "second"])


def test_a_second_run_reuses_everything(toy: Toy) -> None:
    toy.run(chain(toy))
    assert toy.run(chain(toy)) == ["first reused", "second reused", "third reused"]
    assert toy.ran == ["first", "second", "third"]


@pytest.mark.parametrize(
    ("change", "again"),
    [({"a": 9}, ["first", "second", "third"]), ({"b": 9}, ["second", "third"]), ({"c": 9}, ["third"])],
)
def test_a_changed_setting_runs_only_what_depends_on_it(toy: Toy, change: dict, again: list[str]) -> None:
    toy.run(chain(toy))
    toy.ran.clear()
    toy.run(chain(toy, **change))
    assert toy.ran == again
    toy.ran.clear()
    toy.run(chain(toy))  # and the old outputs are still there
    assert toy.ran == []


def test_identity_is_name_configuration_and_dependencies_only(toy: Toy) -> None:
    base = toy.step("a", {"x": 1, "y": [1, 2]})
    assert base.hash == toy.step("a", {"y": (1, 2), "x": 1}).hash
    assert base.hash != toy.step("b", {"x": 1, "y": [1, 2]}).hash
    assert base.hash != toy.step("a", {"x": 1, "y": [2, 1]}).hash
    assert base.hash != toy.step("a", {"x": 1, "y": [1, 2]}, toy.step("d")).hash
    # Pinned: a new version of the project must find the outputs of the old one.
    assert base.hash == "870d69f46c9464b154abd16f23fc6834a078dd309f3f5847f377b25f3959260e"
    assert base.directory("s3://bucket/runs/") == f"s3://bucket/runs/a-{base.hash[:12]}"


@pytest.mark.parametrize("config", [{1, 2}, float("nan"), object()])
def test_a_configuration_without_canonical_json_is_refused(toy: Toy, config: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        _ = toy.step("a", config).hash


def test_a_failure_stops_its_dependents_only_and_is_raised_at_the_end(toy: Toy) -> None:
    first = toy.step("first")
    broken = toy.step("broken", None, first)
    after = toy.step("after", None, broken)
    later = toy.step("later", None, after)
    beside = toy.step("beside", None, first)
    toy.broken.add("broken")
    with pytest.raises(StepsFailed) as caught:
        toy.run(later, beside)
    assert [(name, str(error)) for name, error in caught.value.failures] == [("broken", "broken is broken")]
    assert isinstance(caught.value.__cause__, OSError)
    assert toy.told()[2:] == [
        "broken started",
        "broken failed",
        "after skipped",
        "later skipped",
        "beside started",
        "beside finished",
    ]
    toy.broken.clear()
    toy.ran.clear()
    toy.run(later, beside)
    assert toy.ran == ["broken", "after", "later"]


def test_a_step_that_commits_nothing_has_failed(toy: Toy) -> None:
    with pytest.raises(StepsFailed, match="without committing"):
        toy.run(Step(name="lazy", config=None, function=lambda inputs, directory: None))


def test_an_interrupt_ends_the_run_at_once(toy: Toy) -> None:
    def interrupted(inputs, directory: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        toy.run(Step(name="slow", config=None, function=interrupted), toy.step("beside"))
    assert toy.told() == ["slow started", "slow failed"]


def test_a_finished_step_whose_effect_is_gone_runs_again(toy: Toy) -> None:
    alive = {"yes": True}
    served = toy.step("served", still_good=lambda directory: alive["yes"])
    after = toy.step("after", None, served)
    toy.run(after)
    assert toy.run(after) == ["served reused", "after reused"]
    alive["yes"] = False
    assert toy.run(after) == ["served started", "served finished", "after reused"]


SCRIPT = """
import os, sys, time
from pathlib import Path
from jobs import graph
from jobs.graph import Step

root, log = sys.argv[1], Path(sys.argv[2])

def work(name):
    def function(inputs, directory):
        with log.open("a") as file:
            file.write(name + "\\n")
        os.makedirs(directory, exist_ok=True)
        Path(directory, "half").write_text("written before the kill")
        if name == "second" and not Path(root, "go").exists():
            Path(root, "second-is-running").touch()
            time.sleep(60)
        Path(directory, "manifest.json").write_text("{}")
    return function

first = Step(name="first", config=1, function=work("first"))
second = Step(name="second", config=2, dependencies=(first,), function=work("second"))
third = Step(name="third", config=3, dependencies=(second,), function=work("third"))
graph.run(
    [third], root, lock_dir=Path(root, ".locks"),
    is_done=lambda directory: Path(directory, "manifest.json").exists(),
    on_event=lambda event: print(event.step.name, event.kind, flush=True),
)
"""


def start(root: Path, log: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(root), str(log)]
    return subprocess.Popen(command, cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, text=True)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)


def test_killed_in_the_middle_the_next_run_takes_nothing_half_written(tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = start(tmp_path, log)
    wait_for(tmp_path / "second-is-running")
    os.kill(process.pid, signal.SIGKILL)
    assert process.communicate(timeout=30)[0].split("\n")[:3] == ["first started", "first finished", "second started"]
    (tmp_path / "go").touch()
    process = start(tmp_path, log)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert out.split("\n")[:-1] == [
        "first reused",
        "second started",
        "second finished",
        "third started",
        "third finished",
    ]
    assert log.read_text().split() == ["first", "second", "second", "third"]


def test_of_two_commands_at_once_one_waits_and_takes_over_when_the_other_is_killed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    one = start(tmp_path, log)
    wait_for(tmp_path / "second-is-running")
    two = start(tmp_path, log)
    assert two.stdout is not None
    assert [two.stdout.readline() for _ in range(2)] == ["first reused\n", "second waiting\n"]
    (tmp_path / "go").touch()
    assert log.read_text().split() == ["first", "second"]  # the second command did not enter
    one.kill()
    one.communicate(timeout=30)
    out, _ = two.communicate(timeout=30)
    assert two.returncode == 0
    assert out.split("\n")[:2] == ["second started", "second finished"]
    assert log.read_text().split() == ["first", "second", "second", "third"]


def test_what_another_command_finished_meanwhile_is_reused(toy: Toy) -> None:
    """The second command saw the step unfinished, waited for the lock, and finds it done."""
    step = toy.step("first")
    answers = iter([False, True])
    graph.run(
        [step],
        str(toy.root),
        is_done=lambda directory: next(answers),
        on_event=toy.events.append,
        lock_dir=toy.root / ".locks",
    )
    assert toy.told() == ["first reused"]
    assert toy.ran == []
