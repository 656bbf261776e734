"""What `armd run` says at its end: the numbers, a sample, where things are and what to try next."""

import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines import comparison_table, storage
from pipelines.manifest import read_manifest

SAMPLE_CHARACTERS = 300
SEED = "--train.seed"


def text(root: str, directories: Mapping[str, str], arguments: Sequence[str], seed: int, *, all_reused: bool) -> str:
    """The closing lines of a run.

    Args:
        root: where the run went, absolute.
        directories: the finished stages.
        arguments: what was typed after `armd run`.
        seed: the training seed that was used.
        all_reused: whether nothing had to be run.
    """
    blocks = []
    if all_reused:
        blocks.append("Every stage was already there; nothing was run.")
    if "evaluate" in directories:
        blocks.append(evaluation(directories["evaluate"]))
    if "deploy" in directories:
        blocks.append("\n".join(_deployment(read_manifest(directories["deploy"]))))
    if "compare" in directories:
        blocks.append(comparison(directories["compare"]))
    if {"report", "compare"} & directories.keys():
        blocks.append(f"Report: {storage.redacted(storage.join(root, 'report.html'))}")
    if "export" in directories:
        armd, model = program(), shlex.quote(_shorter(storage.redacted(directories["export"])))
        again = storage.redacted(shlex.join(_with_seed(arguments, seed + 1)))
        blocks.append(
            "Try next:\n"
            f'  {armd} sample {model} --prompt "The" --n-streams 4\n'
            f"  {armd} serve {model}\n"
            f"  {armd} run {again}"
        )
    return "\n\n".join(blocks)


def evaluation(directory: str) -> str:
    """What the finished evaluation in `directory` found."""
    return "\n".join(_evaluation(read_manifest(directory)))


def comparison(directory: str) -> str:
    """What the finished comparison in `directory` found: nats a token under every order, and what that says."""
    contestants = read_manifest(directory)["contestants"]
    head, rows = comparison_table.likelihoods(contestants)
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [
        "  ".join(f"{cell:{'<' if place == 0 else '>'}{widths[place]}}" for place, cell in enumerate(row)).rstrip()
        for row in (head, *rows)
    ]
    return "\n".join(["Held-out nats a token:", *lines, "", *comparison_table.findings(contestants)])


def program() -> str:
    """How this program was called, to be typed again in the same shell."""
    called, interpreter = sys.argv[0], sys.executable
    if os.path.basename(called) == "armd":
        found = shutil.which("armd")
        same = found is not None and os.path.exists(called) and os.path.samefile(found, called)
        path = _shorter(os.path.abspath(called))
        return "armd" if same else shlex.quote(path if os.sep in path else f"./{path}")
    # Compared by name: the interpreter of a virtual environment is a link to one outside it.
    if shutil.which("python") != interpreter:
        return f"{shlex.quote(_shorter(interpreter))} -m jobs"
    return "python -m jobs"


def _shorter(path: str) -> str:
    """An absolute path relative to the current folder where it lies below it; anything else as it is."""
    here = os.path.join(os.getcwd(), "")
    return path.removeprefix(here) if storage.is_local(path) else path


def _with_seed(arguments: Sequence[str], seed: int) -> list[str]:
    """The arguments with another training seed."""
    kept = list(arguments)
    for place, argument in enumerate(kept):
        if argument == SEED:
            kept[place + 1] = str(seed)
            return kept
        if argument.startswith(f"{SEED}="):
            kept[place] = f"{SEED}={seed}"
            return kept
    return [*kept, SEED, str(seed)]


def _evaluation(manifest: Mapping[str, Any]) -> list[str]:
    streams = {int(number): measured for number, measured in manifest["streams"].items()}
    unigram = manifest["unigram"]["perplexity"]
    lines = []
    if 1 in streams:
        perplexity = streams[1]["perplexity"]
        lines.append(
            f"Held-out perplexity {perplexity:.2f}, {streams[1]['bits_per_byte']:.3f} bits per byte; "
            f"the unigram baseline has {unigram:.1f}, {unigram / perplexity:.1f} times as much."
        )
    lines += ["", "  streams  perplexity   sampling"]
    lines += [
        f"  S={number:<6} {measured['perplexity']:>10.2f}   {measured['tokens_per_second']:,.0f} tokens/s"
        for number, measured in sorted(streams.items())
    ]
    sample = _sample(manifest["samples"], max(streams))
    return [*lines, "", *sample] if sample else lines


def _sample(samples: list[dict[str, Any]], n_streams: int) -> list[str]:
    """The prompted sample with the most streams, cut short."""
    chosen = [sample for sample in samples if sample["n_streams"] == n_streams]
    chosen.sort(key=lambda sample: not sample["prompt"])
    if not chosen:
        return []
    written = " ".join((chosen[0]["prompt"] + chosen[0]["text"]).split())
    if len(written) > SAMPLE_CHARACTERS:
        written = written[:SAMPLE_CHARACTERS].rstrip() + " ..."
    return [f"Sample, S={n_streams}, written in {chosen[0]['steps']} steps:", f"  {written}"]


def _deployment(manifest: Mapping[str, Any]) -> list[str]:
    choices = manifest["response"].get("choices", [])
    answer = " ".join(choices[0]["text"].split())[:60] if choices else ""
    asked = f"POST {manifest['url']}/v1/completions"
    return [
        f"HTTP: {asked} answered {manifest['status']} in {manifest['request_seconds']:.2f} s: {answer!r}",
        "The endpoint stays up." if manifest["stays_up"] else "The endpoint ended with this command.",
    ]
