"""The report's sections: plain data in, HTML out. Every text is escaped here; nothing else writes markup from data."""

import datetime
import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

_STEPS = 16  # shades in the ramp that colours samples
_RAMP_LIGHT = ((0xC4, 0xD6, 0xFF), (0xF0, 0xD9, 0xEA), (0xFF, 0xDB, 0x9C))
_RAMP_DARK = ((0x1F, 0x3A, 0x7A), (0x57, 0x33, 0x5C), (0x7D, 0x4B, 0x0C))


def escape(value: Any) -> str:
    """`value` as text for HTML, also inside an attribute's quotes."""
    return html.escape(str(value), quote=True)


def duration(seconds: float) -> str:
    """1.5 s, 42 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def figure(name: str, value: str, unit: str, sub: str) -> str:
    """One headline number; arguments are text."""
    small = f" <small>{escape(unit)}</small>" if unit else ""
    return (
        f'<div class="figure"><div class="name">{escape(name)}</div>'
        f'<div class="value">{escape(value)}{small}</div><div class="sub">{escape(sub)}</div></div>'
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A table of cells that are HTML already, of facts where `head` is empty; `numbers`: columns set to the right."""

    def line(tag: str, cells: Sequence[str]) -> str:
        kinds = [' class="number"' if place in numbers else "" for place in range(len(cells))]
        return "".join(f"<{tag}{kind}>{cell}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))

    body = "".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    if not head:
        return f'<table class="facts"><tbody>{body}</tbody></table>'
    top = line("th", [escape(cell) for cell in head])
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def streams_table(streams: Mapping[str, Mapping[str, Any]], unigram: Mapping[str, Any]) -> str:
    """Likelihood and speed, a row for each number of streams and one for the baseline."""
    first = next(iter(streams.values()))
    rows = []
    for name, one in streams.items():
        change = "" if one is first else f"{one['perplexity'] / first['perplexity'] - 1:+.1%}"
        rows.append(
            [
                f"S={escape(name)}",
                f"{one['perplexity']:.2f}",
                change,
                f"{one['nats_per_token']:.4f}",
                f"{one['bits_per_byte']:.3f}",
                str(one["steps"]),
                f"{one['tokens_per_second']:,.0f}",
                f"{one['tokens_per_second'] / first['tokens_per_second']:.2f}",
            ]
        )
    rows.append(["unigram", f"{unigram['perplexity']:.2f}", "", f"{unigram['nats_per_token']:.4f}", "", "", "", ""])
    head = ("streams", "perplexity", "against S=1", "nats a token", "bits a byte", "steps", "tokens/s", "times")
    if next(iter(streams)) != "1":
        head = (*head[:2], "against the first", *head[3:])
    return table(head, rows, range(1, 8))


def samples(items: Sequence[Mapping[str, Any]]) -> str:
    """Samples side by side, one group for each prompt and seed, each token coloured by its step."""
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for item in items:
        groups.setdefault((item["prompt"], item["seed"]), []).append(item)
    out = []
    for (prompt, seed), group in groups.items():
        what = f"Prompt: <code>{escape(prompt)}</code>" if prompt else "From nothing"
        cards = "".join(_sample(item) for item in group)
        out.append(f'<h3>{what} <span class="muted">seed {seed}</span></h3><div class="samples">{cards}</div>')
    return "".join(out)


def _sample(item: Mapping[str, Any]) -> str:
    spans = "".join(_token(token, item["steps"]) for token in item["tokens"])
    written = sum(not token["prompt"] for token in item["tokens"])
    return (
        f'<div class="card sample"><div class="head"><b>S={item["n_streams"]}</b>'
        f'<span class="muted">{written} tokens in {item["steps"]} steps</span></div>'
        f'<div class="text">{spans}</div></div>'
    )


def _token(token: Mapping[str, Any], steps: int) -> str:
    text = escape(token["text"])
    if not text:
        return ""
    if token["prompt"]:
        return f'<span class="prompt">{text}</span>'
    mark = " mark" if token["text"].startswith("<|") and token["text"].endswith("|>") else ""
    shade = 0 if steps <= 1 else round((token["step"] - 1) / (steps - 1) * (_STEPS - 1))
    return f'<span class="s{shade}{mark}" title="step {token["step"]}">{text}</span>'


def ramp() -> dict[str, str]:
    """The style sheet's part for sample colours: variables for light and dark, rules, and the legend's gradient."""

    def variables(stops: Sequence[tuple[int, int, int]]) -> str:
        return " ".join(f"--r{i}: {_between(stops, i / (_STEPS - 1))};" for i in range(_STEPS))

    return {
        "ramp_light": variables(_RAMP_LIGHT),
        "ramp_dark": variables(_RAMP_DARK),
        "ramp_rules": "\n".join(f".s{i} {{ background: var(--r{i}); }}" for i in range(_STEPS)),
        "ramp_stops": ", ".join(f"var(--r{i})" for i in range(_STEPS)),
    }


def _between(stops: Sequence[tuple[int, int, int]], share: float) -> str:
    place = share * (len(stops) - 1)
    left = min(int(place), len(stops) - 2)
    mix = [round(a + (b - a) * (place - left)) for a, b in zip(stops[left], stops[left + 1], strict=True)]
    return "#" + "".join(f"{channel:02x}" for channel in mix)


def served(deploy: Mapping[str, Any]) -> str:
    """The request that the deploy stage made and the answer it got."""
    request, response = deploy["request"], deploy["response"]
    answer = "".join(choice.get("text", "") for choice in response.get("choices", [])[:1])
    asked = f"POST {deploy['url'].rstrip('/')}/v1/completions\n\n{json.dumps(request, indent=2, ensure_ascii=False)}"
    prompt = request.get("prompt", "")
    shown = f'<span class="prompt">{escape(prompt)}</span>' if isinstance(prompt, str) else ""
    return (
        f'<div class="pair"><div class="card"><h3>Request</h3><pre>{escape(asked)}</pre></div>'
        f'<div class="card"><h3>Answer: {escape(deploy["status"])}</h3>'
        f'<div class="text answer">{shown}{escape(answer)}</div>'
        f"<details><summary>The whole response</summary><pre>"
        f"{escape(json.dumps(response, indent=2, ensure_ascii=False))}</pre></details></div></div>"
    )


def stages(manifests: Mapping[str, Mapping[str, Any]], directories: Mapping[str, str]) -> str:
    """Time and place of every stage: a bar on one time line, idle time between stages left out."""
    bars = spans({name: (_began(one), one["seconds"]) for name, one in manifests.items()})
    total = max(end for _, end in bars.values()) or 1.0
    rows = []
    for name, one in manifests.items():
        begin, end = bars[name]
        bar = f'<i style="left:{begin / total:.2%};width:{(end - begin) / total:.2%}"></i>'
        rows.append(
            f"<tr><td>{escape(name)}</td>"
            f'<td class="bar"><div>{bar}</div></td><td class="number">{escape(duration(one["seconds"]))}</td>'
            f'<td class="when">{escape(one["started"][:19].replace("T", " "))}</td><td>{escape(one["host"])}</td>'
            f"<td><code>{escape(directories[name])}</code></td></tr>"
        )
    head = (
        '<thead><tr><th>stage</th><th class="bar"></th><th class="number">time</th><th>began (UTC)</th>'
        "<th>host</th><th>directory</th></tr></thead>"
    )
    return f"<table>{head}<tbody>{''.join(rows)}</tbody></table>"


def spans(stages_: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """(begin, end) of each stage in seconds from the first, given (start, seconds); idle time between them cut out."""
    placed: dict[str, tuple[float, float]] = {}
    cut = ends = 0.0
    for name, (start, seconds) in sorted(stages_.items(), key=lambda item: item[1][0]):
        if not placed:
            cut = ends = start
        elif start > ends:
            cut += start - ends
            ends = start
        placed[name] = (start - cut, start - cut + seconds)
        ends = max(ends, start + seconds)
    return placed


def _began(manifest: Mapping[str, Any]) -> float:
    return datetime.datetime.fromisoformat(manifest["started"]).timestamp()
