"""The comparison on made-up measurements: means and spreads by hand, tables, findings, the page."""

import html.parser
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest

from pipelines import compare, comparison_table
from pipelines.compare import CompareConfig, Run, difference, gather, spread
from pipelines.errors import UserError
from pipelines.manifest import write_manifest

ABOUT = {"parameters": 2_169_664, "windows": 256, "window_tokens": 128}


def made_up(name: str, seed: int) -> dict[str, Any]:
    """What the measure stage finds: a little worse with every seed, mixed a little better than rho-8."""
    base = 3.0 + 0.01 * seed - (0.02 if name == "mixed" else 0)
    if name == "masked-diffusion":
        return {**ABOUT, "model": "masked_diffusion", "elbo": base + 1, "noise_draws": 16}
    if name == "autoregressive":
        return {**ABOUT, "model": "autoregressive", "left_to_right": base}
    streams = {}
    for n_streams in (16, 2, 4):  # as a manifest's JSON sorts them
        gap = 0.02 * (n_streams - 1)
        streams[str(n_streams)] = {
            "nats_per_token": base + gap + 0.001,
            "one_by_one": base + gap,
            "order_gap": gap,
            "independence_gap": 0.001,
            "cost_of_a_stream": gap * 128 / (n_streams - 1),
            "by_place": [gap, gap / 2, -gap / 8, 0.0],
        }
    bounds = {"mean": base + 1, "weighted": base + 0.9, "orders": 8, "windows": 128}
    return {**ABOUT, "model": "armd", "left_to_right": base, "streams": streams, "random_orders": bounds}


NAMES = ("autoregressive", "left-to-right", "rho-8", "mixed", "masked-diffusion")
LABELS = {name: f"the <{name}> model" for name in NAMES}


def make_runs(seeds: tuple[int, ...]) -> tuple[Run, ...]:
    return tuple(
        Run(contestant=name, label=LABELS[name], seed=seed, input=f"{name}-{seed}") for seed in seeds for name in NAMES
    )


def contestants(*seeds: int) -> list[dict[str, Any]]:
    runs = make_runs(seeds)
    return gather(runs, {one.input: made_up(one.contestant, one.seed) for one in runs})


def test_means_and_deviations_over_seeds() -> None:
    """Fails with the deviation of a population instead of a sample."""
    found = {one["name"]: one for one in contestants(0, 1, 2)}
    assert list(found) == list(NAMES)
    assert found["rho-8"]["seeds"] == [0, 1, 2]
    assert found["rho-8"]["left_to_right"] == {
        "mean": pytest.approx(3.01),
        "deviation": pytest.approx(0.01),
        "values": [3.0, 3.01, 3.02],
    }
    assert found["masked-diffusion"]["elbo"]["mean"] == pytest.approx(4.01)
    assert found["masked-diffusion"]["left_to_right"] is None
    assert found["autoregressive"]["streams"] == {}
    assert found["rho-8"]["streams"]["16"]["cost_of_a_stream"]["mean"] == pytest.approx(2.56)
    assert found["rho-8"]["streams"]["4"]["by_place"] == pytest.approx([0.06, 0.03, -0.0075, 0.0])


def test_one_seed_has_no_spread() -> None:
    assert spread([3.0]) == {"mean": 3.0, "deviation": None, "values": [3.0]}
    assert spread([None]) is None


def test_differences_are_paired_by_seed() -> None:
    """Both drift by the same amount with the seed, so their difference has no spread at all."""
    one, other = spread([3.5, 4.5, 5.5]), spread([3.0, 4.0, 5.0])
    assert one is not None
    assert other is not None
    assert difference(one, other) == {"mean": 0.5, "deviation": 0.0, "values": [0.5, 0.5, 0.5]}


def test_the_tables_have_a_row_a_model_and_a_row_a_number_of_streams() -> None:
    head, rows = comparison_table.likelihoods(contestants(0, 1))
    assert head == ["", "left to right", "S=2", "S=4", "S=16", "random orders", "weighted bound", "ELBO"]
    assert len({len(row) for row in [head, *rows]}) == 1
    assert rows[2] == [
        LABELS["rho-8"],
        "3.005 +- 0.007",
        "3.026 +- 0.007",
        "3.066 +- 0.007",
        "3.306 +- 0.007",
        "4.005 +- 0.007",
        "3.905 +- 0.007",
        "",
    ]
    assert rows[4] == [LABELS["masked-diffusion"], "", "", "", "", "", "", "4.005 +- 0.007"]
    head, rows = comparison_table.gaps(contestants(0))
    assert [row[1] for row in rows] == ["2", "4", "16"] * 3
    assert rows[0][2:] == [f"{math.expm1(0.021):+.1%}", "0.020", "0.001", "2.56"]


def test_findings_say_what_is_expected_and_what_was_found() -> None:
    said = comparison_table.findings(contestants(0, 1))
    assert said[0].startswith("ARMD without permutation against the autoregressive model: +0.000 +- 0.000")
    assert said[1].startswith("Masked diffusion's bound against the autoregressive model: +1.000")
    assert any("S=2 costs +2.1% +- 0.0% perplexity, within the 3% expected" in line for line in said)
    assert any("S=4 costs +6.3% +- 0.0% perplexity, within the 7% expected" in line for line in said)
    assert said[-1].startswith("The mixed recipe against rho=8 and a strided phase, nats a token: left to right -0.020")
    alone = [one for one in contestants(0) if one["name"] == "masked-diffusion"]
    assert comparison_table.findings(alone) == []


class _Parsed(html.parser.HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_stage_writes_numbers_tables_and_a_page(tmp_path: Path) -> None:
    runs = make_runs((0, 1))
    inputs = {}
    for one in runs:
        inputs[one.input] = str(tmp_path / one.input)
        Path(inputs[one.input]).mkdir()
        write_manifest(inputs[one.input], "measure", made_up(one.contestant, one.seed), time.time())
    inputs["corpus"] = str(tmp_path / "corpus")
    Path(inputs["corpus"]).mkdir()
    write_manifest(inputs["corpus"], "corpus", {"vocab_size": 2048, "splits": {"train": {"tokens": 10**6}}}, 0.0)
    config = CompareConfig(title="a <study>", runs=runs, recipe={"corpus": {"sources": ["s3://user:secret@bucket"]}})

    manifest = compare.run(config, inputs, str(tmp_path / "out"))

    out = tmp_path / "out"
    assert json.loads((out / compare.NAME).read_text())["contestants"] == manifest["contestants"]
    table = (out / compare.TABLE).read_text()
    assert table.count("\n| the <") == 5 + 9
    assert "256 held-out windows of 128 tokens, 2 seed(s)" in table
    page = (out / "report.html").read_text()
    parsed = _Parsed(page)
    assert "script" not in parsed.tags
    assert parsed.tags.count("svg") == 4, "two charts, each wide and narrow"
    assert "the <rho-8> model" in parsed.text, "labels are text"
    assert "3.005 \u00b1 0.007" in parsed.text
    assert "10 models of about 2.2 M parameters" in parsed.text
    assert "secret" not in page


def test_an_unfinished_measurement_is_named(tmp_path: Path) -> None:
    runs = make_runs((0,))[:1]
    inputs = {"corpus": str(tmp_path), runs[0].input: str(tmp_path / "missing")}
    with pytest.raises(UserError, match="missing"):
        compare.run(CompareConfig(runs=runs), inputs, str(tmp_path / "out"))
