"""pipelines.corpus: the whole stage, in process and on Ray; restarts, counts, bad input, an object store."""

import functools
import gzip
import json
import logging
import math
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from armd.tokenizer import Tokenizer
from pipelines import corpus, corpus_tasks, corpus_tokenizer, shards, storage
from pipelines.corpus_config import CorpusConfig
from pipelines.errors import UserError
from pipelines.manifest import verify_files
from pipelines.shard_cache import ShardCache
from pipelines.sources import InputFile, Unit, input_files, work_units
from pipelines.windows import WindowIndex
from tests.object_store import s3_server

Files = dict[str, bytes]


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units one after the other in this process, in an arbitrary order, as Ray may finish them."""

    def in_tasks(function: Callable[[Unit], dict], units: list[Unit]) -> Iterator[tuple[int, dict]]:
        order = list(range(len(units)))
        random.Random(len(units)).shuffle(order)
        for index in order:
            yield index, json.loads(json.dumps(function(units[index])))

    monkeypatch.setattr(corpus, "in_tasks", in_tasks)


@pytest.fixture
def source(tmp_path: Path) -> str:
    """Some hundred documents in ten files."""
    generator = random.Random(0)
    words = ["".join(generator.choices("etaoinshr", k=generator.randint(2, 7))) for _ in range(200)]
    folder = tmp_path / "source"
    folder.mkdir()
    for number in range(10):
        texts = [" ".join(generator.choices(words, k=60)) for _ in range(20)]
        (folder / f"{number}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(folder)


def small(source: str, **changes: object) -> CorpusConfig:
    values: dict = {"sources": (source,), "vocab_size": 400, "sequence_length": 32, "validation_fraction": 0.2}
    return CorpusConfig(**{**values, "unit_bytes": 20_000, **changes})


def content(folder: Path) -> Files:
    """Every file below `folder` but the manifest, which says when it was made."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def timeless(manifest: dict) -> dict:
    return {name: value for name, value in manifest.items() if name not in ("started", "seconds")}


def stream_of(folder: Path, manifest: dict, split: str) -> list[int]:
    """The split's tokens, its shards laid end to end."""
    shards_ = manifest["splits"][split]["shards"]
    return np.concatenate([np.load(folder / shard["path"]) for shard in shards_]).tolist()


def documents_of(source: str) -> list[str]:
    lines = [line for path in sorted(Path(source).iterdir()) for line in path.read_text().splitlines()]
    return [json.loads(line)["text"] for line in lines]


