"""The report on made-up stages that look like a demo run."""

import copy
import html.parser
import json
import math
import random
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipelines import report, report_charts, report_corpus, report_sections
from pipelines.errors import UserError
from pipelines.manifest import write_manifest
from pipelines.report import ReportConfig

RECIPE = {
    "corpus": {
        "sources": ["python-docs"],
        "validation_sources": ["held/out.txt"],
        "vocab_size": 2048,
        "sequence_length": 256,
    },
    "train": {
        "batch_size": 16,
        "steps": 600,
        "strided_steps": 200,
        "ar_steps": 12,
        "permutation_steps": 72,
        "max_shuffled": 8,
        "strided_share": 0.0,
        "infilling_share": 0.0,
        "mix_after": 0,
        "streams": [1, 2, 4],
        "learning_rate": 0.003,
        "architecture": {"n_layers": 4, "n_two_stream_layers": 2, "d_model": 128, "n_heads": 4, "d_prefix": 32},
    },
    "evaluate": {"streams": [1, 2, 4], "prompts": ["Return the"]},
    "deploy": {"host": "127.0.0.1", "port": 8000},
}
SENTENCE = (
    "the value of this object is returned as a string\n when file is not found raise an error in module "
    "if key was given else None use with class method for each item in list >>> len(x) and return it"
)


def make_metrics() -> list[dict[str, Any]]:
    """Lines of a demo's training: 800 steps, the last 200 strided."""
    rng = random.Random(0)
    lines: list[dict[str, Any]] = []
    for step in range(10, 801, 10):
        loss = 2.6 + 5.0 * math.exp(-step / 90) + rng.gauss(0, 0.07) + (0.15 if step > 600 else 0)
        rate = 3e-3 * min(step / 50, 0.1 + 0.45 * (1 + math.cos(math.pi * step / 800)))
        common = {"step": step, "tokens": step * 16 * 256}
        streams = rng.choice([1, 2, 4]) if step > 600 else 1
        lines.append({"kind": "train", "loss": loss, "learning_rate": rate, "n_streams": streams, **common})
        if step % 100 == 0:
            for n in (1, 2, 4):
                gap = 0.04 * (n - 1) * (1 if step > 600 else 12)
                lines.append(
                    {"kind": "validation", "loss": 2.75 + 4.9 * math.exp(-step / 90) + gap, "n_streams": n, **common}
                )
    return lines


def make_sample(prompt: str, n_streams: int, n: int = 128) -> dict[str, Any]:
    rng = random.Random(n_streams)
    length = n // n_streams
    tokens: list[dict[str, Any]] = [{"text": prompt, "step": None, "prompt": True}] if prompt else []
    for place in range(n):
        stream, offset = divmod(place, length)
        step = stream + 1 if offset == 0 else n_streams + offset
        text = "<|endoftext|>" if place % 50 == 49 else " " + rng.choice(SENTENCE.split(" "))
        tokens.append({"text": text, "step": step, "prompt": False})
    steps = n_streams + length - 1
    text = "".join(token["text"] for token in tokens if not token["prompt"])
    return {"prompt": prompt, "n_streams": n_streams, "seed": 0, "steps": steps, "text": text, "tokens": tokens}


