"""A study as a graph: every contestant once with every seed on the same data; what it ran is never run again."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from jobs import pipeline, study
from jobs.cli import main
from jobs.contestants import CONTESTANTS
from jobs.graph import Step
from jobs.recipes import Study, replicate
from pipelines.corpus_config import CorpusConfig
from pipelines.manifest import read_manifest

SMALL = dataclasses.replace(replicate(), contestants=("autoregressive", "rho-8", "mixed"), seeds=(0, 5))


@pytest.fixture
def corpus(tmp_path: Path) -> CorpusConfig:
    source = tmp_path / "text.txt"
    source.write_text("some text\n" * 50)
    return CorpusConfig(sources=(str(source),), vocab_size=300, sequence_length=16)


def steps_of(config: Study) -> dict[str, Step]:
    return {step.name: step for _, step in study.build(config)}


def test_every_contestant_is_trained_measured_and_compared(corpus: CorpusConfig) -> None:
    config = dataclasses.replace(SMALL, corpus=corpus)
    pairs = study.build(config)
    runs = [f"{name}-{seed}" for seed in (0, 5) for name in SMALL.contestants]
    stages = ("train", "export", "measure")
    assert [step.name for _, step in pairs] == [
        "corpus",
        *(f"{stage}-{run}" for run in runs for stage in stages),
        "compare",
    ]
    assert all(stage in study.STAGES and step.name.startswith(stage) for stage, step in pairs)
    steps = steps_of(config)
    assert len({step.hash for step in steps.values()}) == len(steps)
    assert [step.name for step in steps["compare"].dependencies] == ["corpus", *(f"measure-{run}" for run in runs)]
    assert [step.name for step in steps["measure-mixed-5"].dependencies] == ["corpus", "export-mixed-5"]
    assert [step.name for step in steps["export-mixed-5"].dependencies] == ["corpus", "train-mixed-5"]


def test_a_larger_study_reuses_the_smaller_ones_runs(corpus: CorpusConfig) -> None:
    """Fails with the list of contestants in a training step's identity."""
    small = steps_of(dataclasses.replace(SMALL, corpus=corpus))
    large = steps_of(dataclasses.replace(replicate(), corpus=corpus, seeds=(5, 0, 1)))
    assert {name: step.hash for name, step in small.items() if name != "compare"}.items() <= {
        name: step.hash for name, step in large.items()
    }.items()
    assert small["compare"].hash != large["compare"].hash


def test_contestants_differ_in_model_and_orders_alone() -> None:
    """Equal data, steps, batch, optimiser and widths: what the paper compares."""
    shared = dataclasses.replace(replicate().train, activation_checkpointing=True)
    own = {
        "model",
        "steps",
        "strided_steps",
        "max_shuffled",
        "streams",
        "strided_share",
        "infilling_share",
        "mix_after",
        "architecture",
        "activation_checkpointing",
    }
    plain = {name: value for name, value in dataclasses.asdict(shared).items() if name not in own}
    for name, contestant in CONTESTANTS.items():
        config = contestant.train(shared)
        fields = dataclasses.asdict(config)
        assert {field: value for field, value in fields.items() if field not in own} == plain, name
        assert config.total_steps == shared.total_steps, name
        own_shape = {key: getattr(shared.architecture, key) for key in ("n_two_stream_layers", "n_neighbours")}
        assert dataclasses.replace(config.architecture, **own_shape) == shared.architecture, name
    changed = {name: contestant.train(shared) for name, contestant in CONTESTANTS.items()}
    assert len(set(map(repr, changed.values()))) == len(changed), "two contestants are the same"
    assert changed["autoregressive"].model == "autoregressive"
    assert changed["masked-diffusion"].model == "masked_diffusion"
    assert not changed["left-to-right"].teaches_streams
    assert [changed[f"rho-{rho}"].max_shuffled for rho in (0, 8, 32)] == [0, 8, 32]
    assert changed["mixed"].strided_share == 0.5
    assert changed["mixed-no-neighbours"].architecture.n_neighbours == 0
    assert changed["mixed"].mix_after == shared.total_steps // 10


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--contestants", "mixe"], "--contestants must be among"),
        (["--contestants", "mixed", "mixed"], "--contestants must be one or more, each once"),
        (["--seeds"], "--seeds"),
        (["--seeds", "1", "1"], "--seeds must be one or more, each once"),
        (["--train.max-shuffled", "16"], "--train.max-shuffled must be 32 in a study"),
        (["--train.strided-share", "0.5"], "--train.strided-share must be 0.0 in a study"),
        (["--train.seed", "3"], "--train.seed must be 0 in a study"),
        (["--train.model", "autoregressive"], "--train.model must be armd in a study"),
        (["--until", "deploy"], "--until must be one of this recipe's stages"),
    ],
)
def test_bad_settings_are_two_lines(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "replicate", *arguments]) == 2
    what, fix = capsys.readouterr().err.strip().splitlines()
    assert said in what
    assert fix.startswith("fix: ")


def test_a_plan_counts_every_run(capsys: pytest.CaptureFixture[str]) -> None:
    from jobs import plan

    one = plan.make(dataclasses.replace(SMALL, contestants=("mixed",), seeds=(0,)))
    six = plan.make(SMALL)
    assert six["runs"] == 6
    for name in ("steps", "tokens"):
        assert six[name] == 6 * one[name]
    assert six["disk"]["export"] == 6 * one["disk"]["export"]
    assert six["memory_per_rank"] == one["memory_per_rank"]
    assert main(["plan", "replicate", "--seeds", "0"]) == 0
    assert "900 in each of 8 runs" in capsys.readouterr().out


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_study_from_text_to_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Real stages, in little; a second command finds everything, one with another contestant runs only that."""
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.3")
    for name, first in (("train", 0), ("held-out", 1000)):
        lines = (f"The {n}th of many lines, none of which says much at all." for n in range(first, first + 400))
        (tmp_path / f"{name}.txt").write_text("\n\n".join(lines))
    options = f"""
        --root {tmp_path}/runs --seeds 0 --train.n-workers 1 --train.warmup-steps 1 --train.architecture.d-model 24
        --corpus.sources {tmp_path}/train.txt --corpus.validation-sources {tmp_path}/held-out.txt
        --corpus.vocab-size 300 --corpus.sequence-length 32
        --train.steps 4 --train.strided-steps 2 --train.ar-steps 1 --train.permutation-steps 2
        --measure.max-windows 4 --measure.random-orders 2 --measure.noise-draws 1"""
    command = ["run", "replicate", *options.split()]
    assert main([*command, "--contestants", "autoregressive", "mixed"]) == 0
    said = capsys.readouterr().out
    assert "S=2" in said
    assert (tmp_path / "runs" / "report.html").read_text().count("<svg") == 4
    (compared,) = (tmp_path / "runs").glob("compare-*")
    names = [one["name"] for one in read_manifest(str(compared))["contestants"]]
    assert names == ["autoregressive", "mixed"]
    assert main([*command, "--contestants", "autoregressive", "mixed"]) == 0
    assert "nothing was run" in capsys.readouterr().out


def test_the_stages_are_modules() -> None:
    for stage in study.STAGES:
        assert callable(pipeline._module(stage).run)
