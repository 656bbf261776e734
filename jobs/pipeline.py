"""A recipe as steps: corpus -> train -> export -> evaluate and deploy -> report.

Stage modules are imported when a stage runs, so that a run whose stages are all there starts nothing.
"""

import dataclasses
import importlib
import json
import signal
import threading
from collections.abc import Callable, Mapping
from typing import Any

from jobs.graph import Step
from jobs.recipes import Recipe, Study
from pipelines import runtime
from pipelines.corpus_config import CorpusConfig
from pipelines.progress import Progress, silent

_INPUTS = {
    "corpus": (),
    "train": ("corpus",),
    "export": ("corpus", "train"),
    "evaluate": ("corpus", "export"),
    "deploy": ("export",),
    "report": ("corpus", "train", "export", "evaluate", "deploy"),
}
STAGES = tuple(_INPUTS)
"""The stages in the order in which they run; `--until` stops after one of them."""

# Settings that do not change what a stage produces, so that changing them resumes the run instead of starting another.
# The sources count by what they hold now, not by where they are: by each file's path relative to its source, size, and
# modification time or ETag. The tokenizer counts by its content.
_NOT_IDENTITY = {
    "corpus": ("sources", "validation_sources", "tokenizer"),
    "train": (
        "checkpoint_every",
        "keep_checkpoints",
        "max_failures",
        "wait_for_nodes",
        "cache_bytes",
        "activation_checkpointing",
    ),
    "export": ("batch_size",),
    "measure": ("batch_size",),
}


def resolved(recipe: Recipe | Study) -> dict[str, Any]:
    """The recipe as plain JSON values."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(recipe), allow_nan=False))
    return plain


def build(
    recipe: Recipe, name: str = "", progress: Callable[[str], Progress] = lambda stage: silent
) -> dict[str, Step]:
    """The steps of `recipe` by stage, in order.

    Looks at the sources, since their state belongs to the corpus stage's identity; starts nothing.

    Args:
        recipe: the configuration.
        name: the recipe's name, for the report.
        progress: gives the `Progress` of a step by its name.

    Raises:
        UserError: a source does not exist, or holds nothing.
    """
    from pipelines import report

    configs: dict[str, Any] = {
        "train": recipe.train,
        "export": recipe.export,
        "evaluate": recipe.evaluate,
        "deploy": recipe.deploy,
        "report": report.ReportConfig(title=f"armd run {name}".strip(), recipe=resolved(recipe)),
    }
    steps = {"corpus": corpus_step(recipe.corpus, progress)}
    for stage, config in configs.items():
        steps[stage] = step(
            stage,
            config,
            {needed: steps[needed] for needed in _INPUTS[stage]},
            progress,
            still_good=_still_served if stage == "deploy" else None,
        )
    return steps


def corpus_step(config: CorpusConfig, progress: Callable[[str], Progress] = lambda stage: silent) -> Step:
    """The step that makes a corpus; what its sources hold now belongs to its identity.

    Raises:
        UserError: a source does not exist, or holds nothing.
    """
    from pipelines import corpus

    identity = {**_identity("corpus", config), "holds": corpus.fingerprint(config)}
    return Step(name="corpus", config=identity, function=_bind("corpus", "corpus", config, {}, progress))


def step(
    stage: str,
    config: Any,
    inputs: Mapping[str, Step],
    progress: Callable[[str], Progress],
    *,
    name: str = "",
    still_good: Callable[[str], bool] | None = None,
) -> Step:
    """The step that runs `pipelines.<stage>` with `config`.

    Args:
        stage: the stage's module.
        config: its configuration, a dataclass.
        inputs: the steps that it reads, by the names under which the stage knows them.
        progress: gives the `Progress` of a step.
        name: the step's name, where a graph has the stage more than once.
        still_good: as `Step` has it.
    """
    name = name or stage
    return Step(
        name=name,
        config=_identity(stage, config),
        dependencies=tuple(inputs.values()),
        function=_bind(stage, name, config, {role: needed.name for role, needed in inputs.items()}, progress),
        still_good=still_good,
    )


def _identity(stage: str, config: Any) -> dict[str, Any]:
    fields = dataclasses.asdict(config)
    return {name: value for name, value in fields.items() if name not in _NOT_IDENTITY.get(stage, ())}


def _bind(
    stage: str, name: str, config: Any, names: Mapping[str, str], progress: Callable[[str], Progress]
) -> Callable[[Mapping[str, str], str], Any]:
    """The stage as a step's function; `names` are the steps that it reads, by the names that the stage has for them."""

    def run(directories: Mapping[str, str], output_dir: str) -> Any:
        inputs = {role: directories[needed] for role, needed in names.items()}
        on_interrupt = signal.getsignal(signal.SIGINT)
        try:
            return _module(stage).run(config, inputs, output_dir, progress(name))
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, on_interrupt)  # Ray Train leaves its own behind

    return run


def _module(stage: str) -> Any:
    return importlib.import_module(f"pipelines.{stage}")


def _still_served(directory: str) -> bool:
    """Whether a finished deploy stage still holds: on a cluster that outlives commands, its application must answer."""
    if not runtime.on_cluster():
        return True
    served: bool = _module("deploy").still_served(directory)
    return served
