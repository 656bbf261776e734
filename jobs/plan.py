"""`armd plan`: what a recipe will need. Runs nothing, starts nothing, writes nothing."""

import dataclasses
import inspect
import json
import os.path
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jobs import costs, options, pipeline
from jobs.recipes import RECIPES, Chosen, Recipe, Study
from jobs.run import choose_recipe, recipes_help
from jobs.terminal import bytes_text, clock_text, count_text
from pipelines import storage
from pipelines.corpus_config import CorpusConfig
from pipelines.errors import UserError
from pipelines.manifest import is_done, read_manifest
from pipelines.train_config import TrainConfig

NAMED_VOCABULARIES = {"gpt2": ("GPT-2", 50_257), "bert-base-uncased": ("BERT", 30_522)}
"""The tokenizers, with their sizes, that recipes name by their folder, for plans made before the folder is there."""

UTILISATION = 0.4
HARDWARE = {"H100 or H200 GPU": 989e12, "A100 GPU": 312e12, "CPU core": 50e9}
"""Peak dense operations a second of one worker: bfloat16 on the GPUs, float32 on the CPU."""


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What `armd plan RECIPE` takes."""

    tokens_per_second: float | None = None
    """Training throughput of all workers together, for the time estimate; None: assume some hardware."""
    root: str = "runs"
    """Where stages would go; a corpus that is there already is read for the number of epochs."""
    json: bool = False
    """Print one JSON object instead."""
    recipe: Chosen = field(default_factory=Recipe)
    """The recipe, every value of which can be changed."""

    def __post_init__(self) -> None:
        storage.check_place(self.root, "root")
        if self.tokens_per_second is not None and not self.tokens_per_second > 0:
            raise ValueError(f"tokens_per_second must be more than 0, not {self.tokens_per_second}")


def main(arguments: Sequence[str]) -> int:
    """Run the command; the exit status."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(
            recipes_help("plan", "What a recipe will need: parameters, FLOPs, memory, steps, disk, time. Runs nothing.")
        )
        return 0 if arguments else 2
    name = arguments[0]
    recipe = choose_recipe(name)
    chosen = options.parse(
        dataclasses.replace(PlanOptions(), recipe=recipe),
        arguments[1:],
        command=f"armd plan {name}",
        description=inspect.getdoc(RECIPES[name]) or "",
    )
    plan = make(chosen.recipe, root=chosen.root, tokens_per_second=chosen.tokens_per_second)
    if chosen.json:
        print(storage.redacted(json.dumps({"recipe": name, **plan})))
    else:
        _print(name, chosen.recipe, plan)
    return 0


def make(recipe: Recipe | Study, *, root: str = "runs", tokens_per_second: float | None = None) -> dict[str, Any]:
    """The plan as JSON values; sizes in bytes, times in seconds; steps, tokens and time are those of all runs together.

    A study's runs are counted as ARMD's, which are the longest.

    Raises:
        UserError: the vocabulary's size cannot be known yet.
    """
    train = recipe.train
    vocab_size, vocabulary = _vocabulary(recipe)
    model = train.architecture.model_config(vocab_size, recipe.corpus.sequence_length)
    bfloat16 = train.dtype == "bfloat16" or (train.dtype == "auto" and _has_gpu())
    n_parameters = costs.parameters(model)
    flops, plain = costs.flops(model), costs.autoregressive_flops(model)
    memory = costs.memory(model, train, n_parameters, bfloat16=bfloat16)
    n_runs = len(recipe.seeds) * len(recipe.contestants) if isinstance(recipe, Study) else 1
    n_tokens = n_runs * costs.tokens(train, recipe.corpus.sequence_length)
    checkpoint = costs.checkpoint_bytes(train, n_parameters, bfloat16=bfloat16)
    corpus = _corpus(recipe.corpus, root)
    corpus_bytes = corpus["tokens"] * (2 if vocab_size <= 1 << 16 else 4) if corpus else None
    # One more checkpoint than are kept is there while the next is written.
    training_bytes = (n_runs * train.keep_checkpoints + 1) * checkpoint
    export_bytes = n_runs * costs.export_bytes(n_parameters)
    again = flops.layers + flops.attention if train.activation_checkpointing else 0.0
    return {
        "config": pipeline.resolved(recipe),
        "vocab_size": vocab_size,
        "vocabulary": vocabulary,
        "parameters": n_parameters,
        "flops_per_token": {
            **dataclasses.asdict(flops),
            "training": flops.training,
            "ratio_to_autoregressive": flops.training / plain.training,
            "ratio_to_autoregressive_layers": flops.layers / plain.layers,
        },
        "dtype": "bfloat16" if bfloat16 else "float32",
        "memory_per_rank": {**dataclasses.asdict(memory), "total": memory.total},
        "runs": n_runs,
        "steps": n_runs * train.total_steps,
        "tokens": n_tokens,
        "epochs": n_tokens / n_runs / corpus["tokens"] if corpus else None,
        "corpus": corpus,
        "checkpoint_bytes": checkpoint,
        "disk": {
            "corpus": corpus_bytes,
            "train": training_bytes,
            "export": export_bytes,
            "total": training_bytes + export_bytes + (corpus_bytes or 0),
        },
        "seconds": _seconds(n_tokens, flops.training + again, train.n_workers, tokens_per_second),
    }


