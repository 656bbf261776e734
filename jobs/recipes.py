"""Runs as Python functions: the whole configuration, and a docstring that says what it costs and what it should give.

A `Recipe` takes one model from text to an endpoint, a `Study` trains several on one corpus and compares them.

A recipe's docstring is a claim: command, hardware, time, expected metric. Everything can be overridden on the command
line, `armd run demo --train.steps 100`.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from armd.config import ARCHITECTURES, Architecture
from jobs.contestants import CONTESTANTS, DEFAULT_CONTESTANTS
from pipelines.corpus_config import CorpusConfig
from pipelines.evaluate import EvaluateConfig
from pipelines.export import ExportConfig
from pipelines.measure import MeasureConfig
from pipelines.serving.config import DeployConfig
from pipelines.train_config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The configuration of every stage."""

    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    """Text and tokenizer."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Model, schedules, optimiser, workers."""
    export: ExportConfig = field(default_factory=ExportConfig)
    """The check of the exported model."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """What is measured on held-out text, and the samples."""
    deploy: DeployConfig = field(default_factory=DeployConfig)
    """The HTTP endpoint."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """The configuration of a comparison: every contestant is trained once with every seed.

    Raises:
        ValueError: naming the field and the value that does not fit.
    """

    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    """Text and tokenizer, the same for all."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """What the contestants have in common; each changes the model or the schedule of orders, never data or steps."""
    contestants: tuple[str, ...] = DEFAULT_CONTESTANTS
    """What is compared, by name; the first one is what the others are measured against."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds of the weights and the order of the data, one a run."""
    export: ExportConfig = field(default_factory=ExportConfig)
    """The check of each exported model."""
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    """What is measured on each."""

    def __post_init__(self) -> None:
        if self.train.model != "armd":
            raise ValueError(f"model must be armd in a study, whose contestants set it, not {self.train.model}")
        if self.train.seed:
            raise ValueError(f"seed must be 0 in a study, whose seeds set it, not {self.train.seed}")
        for name in ("max_shuffled", "strided_share", "infilling_share", "mix_after"):
            value, default = getattr(self.train, name), TrainConfig.__dataclass_fields__[name].default
            if value != default:
                raise ValueError(f"{name} must be {default} in a study, whose contestants set it, not {value}")
        for name in ("contestants", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must be one or more, each once, not {values}")
        for name in self.contestants:
            if name not in CONTESTANTS:
                raise ValueError(f"contestants must be among {', '.join(CONTESTANTS)}, not {name!r}")


Chosen = Annotated[Recipe | Study, tyro.conf.arg(name=""), tyro.conf.AvoidSubcommands]
"""A field of a command's options that holds a recipe, whose own fields are options of the command."""


def demo() -> Recipe:
    """The whole pipeline in minutes: a tiny model of Python's own documentation.

    Command: armd run demo
    Hardware: 2 CPU cores, 4 GB of memory; no network, no GPU, no compiler.
    Time: 5 minutes.
    Expect: held-out perplexity 41 (the unigram baseline has 525), S=4 4% above S=1 at nearly three times its speed.
    """
    return Recipe(
        corpus=CorpusConfig(sources=("python-docs",), vocab_size=2048, sequence_length=512),
        train=TrainConfig(
            architecture=ARCHITECTURES["tiny"],
            batch_size=4,
            micro_batch_size=2,
            n_workers=2,
            zero_stage=2,
            steps=600,
            strided_steps=400,
            ar_steps=20,
            permutation_steps=100,
            max_shuffled=8,
            learning_rate=3e-3,
            warmup_steps=50,
            log_every=10,
            validate_every=200,
            validation_windows=54,
            checkpoint_every=200,
        ),
        evaluate=EvaluateConfig(prompts=("Return the",), temperature=0.9, top_p=1.0),
    )


def small() -> Recipe:
    """The paper's 125M model on OpenWebText.

    Command: armd run small --corpus.sources DIR --corpus.tokenizer DIR
    Needs: OpenWebText as .jsonl or .parquet files with a `text` field in data/openwebtext, or from the hub
        (--corpus.sources datasets:Skylion007/openwebtext); GPT-2's encoder.json and vocab.bpe in data/gpt2; or other
        places, by the two options above.
    Hardware: 8 GPUs of 80 GB.
    Time: `armd plan small` works it out from your throughput; 215 G tokens.
    Expect: zero-shot perplexity as the paper's ARMD small (400k): WikiText103 35.15, LAMBADA 45.35. Not yet run here.
    """
    return Recipe(
        corpus=CorpusConfig(sources=("data/openwebtext",), tokenizer="data/gpt2", sequence_length=1024),
        train=TrainConfig(
            architecture=ARCHITECTURES["small"],
            batch_size=512,
            micro_batch_size=16,
            n_workers=8,
            zero_stage=2,
            steps=400_000,
            strided_steps=10_000,
            ar_steps=9_000,
            permutation_steps=48_000,
            max_shuffled=32,
            learning_rate=3e-4,
            warmup_steps=2_500,
            dtype="bfloat16",
            device="gpu",
            wait_for_nodes=1_200.0,
        ),
        evaluate=EvaluateConfig(max_windows=1024, sample_tokens=1023),
    )


def medium() -> Recipe:
    """The paper's 345M model on OpenWebText.

    Command: armd run medium --corpus.sources DIR --corpus.tokenizer DIR
    Needs: as `small`.
    Hardware: 16 GPUs of 80 GB.
    Time: `armd plan medium` works it out from your throughput; 163 G tokens.
    Expect: zero-shot perplexity as the paper's ARMD medium (300k): WikiText103 25.55, LAMBADA 39.08. Not yet run here.
    """
    base = small()
    train = dataclasses.replace(
        base.train,
        architecture=ARCHITECTURES["medium"],
        steps=300_000,
        micro_batch_size=8,
        n_workers=16,
        zero_stage=2,
    )
    return dataclasses.replace(base, train=train)


def lm1b() -> Recipe:
    """The paper's One Billion Word run: 125M parameters, length 128.

    Command: armd run lm1b --corpus.sources DIR --corpus.tokenizer DIR
    Needs: LM1B as .txt files, a sentence a line, or .jsonl or .parquet files in data/lm1b, or a data set of the hub
        (--corpus.sources datasets:NAME); BERT's vocab.txt in data/bert-base-uncased; or other places, by the two
        options above.
    Hardware: 8 GPUs of 80 GB.
    Time: `armd plan lm1b` works it out from your throughput; 66 G tokens.
    Expect: test perplexity 22.36 (the paper, 1M steps). Not yet run here.
    """
    base = small()
    corpus = CorpusConfig(
        sources=("data/lm1b",),
        tokenizer="data/bert-base-uncased",
        sequence_length=128,
        document_separator="\n",
        detokenizer="lm1b",
        formation="lm1b-wrap",
    )
    train = dataclasses.replace(
        base.train,
        micro_batch_size=64,
        steps=1_000_000,
        ar_steps=100_000,
        max_shuffled=8,
        permutation_steps=300_000,
    )
    return Recipe(corpus=corpus, train=train, evaluate=EvaluateConfig(max_windows=4096, sample_tokens=127))


def replicate() -> Study:
    """The paper's comparison at small scale: ARMD's recipes against both baselines, same data, same tokens, with seeds.

    Command: armd run replicate --corpus.sources FILES
    Hardware: 2 CPU cores, 4 GB of memory; no network, no GPU.
    Time: 90 minutes; 2.2M parameters, 16 runs of 0.9M tokens; it can be stopped and started again at any moment.
    Expect: ARMD left to right within 3% of the autoregressive model's perplexity; with rho=8 or mixed, S=2 within 3%
    and S=4 within 8% of its perplexity at S=1; masked diffusion far behind. docs/benchmarks.md has the table with its
    spread.
    """
    return Study(
        corpus=CorpusConfig(sources=("python-docs",), vocab_size=2048, sequence_length=128),
        train=TrainConfig(
            architecture=Architecture(n_layers=4, n_two_stream_layers=2, d_model=192, n_heads=6, d_prefix=32),
            batch_size=8,
            micro_batch_size=4,
            n_workers=2,
            steps=630,
            strided_steps=270,
            ar_steps=18,
            permutation_steps=108,
            learning_rate=3e-3,
            warmup_steps=100,
            log_every=25,
            validate_every=500,
            validation_windows=128,
            checkpoint_every=500,
        ),
    )


RECIPES: dict[str, Callable[[], Recipe | Study]] = {
    "demo": demo,
    "small": small,
    "medium": medium,
    "lm1b": lm1b,
    "replicate": replicate,
}
"""Recipes by the name that the command line takes."""
