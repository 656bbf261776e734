"""The comparison of a study: what every contestant measured, as a table with its spread over seeds, and as a page.

comparison.json holds the numbers, comparison.md the tables for people, report.html the tables and charts.
"""

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipelines import storage
from pipelines.manifest import read_manifest, write_manifest
from pipelines.progress import Progress, silent
from pipelines.report import NAME as REPORT
from pipelines.report import source_commit

NAME = "comparison.json"
TABLE = "comparison.md"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One trained and measured model."""

    contestant: str
    """The contestant's name."""
    label: str
    """What people read."""
    seed: int
    """Its seed."""
    input: str
    """The name of its measurement among the stage's inputs."""


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """What the comparison needs to know besides its inputs."""

    title: str = "armd run"
    """The page's heading."""
    runs: tuple[Run, ...] = ()
    """The runs, the contestant that the others are measured against first."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """The resolved configuration of the study, as plain JSON values."""


def run(
    config: CompareConfig, inputs: Mapping[str, str], output_dir: str, progress: Progress = silent
) -> dict[str, Any]:
    """Compare the finished measurements in `inputs`.

    Returns:
        The manifest: contestants in the order of the table, each with its label, parameters, seeds and measures.

    Raises:
        UserError: a measurement has not finished.
    """
    from pipelines import comparison_page, comparison_table

    started = time.time()
    measured = {one.input: read_manifest(inputs[one.input]) for one in config.runs}
    contestants = gather(config.runs, measured)
    body = {"contestants": contestants, "commit": source_commit()}
    corpus = read_manifest(inputs["corpus"])
    storage.make_dir(output_dir)
    storage.write_json(storage.join(output_dir, NAME), body)
    storage.write_text(storage.join(output_dir, TABLE), comparison_table.markdown(contestants))
    storage.write_text(storage.join(output_dir, REPORT), comparison_page.render(config, body, corpus))
    progress.update(1, 1, "tables")
    return write_manifest(output_dir, "compare", body, started)


def gather(runs: Sequence[Run], measured: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The measures of each contestant over its seeds, in nats a token; contestants in the order of `runs`."""
    found: dict[str, list[Run]] = {}
    for one in runs:
        found.setdefault(one.contestant, []).append(one)
    contestants = []
    for name, group in found.items():
        results = [measured[one.input] for one in group]
        contestants.append(
            {
                "name": name,
                "label": group[0].label,
                "seeds": [one.seed for one in group],
                "model": results[0]["model"],
                "parameters": results[0]["parameters"],
                "windows": results[0]["windows"],
                "window_tokens": results[0]["window_tokens"],
                "left_to_right": spread([one.get("left_to_right") for one in results]),
                "elbo": spread([one.get("elbo") for one in results]),
                "random_mean": spread([one.get("random_orders", {}).get("mean") for one in results]),
                "random_weighted": spread([one.get("random_orders", {}).get("weighted") for one in results]),
                "streams": {
                    n_streams: _streams([one["streams"][n_streams] for one in results])
                    for n_streams in results[0].get("streams", {})
                },
            }
        )
    return contestants


def spread(values: Sequence[float | None]) -> dict[str, Any] | None:
    """Mean and standard deviation (of the sample; None of a single one) of one number over seeds, and the values."""
    there = [value for value in values if value is not None]
    if not there:
        return None
    deviation = statistics.stdev(there) if len(there) > 1 else None
    return {"mean": statistics.fmean(there), "deviation": deviation, "values": there}


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """`one` less `other`, seed by seed where both have the same number of them, else of the means."""
    if len(one["values"]) == len(other["values"]):
        found = spread([a - b for a, b in zip(one["values"], other["values"], strict=True)])
    else:
        found = spread([one["mean"] - other["mean"]])
    assert found is not None
    return found


def perplexity_ratio(nats: float) -> float:
    """How much more perplexity a difference of `nats` a token is, as a share: 0.03 is 3%."""
    return math.expm1(nats)


def _streams(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    measures = ("nats_per_token", "one_by_one", "order_gap", "independence_gap", "cost_of_a_stream")
    places = zip(*(one["by_place"] for one in results), strict=True)
    return {
        **{name: spread([one[name] for one in results]) for name in measures},
        "by_place": [statistics.fmean(values) for values in places],
    }
