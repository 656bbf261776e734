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
from jobs.recipes import Recipe
from pipelines import runtime
from pipelines.progress import Progress, silent

STAGES = ("corpus", "train", "export", "evaluate", "deploy", "report")
"""The stages in the order in which they run; `--until` stops after one of them."""

_INPUTS = {
    "corpus": (),
    "train": ("corpus",),
    "export": ("corpus", "train"),
    "evaluate": ("corpus", "export"),
    "deploy": ("export",),
    "report": ("corpus", "train", "export", "evaluate", "deploy"),
}

# Settings that do not change what a stage produces, so that changing them resumes the run instead of starting another.
# The sources count by what they hold now, not by where they are: by each file's path relative to its source, size, and
# modification time or ETag. The tokenizer counts by its content.
_NOT_IDENTITY = {
    "corpus": ("sources", "validation_sources", "tokenizer"),
    "train": ("checkpoint_every", "keep_checkpoints", "max_failures", "wait_for_nodes"),
    "export": ("batch_size",),
}


def resolved(recipe: Recipe) -> dict[str, Any]:
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
        progress: gives the `Progress` of a stage.

    Raises:
        UserError: a source does not exist, or holds nothing.
    """
    from pipelines import corpus, report

    configs: dict[str, Any] = {
        "corpus": recipe.corpus,
        "train": recipe.train,
        "export": recipe.export,
        "evaluate": recipe.evaluate,
        "deploy": recipe.deploy,
        "report": report.ReportConfig(title=f"armd run {name}".strip(), recipe=resolved(recipe)),
    }
    identities = {stage: _identity(stage, config) for stage, config in configs.items()}
    identities["corpus"]["holds"] = corpus.fingerprint(recipe.corpus)
    steps: dict[str, Step] = {}
    for stage in STAGES:
        steps[stage] = Step(
            name=stage,
            config=identities[stage],
            dependencies=tuple(steps[needed] for needed in _INPUTS[stage]),
            function=_bind(stage, configs[stage], progress),
            still_good=_still_served if stage == "deploy" else None,
        )
    return steps


def _identity(stage: str, config: Any) -> dict[str, Any]:
    fields = dataclasses.asdict(config)
    return {name: value for name, value in fields.items() if name not in _NOT_IDENTITY.get(stage, ())}


def _bind(stage: str, config: Any, progress: Callable[[str], Progress]) -> Callable[[Mapping[str, str], str], Any]:
    def run(inputs: Mapping[str, str], output_dir: str) -> Any:
        on_interrupt = signal.getsignal(signal.SIGINT)
        try:
            return _module(stage).run(config, inputs, output_dir, progress(stage))
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
