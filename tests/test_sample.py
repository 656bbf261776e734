"""`armd sample`: what it prints, on a terminal and elsewhere."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import serving_parts
from rich.console import Console

import armd
from armd.template import parse_template
from jobs import sample, watch
from jobs.cli import main

ESCAPE = "\x1b"


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(serving_parts.save(tmp_path_factory.mktemp("model"), max_length=64))


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["sample", *arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def samples(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(printed(capsys, *arguments, "--json"))["samples"]
    return found


@pytest.mark.parametrize("mode", [[], ["--mode", "exact"], ["--threshold", "0.2"], ["--max-entropy", "3"]], ids=str)
def test_a_seed_reproduces_and_each_text_has_its_own(
    mode: list[str], model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [model_dir, "--prompt", "the fox", "--max-tokens", "12", "--seed", "7", *mode]
    several = samples(capsys, *options, "--n", "3")
    (alone,) = samples(capsys, *options)
    assert {**alone, "logprobs": []} == {**several[0], "logprobs": []}  # those are the same to rounding
    assert [one["seed"] for one in several] == [7, 8, 9]
    assert len({one["text"] for one in several}) == 3
    for one in several:
        assert (one["accepted"] + one["rejected"] > 0) == ("exact" in mode)
        assert len(one["tokens"]) == len(one["logprobs"]) == len(one["step_of_token"])
    text = printed(capsys, *options)
    assert text == f"the fox{several[0]['text']}\n"


def test_a_template_is_filled_and_nothing_else_of_it_changes(
    model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (one,) = samples(capsys, model_dir, "--template", "The [MASK:4] sat on the[MASK].", "--mode", "exact")
    assert re.fullmatch(r"The .+ sat on the.+\.", one["text"], re.DOTALL)
    assert len(one["tokens"]) == 5
    assert serving_parts.tokenizer().eos_id not in one["tokens"]
    assert printed(capsys, model_dir, "--template", "The [MASK:4] sat on the[MASK].", "--mode", "exact") == (
        one["text"] + "\n"
    )


def test_templates() -> None:
    def encode(text: str) -> list[int]:
        return [ord(one) for one in text]

    assert parse_template("[MASK]", encode) == [None]
    assert parse_template("a[MASK:2]b[MASK]", encode) == [97, None, None, 98, None]
    with pytest.raises(ValueError, match=r"mask of 0 tokens: \[MASK:0\]"):
        parse_template("a[MASK:0]", encode)
    with pytest.raises(ValueError, match=r"no \[MASK\].*'a \[mask\]'"):
        parse_template("a [mask]", encode)


def test_watching_without_a_terminal_prints_the_text_alone(model_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = [model_dir, "--prompt", "the", "--max-tokens", "9", "--n", "2"]
    assert printed(capsys, *options, "--watch") == printed(capsys, *options)


@pytest.mark.parametrize("setting", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_watching_writes_no_escape_codes_into_a_file(
    setting: str, model_dir: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(setting, "1")
    assert ESCAPE not in printed(capsys, model_dir, "--max-tokens", "9", "--watch")


def test_a_stop_string_ends_a_text_and_its_decoding(
    model_dir: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may begin in one token and end in another; others go on."""
    cancelled = []
    cancel = armd.Engine.cancel
    monkeypatch.setattr(armd.Engine, "cancel", lambda self, one: cancelled.append(cancel(self, one)))
    options = [model_dir, "--prompt", "the", "--max-tokens", "24", "--n-streams", "1", "--n", "2"]
    free, other = samples(capsys, *options)
    tokenizer = serving_parts.tokenizer()
    (stop,) = re.findall(r"[^\ufffd]{3}", free["text"][5:])[:1]  # whole characters
    assert stop not in other["text"]
    cancelled.clear()
    cut, same = samples(capsys, *options, "--stop", "nowhere", stop)
    assert cancelled.count(True) == 1
    assert cut["text"] == free["text"][: free["text"].index(stop)]
    assert cut["tokens"] == free["tokens"][: len(cut["tokens"])]
    assert stop in tokenizer.decode(cut["tokens"])
    assert stop not in tokenizer.decode(cut["tokens"][:-1])
    assert len(cut["logprobs"]) == len(cut["step_of_token"]) == cut["steps"] == len(cut["tokens"]) < 24
    assert (cut["finish_reason"], cut["stop_reason"]) == ("stop", stop)
    assert same["text"] == other["text"]
    assert same["stop_reason"] is None


def test_watching_on_a_terminal_ends_with_the_text(
    model_dir: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The live view goes to the terminal, is erased, and the text is printed as ever."""
    screen = Screen()
    monkeypatch.setattr("rich.console.Console", lambda: Console(file=screen, force_terminal=True, width=60))
    options = [model_dir, "--prompt", "the", "--max-tokens", "12", "--n", "2", "--mode", "exact"]
    assert printed(capsys, *options, "--watch") == printed(capsys, *options)
    shown = screen.getvalue()
    assert f"{ESCAPE}[2m" in shown  # drafts
    assert f"{ESCAPE}[36m" in shown  # the first stream
    assert shown.rstrip("\n").endswith(f"{ESCAPE}[2K")
    screen.truncate(0)
    assert json.loads(printed(capsys, *options, "--watch", "--json"))
    assert screen.getvalue() == ""


def test_the_live_view_shows_what_stands_what_is_drafted_and_what_is_open() -> None:
    tokenizer = serving_parts.tokenizer()
    words = tokenizer.encode(" the quick\x1b[31m brown")
    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    view = watch.Watch(console, tokenizer, [words[0], *[None] * 8, words[-1]], n_streams=2, n_texts=1)

    def spans() -> list[tuple[str, str]]:
        (text,) = view.render().renderables
        return [(text.plain[span.start : span.end], str(span.style)) for span in text.spans]

    def written(index: int, text: str) -> armd.Written:
        return armd.Written(index, tokenizer.encode(text)[0], -1.0)

    with view:
        view.show(0, armd.Event(0, [written(0, "a")], drafted=[written(4, "b")]))
        assert ("a", "cyan") in spans()
        assert ("b", "dim") in spans()
        view.show(0, armd.Event(0, [written(4, "c"), written(1, "\x1b")]))
    assert ("c", "yellow") in spans()
    assert "b" not in dict(spans())
    (text,) = view.render().renderables
    assert text.plain.count("_") == 2 + 3  # at most three open places in a row
    assert ESCAPE not in text.plain


def test_the_options_reach_the_sampler(model_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No option is parsed and ignored."""
    seen: list[armd.SamplingParams] = []
    monkeypatch.setattr(sample, "_decode", lambda network, template, requests, texts, view: seen.extend(requests))
    options = "--n-streams 3 --mode exact --max-tokens 5 --temperature 0.5 --top-p 0.9 --top-k 7 --seed 3"
    assert main(["sample", model_dir, *options.split()]) == 0
    assert main(["sample", model_dir, "--max-entropy", "0.5"]) == 0
    assert main(["sample", model_dir, "--threshold", "0.5"]) == 0
    params, by_entropy, by_threshold = seen
    assert (by_entropy.max_entropy, by_threshold.threshold) == (0.5, 0.5)
    eos = serving_parts.tokenizer().eos_id
    assert params == armd.SamplingParams(
        n_streams=3, mode="exact", max_tokens=5, temperature=0.5, top_p=0.9, top_k=7, seed=3, stop_ids=(eos,)
    )


def test_long_prompts_are_named(model_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", model_dir, "--template", "[MASK:65]"]) == 1
    assert "the template has 65 tokens, the model's length is 64" in capsys.readouterr().err