def make_evaluation() -> dict[str, Any]:
    streams = {}
    for n, perplexity, rate in ((1, 17.93, 182.0), (2, 18.11, 340.5), (4, 18.52, 601.2)):
        nats = math.log(perplexity)
        one = {"nats_per_token": nats, "perplexity": perplexity, "bits_per_byte": nats / math.log(2) / 3.1}
        speed = {"tokens_per_second": rate, "tokens_per_second_runs": [rate] * 3, "steps": n + 128 // n - 1}
        streams[str(n)] = {**one, "tokens": 16384, "sampled_tokens": 128, **speed}
    samples = [make_sample(prompt, n) for prompt in ("", "Return the") for n in (1, 2, 4)]
    body = {"streams": streams, "unigram": {"perplexity": 402.6, "nats_per_token": math.log(402.6)}, "samples": samples}
    note = {"windows": 64, "window_tokens": 256, "bytes": 50790, "repeats": 3, "device": "CPU, 2 threads"}
    return {**body, **note, "temperature": 0.8, "top_p": 0.95}


def make_bodies() -> dict[str, dict[str, Any]]:
    request = {"model": "armd", "prompt": "Return the", "max_tokens": 32, "seed": 0, "armd": {"streams": 4}}
    answer = " value of this object as a string, or None if it was not found."
    response = {"object": "text_completion", "choices": [{"index": 0, "text": answer, "finish_reason": "length"}]}
    splits = {
        "train": {"documents": 16482, "tokens": 1012394, "bytes": 3201190, "shards": [], "lengths": [0, 0, 9, 16473]},
        "validation": {"documents": 861, "tokens": 52011, "bytes": 160220, "shards": [], "lengths": [0, 1, 860]},
    }
    documents = {"read": 17355, "used": 17343, "empty": 7, "duplicate": 0, "quarantined": 5}
    corpus = {
        "documents": documents,
        "quarantine_reasons": {"damaged archive": 1, "not UTF-8": 4},
        "splits": splits,
        "vocab_size": 2048,
        "sequence_length": 256,
        "formation": {"name": "packed", "version": 1, "specials": {}},
        "samples": [
            {"hash": "00", "tokens": 4, "shown": ["Short", " and", " whole", "<|endoftext|>"]},
            {"hash": "01", "tokens": 900, "shown": ["A", " long", " one"]},
        ],
    }
    train = {"parameters": 1340288, "steps": 800, "tokens": 3276800, "tokens_per_second": 17120.4}
    return {
        "corpus": {**corpus, "tokenizer_sha256": "9f2c" * 16},
        "train": {**train, "world_size": 2, "zero_stage": 2},
        "export": {},
        "evaluate": make_evaluation(),
        "deploy": {
            "url": "http://127.0.0.1:8000",
            "request": request,
            "response": response,
            "status": 200,
            "start_seconds": 14.2,
            "request_seconds": 0.31,
            "stays_up": False,
        },
    }


def make_stages(root: Path, bodies: dict[str, dict[str, Any]] | None = None) -> dict[str, str]:
    """Finished stage folders below `root`, one after the other in time."""
    seconds = {"corpus": 14, "train": 231, "export": 9, "evaluate": 21, "deploy": 17}
    began = time.time() - 1000
    inputs = {}
    for name, body in (bodies or make_bodies()).items():
        folder = root / f"{name}-0123456789ab"
        folder.mkdir(parents=True)
        manifest = write_manifest(str(folder), name, body, began)
        manifest["seconds"] = seconds[name]
        (folder / "manifest.json").write_text(json.dumps(manifest))
        began += seconds[name] + 1
        inputs[name] = str(folder)
    metrics = "".join(json.dumps(line) + "\n" for line in make_metrics())
    (root / "train-0123456789ab" / "metrics.jsonl").write_text(metrics)
    return inputs


def make_report(root: Path, bodies: dict[str, dict[str, Any]] | None = None, **config: Any) -> str:
    inputs = make_stages(root, bodies)
    given = {"title": "armd run demo", "recipe": RECIPE, **config}
    manifest = report.run(ReportConfig(**given), inputs, str(root / "report"))
    text = (root / "report" / "report.html").read_text(encoding="utf-8")
    assert manifest["bytes"] == len(text.encode())
    return text


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_report(tmp_path_factory.mktemp("run"))


class Structure(html.parser.HTMLParser):
    """Collects what matters of a page and insists that tags nest."""

    VOID = frozenset(("meta", "br", "link", "img", "input", "hr"))

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.ids: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids.update(value for name, value in attrs if name == "id" and value)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parse(page: str) -> Structure:
    structure = Structure()
    structure.feed(page)
    assert structure.open == []
    return structure


def test_the_page_is_well_formed_and_alone(page: str) -> None:
    structure = parse(page)
    assert structure.tags["svg"] == 6, "three charts, each wide and narrow"
    assert max(structure.ids.values()) == 1
    assert structure.tags["script"] == structure.tags["link"] == structure.tags["img"] == 0
    outside = [one for one in structure.attributes if one[1] in ("src", "href", "xlink:href", "action", "srcset")]
    assert all(value.startswith("#") for _, _, value in outside)
    assert not re.search(r"url\((?!#)|@import", page)
    assert "default-src 'none'" in page


def test_references_inside_the_charts_resolve(page: str) -> None:
    structure = parse(page)
    wanted = set(re.findall(r'url\(#([^)"]+)\)', page)) | set(re.findall(r'href="#([^"]+)"', page))
    assert wanted
    assert wanted <= set(structure.ids)


def test_placeholder_colours_are_all_filled_in(page: str) -> None:
    assert not re.search(r"#0(\d)0(\1)0\1", page)
    used = set(re.findall(r"var\((--[a-z0-9-]+)\)", page))
    defined = set(re.findall(r"(--[a-z0-9-]+):", page))
    assert used <= defined


def test_the_numbers_are_there(page: str) -> None:
    text = " ".join(" ".join(parse(page).text).split())
    for expected in (
        "Held-out perplexity 17.9 22.5 times below the unigram baseline's 403",
        "S=4 against S=1 3.30x the speed, at +3.3% perplexity",
        "Parameters 1.34 M 4 layers, width 128, 4 heads",
        "Trained on 3.28 M tokens 800 steps",
        "2 workers, ZeRO stage 2",
        "17,355 read: 17,343 used, 7 empty, 5 quarantined",
        "4 not UTF-8 1 damaged archive",
        "256 tokens, packed v1",
        "2 training documents as the model sees them",
        "900 tokens, the first 3 shown A long one",
        "3 min 51 s",
        "up after 14 s, answered in 0.3 s. It ended with the command",
        "4 min 52 s in all",
    ):
        assert expected in text


def test_every_token_shows_with_its_step(page: str) -> None:
    text = "".join(parse(page).text)
    evaluation = make_evaluation()
    for sample in evaluation["samples"]:
        assert sample["text"] in text
    written = sum(not token["prompt"] for sample in evaluation["samples"] for token in sample["tokens"])
    assert len(re.findall(r'<span class="s\d+(?: mark)?" title="step \d+">', page)) == written
    assert page.count('<span class="prompt">') == 3 + 1  # three prompted samples and the served answer


def test_early_and_late_tokens_have_the_ramps_ends() -> None:
    sample = {"prompt": "", "n_streams": 1, "seed": 0, "steps": 31, "text": ""}
    sample["tokens"] = [{"text": str(step), "step": step, "prompt": False} for step in range(1, 32)]
    shades = [int(found) for found in re.findall(r'class="s(\d+)"', report_sections.samples([sample]))]
    assert (shades[0], shades[-1]) == (0, 15)
    assert shades == sorted(shades)


HOSTILE = '</div><script>alert(1)</script><img src=x onerror="alert(2)">&amp;$title'


def test_text_of_models_and_people_stays_text(tmp_path: Path) -> None:
    bodies = make_bodies()
    bodies["evaluate"]["samples"][0]["tokens"][3]["text"] = HOSTILE
    bodies["evaluate"]["samples"][4]["prompt"] = HOSTILE
    bodies["evaluate"]["device"] = HOSTILE
    bodies["corpus"]["samples"][0]["shown"][1] = HOSTILE
    bodies["corpus"]["quarantine_reasons"] = {HOSTILE: 5}
    bodies["deploy"]["request"]["prompt"] = HOSTILE
    bodies["deploy"]["response"]["choices"][0]["text"] = HOSTILE
    recipe = copy.deepcopy(RECIPE)
    recipe["corpus"]["sources"] = recipe["corpus"]["validation_sources"] = [HOSTILE]
    structure = parse(make_report(tmp_path, bodies, title=HOSTILE, recipe=recipe))
    assert structure.tags["script"] == structure.tags["img"] == 0
    assert not [one for one in structure.attributes if one[1].startswith("on")]
    assert "".join(structure.text).count(HOSTILE) >= 10


def test_held_out_sources_show_where_there_are_any(page: str, tmp_path: Path) -> None:
    recipe = copy.deepcopy(RECIPE)
    recipe["corpus"]["validation_sources"] = []
    assert "<code>held/out.txt</code>" in page
    assert "held-out sources" not in make_report(tmp_path, recipe=recipe)


def test_bars_of_lengths_hold_every_document() -> None:
    drawing = report_corpus.lengths_chart([0, 0, 10, 860, 16473])
    for count, length in (("10", "2"), ("860", "4"), ("16.5 k", "8")):
        assert len(re.findall(f">{re.escape(count)}</text>", drawing)) >= 2
        assert len(re.findall(f">{length}</text>", drawing)) >= 2
    assert report_corpus.lengths_chart([]).count("<svg") == 2


def test_duplicates_show_where_they_are_dropped(tmp_path: Path) -> None:
    bodies = make_bodies()
    bodies["corpus"]["documents"] |= {"read": 17365, "duplicate": 10}
    assert "7 empty, 10 duplicate, 5 quarantined" in make_report(tmp_path, bodies)


def test_credentials_in_uris_do_not_show(tmp_path: Path) -> None:
    recipe = copy.deepcopy(RECIPE)
    recipe["corpus"]["sources"] = ["s3://AKIAPLANTED:secretPLANTED@bucket/text"]
    text = make_report(tmp_path, recipe=recipe)
    assert "PLANTED" not in text
    assert "s3://bucket/text" in text


def test_the_same_run_gives_the_same_page(page: str, tmp_path: Path) -> None:
    charts = [report_charts.streams_chart(make_evaluation()["streams"]) for _ in range(2)]
    assert charts[0] == charts[1]
    assert charts[0] in page


@pytest.mark.parametrize("streams", [["1"], ["2", "4"]])
def test_fewer_streams_and_no_schedule(tmp_path: Path, streams: list[str]) -> None:
    bodies = make_bodies()
    evaluation = bodies["evaluate"]
    evaluation["streams"] = {name: evaluation["streams"][name] for name in streams}
    evaluation["samples"] = evaluation["samples"][:1]
    recipe = copy.deepcopy(RECIPE)
    recipe["train"] |= {"strided_steps": 0, "max_shuffled": 0}
    structure = parse(make_report(tmp_path, bodies, recipe=recipe))
    assert structure.tags["svg"] == 6


def test_a_mixed_schedule_is_told(tmp_path: Path) -> None:
    recipe = copy.deepcopy(RECIPE)
    recipe["train"] |= {"max_shuffled": 0, "strided_steps": 0, "strided_share": 0.5, "mix_after": 60}
    page = make_report(tmp_path, recipe=recipe)
    assert "After 60 steps 50% of the steps are strided, with S of 1, 2, 4." in page
    assert "mixed, 50% in streams" in page
    assert "shuffled, all of them" not in page


def test_an_unfinished_stage_is_named(tmp_path: Path) -> None:
    inputs = make_stages(tmp_path)
    (Path(inputs["evaluate"]) / "manifest.json").unlink()
    with pytest.raises(UserError, match="evaluate-0123456789ab"):
        report.run(ReportConfig(recipe=RECIPE), inputs, str(tmp_path / "report"))
    assert not (tmp_path / "report").exists()


def test_spans_leave_idle_time_out() -> None:
    spans = report_sections.spans({"late": (1000.0, 5.0), "first": (10.0, 4.0), "beside": (12.0, 1.0)})
    assert spans == {"first": (0.0, 4.0), "beside": (2.0, 3.0), "late": (4.0, 9.0)}


def test_smoothing_keeps_a_line_and_does_not_lag() -> None:
    assert report_charts.smoothed([3.0] * 200) == pytest.approx([3.0] * 200)
    line = [float(i) for i in range(200)]
    assert report_charts.smoothed(line)[10:-10] == pytest.approx(line[10:-10])
    noisy = [i % 2 for i in range(200)]
    assert max(report_charts.smoothed(noisy)[10:-10]) < 0.6


@pytest.mark.parametrize(
    ("value", "text"), [(0.5, "0.5"), (182, "182"), (17120.4, "17.1 k"), (3276800, "3.28 M"), (2.15e11, "215 G")]
)
def test_numbers_for_people(value: float, text: str) -> None:
    assert report_charts.short(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.53, "1.5 s"), (42.2, "42 s"), (231, "3 min 51 s"), (7512, "2 h 05 min")]
)
def test_durations_for_people(seconds: float, text: str) -> None:
    assert report_sections.duration(seconds) == text


def test_a_copy_without_history_is_told_its_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(report, "__file__", str(tmp_path / "pipelines" / "report.py"))
    monkeypatch.delenv("ARMD_COMMIT", raising=False)
    assert report.source_commit() is None
    monkeypatch.setenv("ARMD_COMMIT", "0123456789ab")
    assert report.source_commit() == "0123456789ab"
