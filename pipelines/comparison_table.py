"""A comparison's tables and findings as rows of text: for the terminal, for Markdown and for the page."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.compare import difference, perplexity_ratio

Row = list[str]

WITHIN = {"2": 0.03, "4": 0.07}
"""What the paper has parallel sampling cost at most after strided fine-tuning: perplexity above S=1, by S."""


def likelihoods(contestants: Sequence[Mapping[str, Any]]) -> tuple[Row, list[Row]]:
    """(head, rows): nats a token under every order, mean and deviation over seeds."""
    streams = _stream_names(contestants)
    head = ["", "left to right", *(f"S={name}" for name in streams), "random orders", "weighted bound", "ELBO"]
    rows = []
    for one in contestants:
        parallel = [one["streams"].get(name, {}).get("nats_per_token") for name in streams]
        cells = [one["left_to_right"], *parallel, one["random_mean"], one["random_weighted"], one["elbo"]]
        rows.append([one["label"], *map(with_spread, cells)])
    return head, rows


def gaps(contestants: Sequence[Mapping[str, Any]]) -> tuple[Row, list[Row]]:
    """(head, rows): for every S what the order costs, what parallel tokens cost on top, and a stream's cost c."""
    head = ["", "S", "perplexity above S=1", "order gap", "independence gap", "c, nats a stream"]
    rows = []
    for one in contestants:
        for name, measured in _streams(one):
            above = difference(measured["nats_per_token"], one["left_to_right"])
            rows.append(
                [
                    one["label"],
                    name,
                    _more_perplexity(above),
                    with_spread(measured["order_gap"]),
                    with_spread(measured["independence_gap"]),
                    with_spread(measured["cost_of_a_stream"], 2),
                ]
            )
    return head, rows


def findings(contestants: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each thing that the paper expects and this study can tell."""
    by_name = {one["name"]: one for one in contestants}
    lines = []
    baseline = by_name.get("autoregressive")
    if baseline and (plain := by_name.get("left-to-right")):
        gap = difference(plain["left_to_right"], baseline["left_to_right"])
        lines.append(
            f"ARMD without permutation against the autoregressive model: {with_spread(gap, sign=True)} nats a token "
            f"(expected: at or below)."
        )
    if baseline and (diffusion := by_name.get("masked-diffusion")):
        gap = difference(diffusion["elbo"], baseline["left_to_right"])
        lines.append(
            f"Masked diffusion's bound against the autoregressive model: {with_spread(gap, sign=True)} nats a token "
            f"(expected: far above)."
        )
    for one in contestants:
        if one["name"].startswith(("rho-", "mixed")):
            lines += _within(one)
    if (mixed := by_name.get("mixed")) and (paper := by_name.get("rho-8")):
        orders = [("left to right", mixed["left_to_right"], paper["left_to_right"])]
        orders += [
            (f"S={name}", mixed["streams"][name]["nats_per_token"], paper["streams"][name]["nats_per_token"])
            for name, _ in _streams(mixed)
        ]
        said = ", ".join(f"{name} {with_spread(difference(a, b), sign=True)}" for name, a, b in orders)
        lines.append(f"The mixed recipe against rho=8 and a strided phase, nats a token: {said}.")
    return lines


def markdown(contestants: Sequence[Mapping[str, Any]]) -> str:
    """Both tables and the findings."""
    first = contestants[0]
    n_seeds = max(len(one["seeds"]) for one in contestants)
    about = f"{first['windows']:,} held-out windows of {first['window_tokens']:,} tokens, {n_seeds} seed(s)."
    parts = [
        f"Nats a token, mean and standard deviation over seeds; {about}",
        _markdown(*likelihoods(contestants)),
        "What writing in parallel costs.",
        _markdown(*gaps(contestants)),
        "\n".join(f"* {line}" for line in findings(contestants)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def with_spread(found: Mapping[str, Any] | None, digits: int = 3, *, sign: bool = False) -> str:
    """1.746 +- 0.004; the mean alone where there is one seed, nothing where nothing was measured."""
    if found is None:
        return ""
    rounded = round(found["mean"], digits) + 0.0  # no "-0.000"
    mean = f"{rounded:{'+' if sign else ''}.{digits}f}"
    return mean if found["deviation"] is None else f"{mean} +- {found['deviation']:.{digits}f}"


def _more_perplexity(above: Mapping[str, Any]) -> str:
    """+2.1% +- 0.1%: how much more perplexity so many nats a token more are."""
    found = [perplexity_ratio(nats) for nats in above["values"]]
    spread = f" +- {statistics.stdev(found):.1%}" if len(found) > 1 else ""
    return f"{perplexity_ratio(above['mean']):+.1%}{spread}"


def _within(one: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, most in WITHIN.items():
        if name in one["streams"]:
            above = difference(one["streams"][name]["nats_per_token"], one["left_to_right"])
            share = perplexity_ratio(above["mean"])
            verdict = "within" if share <= most else "more than"
            cost = _more_perplexity(above)
            lines.append(f"{one['label']}: S={name} costs {cost} perplexity, {verdict} the {most:.0%} expected.")
    return lines


def _streams(one: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """What was measured for every S, ascending; a manifest's JSON sorts its keys as words."""
    return sorted(one["streams"].items(), key=lambda item: int(item[0]))


def _stream_names(contestants: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every S that was measured, ascending."""
    return sorted({name for one in contestants for name in one["streams"]}, key=int)


def _markdown(head: Row, rows: Sequence[Row]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)
