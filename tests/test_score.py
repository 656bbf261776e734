"""`armd score` against the library: every way of scoring, reading in parts, bounded memory, what is refused."""

import io
import json
import math
import tracemalloc
from pathlib import Path

import pytest
import torch

import armd
import armd.tokenizer
from jobs import score
from jobs.cli import main
from tests.models import tiny_model

LENGTH = 16
TEXT = "The cat sat on the mat. \u4f60\u597d, said the dog; caf\u00e9?\n\n" * 12 + "And ran away.\n"


@pytest.fixture(scope="module")
def tokenizer() -> armd.Tokenizer:
    return armd.Tokenizer.train([TEXT], 290)


@pytest.fixture(scope="module")
def network(tokenizer: armd.Tokenizer) -> armd.ARMD:
    return tiny_model(tokenizer.vocab_size, LENGTH).float()


@pytest.fixture
def model(tmp_path: Path, network: armd.ARMD, tokenizer: armd.Tokenizer, monkeypatch: pytest.MonkeyPatch) -> str:
    """The model's folder; the working directory holds text.txt."""
    armd.save(tmp_path / "model", network, tokenizer)
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT, encoding="utf-8")
    return str(tmp_path / "model")


def scored(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main(["score", *arguments, "--json"]) == 0
    result: dict = json.loads(capsys.readouterr().out)
    return result


ALL = ("--n-streams", "3", "--one-by-one", "--random-orders", "4", "--seed", "7")


def test_every_way_is_the_librarys(
    model: str, network: armd.ARMD, tokenizer: armd.Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    result = scored(capsys, model, "text.txt", *ALL)
    ids = tokenizer.encode(TEXT)
    windows = [torch.tensor([ids[start : start + LENGTH]]) for start in range(0, len(ids), LENGTH)]
    assert (result["tokens"], result["bytes"], result["windows"]) == (len(ids), len(TEXT.encode()), len(windows))
    assert len(windows[-1][0]) < LENGTH
    expected = dict.fromkeys(score.LABELS, 0.0)
    for row, window in enumerate(windows):
        n = window.shape[1]
        strided = armd.Order.strided(n, 3)
        orders = {
            "left_to_right": armd.Order.left_to_right(n),
            "strided": strided,
            "strided_one_by_one": armd.Order.given(strided.positions),
        }
        for way, order in orders.items():
            expected[way] -= float(armd.score(network, window, order).sum())
        logp = armd.score_random_orders(network, window, 4, seed=7, first_row=row)[0].tolist()
        expected["random_mean"] -= sum(logp) / 4
        expected["random_weighted"] -= math.log(sum(math.exp(one - max(logp)) for one in logp) / 4) + max(logp)
    assert list(result["scores"]) == list(expected)
    for way, nats in expected.items():
        of_way = result["scores"][way]
        assert of_way["nats"] == pytest.approx(nats, rel=1e-5)
        assert of_way["nats_per_token"] == of_way["nats"] / len(ids)
        assert of_way["perplexity"] == pytest.approx(math.exp(of_way["nats"] / len(ids)))
        assert of_way["bits_per_byte"] == pytest.approx(of_way["nats"] / math.log(2) / len(TEXT.encode()))
    assert result["nats"] == result["scores"]["strided"]["nats"]
    assert result["order_gap"] + result["independence_gap"] == pytest.approx(
        (expected["strided"] - expected["left_to_right"]) / len(ids), rel=1e-3
    )
    assert result["scores"]["random_weighted"]["nats"] < result["scores"]["random_mean"]["nats"]


def test_only_what_is_asked_for(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    plain = scored(capsys, model, "text.txt")
    assert list(plain["scores"]) == ["left_to_right"]
    assert plain["nats"] == plain["scores"]["left_to_right"]["nats"]
    assert "order_gap" not in plain
    assert list(scored(capsys, model, "text.txt", "--n-streams", "2")["scores"]) == ["left_to_right", "strided"]
    ways = scored(capsys, model, "text.txt", "--random-orders", "1")["scores"]
    assert list(ways) == ["left_to_right", "random_mean", "random_weighted"]
    assert ways["random_mean"] == ways["random_weighted"]


def test_nothing_depends_on_batches_or_on_where_reading_stops(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of 5 bytes end inside characters and words."""
    whole = scored(capsys, model, "text.txt", *ALL)
    for changes in ({"BATCH": 1}, {"BATCH": 3}, {"LOGITS": 1}, {"CHUNK": 5}):
        with monkeypatch.context() as patch:
            for name, value in changes.items():
                patch.setattr(score, name, value)
            other = scored(capsys, model, "text.txt", *ALL)
        assert (other["tokens"], other["bytes"], other["windows"]) == tuple(
            whole[name] for name in ("tokens", "bytes", "windows")
        )
        for way, of_way in whole["scores"].items():
            assert other["scores"][way]["nats"] == pytest.approx(of_way["nats"], rel=1e-5)


def test_batches_are_cut_to_the_size_of_their_logits(
    model: str, tokenizer: armd.Tokenizer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    original = armd.score
    monkeypatch.setattr(armd, "score", lambda *arguments: seen.append(len(arguments[1])) or original(*arguments))
    monkeypatch.setattr(score, "LOGITS", 2 * LENGTH * tokenizer.vocab_size)
    scored(capsys, model, "text.txt")
    assert set(seen) == {1, 2}


def test_a_long_line_is_never_held_whole(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line of 5 MB, the network left out: what is held does not grow with it."""
    monkeypatch.setattr(score, "CHUNK", 1 << 14)
    monkeypatch.setattr(armd.tokenizer, "_PIECE", 1 << 14)
    monkeypatch.setattr(armd, "score", lambda network, tokens, order: torch.zeros(tokens.shape))
    (tmp_path / "line.txt").write_text("the cat sat on the mat " * 220_000)
    scored(capsys, model, "text.txt")  # imports and caches
    tracemalloc.start()
    result = scored(capsys, model, "line.txt")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert result["bytes"] > 5_000_000
    assert peak < 1_500_000


def test_standard_input(model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = scored(capsys, model, "text.txt")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    assert scored(capsys, model, "-")["nats"] == expected["nats"]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"fine\xff", "invalid start byte at byte 4"),
        (b"0123456789\xe4\xbd", "unexpected end of data at byte 10"),
        (b"012\xe4\xbd\xa0345\xe4\xbdx", "invalid continuation byte at byte 9"),
    ],
)
def test_a_bad_byte_is_named_by_its_place_in_the_file(
    model: str, content: bytes, what: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("bad.txt").write_bytes(content)
    for chunk in (1, 4, 5, 100):
        monkeypatch.setattr(score, "CHUNK", chunk)
        assert main(["score", model, "bad.txt"]) == 1
        assert what in capsys.readouterr().err


def test_the_table(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", model, "text.txt", *ALL]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(" windows")
    assert [line.partition("  ")[0].rstrip() for line in lines[2:-1]] == [
        "left to right",
        "3 streams",
        "3 streams, one token a block",
        "random orders, mean of 4",
        "random orders, weighted bound of 4",
    ]
    assert len({len(line) for line in lines[1:-1]}) == 1
    assert lines[-1].startswith("order gap ")
