"""`armd run`: bring a recipe's stages up to date, show it, write run.json and report.html, and say what came of it."""

import dataclasses
import inspect
import os
import signal
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jobs import graph, options, pipeline, summary
from jobs.recipes import RECIPES, Recipe
from jobs.record import Record
from jobs.terminal import Terminal, apart
from pipelines import storage
from pipelines.manifest import is_done

TERMINATED = 128 + signal.SIGTERM
"""Exit status after SIGTERM, as a shell gives it."""


SUBMITTED_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Environment variable that Ray sets in the processes of a submitted job."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What `armd run RECIPE` takes."""

    until: Literal["corpus", "train", "export", "evaluate", "deploy", "report"] = "report"
    """Stop after this stage."""
    root: str = "runs"
    """Folder or URI (s3://bucket/path) for the stages' directories; in a submitted job relative to the home folder."""
    debug: bool = False
    """Show the traceback of an error, and what libraries print; else that goes to run.log below the root."""
    recipe: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=Recipe)
    """The recipe, every value of which can be changed."""


def main(arguments: Sequence[str]) -> int:
    """Run the command; the exit status."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(recipes_help("run", "Run a recipe's stages; what is done already is reused, what changed is run again."))
        return 0 if arguments else 2
    name = arguments[0]
    recipe = choose_recipe(name)
    chosen = options.parse(
        dataclasses.replace(RunOptions(), recipe=recipe),
        arguments[1:],
        command=f"armd run {name}",
        description=inspect.getdoc(RECIPES[name]) or "",
    )
    root = _absolute(chosen.root)
    storage.check_writable(root)
    directories, all_reused = _bring_up_to_date(chosen, name, root, ["armd", "run", *arguments])
    shown = chosen.root if storage.absolute(chosen.root) == root else root
    if "report" in directories:
        report = storage.join(root, "report.html")
        storage.write_bytes(report, storage.read_bytes(storage.join(directories["report"], "report.html")))
    if closing := summary.text(name, shown, directories, all_reused):
        print(f"\n{closing}")
    return 0


def _bring_up_to_date(chosen: RunOptions, name: str, root: str, command: Sequence[str]) -> tuple[dict[str, str], bool]:
    """Bring the stages up to date; the directory of each, and whether all of them were there already."""
    log = None if chosen.debug else _log_file(root)
    with apart(log) as screen, Terminal(screen) as terminal:
        steps = pipeline.build(chosen.recipe, name, terminal.progress)
        wanted = [steps[stage] for stage in pipeline.STAGES[: pipeline.STAGES.index(chosen.until) + 1]]
        record = Record(root, name, pipeline.resolved(chosen.recipe), wanted, command)

        def on_event(event: graph.Event) -> None:
            terminal.on_event(event)
            record.on_event(event)

        previous = signal.signal(signal.SIGTERM, _terminate)
        try:
            graph.run(wanted, root, is_done=is_done, on_event=on_event, lock_dir=_lock_dir(root))
        except Exception:
            record.finish("failed")
            raise
        except BaseException as stop:
            record.finish("interrupted")
            if isinstance(stop, SystemExit) and stop.code != TERMINATED:
                raise KeyboardInterrupt from stop  # Ray Train's way to end on Ctrl-C is an exit with status 0
            raise
        finally:
            signal.signal(signal.SIGTERM, previous)
        record.finish("finished")
    return {step.name: step.directory(root) for step in wanted}, record.all_reused


def choose_recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        UsageError: there is none; the nearest one is offered.
    """
    if name.startswith("-"):
        raise options.UsageError(f"the recipe's name comes first, not {name}", f"recipes: {', '.join(RECIPES)}")
    options.choose(name, RECIPES, "recipe", f"recipes: {', '.join(RECIPES)}")
    return RECIPES[name]()


def recipes_help(command: str, purpose: str) -> str:
    """The help of a command that takes a recipe."""
    width = max(map(len, RECIPES)) + 2
    lines = [f"usage: armd {command} RECIPE [OPTIONS]", "", purpose, "", "recipes:"]
    for name, recipe in RECIPES.items():
        lines.append(f"  {name:{width}}{(inspect.getdoc(recipe) or '').splitlines()[0]}")
    lines += [
        "",
        f"  armd {command} RECIPE --help   what the recipe needs and every option, --root and --until included",
    ]
    lines += ["", "examples:", f"  armd {command} demo --train.steps 100"]
    lines += [f"  armd {command} demo --corpus.sources my-texts/ more.jsonl.gz --corpus.sequence-length 128"]
    if command == "run":
        lines += ["  armd run demo --until train --root s3://bucket/runs"]
    return "\n".join(lines)


def _absolute(root: str) -> str:
    """`root` as an absolute path or a URI.

    A submitted job runs in a copy of its working directory that Ray deletes with the job; there a relative root is
    below the home directory, as it is for somebody who logs in.
    """
    if SUBMITTED_JOB in os.environ and storage.is_local(root):
        root = os.path.join("~", root.removeprefix("file://"))
    return storage.absolute(root)


def _lock_dir(root: str) -> Path:
    """Where the locks of commands on `root` are: in it, or for an object store in this machine's temporary folder."""
    if storage.is_local(root):
        return Path(root, ".locks")
    return Path(tempfile.gettempdir(), f"armd-locks-{os.getuid()}", storage.sha256_bytes(root.encode())[:16])


def _terminate(number: int, frame: object) -> None:
    raise SystemExit(TERMINATED)


def _log_file(root: str) -> str:
    return storage.join(root, "run.log") if storage.is_local(root) else str(Path(tempfile.gettempdir(), "armd-run.log"))
