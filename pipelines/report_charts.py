"""The report's charts: numbers in, inline SVG out.

Colours are placeholders that the page's style sheet fills in (`var(--..)`), so that one drawing serves light and dark
screens. Each chart is drawn twice, wide and narrow, and the style sheet shows the one that is legible.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

INK, MUTED, LINE, BLUE, FAINT, ORANGE, SHADE_A, SHADE_B, GREEN = (f"#0{i}0{i}0{i}" for i in range(1, 10))
_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
    BLUE: "var(--blue)",
    FAINT: "var(--blue-faint)",
    ORANGE: "var(--orange)",
    SHADE_A: "var(--shade-a)",
    SHADE_B: "var(--shade-b)",
    GREEN: "var(--green)",
}
LINE_STYLES = ((BLUE, "o"), (ORANGE, "s"), (GREEN, "^"), (MUTED, "D"))
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}


def training_chart(metrics: Sequence[Mapping[str, Any]], train: Mapping[str, Any], unigram: float) -> str:
    """Loss against tokens, raw and smoothed, with the held-out points, the schedule's phases and the learning rate.

    Args:
        metrics: lines of metrics.jsonl.
        train: the recipe's training configuration, for the phases.
        unigram: nats a token of the unigram baseline.
    """
    training = [line for line in metrics if line["kind"] == "train"]
    held_out = [line for line in metrics if line["kind"] == "validation"]
    label = "Training and held-out loss in nats a token against tokens, with the learning rate"

    def draw(figure: Any, narrow: bool) -> None:
        loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=(6, 1))
        _phases(loss, training, train, narrow)
        _phases(rate, training, train, narrow=True, labels=False)
        tokens = [line["tokens"] for line in training]
        values = [line["loss"] for line in training]
        loss.plot(tokens, values, color=FAINT, linewidth=0.8)
        loss.plot(tokens, smoothed(values), color=BLUE, linewidth=1.8, label="training")
        for n_streams in sorted({line["n_streams"] for line in held_out}):
            colour, marker = _stream_style(n_streams)
            points = [line for line in held_out if line["n_streams"] == n_streams]
            loss.plot(
                [line["tokens"] for line in points],
                [line["loss"] for line in points],
                marker,
                color=colour,
                markersize=4.5,
                clip_on=False,
                label=f"held out, S={n_streams}",
            )
        _baseline(loss, unigram, values)
        loss.set_ylabel("nats a token")
        loss.grid(axis="y")
        loss.legend(loc="upper right", ncols=1 if narrow else 2, fontsize=9)
        rate.plot(tokens, [line["learning_rate"] for line in training], color=MUTED, linewidth=1.2)
        peak = max(line["learning_rate"] for line in training) or 1.0
        rate.set_yticks([0, peak], ["0", f"{peak:.1g}"])
        rate.set_ylim(0, peak * 1.15)
        rate.set_ylabel("rate")
        rate.set_xlabel("training tokens")
        rate.xaxis.set_major_formatter(lambda value, _: short(value))
        rate.set_xlim(0, max(tokens))
        figure.align_ylabels()

    return chart("loss", label, draw, wide=(8.8, 4.4), narrow=(4.2, 4.6))


def streams_chart(streams: Mapping[str, Mapping[str, Any]]) -> str:
    """Perplexity and sampling speed against the number of streams."""
    names = list(streams)
    base = streams[names[0]]
    label = "Perplexity and sampled tokens a second against the number of streams S"

    def draw(figure: Any, narrow: bool) -> None:
        left, right = figure.subplots(2, 1) if narrow else figure.subplots(1, 2)
        places = range(len(names))
        perplexities = [streams[name]["perplexity"] for name in names]
        left.plot(places, perplexities, color=FAINT, linewidth=1.6)
        left.plot(places, perplexities, "o", color=BLUE)
        for place, value in zip(places, perplexities, strict=True):
            more = "" if place == 0 else f"  {value / base['perplexity'] - 1:+.1%}"
            left.annotate(f"{value:.4g}{more}", (place, value), (0, 9), textcoords="offset points", ha="center")
        low, high = min(perplexities), max(perplexities)
        spread = max(high - low, 0.1 * high)
        left.set_ylim(low - 0.35 * spread, high + 0.6 * spread)
        left.set_title("Held-out perplexity")
        rates = [streams[name]["tokens_per_second"] for name in names]
        right.bar(places, rates, width=0.55, color=ORANGE)
        for place, value in zip(places, rates, strict=True):
            more = "" if place == 0 else f"  x{value / base['tokens_per_second']:.1f}"
            right.annotate(f"{short(value)}{more}", (place, value), (0, 5), textcoords="offset points", ha="center")
        right.set_ylim(0, max(rates) * 1.2)
        right.set_title("Sampled tokens a second, one text at a time")
        for axes in (left, right):
            axes.set_xticks(places, [f"S={name}" for name in names])
            axes.set_xlim(-0.6, len(names) - 0.4)
            axes.tick_params(axis="x", length=0)
            axes.yaxis.set_major_formatter(lambda value, _: short(value))
            axes.grid(axis="y")
            axes.set_axisbelow(True)

    return chart("streams", label, draw, wide=(8.8, 2.9), narrow=(4.2, 5.0))


def smoothed(values: Sequence[float]) -> list[float]:
    """Centred mean with triangular weights over about a twentieth of the curve: no lag, unlike a running mean."""
    reach = max(1, len(values) // 40)
    out = []
    for place in range(len(values)):
        near = range(max(0, place - reach), min(len(values), place + reach + 1))
        weights = [reach + 1 - abs(other - place) for other in near]
        out.append(sum(w * values[other] for w, other in zip(weights, near, strict=True)) / sum(weights))
    return out


def short(value: float) -> str:
    """A number for people: 950, 12.3 k, 4.56 M."""
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _phases(
    axes: Any, training: Sequence[Mapping[str, Any]], train: Mapping[str, Any], narrow: bool, labels: bool = True
) -> None:
    """Shade the steps in which ranks are shuffled, those with others mixed in, and those of strided fine-tuning."""
    tokens_a_step = training[-1]["tokens"] / training[-1]["step"]
    end = train["steps"] + train["strided_steps"]
    spans = []
    if train["max_shuffled"] > 0:
        spans.append((train["ar_steps"], train["steps"], SHADE_A, f"permutation, up to {train['max_shuffled']} ranks"))
    if mixed := train["strided_share"] + train["infilling_share"]:
        spans.append((train["mix_after"], train["steps"], SHADE_B, f"mixed, {mixed:.0%} in streams"))
    if train["strided_steps"] > 0:
        spans.append((train["steps"], end, SHADE_B, "strided"))
    for begin, stop, colour, label in spans:
        if begin >= stop:
            continue
        axes.axvspan(begin * tokens_a_step, stop * tokens_a_step, color=colour, linewidth=0)
        if labels:
            text = label.split(",")[0] if narrow else label
            place = (begin * tokens_a_step, 0)
            axes.annotate(text, place, (5, 5), axes.get_xaxis_transform(), "offset points", color=MUTED, fontsize=9)


def _baseline(axes: Any, unigram: float, values: Sequence[float]) -> None:
    """The unigram baseline, where it is not far above everything else."""
    axes.axhline(unigram, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate("unigram", (1, unigram), (-2, 3), ("axes fraction", "data"), "offset points", ha="right", color=MUTED)
    axes.set_ylim(top=max(*values, unigram) * 1.08)


def _stream_style(n_streams: int) -> tuple[str, str]:
    return LINE_STYLES[min(n_streams.bit_length() - 1, len(LINE_STYLES) - 1)]


def chart(
    name: str,
    label: str,
    draw: Callable[..., None],
    wide: tuple[float, float],
    narrow: tuple[float, float],
) -> str:
    sizes = {"wide": wide, "narrow": narrow}
    drawings = [
        _svg(f"{name}-{kind}", label, size, partial(draw, narrow=kind == "narrow")) for kind, size in sizes.items()
    ]
    return '<div class="chart">' + "".join(drawings) + "</div>"


def _svg(name: str, label: str, size: tuple[float, float], draw: Callable[[Any], None]) -> str:
    """Draw without pyplot, which would keep state, and make the SVG fit for a page that holds several."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    kind = name.rsplit("-", 1)[-1]
    svg = svg.replace("<svg ", f'<svg class="{kind}" role="img" aria-label="{label}" ', 1)
    for placeholder, variable in _VARIABLES.items():
        svg = svg.replace(placeholder, variable)
    return svg.strip()
