"""What `armd run` says at its end: the numbers, a sample, where things are and what to try next."""

from collections.abc import Mapping
from typing import Any

from pipelines import storage
from pipelines.manifest import read_manifest

SAMPLE_CHARACTERS = 300


def text(recipe: str, root: str, directories: Mapping[str, str], all_reused: bool) -> str:
    """The closing lines of a run below `root` (as typed) whose finished stages are in `directories`."""
    lines = [""]
    if all_reused:
        lines += ["Every stage was already there; nothing was run."]
    if "evaluate" in directories:
        lines += _evaluation(read_manifest(directories["evaluate"]))
    if "deploy" in directories:
        lines += ["", *_deployment(read_manifest(directories["deploy"]))]
    if "report" in directories:
        lines += ["", f"Report: {storage.join(root, 'report.html')}"]
    if "export" in directories:
        model = storage.redacted(directories["export"])
        lines += [
            "",
            "Try next:",
            f'  armd sample {model} --prompt "The" --n-streams 4',
            f"  armd serve {model}",
            f"  armd run {recipe} --train.seed 1{'' if root == 'runs' else f' --root {root}'}",
        ]
    return "\n".join(lines).strip("\n")


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
