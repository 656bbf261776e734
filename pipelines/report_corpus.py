"""The report's section on the corpus: what came of the sources, how long documents are, and how a model sees them."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.documents import KINDS
from pipelines.report_charts import BLUE, chart, short
from pipelines.report_sections import escape, table


def section(manifest: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The whole section, from the corpus's manifest and the recipe's corpus settings."""
    lengths = [split["lengths"] for split in manifest["splits"].values()]
    total = [sum(one[i] for one in lengths if i < len(one)) for i in range(max(map(len, lengths)))]
    return (
        facts(manifest, config)
        + "<h3>Documents by their length in tokens</h3>"
        + f'<div class="card">{lengths_chart(total)}</div>'
        + samples(manifest["samples"])
    )


def facts(manifest: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Where the text came from, by the recipe's corpus settings, and what became of it."""
    documents = manifest["documents"]
    places = {"sources": config["sources"], "held-out sources": config["validation_sources"]}
    rows = [
        *(
            [name, "<br>".join(f"<code>{escape(source)}</code>" for source in sources)]
            for name, sources in places.items()
            if sources
        ),
        [
            "documents",
            escape(
                f"{documents['read']:,} read: "
                + ", ".join(f"{documents[kind]:,} {kind}" for kind in KINDS if documents[kind] or kind != "duplicate")
            ),
        ],
    ]
    reasons = manifest["quarantine_reasons"]
    if reasons:
        listed = [f"{reasons[reason]:,} {reason}" for reason in sorted(reasons, key=lambda one: (-reasons[one], one))]
        rows.append(["quarantined", "<br>".join(map(escape, listed))])
    for name, split in manifest["splits"].items():
        size = f", {short(split['bytes'])}B of text" if "bytes" in split else ""
        rows.append(
            [escape(name), escape(f"{split['documents']:,} documents, {split['tokens']:,} tokens{size}")],
        )
    vocabulary = f"{manifest['vocab_size']:,} entries, " if "vocab_size" in manifest else ""
    rows.append(
        ["tokenizer", f"{escape(vocabulary)}<code>{escape(manifest['tokenizer_sha256'][:16])}</code>"],
    )
    formation = manifest["formation"]
    rows.append(
        ["sequences", escape(f"{manifest['sequence_length']:,} tokens, {formation['name']} v{formation['version']}")]
    )
    return f'<div class="card scroll">{table((), rows)}</div>'


def lengths_chart(lengths: Sequence[int]) -> str:
    """A bar for each doubling of the length: `lengths[i]` documents have 2^(i-1) to 2^i - 1 tokens."""
    shortest = next((size for size, count in enumerate(lengths) if count), 0)
    shown = lengths[shortest:]
    label = "Number of documents by their length in tokens"

    def draw(figure: Any, narrow: bool) -> None:
        axes = figure.subplots()
        axes.bar(range(len(shown)), shown, width=0.8, color=BLUE)
        for place, count in enumerate(shown):
            if count:
                axes.annotate(short(count), (place, count), (0, 4), textcoords="offset points", ha="center", fontsize=8)
        names = [short(2 ** max(0, size - 1)) for size in range(shortest, len(lengths))]
        step = 1 + len(shown) // 12 if narrow else 1
        axes.set_xticks(range(0, len(shown), step), names[::step])
        axes.tick_params(axis="x", length=0)
        axes.set_xlabel("tokens, at least")
        axes.yaxis.set_major_formatter(lambda value, _: short(value))
        axes.set_ylim(0, max(shown, default=0) * 1.15 or 1)
        axes.grid(axis="y")
        axes.set_axisbelow(True)

    return chart("lengths", label, draw, wide=(8.8, 2.6), narrow=(4.2, 2.8))


def samples(documents: Sequence[Mapping[str, Any]]) -> str:
    """The first tokens of each sample document, every other one shaded."""
    cards = []
    for document in documents:
        tokens = "".join(
            f'<span class="t{place % 2}">{escape(text)}</span>' for place, text in enumerate(document["shown"])
        )
        left = document["tokens"] - len(document["shown"])
        more = f", the first {len(document['shown']):,} shown" if left > 0 else ""
        cards.append(
            f'<div class="card sample"><div class="head"><span>{document["tokens"]:,} tokens{more}</span></div>'
            f'<div class="text">{tokens}</div></div>'
        )
    return (
        f"<details><summary>{len(documents)} training documents as the model sees them, drawn by their hashes</summary>"
        f'<div class="samples">{"".join(cards)}</div></details>'
    )
