"""`armd run`: bring a recipe's stages up to date, show it, write run.json and report.html, and say what came of it."""

import dataclasses
import inspect
import os
import signal
import stat
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jobs import graph, options, pipeline, study, summary
from jobs.recipes import RECIPES, Chosen, Recipe, Study
from jobs.record import Record
from jobs.terminal import Terminal, apart
from pipelines import runtime, storage
from pipelines.errors import UserError
from pipelines.manifest import is_done
from pipelines.progress import Progress
from pipelines.report import NAME as REPORT
from pipelines.serving import preflight

TERMINATED = 128 + signal.SIGTERM
"""Exit status after SIGTERM, as a shell gives it."""

WORKERS_A_CORE = 4
"""Training workers that a core of this machine is asked to bear at most, on a private cluster."""

SUBMITTED_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Environment variable that Ray sets in the processes of a submitted job."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What `armd run RECIPE` takes."""

    until: Literal["corpus", "train", "export", "evaluate", "deploy", "report", "measure", "compare"] | None = None
    """Stop after this stage; None: run them all."""
    root: str = "runs"
    """Folder or URI (s3://bucket/path) for the stages' directories; in a submitted job relative to the home folder."""
    debug: bool = False
    """Show the traceback of an error, and what libraries print; else that goes to run.log below a local root."""
    recipe: Chosen = field(default_factory=Recipe)
    """The recipe, every value of which can be changed."""

    def __post_init__(self) -> None:
        storage.check_place(self.root, "root")
        if self.until not in (None, *self.stages):
            raise ValueError(f"until must be one of this recipe's stages, {', '.join(self.stages)}, not {self.until}")

    @property
    def stages(self) -> tuple[str, ...]:
        """The recipe's stages, in the order in which they run."""
        return study.STAGES if isinstance(self.recipe, Study) else pipeline.STAGES

    def steps(self, name: str, progress: Callable[[str], Progress]) -> list[graph.Step]:
        """The steps that are wanted, in the order in which they run."""
        if isinstance(self.recipe, Study):
            steps = study.build(self.recipe, name, progress)
        else:
            steps = list(pipeline.build(self.recipe, name, progress).items())
        last = self.stages.index(self.until or self.stages[-1])
        return [step for stage, step in steps if self.stages.index(stage) <= last]


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
    directories: dict[str, str] = {}
    try:
        all_reused = _bring_up_to_date(chosen, name, root, ["armd", "run", *arguments], directories)
    except graph.StepsFailed:
        if "evaluate" in directories:
            print(f"\n{summary.evaluation(directories['evaluate'])}\n", flush=True)
        raise
    for page in ("report", "compare"):
        if page in directories:
            report = storage.read_bytes(storage.join(directories[page], REPORT))
            storage.write_bytes(storage.join(root, REPORT), report)
    if closing := summary.text(root, directories, arguments, chosen.recipe.train.seed, all_reused=all_reused):
        print(f"\n{closing}")
    return 0


def _bring_up_to_date(
    chosen: RunOptions, name: str, root: str, command: Sequence[str], directories: dict[str, str]
) -> bool:
    """Bring the stages up to date; `directories` receives those that are done, as they are.

    Returns:
        Whether all of them were there already.
    """
    log = None if chosen.debug else _log_file(root)
    with apart(log) as screen, Terminal(screen) as terminal:
        wanted = chosen.steps(name, terminal.progress)
        _check_ahead(chosen.recipe, {step.name for step in wanted if not is_done(step.directory(root))})
        record = Record(root, name, pipeline.resolved(chosen.recipe), wanted, command)

        def on_event(event: graph.Event) -> None:
            terminal.on_event(event)
            record.on_event(event)
            if event.kind in ("finished", "reused"):
                directories[event.step.name] = event.directory

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
    return record.all_reused


def _check_ahead(recipe: Recipe | Study, missing: Collection[str]) -> None:
    """Refuse before the first stage what a late one would refuse on a private cluster, and size that cluster for all.

    Args:
        recipe: the configuration.
        missing: the steps that are still to be done.

    Raises:
        UserError: a baseline beyond the stages that take one, more workers than this machine can bear, a port in use,
            an open address without a key.
    """
    if isinstance(recipe, Recipe) and recipe.train.model != "armd" and {"evaluate", "deploy"} & set(missing):
        raise UserError(
            f"the stages after export take an ARMD model, not the baseline {recipe.train.model}",
            "pass --until export: the manifest there holds the baseline's held-out loss",
        )
    if runtime.on_cluster():
        return
    if any(step.startswith("train") for step in missing):
        n_workers, cores = recipe.train.n_workers, os.cpu_count() or 1
        if n_workers > WORKERS_A_CORE * cores:
            raise UserError(
                f"{n_workers} training workers are too many for the {cores} cores of this machine",
                f"give --train.n-workers of at most {WORKERS_A_CORE * cores}, or set RAY_ADDRESS to a larger cluster",
            )
        runtime.reserve(n_workers + 2)  # what the driver and the data need beside them
    if isinstance(recipe, Recipe) and "deploy" in missing:
        preflight.check_key(recipe.deploy)
        preflight.check_port(recipe.deploy)


def choose_recipe(name: str) -> Recipe | Study:
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
    """Where the locks of commands on `root` are: in it, or for an object store in this user's temporary folder."""
    return Path(root, ".locks") if storage.is_local(root) else _own_folder(root)


def _terminate(number: int, frame: object) -> None:
    raise SystemExit(TERMINATED)


def _log_file(root: str) -> str:
    return storage.join(root, "run.log") if storage.is_local(root) else str(_own_folder(root) / "run.log")


def _own_folder(root: str) -> Path:
    """A folder of this machine for what commands on the object store `root` keep locally; nobody else can enter it.

    Raises:
        UserError: somebody else made it first.
    """
    folder = Path(tempfile.gettempdir(), f"armd-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    about = folder.lstat()
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid() or about.st_mode & 0o077:
        raise UserError(f"{folder} is not a folder of this user alone", "remove it, or set TMPDIR to a folder of yours")
    below = folder / storage.sha256_bytes(root.encode())[:16]
    below.mkdir(exist_ok=True)
    return below
