"""A comparison as one HTML file, complete in itself."""

import json
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from pipelines import comparison_table, report, storage
from pipelines.report_charts import LINE_STYLES, MUTED, chart
from pipelines.report_sections import escape, table

if TYPE_CHECKING:
    from pipelines.compare import CompareConfig

PLACES_OF = "4"
"""The number of streams whose curve by place is drawn, if it was measured."""

UNTAUGHT = 0.5
"""Nats a token that the fewest streams may cost; a model above it was taught none, and would flatten the charts."""

_DASHES = ((0, (4, 3)), (0, (1, 2)), (0, (6, 2, 1, 2)))


def render(config: "CompareConfig", body: Mapping[str, Any], corpus: Mapping[str, Any]) -> str:
    """The page. Pure: the same arguments give the same text."""
    contestants = body["contestants"]
    by_order, costs = comparison_table.likelihoods(contestants), comparison_table.gaps(contestants)
    page = report.fill(
        "comparison_page.html",
        title=escape(config.title),
        subtitle=escape(_subtitle(contestants, corpus, body["commit"])),
        findings="\n".join(f"<li>{escape(line)}</li>" for line in comparison_table.findings(contestants)),
        likelihoods_note=escape(
            "Nats a token; lower is better. S streams are scored in the order and the blocks in which they are "
            "written. Random orders: the mean over orders, and the tighter importance-weighted bound. Mean and "
            "standard deviation over seeds. A model that was taught no streams is in the tables alone."
        ),
        likelihoods_chart=_likelihoods_chart(contestants),
        likelihoods_table=_html(*by_order),
        gaps_note=escape(
            "The order gap is what the strided order costs with one token a block, the independence gap what its "
            "blocks cost on top. A stream starts without left context and pays for it: c is the price of a stream. "
            f"The curves add it up along a stream, S={PLACES_OF}; where they fall, right context is bought back."
        ),
        places_chart=_places_chart(contestants),
        gaps_table=_html(*costs),
        config=escape(json.dumps(config.recipe, indent=2, ensure_ascii=False)),
    )
    return storage.redacted(page)


def _subtitle(contestants: Sequence[Mapping[str, Any]], corpus: Mapping[str, Any], commit: str | None) -> str:
    first = contestants[0]
    n_runs = sum(len(one["seeds"]) for one in contestants)
    source = f", commit {commit}" if commit else ""
    return (
        f"{n_runs} models of about {first['parameters'] / 1e6:.1f} M parameters, vocabulary {corpus['vocab_size']:,}, "
        f"{corpus['splits']['train']['tokens']:,} tokens of training text; {first['windows']:,} held-out windows of "
        f"{first['window_tokens']:,} tokens{source}"
    )


def _html(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [[escape(cell).replace("+-", "&plusmn;") for cell in row] for row in rows]
    return table(head, cells, range(1, len(head)))


def _likelihoods_chart(contestants: Sequence[Mapping[str, Any]]) -> str:
    """Nats a token against S; models without streams are lines across."""
    across = [one for one in contestants if not one["streams"]]
    curves = _taught(contestants)
    names = sorted({name for one in curves for name in one["streams"]}, key=int)

    def draw(figure: Any, narrow: bool) -> None:
        axes = figure.subplots()
        for place, one in enumerate(across):
            level = (one["left_to_right"] or one["elbo"])["mean"]
            dashes = _DASHES[place % len(_DASHES)]
            axes.axhline(level, color=MUTED, linewidth=1.2, linestyle=dashes, label=one["label"])
        for place, one in enumerate(curves):
            points = [one["left_to_right"], *(one["streams"][name]["nats_per_token"] for name in names)]
            colour, marker = LINE_STYLES[place % len(LINE_STYLES)]
            axes.errorbar(
                range(len(points)),
                [point["mean"] for point in points],
                yerr=[point["deviation"] or 0.0 for point in points],
                color=colour,
                marker=marker,
                markersize=4.5,
                linewidth=1.2,
                label=one["label"],
            )
        axes.set_xticks(range(len(names) + 1), ["S=1", *(f"S={name}" for name in names)])
        axes.set_ylabel("nats a token")
        axes.grid(axis="y")
        axes.legend(fontsize=8, ncols=1 if narrow else 2, loc="upper left")
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + (0.9 if narrow else 0.45) * (high - low))  # room for the legend

    return chart("likelihoods", "Nats a token against S, by model", draw, wide=(8.8, 4.0), narrow=(4.2, 5.0))


def _places_chart(contestants: Sequence[Mapping[str, Any]]) -> str:
    """What a stream has cost so far, against the place in it."""
    drawn = [one for one in _taught(contestants) if PLACES_OF in one["streams"]]
    if not drawn:
        return ""

    def draw(figure: Any, narrow: bool) -> None:
        axes = figure.subplots()
        for place, one in enumerate(drawn):
            costs = one["streams"][PLACES_OF]["by_place"]
            colour, _ = LINE_STYLES[place % len(LINE_STYLES)]
            axes.plot(range(1, len(costs) + 1), list(accumulate(costs)), color=colour, label=one["label"])
        axes.set_xlabel("place in the stream")
        axes.set_ylabel("nats so far")
        axes.axhline(0, color=MUTED, linewidth=0.8)
        axes.grid(axis="y")
        axes.legend(fontsize=8, ncols=1, loc="center left", bbox_to_anchor=(1, 0.5)) if not narrow else axes.legend(
            fontsize=8, loc="lower right"
        )

    label = f"Cumulated cost of a stream against the place in it, S={PLACES_OF}"
    return chart("places", label, draw, wide=(8.8, 3.4), narrow=(4.2, 4.2))


def _taught(contestants: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those that write in streams; each keeps its colour from chart to chart."""
    return [
        one
        for one in contestants
        if one["streams"] and min(each["order_gap"]["mean"] for each in one["streams"].values()) < UNTAUGHT
    ]
