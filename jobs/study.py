"""A study as steps: corpus -> (train -> export -> measure) for every contestant and seed -> compare."""

import dataclasses
from collections.abc import Callable

from jobs import pipeline
from jobs.contestants import CONTESTANTS
from jobs.graph import Step
from jobs.recipes import Study
from pipelines.progress import Progress, silent

STAGES = ("corpus", "train", "export", "measure", "compare")
"""The stages in the order in which they run; `--until` stops after one of them."""


def build(
    study: Study, name: str = "", progress: Callable[[str], Progress] = lambda stage: silent
) -> dict[str, list[Step]]:
    """The steps of `study` by stage; the steps of one seed come before those of the next.

    Looks at the sources, since their state belongs to the corpus stage's identity; starts nothing.

    Args:
        study: the configuration.
        name: the study's name, for the report.
        progress: gives the `Progress` of a step by its name.

    Raises:
        UserError: a source does not exist, or holds nothing.
    """
    from pipelines import compare

    corpus = pipeline.corpus_step(study.corpus, progress)
    steps: dict[str, list[Step]] = {stage: [] for stage in STAGES}
    steps["corpus"].append(corpus)
    runs = []
    measured = {}
    for seed in study.seeds:
        for contestant in study.contestants:
            which = f"{contestant}-{seed}"
            config = dataclasses.replace(CONTESTANTS[contestant].train(study.train), seed=seed)
            train = pipeline.step("train", config, {"corpus": corpus}, progress, name=f"train-{which}")
            inputs = {"corpus": corpus, "train": train}
            export = pipeline.step("export", study.export, inputs, progress, name=f"export-{which}")
            inputs = {"corpus": corpus, "export": export}
            measure = pipeline.step("measure", study.measure, inputs, progress, name=f"measure-{which}")
            for stage, step in (("train", train), ("export", export), ("measure", measure)):
                steps[stage].append(step)
            measured[which] = measure
            label = CONTESTANTS[contestant].label
            runs.append(compare.Run(contestant=contestant, label=label, seed=seed, input=which))
    config = compare.CompareConfig(title=f"armd run {name}".strip(), runs=tuple(runs), recipe=pipeline.resolved(study))
    steps["compare"].append(pipeline.step("compare", config, {"corpus": corpus, **measured}, progress))
    return steps