class Recorder:
    """A progress that remembers."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, float | None, str, str]] = []

    def update(self, done: float, total: float | None, unit: str, note: str = "") -> None:
        self.calls.append((done, total, unit, note))


def test_corpus_holds_every_document_once(tmp_path: Path, source: str, in_process: None) -> None:
    progress = Recorder()
    manifest = corpus.run(small(source), {}, str(tmp_path / "out"), progress)
    assert manifest["documents"] == {"read": 200, "used": 200, "empty": 0, "duplicate": 0, "quarantined": 0}
    assert (manifest["stage"], manifest["sequence_length"], manifest["dtype"]) == ("corpus", 32, "uint16")
    assert (tmp_path / "out" / "quarantine.jsonl").read_bytes() == b""
    tokenizer = Tokenizer.load(tmp_path / "out")
    assert tokenizer.sha256 == manifest["tokenizer_sha256"]
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (manifest["vocab_size"], manifest["eos_id"])
    for split, held_out in (("train", False), ("validation", True)):
        part = manifest["splits"][split]
        verify_files(str(tmp_path / "out"), part["shards"])
        assert len(part["shards"]) > 3
        stream = np.concatenate([np.load(tmp_path / "out" / shard["path"]) for shard in part["shards"]])
        pieces = tokenizer.decode(stream.tolist()).split(tokenizer.eos_token)
        expected = [text for text in documents_of(source) if shards.is_held_out(text, 0.2) == held_out]
        assert pieces == [*expected, ""]
        assert (part["documents"], part["tokens"]) == (len(expected), len(stream))
        assert part["bytes"] == sum(len(text) for text in expected)
        index = WindowIndex(str(tmp_path / "out"), split)
        assert len(index) == len(stream) // 32
        assert index[len(index) - 1].tolist() == stream[32 * (len(index) - 1) : 32 * len(index)].tolist()
    done, total, unit, note = progress.calls[-1]
    assert done == pytest.approx(total)
    assert unit == "MB"
    assert "200 documents" in note
    assert [call[0] for call in progress.calls] == sorted(call[0] for call in progress.calls)


def test_held_out_documents_have_sources_of_their_own(tmp_path: Path, source: str, in_process: None) -> None:
    """Same names, sizes and times in both, and a document that is in both; validation_fraction plays no part."""
    held_out = tmp_path / "held-out"
    shutil.copytree(source, held_out)
    swapped = (held_out / "3.jsonl").read_text().replace("h", "n")
    (held_out / "3.jsonl").write_text(swapped)
    os.utime(held_out / "3.jsonl", ns=(os.stat(f"{source}/3.jsonl").st_mtime_ns,) * 2)
    out = tmp_path / "out"
    manifest = corpus.run(small(source, validation_sources=(str(held_out),)), {}, str(out))
    assert manifest["documents"]["used"] == 400
    assert manifest["config"]["validation_sources"] == [str(held_out)]
    tokenizer = Tokenizer.load(out)
    for split, folder in (("train", source), ("validation", str(held_out))):
        pieces = tokenizer.decode(stream_of(out, manifest, split)).split(tokenizer.eos_token)
        assert pieces == [*documents_of(folder), ""]
        assert manifest["splits"][split]["documents"] == 200
        assert len(manifest["splits"][split]["shards"]) > 3


def test_one_document_each_for_training_and_validation(tmp_path: Path, in_process: None) -> None:
    """A text whose end is held out: two files, each a single document of many lines, one of them compressed."""
    text = "".join(f"Line {n}: {'the cat sat on the mat ' * (n % 5)}\n" for n in range(20_000))
    (tmp_path / "train.txt").write_text(text[:-90_000])
    (tmp_path / "rest.txt.gz").write_bytes(gzip.compress(text[-90_000:].encode()))
    config = small(str(tmp_path / "train.txt"), validation_sources=(str(tmp_path / "rest.txt.gz"),))
    manifest = corpus.run(config, {}, str(tmp_path / "out"))
    assert manifest["documents"] == {"read": 2, "used": 2, "empty": 0, "duplicate": 0, "quarantined": 0}
    tokenizer = Tokenizer.load(tmp_path / "out")
    for split, expected in (("train", text[:-90_000]), ("validation", text[-90_000:])):
        assert manifest["splits"][split]["documents"] == 1
        assert manifest["splits"][split]["bytes"] == len(expected)
        stream = stream_of(tmp_path / "out", manifest, split)
        assert tokenizer.decode(stream) == expected + tokenizer.eos_token


def test_held_out_sources_are_identity_by_what_they_hold(tmp_path: Path, source: str, in_process: None) -> None:
    held_out = tmp_path / "held-out"
    shutil.copytree(source, held_out)
    config = small(source, validation_sources=(str(held_out),))
    first = corpus.fingerprint(config)
    assert json.loads(json.dumps(first)) == first
    moved = shutil.copytree(held_out, tmp_path / "moved")
    assert corpus.fingerprint(small(source, validation_sources=(str(moved),))) == first
    others = [
        small(source),
        small(source, sources=(source, str(held_out))),
        small(source, sources=(str(held_out),), validation_sources=(source, str(moved))),
    ]
    assert all(corpus.fingerprint(other) != first for other in others)
    before = corpus.run(config, {}, str(tmp_path / "out"))
    (held_out / "3.jsonl").write_text('{"text": "another document"}\n')
    assert corpus.fingerprint(config) != first
    after = corpus.run(config, {}, str(tmp_path / "out"))
    assert after["splits"]["train"] == before["splits"]["train"]
    assert after["splits"]["validation"]["documents"] == 181


def test_the_tokenizer_is_trained_on_the_training_sources_alone(tmp_path: Path, source: str) -> None:
    """All of them, and all of the sample."""
    config = small(source, validation_sources=(str(shutil.copytree(source, tmp_path / "held-out")),))
    units = corpus.work_units(config)
    assert corpus_tokenizer.training_sample(config, units) == documents_of(source)
    sample = corpus_tokenizer.training_sample(replace(config, tokenizer_sample_bytes=4000), units)
    assert 3000 < sum(map(len, sample)) <= 4000


@pytest.mark.parametrize(
    ("changes", "what", "fix"),
    [
        (
            {"validation_sources": ("texts/b.txt",)},
            "texts/b.txt is in --corpus.sources and in --corpus.val",
            "each file",
        ),
        ({"sources": ("python-docs",), "validation_sources": ("python-docs",)}, "python-docs:", "each file"),
        ({"validation_sources": ("nowhere",)}, "nowhere does not exist", "--corpus.validation-sources"),
        ({"validation_sources": ("hollow",)}, "empty folder", "--corpus.validation-sources"),
        ({"validation_sources": ("tiny.txt",)}, "validation split has 2 tokens", "in --corpus.validation-sources"),
        (
            {"sources": ("tiny.txt",), "validation_sources": ("texts",)},
            "train split has 2 tokens",
            "in --corpus.sources",
        ),
    ],
)
def test_bad_held_out_sources_are_user_errors(
    tmp_path: Path, in_process: None, changes: dict, what: str, fix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("texts").mkdir()
    Path("hollow").mkdir()
    for name in ("a", "b"):
        Path(f"texts/{name}.txt").write_text(f"some words of {name} " * 50)
    Path("tiny.txt").write_text("!")
    config = small("texts", **changes)
    with pytest.raises(UserError, match=what) as error:
        corpus.run(config, {}, str(tmp_path / "out"))
    assert fix in error.value.fix
    if "tokens" not in what:  # what the listings show is refused before a run starts anything
        with pytest.raises(UserError, match=what):
            corpus.fingerprint(config)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_unigram_baseline(tmp_path: Path, source: str, in_process: None) -> None:
    manifest = corpus.run(small(source), {}, str(tmp_path / "out"))
    streams = {}
    for split, part in manifest["splits"].items():
        streams[split] = np.concatenate(
            [np.load(tmp_path / "out" / shard["path"]) for shard in part["shards"]]
        ).tolist()
    counts = Counter(streams["train"])
    total = len(streams["train"]) + manifest["vocab_size"]
    nats = [-math.log((counts[token] + 1) / total) for token in streams["validation"]]
    assert manifest["unigram"]["validation_nats_per_token"] == pytest.approx(sum(nats) / len(nats), rel=1e-12)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == manifest


def test_second_run_reads_nothing_again(
    tmp_path: Path, source: str, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = corpus.run(small(source), {}, str(tmp_path / "out"))
    monkeypatch.setattr(corpus, "in_tasks", None)
    assert corpus.run(small(source), {}, str(tmp_path / "out")) == first


def test_killed_run_is_continued_and_gives_the_same_files(
    tmp_path: Path, source: str, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = timeless(corpus.run(small(source), {}, str(tmp_path / "whole")))
    out = tmp_path / "out"
    make_unit, train = shards.make_unit, Tokenizer.train
    made: list[int] = []

    def killed(unit: Unit, settings: shards.UnitSettings) -> dict:
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(1)
        return make_unit(unit, settings)

    monkeypatch.setattr(shards, "make_unit", killed)
    with pytest.raises(KeyboardInterrupt):
        corpus.run(small(source), {}, str(out))
    assert not (out / "manifest.json").exists()
    (out / "shards" / ".armd-1-x.tmp").write_text("half a shard")
    (out / "shards" / "train-000.npy").write_text("of another run")
    monkeypatch.setattr(shards, "make_unit", make_unit)
    written: list[int] = []
    write = shards._write_shards
    monkeypatch.setattr(shards, "_write_shards", lambda *arguments: written.append(1) or write(*arguments))
    monkeypatch.setattr(Tokenizer, "train", None)
    assert timeless(corpus.run(small(source), {}, str(out))) == whole
    monkeypatch.setattr(Tokenizer, "train", train)
    assert content(out) == content(tmp_path / "whole")
    assert len(written) == len(list((out / "units").iterdir())) - 1 - 3


@pytest.mark.parametrize("content_", [b"{torn", b"{}"])
def test_half_written_tokenizer_is_trained_again(
    tmp_path: Path, source: str, in_process: None, content_: bytes
) -> None:
    expected = corpus.run(small(source), {}, str(tmp_path / "whole"))["tokenizer_sha256"]
    (tmp_path / "out" / "units").mkdir(parents=True)
    (tmp_path / "out" / "tokenizer.json").write_bytes(content_)
    (tmp_path / "out" / "units" / "tokenizer.json").write_bytes(content_)
    assert corpus.run(small(source), {}, str(tmp_path / "out"))["tokenizer_sha256"] == expected


def test_tokenizer_of_other_settings_is_not_taken_over(tmp_path: Path, source: str, in_process: None) -> None:
    expected = corpus.run(small(source), {}, str(tmp_path / "whole"))["tokenizer_sha256"]
    out = tmp_path / "out"
    corpus.run(small(source, vocab_size=300), {}, str(out))
    (out / "manifest.json").unlink()
    assert corpus.run(small(source), {}, str(out))["tokenizer_sha256"] == expected


def test_changed_source_or_setting_is_noticed(tmp_path: Path, source: str, in_process: None) -> None:
    out = tmp_path / "out"
    first = corpus.run(small(source), {}, str(out))
    longer = corpus.run(small(source, sequence_length=48), {}, str(out))
    assert (first["sequence_length"], longer["sequence_length"]) == (32, 48)
    assert first["splits"] == longer["splits"]
    Path(source, "99.jsonl").write_text('{"text": "one more document"}\n')
    more = corpus.run(small(source), {}, str(out))
    assert more["documents"]["used"] == 201
    listed = {shard["path"] for part in more["splits"].values() for shard in part["shards"]}
    assert {f"shards/{name}" for name in os.listdir(out / "shards")} == listed


def test_units_of_a_source_that_was_moved_are_taken_over(
    tmp_path: Path, source: str, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path / "out")
    first = corpus.run(small(source), {}, out)
    Path(out, "manifest.json").unlink()  # a killed run: all units are done, the corpus is not
    moved = Path(source).rename(tmp_path / "elsewhere")
    made = []
    monkeypatch.setattr(shards, "_write_shards", lambda *unit: made.append(unit))
    second = corpus.run(small(str(moved)), {}, out)
    assert made == []
    assert (second["identity"], second["splits"]) == (first["identity"], first["splits"])


def test_quarantine_is_written_and_counted(tmp_path: Path, source: str, in_process: None) -> None:
    bad = Path(source, "5.jsonl")
    bad.write_bytes(bad.read_bytes() + b'{"text": "torn\n{"text": ""}\n{"other": 1}\n')
    manifest = corpus.run(small(source, max_quarantined=0.01), {}, str(tmp_path / "out"))
    assert manifest["documents"] == {"read": 203, "used": 200, "empty": 1, "duplicate": 0, "quarantined": 2}
    lines = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    assert [(entry["source"], entry["line"]) for entry in map(json.loads, lines)] == [(str(bad), 21), (str(bad), 23)]
    assert all(entry["reason"] for entry in map(json.loads, lines))
    with pytest.raises(
        UserError, match=r"2 of 203 records .* max_quarantined = 0\.009 .*5\.jsonl \(2, the first: line 21: not JSON"
    ):
        corpus.run(small(source, max_quarantined=0.009), {}, str(tmp_path / "strict"))
    assert not (tmp_path / "strict" / "manifest.json").exists()
    assert (tmp_path / "strict" / "quarantine.jsonl").read_text().count("\n") == 2


def test_a_weight_of_a_source_shorter_than_one_window_is_refused(tmp_path: Path, source: str, in_process: None) -> None:
    short = tmp_path / "short.jsonl"
    short.write_text('{"text": "a few words"}\n')
    config = small(source, sources=(f"{source}/[0-8].jsonl", str(short)), validation_sources=(f"{source}/9.jsonl",))
    assert corpus.run(config, {}, str(tmp_path / "all"))["documents"]["used"] == 201
    with pytest.raises(UserError, match=r"source .*short\.jsonl has a weight and \d+ tokens .* one window of 32"):
        corpus.run(replace(config, weights=(1.0, 1.0)), {}, str(tmp_path / "mixed"))


@pytest.mark.parametrize(("max_quarantined", "stops_early"), [(0.1, True), (0.45, False)])
def test_a_corpus_that_can_only_fail_stops_early(
    tmp_path: Path,
    source: str,
    in_process: None,
    monkeypatch: pytest.MonkeyPatch,
    max_quarantined: float,
    stops_early: bool,
) -> None:
    """Half of the records are bad: five times a tenth, but not twice 0.45."""
    monkeypatch.setattr(corpus, "_FEWEST_QUARANTINED", 20)
    for path in Path(source).iterdir():
        path.write_text(path.read_text() + '{"text": 1}\n' * 20)
    config = small(source, max_quarantined=max_quarantined, unit_bytes=1, validation_sources=(f"{source}/9.jsonl",))
    config = replace(config, sources=(f"{source}/[0-8].jsonl",))
    done = Recorder()
    with pytest.raises(UserError, match=r"of \d+ records cannot be read, more than max_quarantined"):
        corpus.run(config, {}, str(tmp_path / "out"), done)
    share = done.calls[-1][0] / done.calls[-1][1]
    assert (share < 0.5) is stops_early
    assert (tmp_path / "out" / "quarantine.jsonl").read_text().count("\n") > 20


def test_duplicates_are_dropped_by_choice_and_counted(tmp_path: Path, source: str, in_process: None) -> None:
    texts = documents_of(source)
    repeated = [texts[3], texts[150], "a new one", texts[3]]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in repeated)
    Path(source, "9a.jsonl").write_text(lines + "{torn\n\n" + '{"text": " "}\n')
    config = small(source, max_quarantined=0.1)
    kept = corpus.run(config, {}, str(tmp_path / "all"))
    assert kept["documents"] == {"read": 206, "used": 204, "empty": 1, "duplicate": 0, "quarantined": 1}
    manifest = corpus.run(replace(config, drop_duplicates=True), {}, str(tmp_path / "out"))
    assert manifest["documents"] == {"read": 206, "used": 201, "empty": 1, "duplicate": 3, "quarantined": 1}
    tokenizer = Tokenizer.load(tmp_path / "out")
    for split, held_out in (("train", False), ("validation", True)):
        pieces = tokenizer.decode(stream_of(tmp_path / "out", manifest, split)).split(tokenizer.eos_token)
        assert pieces == [*(text for text in [*texts, "a new one"] if shards.is_held_out(text, 0.2) == held_out), ""]
    assert not (tmp_path / "out" / "hashes").exists()


def test_the_manifest_tells_what_the_corpus_is_like(tmp_path: Path, source: str, in_process: None) -> None:
    texts = documents_of(source)
    bad = b'{"text": "torn\n{"text": "\xff"}\n{"text": 1}\n{"text"\n'
    Path(source, "x.jsonl").write_bytes(bad)
    manifest = corpus.run(small(source, max_quarantined=0.1), {}, str(tmp_path / "out"))
    assert manifest["quarantine_reasons"] == {"not JSON": 2, "not UTF-8": 1, "field 'text' is not text but int": 1}
    tokenizer = Tokenizer.load(tmp_path / "out")
    training = [text for text in texts if not shards.is_held_out(text, 0.2)]
    lengths = Counter((len(tokenizer.encode(text)) + 1).bit_length() for text in training)
    found = manifest["splits"]["train"]["lengths"]
    assert {size: count for size, count in enumerate(found) if count} == lengths
    expected = sorted((storage.sha256_bytes(text.encode())[:16], text) for text in training)[:10]
    assert [sample["hash"] for sample in manifest["samples"]] == [digest for digest, _ in expected]
    for sample, (_, text) in zip(manifest["samples"], expected, strict=True):
        assert sample["tokens"] == len(tokenizer.encode(text)) + 1
        shown = "".join(sample["shown"])
        assert shown == (text + tokenizer.eos_token)[: len(shown)]
        assert len(sample["shown"]) == min(160, sample["tokens"])


def test_samples_show_characters_whole(tmp_path: Path, in_process: None) -> None:
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"\u4e00\u4e8c {chr(0x4E00 + number)} \U0001f600 x{number}")
    manifest = corpus.run(small(str(tmp_path / "*.txt"), vocab_size=257, sequence_length=4), {}, str(tmp_path / "out"))
    for sample in manifest["samples"]:
        assert "\u4e00" in sample["shown"]
        assert "\U0001f600" in sample["shown"]
        assert "\ufffd" not in "".join(sample["shown"])


BAD: list[tuple[str, Files, dict, str, str]] = [
    ("missing", {}, {}, "does not exist", "--corpus.sources"),
    ("blank", {"x.txt": b" \n\t"}, {}, "hold no text", "--corpus.sources"),
    ("blank-given", {"x.txt": b" \n\t"}, {"tokenizer": "given"}, "hold no text", "--corpus.sources"),
    ("field", {"x.jsonl": b'{"body": "words"}\n' * 9}, {}, "x.jsonl, line 1: no field 'text'", "--corpus.text-field"),
    ("field-given", {"x.jsonl": b'{"body": "w"}\n' * 9}, {"tokenizer": "given"}, "9 of 9 records", "--corpus.max-quar"),
    ("short", {f"{n}.txt": b"some words" for n in range(9)}, {}, "train split has 0|held out", "validation-fraction"),
    ("one", {"x.txt": b"many words " * 500}, {}, "validation split has 0 tokens|is held out", "validation-fraction"),
    ("big5", {"x.txt": b"\xa4\xa4"}, {}, "x.txt: not UTF-8", "mend the sources"),
    ("few", {f"{n}.txt": b"word %d" % n for n in range(40)}, {"sequence_length": 4096}, "4096", "--corpus.sequence-l"),
    ("tokenizer", {"x.txt": b"text"}, {"tokenizer": "nowhere"}, "nowhere", "tokenizer.json"),
]


@pytest.mark.parametrize(("files", "changes", "what", "fix"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_input_is_a_user_error(
    tmp_path: Path, in_process: None, files: Files, changes: dict, what: str, fix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Tokenizer.train(["some text"] * 9, 270).save(tmp_path / "given" / "tokenizer.json")
    for name, data in files.items():
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(data)
    with pytest.raises(UserError, match=what) as error:
        corpus.run(small(str(tmp_path / "in"), **changes), {}, str(tmp_path / "out"))
    assert fix in error.value.fix
    assert "\n" not in error.value.what + error.value.fix
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_given_tokenizer_is_used_and_is_part_of_the_fingerprint(tmp_path: Path, source: str, in_process: None) -> None:
    given = tmp_path / "given" / "tokenizer.json"
    Tokenizer.train(documents_of(source), 300).save(given)
    config = small(source, tokenizer=str(given.parent))
    manifest = corpus.run(config, {}, str(tmp_path / "out"))
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == given.read_bytes()
    assert manifest["vocab_size"] == 300
    before = corpus.fingerprint(config)
    assert json.loads(json.dumps(before)) == before == corpus.fingerprint(config)
    Tokenizer.train(documents_of(source), 310).save(given)
    assert corpus.fingerprint(config) != before
    assert corpus.run(config, {}, str(tmp_path / "out"))["vocab_size"] == 310


def test_tokenizer_from_an_object_store(source: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(documents_of(source), 300)
    storage.write_text("memory://tokenizer-test/deep/tokenizer.json", tokenizer.to_json())
    try:
        for uri in ("memory://tokenizer-test/deep", "memory://tokenizer-test/deep/tokenizer.json"):
            assert corpus_tokenizer.given_tokenizer(uri).sha256 == tokenizer.sha256
        with pytest.raises(UserError, match="nowhere"):
            corpus_tokenizer.given_tokenizer("memory://tokenizer-test/nowhere.json")
    finally:
        storage.remove_tree("memory://tokenizer-test")


def test_tokenizer_sample_is_bounded_spread_and_of_the_training_split(source: str) -> None:
    config = small(source, tokenizer_sample_bytes=4000)
    units = work_units(input_files(config.sources), 7_000, config.validation_fraction)
    sample = corpus_tokenizer.training_sample(config, units)
    assert 3000 < sum(map(len, sample)) <= 4000
    places = set()
    for text in sample:
        (place,) = {n for n, document in enumerate(documents_of(source)) if document.startswith(text)}
        assert not shards.is_held_out(documents_of(source)[place], 0.2)
        places.add(place // 20)
    assert places == set(range(10))


def test_output_that_other_nodes_do_not_share_is_noticed(
    tmp_path: Path, source: str, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_unit = shards.make_unit

    def elsewhere(unit: Unit, settings: shards.UnitSettings) -> dict:
        record = make_unit(unit, settings)
        storage.remove_tree(str(tmp_path / "out" / record["splits"]["train"]["shards"][0]["path"]))
        return record

    monkeypatch.setattr(shards, "make_unit", elsewhere)
    with pytest.raises(UserError, match="not the same folder on every node"):
        corpus.run(small(source), {}, str(tmp_path / "out"))


@pytest.mark.ray
def test_ray_gives_the_same_files_and_passes_errors_on(
    tmp_path: Path, source: str, ray_cluster: None, capfd: pytest.CaptureFixture[str]
) -> None:
    progress = Recorder()
    config = small(f"{source}/[0-7].jsonl", validation_sources=(f"{source}/[89].jsonl",))
    manifest = corpus.run(config, {}, str(tmp_path / "ray"), progress)
    assert [part["documents"] for part in manifest["splits"].values()] == [160, 40]
    assert progress.calls[-1][0] == pytest.approx(progress.calls[-1][1])
    units = len(list((tmp_path / "ray" / "units").iterdir())) - 1
    assert len(progress.calls) == units + 1
    assert units > 3
    printed = capfd.readouterr()
    assert printed.out + printed.err == ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "in_tasks", lambda function, units: enumerate(function(unit) for unit in units))
        assert timeless(corpus.run(config, {}, str(tmp_path / "alone"))) == timeless(manifest)
    assert content(tmp_path / "ray") == content(tmp_path / "alone")
    nowhere = InputFile(uri="nosuch://x/y.txt", name="0:y.txt", format="txt", compression="", size=1, version="")
    settings = shards.UnitSettings(
        output_dir=str(tmp_path / "error"),
        tokenizer_json=Tokenizer.load(tmp_path / "ray").to_json(),
    )
    unit = Unit(files=(nowhere,), validation_fraction=0.5)
    with pytest.raises(UserError, match="nosuch://x/y") as error:
        list(corpus_tasks.in_tasks(functools.partial(shards.make_unit, settings=settings), [unit]))
    assert error.value.fix
    printed = capfd.readouterr()
    assert "Traceback" not in printed.out + printed.err


def test_only_ray_datas_own_lines_are_silenced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when every handler that writes to a stream is: then nobody's log hears from a server in this process."""
    logger, ours = logging.getLogger("ray.data"), logging.StreamHandler()
    import ray.data

    console = next(handler for handler in logger.handlers if handler.name == "console")
    monkeypatch.setattr(logger, "handlers", [console, ours])
    monkeypatch.setattr(console, "level", console.level)  # and as it was, afterwards
    monkeypatch.setattr(ray.data.DataContext.get_current(), "enable_progress_bars", True)
    corpus_tasks._silence_ray_data()
    assert (console.level, ours.level) == (logging.CRITICAL, logging.NOTSET)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty bucket of an S3 server on loopback."""
    with s3_server(monkeypatch, "corpus-test"):
        yield "s3://corpus-test"


def test_object_store_in_and_out(tmp_path: Path, source: str, in_process: None, bucket: str) -> None:
    import boto3

    for path in sorted(Path(source).iterdir()):
        storage.write_bytes(f"{bucket}/source/{path.name}", path.read_bytes())
    assert corpus.fingerprint(small(f"{bucket}/source")) == corpus.fingerprint(small(f"{bucket}/source"))
    out = f"{bucket}/runs/out"
    storage.check_writable(out)
    assert storage.list_names(bucket) == ["source"]
    boto3.client("s3").put_object(Bucket="corpus-test", Key="by/another/process", Body=b"")
    assert storage.list_names(bucket) == ["by", "source"]
    manifest = corpus.run(small(f"{bucket}/source/*.jsonl"), {}, out)
    local = corpus.run(small(source), {}, str(tmp_path / "local"))
    assert manifest["splits"] == local["splits"]
    assert storage.list_names(out) == ["manifest.json", "quarantine.jsonl", "shards", "tokenizer.json", "units"]
    verify_files(out, manifest["splits"]["train"]["shards"])
    index = WindowIndex(out, "train", ShardCache(str(tmp_path / "cache")))
    expected = WindowIndex(str(tmp_path / "local"), "train")
    assert index[7].tolist() == expected[7].tolist()
    storage.remove_tree(f"{out}/manifest.json")
    assert corpus.run(small(f"{bucket}/source/*.jsonl"), {}, out)["splits"] == local["splits"]
    with pytest.raises(UserError, match="s3://corpus-test/nowhere does not exist"):
        corpus.run(small(f"{bucket}/nowhere"), {}, out)
    with pytest.raises(UserError, match="cannot write to s3://no-such-bucket/x") as error:
        storage.check_writable("s3://no-such-bucket/x")
    assert "testing-" not in str(error.value.args)


def test_output_that_cannot_be_written_is_a_user_error(tmp_path: Path, source: str, in_process: None) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*/file/out"):
        corpus.run(small(source), {}, str(tmp_path / "file" / "out"))
