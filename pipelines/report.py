"""The report: one HTML file, complete in itself, that shows a run to a person."""

import importlib.resources
import json
import os
import string
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines import report_charts as charts
from pipelines import report_corpus, storage
from pipelines import report_sections as sections
from pipelines.manifest import read_manifest, versions, write_manifest
from pipelines.metrics import read_metrics
from pipelines.progress import Progress, silent
from pipelines.report_charts import short
from pipelines.report_sections import duration, escape, figure

NAME = "report.html"
COMMIT_VARIABLE = "ARMD_COMMIT"
STAGES = ("corpus", "train", "export", "evaluate", "deploy")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What the report says beyond what the stages' manifests hold."""

    title: str = "armd run"
    """The heading."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """The resolved configuration of all stages, as plain JSON values."""


def run(
    config: ReportConfig, inputs: Mapping[str, str], output_dir: str, progress: Progress = silent
) -> dict[str, Any]:
    """Write report.html from the finished stages in `inputs`.

    Returns:
        The manifest: {"path": "report.html", "bytes": its size, "commit": the source's commit or None}.

    Raises:
        UserError: a stage has not finished.
    """
    started = time.time()
    progress.update(0, 1, "reports")
    manifests = {name: read_manifest(inputs[name]) for name in STAGES}
    metrics = read_metrics(inputs["train"])
    commit = source_commit()
    page = render(config, manifests, {name: inputs[name] for name in STAGES}, metrics, commit)
    storage.make_dir(output_dir)
    storage.write_text(storage.join(output_dir, NAME), page)
    progress.update(1, 1, "reports")
    body = {"path": NAME, "bytes": len(page.encode("utf-8")), "commit": commit}
    return write_manifest(output_dir, "report", body, started)


def source_commit() -> str | None:
    """The commit of the source tree that runs, with "+" where files differ from it; None outside a git checkout.

    A submitted job runs in a copy without git's history; there the environment variable ARMD_COMMIT says it.
    """
    if told := os.environ.get(COMMIT_VARIABLE):
        return told
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "--short=12", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changed else "")


def render(
    config: ReportConfig,
    manifests: Mapping[str, Mapping[str, Any]],
    directories: Mapping[str, str],
    metrics: list[dict[str, Any]],
    commit: str | None,
) -> str:
    """The page. Pure: the same arguments give the same text."""
    evaluation, train = manifests["evaluate"], config.recipe["train"]
    places = {name: storage.redacted(directory) for name, directory in directories.items()}
    page = fill(
        "report_page.html",
        title=escape(config.title),
        subtitle=_subtitle(manifests, commit),
        figures="\n".join(_figures(manifests, train)),
        training_note=_training_note(train),
        training_chart=charts.training_chart(metrics, train, evaluation["unigram"]["nats_per_token"]),
        streams_note=_streams_note(evaluation),
        streams_chart=charts.streams_chart(evaluation["streams"]),
        streams_table=sections.streams_table(evaluation["streams"], evaluation["unigram"]),
        samples_note=_samples_note(evaluation),
        samples=sections.samples(evaluation["samples"]),
        served_note=_served_note(manifests["deploy"]),
        served=sections.served(manifests["deploy"]),
        corpus=report_corpus.section(manifests["corpus"], config.recipe["corpus"]),
        stages_note=_stages_note(manifests),
        stages=sections.stages(manifests, places),
        versions=_versions(manifests["train"], commit),
        config=escape(json.dumps(config.recipe, indent=2, ensure_ascii=False)),
    )
    return storage.redacted(page)


def fill(template: str, *, title: str, subtitle: str, **parts: str) -> str:
    """A page of this package: its frame and style, and `parts`, which are HTML, in the places of `template`."""
    folder = importlib.resources.files("pipelines")

    def filled(name: str, places: Mapping[str, str]) -> str:
        return string.Template(folder.joinpath(name).read_text(encoding="utf-8")).substitute(places)

    frame = {"title": title, "subtitle": subtitle, "armd_version": escape(versions()["armd"] or "from source")}
    frame["style"] = filled("report_style.css", sections.ramp())
    return filled("page_frame.html", {**frame, "body": filled(template, parts)})


def _subtitle(manifests: Mapping[str, Mapping[str, Any]], commit: str | None) -> str:
    train = manifests["train"]
    when = train["started"][:16].replace("T", " ")
    source = f", commit {commit}" if commit else ""
    return escape(f"{when} UTC on {train['host']}{source}")


def _figures(manifests: Mapping[str, Mapping[str, Any]], train: Mapping[str, Any]) -> list[str]:
    streams, unigram = manifests["evaluate"]["streams"], manifests["evaluate"]["unigram"]
    trained = manifests["train"]
    first, last = next(iter(streams)), next(reversed(streams))
    base, most = streams[first], streams[last]
    shape = train["architecture"]
    return [
        figure(
            "Held-out perplexity",
            f"{base['perplexity']:.3g}",
            "",
            f"{unigram['perplexity'] / base['perplexity']:.1f} times below the unigram baseline's "
            f"{unigram['perplexity']:.3g}",
        ),
        figure("Bits a byte", f"{base['bits_per_byte']:.3f}", "", f"over {base['tokens']:,} held-out tokens"),
        figure(
            f"S={last} against S={first}",
            f"{most['tokens_per_second'] / base['tokens_per_second']:.2f}x",
            "",
            f"the speed, at {most['perplexity'] / base['perplexity'] - 1:+.1%} perplexity",
        ),
        figure(
            "Parameters",
            short(trained["parameters"]),
            "",
            f"{shape['n_layers']} layers, width {shape['d_model']}, {shape['n_heads']} heads",
        ),
        figure("Trained on", short(trained["tokens"]), "tokens", f"{trained['steps']:,} steps"),
        figure(
            "Training speed",
            short(trained["tokens_per_second"]),
            "tokens/s",
            f"{_count(trained['world_size'], 'worker')}, ZeRO stage {trained['zero_stage']}",
        ),
    ]


def _training_note(train: Mapping[str, Any]) -> str:
    parts = [f"{train['batch_size']} sequences a step."]
    if train["max_shuffled"]:
        parts.append(
            f"Left to right for {train['ar_steps']:,} steps; then up to {train['max_shuffled']} ranks of each sequence "
            f"are shuffled, all of them from step {train['permutation_steps']:,}."
        )
    streams = ", ".join(str(n) for n in train["streams"])
    shares = [
        f"{train[f'{kind}_share']:.0%} of the steps are {kind}"
        for kind in ("strided", "infilling")
        if train[f"{kind}_share"]
    ]
    if shares:
        parts.append(f"After {train['mix_after']:,} steps {' and '.join(shares)}, with S of {streams}.")
    if train["strided_steps"]:
        parts.append(f"The last {train['strided_steps']:,} steps train strided orders with S of {streams}.")
    return escape(" ".join(parts))


def _streams_note(evaluation: Mapping[str, Any]) -> str:
    return escape(
        f"{evaluation['windows']:,} held-out windows of {evaluation['window_tokens']:,} tokens, each token predicted "
        f"once, in the order that sampling with S streams has. Speed: one text at a time, the median of "
        f"{_count(evaluation['repeats'], 'run')}, on {evaluation['device']}."
    )


def _samples_note(evaluation: Mapping[str, Any]) -> str:
    return escape(
        f"Each token's colour is the step at which it was written (the pointer shows its number); prompts are grey. "
        f"Temperature {evaluation['temperature']:g}, top-p {evaluation['top_p']:g}."
    )


def _served_note(deploy: Mapping[str, Any]) -> str:
    fate = "It is still up." if deploy["stays_up"] else "It ended with the command; armd serve starts it again."
    times = f"up after {duration(deploy['start_seconds'])}, answered in {duration(deploy['request_seconds'])}"
    return escape(f"One real HTTP request: {times}. {fate}")


def _versions(train: Mapping[str, Any], commit: str | None) -> str:
    found = [("commit", commit or "not a git checkout"), *train["versions"].items()]
    rows = [[escape(name), f"<code>{escape(version)}</code>"] for name, version in found if version]
    return sections.table((), rows)


def _stages_note(manifests: Mapping[str, Mapping[str, Any]]) -> str:
    total = duration(sum(one["seconds"] for one in manifests.values()))
    return escape(f"{total} in all. Idle time between stages is left out of the bars.")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()