def _seconds(n_tokens: int, flops: float, n_workers: int, tokens_per_second: float | None) -> dict[str, float]:
    """Training time by what it assumes, in words."""
    if tokens_per_second is not None:
        return {f"at {count_text(tokens_per_second)} tokens/s, as given": n_tokens / tokens_per_second}
    cpu_days = n_tokens * flops / (UTILISATION * HARDWARE["CPU core"] * n_workers) / 86_400
    return {
        f"on {n_workers} x {name}, at {UTILISATION:.0%} of {count_text(peak)} FLOP/s": n_tokens
        * flops
        / (UTILISATION * peak * n_workers)
        for name, peak in HARDWARE.items()
        if (name == "CPU core") == (cpu_days < 2)  # a run for GPUs would take years, one for CPUs no time
    }


def _vocabulary(recipe: Recipe | Study) -> tuple[int, str]:
    """The vocabulary's size and where it comes from."""
    given = recipe.corpus.tokenizer
    if given is None:
        return recipe.corpus.vocab_size, "to be trained, at most"
    folder = os.path.basename(given.rstrip("/"))
    if folder in NAMED_VOCABULARIES and storage.is_local(given) and not storage.exists(given):
        name, size = NAMED_VOCABULARIES[folder]
        return size, f"taken as {name}'s {size:,} entries; {given} is not there"
    from pipelines.corpus_tokenizer import given_tokenizer

    return given_tokenizer(given).vocab_size, storage.redacted(given)


def _corpus(config: CorpusConfig, root: str) -> dict[str, Any] | None:
    """Tokens of the training split, when this corpus has been made already."""
    try:
        directory = pipeline.corpus_step(config).directory(storage.absolute(root))
    except UserError:  # the sources are not here: a plan can be made before they are
        return None
    if not is_done(directory):
        return None
    return {"directory": directory, "tokens": read_manifest(directory)["splits"]["train"]["tokens"]}


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _print(name: str, recipe: Recipe | Study, plan: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(title=f"armd plan {name}", title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim")
    for row in _rows(recipe, plan):
        table.add_row(*row)
    console.print(table)
    console.print("\nConfiguration", style="bold")
    for line in _flat(plan["config"]):
        console.print(f"  {storage.redacted(line)}", soft_wrap=True, markup=False)


def _rows(recipe: Recipe | Study, plan: dict[str, Any]) -> list[tuple[str, str, str]]:
    train, flops, memory, disk = recipe.train, plan["flops_per_token"], plan["memory_per_rank"], plan["disk"]
    corpus = plan["corpus"]
    length = recipe.corpus.sequence_length
    rows = [
        ("Parameters", count_text(plan["parameters"]), f"{plan['parameters']:,} exactly"),
        ("Vocabulary", count_text(plan["vocab_size"]), plan["vocabulary"]),
        (
            "FLOPs a token",
            count_text(flops["training"]),
            f"forward and backward; {flops['ratio_to_autoregressive']:.2f}x an autoregressive transformer of this size "
            f"({flops['ratio_to_autoregressive_layers']:.2f}x in the layers)",
        ),
        ("Steps", count_text(plan["steps"]), _steps_note(train, plan["runs"])),
        ("Tokens", count_text(plan["tokens"]), f"{train.batch_size} sequences of {length} tokens a step"),
        (
            "Epochs",
            "unknown" if plan["epochs"] is None else f"{plan['epochs']:.2f}",
            "the corpus has not been made yet"
            if corpus is None
            else f"of the {count_text(corpus['tokens'])} tokens in {storage.redacted(corpus['directory'])}",
        ),
        (
            "Memory a rank",
            bytes_text(memory["total"]),
            f"{train.n_workers} workers, ZeRO stage {train.zero_stage}, {plan['dtype']}, "
            f"micro-batch {train.micro_batch_size}; libraries and buffers come on top",
        ),
    ]
    said = {
        "parameters": "",
        "gradients": "",
        "master": "float32 copy of the weights",
        "moments": "AdamW's",
        "average": "moving average of the weights",
        "activations": "estimate",
        "logits": "estimate",
    }
    rows += [(f"  {part}", bytes_text(memory[part]), note) for part, note in said.items() if memory[part]]
    rows += [
        ("Checkpoint", bytes_text(plan["checkpoint_bytes"]), f"every {train.checkpoint_every:,} steps"),
        ("Disk", bytes_text(disk["total"]), "without the corpus" if disk["corpus"] is None else "with the corpus"),
        ("  checkpoints", bytes_text(disk["train"]), f"{train.keep_checkpoints} kept, and one being written"),
        ("  model", bytes_text(disk["export"]), "exported, float32"),
    ]
    for number, (assumption, seconds) in enumerate(plan["seconds"].items()):
        rows.append(("" if number else "Training time", clock_text(seconds), assumption))
    return rows


def _steps_note(train: TrainConfig, n_runs: int) -> str:
    if n_runs > 1:
        return f"{train.total_steps:,} in each of {n_runs} runs; epochs are those of one run"
    parts = [f"{train.steps:,} {'of permutation' if train.max_shuffled else 'left to right'}"]
    if mixed := train.strided_share + train.infilling_share:
        parts.append(f"{mixed:.0%} of them in streams")
    if train.strided_steps:
        parts.append(f"{train.strided_steps:,} strided")
    return ", ".join(parts)


def _flat(config: dict[str, Any], prefix: str = "--") -> list[str]:
    """The configuration as the options that would set it."""
    lines = []
    for name, value in config.items():
        option = f"{prefix}{name.replace('_', '-')}"
        if isinstance(value, dict):
            lines += _flat(value, f"{option}.")
        else:
            lines.append(f"{option} {' '.join(map(str, value)) if isinstance(value, list) else value}")
    return lines
