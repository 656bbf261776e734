"""A study as steps: corpus -> (train -> export -> measure) for every contestant and seed -> compare."""

import dataclasses
from collections.abc import Callable

from jobs import pipeline
from jobs.contestants import CONTESTANTS
from jobs.graph import Step
from jobs.recipes import Study
from pipelines.compare import CompareConfig, Run
from pipelines.progress import Progress, silent

STAGES = ("corpus", "train", "export", "measure", "compare")
"""The stages in the order in which they run; `--until` stops after one of them."""


def build(
    study: Study, name: str = "", progress: Callable[[str], Progress] = lambda stage: silent
) -> list[tuple[str, Step]]:
    """The stage and the step of everything that `study` runs: one model after the other, all of one seed first.

    Looks at the sources, since their state belongs to the corpus stage's identity; starts nothing.

    Args:
        study: the configuration.
        name: the study's name, for the report.
        progress: gives the `Progress` of a step by its name.

    Raises:
        UserError: a source does not exist, or holds nothing.
    """
    corpus = pipeline.corpus_step(study.corpus, progress)
    steps = [("corpus", corpus)]
    runs, measured = [], {}
    for seed in study.seeds:
        for contestant in study.contestants:
            run = f"{contestant}-{seed}"
            config = dataclasses.replace(CONTESTANTS[contestant].train(study.train), seed=seed)
            train = pipeline.step("train", config, {"corpus": corpus}, progress, name=f"train-{run}")
            trained = {"corpus": corpus, "train": train}
            export = pipeline.step("export", study.export, trained, progress, name=f"export-{run}")
            exported = {"corpus": corpus, "export": export}
            measure = pipeline.step("measure", study.measure, exported, progress, name=f"measure-{run}")
            steps += [("train", train), ("export", export), ("measure", measure)]
            runs.append(Run(contestant=contestant, label=CONTESTANTS[contestant].label, seed=seed, input=run))
            measured[run] = measure
    compare = CompareConfig(title=f"armd run {name}".strip(), runs=tuple(runs), recipe=pipeline.resolved(study))
    return [*steps, ("compare", pipeline.step("compare", compare, {"corpus": corpus, **measured}, progress))]
