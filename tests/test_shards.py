"""pipelines.shards: a unit's documents against a plain reading of the definition; restart, damage, dtypes."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from armd.tokenizer import Tokenizer
from pipelines import shards, storage
from pipelines.corpus_config import Reading
from pipelines.errors import UserError
from pipelines.shard_file import packed_counts, token_dtype, unpacked_counts
from pipelines.shards import UnitSettings, is_held_out, make_unit, unit_key
from pipelines.sources import Unit, input_files

TEXTS = [f"document number {number} says {'word ' * (number % 7)}" for number in range(60)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 300)


@pytest.fixture
def unit(tmp_path: Path) -> Unit:
    lines = [json.dumps({"text": text}) for text in TEXTS[:40]] + ["{torn", '{"text": "  "}']
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text("\n".join(lines))
    for number, text in enumerate(TEXTS[40:]):
        (tmp_path / "in" / f"b{number:02}.txt").write_text(text)
    return read(tmp_path / "in")


def read(source: Path, validation_fraction: float = 0.3) -> Unit:
    return Unit(files=tuple(input_files([str(source)])), validation_fraction=validation_fraction)


def settings(tmp_path: Path, tokenizer: Tokenizer, **changes: object) -> UnitSettings:
    values: dict = {"output_dir": str(tmp_path / "out"), "tokenizer_json": tokenizer.to_json()}
    return UnitSettings(**{**values, **changes})


def load(tmp_path: Path, record: dict, split: str) -> np.ndarray:
    (shard,) = record["splits"][split]["shards"]
    array = np.load(tmp_path / "out" / shard["path"], allow_pickle=False)
    assert storage.sha256_file(str(tmp_path / "out" / shard["path"])) == shard["sha256"]
    assert shard["tokens"] == len(array) == record["splits"][split]["tokens"]
    return array


@pytest.mark.parametrize("batch", [1, 50, 1 << 20])
def test_shards_are_the_documents_in_order(
    tmp_path: Path, tokenizer: Tokenizer, unit: Unit, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    monkeypatch.setattr(shards, "_BATCH_CHARACTERS", batch)
    record = make_unit(unit, settings(tmp_path, tokenizer))
    assert record["documents"] == {"read": 62, "used": 60, "empty": 1, "duplicate": 0, "quarantined": 1}
    assert record["quarantine"] == [
        {
            "source": unit.files[0].uri,
            "line": 41,
            "reason": "not JSON: Expecting property name enclosed in double quotes at character 1",
        }
    ]
    for split, held_out in (("train", False), ("validation", True)):
        texts = [text for text in TEXTS if is_held_out(text, 0.3) == held_out]
        expected = [token for text in texts for token in [*tokenizer.encode(text), tokenizer.eos_id]]
        array = load(tmp_path, record, split)
        assert array.dtype == np.uint16
        assert array.tolist() == expected
        part = record["splits"][split]
        assert part["documents"] == len(texts) > 5
        assert part["bytes"] == sum(len(text.encode()) for text in texts)
        assert (
            unpacked_counts(part["counts"]).tolist() == np.bincount(expected, minlength=tokenizer.vocab_size).tolist()
        )


def test_a_long_document_is_tokenised_in_parts(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And gives what it gives as a whole, in every formation that has parts to put together."""
    monkeypatch.setattr("armd.tokenizer._PIECE", 64)
    text = " ".join(TEXTS)
    (tmp_path / "x.txt").write_text(text)
    ids = tokenizer.encode(text)
    assert len(text) > 2000
    calls: list[list[str]] = []
    stream = Tokenizer.encode_stream
    monkeypatch.setattr(Tokenizer, "encode_stream", lambda self, parts: calls.append(parts) or stream(self, parts))
    for batch, n_calls in ((1 << 20, 0), (1000, 1)):
        monkeypatch.setattr(shards, "_BATCH_CHARACTERS", batch)
        for formation, expected in (("packed", [*ids, tokenizer.eos_id]), ("mdlm-bd3lm", ids)):
            config = settings(tmp_path, tokenizer, output_dir=str(tmp_path / "out" / str(batch)), formation=formation)
            calls.clear()
            record = make_unit(read(tmp_path / "x.txt", 0.0), config)
            (shard,) = record["splits"]["train"]["shards"]
            assert np.load(Path(config.output_dir) / shard["path"]).tolist() == expected
            assert len(calls) == n_calls
            assert record["splits"]["train"]["lengths"][len(expected).bit_length()] == 1


def test_lengths_and_samples_by_a_plain_loop(tmp_path: Path, tokenizer: Tokenizer, unit: Unit) -> None:
    record = make_unit(unit, settings(tmp_path, tokenizer))
    for split, held_out in (("train", False), ("validation", True)):
        texts = [text for text in TEXTS if is_held_out(text, 0.3) == held_out]
        lengths: dict[int, int] = {}
        stream: list[int] = []
        places = []
        for text in texts:
            ids = [*tokenizer.encode(text), tokenizer.eos_id]
            lengths[len(ids).bit_length()] = lengths.get(len(ids).bit_length(), 0) + 1
            places.append([storage.sha256_bytes(text.encode())[:16], len(stream), len(ids)])
            stream += ids
        part = record["splits"][split]
        assert {size: count for size, count in enumerate(part["lengths"]) if count} == lengths
        assert part["samples"] == sorted(places)[:10]


def test_finished_unit_is_taken_over_and_a_damaged_one_made_again(
    tmp_path: Path, tokenizer: Tokenizer, unit: Unit, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(tmp_path, tokenizer)
    first = make_unit(unit, config)
    files = {
        name: (tmp_path / "out" / "shards" / name).read_bytes() for name in os.listdir(tmp_path / "out" / "shards")
    }
    calls = []
    write = shards._write_shards
    monkeypatch.setattr(shards, "_write_shards", lambda *arguments: calls.append(1) or write(*arguments))
    assert make_unit(unit, config) == first
    assert not calls
    shard = tmp_path / "out" / first["splits"]["train"]["shards"][0]["path"]
    record = tmp_path / "out" / shards.record_path(unit_key(unit, config))
    for damage in (
        lambda: shard.write_bytes(shard.read_bytes()[:-2]),
        shard.unlink,
        record.unlink,
        lambda: record.write_text(record.read_text()[:100]),
        lambda: record.write_text("[]"),
        lambda: record.write_text(record.read_text().replace('"read": 62', '"read": 63')),
        lambda: record.write_text(record.read_text().replace(first["splits"]["train"]["counts"], "x")),
        lambda: record.write_text(record.read_text().replace(first["key"], "0" * 64)),
    ):
        calls.clear()
        damage()
        assert make_unit(unit, config) == first
        assert calls == [1]
        found = os.listdir(tmp_path / "out" / "shards")
        assert {name: (tmp_path / "out" / "shards" / name).read_bytes() for name in found} == files


def test_key_follows_everything_that_shards_depend_on(tmp_path: Path, tokenizer: Tokenizer, unit: Unit) -> None:
    config = settings(tmp_path, tokenizer)
    other = Tokenizer.train(TEXTS, 280)
    keys = {
        unit_key(unit, config),
        unit_key(replace(unit, files=unit.files[1:]), config),
        unit_key(unit, settings(tmp_path, other)),
        unit_key(unit, settings(tmp_path, tokenizer, reading=Reading(text_field="body"))),
        unit_key(unit, settings(tmp_path, tokenizer, reading=Reading(document_separator="x"))),
        unit_key(unit, settings(tmp_path, tokenizer, reading=Reading(detokenizer="ptb"))),
        unit_key(unit, settings(tmp_path, tokenizer, formation="sedd-radd")),
        unit_key(unit, settings(tmp_path, tokenizer, row_length=8)),
        unit_key(replace(unit, validation_fraction=0.2), config),
        unit_key(replace(unit, dropped=packed_counts(np.array([3]))), config),
        unit_key(replace(unit, files=(replace(unit.files[0], begin=1), *unit.files[1:])), config),
    }
    os.utime(unit.files[0].uri, ns=(5, 5))
    keys.add(unit_key(read(tmp_path / "in"), config))
    assert len(keys) == 12
    assert unit_key(unit, config) == unit_key(unit, settings(tmp_path, tokenizer, output_dir="elsewhere"))


def test_a_failing_unit_leaves_no_record_and_no_scratch(
    tmp_path: Path, tokenizer: Tokenizer, unit: Unit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(storage, "put_file", fail)
    with pytest.raises(OSError, match="disk full"):
        make_unit(unit, settings(tmp_path, tokenizer))
    assert [name for _, _, names in os.walk(tmp_path / "out") for name in names] == []


def test_a_file_that_cannot_be_opened_commits_nothing(tmp_path: Path, tokenizer: Tokenizer, unit: Unit) -> None:
    path = Path(unit.files[5].uri)
    away = path.rename(tmp_path / "away.txt")
    with pytest.raises(UserError, match=f"{path} was listed but cannot be opened"):
        make_unit(unit, settings(tmp_path, tokenizer))
    assert [name for _, _, names in os.walk(tmp_path / "out") for name in names] == []
    away.rename(path)
    assert make_unit(unit, settings(tmp_path, tokenizer))["documents"]["used"] == 60


def test_documents_that_are_not_those_of_the_first_pass_are_refused(
    tmp_path: Path, tokenizer: Tokenizer, unit: Unit
) -> None:
    config = settings(tmp_path, tokenizer)
    with pytest.raises(UserError, match=r"had 59 documents when duplicates were looked for, and 60 when") as caught:
        make_unit(replace(unit, dropped=packed_counts(np.array([3])), n_hashed=59), config)
    assert "hashes" in caught.value.fix
    assert [name for _, _, names in os.walk(tmp_path / "out") for name in names] == []
    kept = make_unit(replace(unit, dropped=packed_counts(np.array([3])), n_hashed=60), config)
    assert kept["documents"] == {"read": 62, "used": 59, "empty": 1, "duplicate": 1, "quarantined": 1}


def test_unit_without_text_has_no_shards(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "x.txt").write_text(" \n")
    record = make_unit(read(tmp_path / "x.txt"), settings(tmp_path, tokenizer))
    assert record["documents"] == {"read": 1, "used": 0, "empty": 1, "duplicate": 0, "quarantined": 0}
    assert [record["splits"][split]["shards"] for split in shards.SPLITS] == [[], []]
    assert make_unit(read(tmp_path / "x.txt"), settings(tmp_path, tokenizer)) == record


def test_held_out_share_and_independence_of_the_order() -> None:
    texts = [f"text {number}" for number in range(4000)]
    share = sum(is_held_out(text, 0.1) for text in texts) / len(texts)
    assert 0.08 < share < 0.12
    held_out = [text for text in texts if is_held_out(text, 0.05)]
    assert all(is_held_out(text, 0.1) for text in held_out)  # a larger share keeps what was held out
    assert is_held_out("text 7", 0.0) is False
    assert is_held_out("text 7", 1.0) is True


def test_token_dtype() -> None:
    assert [token_dtype(size).name for size in (257, 65536, 65537)] == ["uint16", "uint16", "uint32"]


def test_large_vocabularies_are_written_as_uint32(tmp_path: Path, tokenizer: Tokenizer) -> None:
    large = json.loads(tokenizer.to_json())
    large["model"]["vocab"]["zz"] = 70_000
    (tmp_path / "x.txt").write_text("zz")
    config = settings(tmp_path, tokenizer, tokenizer_json=json.dumps(large))
    record = make_unit(read(tmp_path / "x.txt", validation_fraction=0.0), config)
    assert load(tmp_path, record, "train").dtype == np.uint32


def test_counts_survive_packing() -> None:
    counts = np.array([0, 1, 2**40, 7])
    assert unpacked_counts(packed_counts(counts)).tolist() == counts.tolist()
    assert json.loads(json.dumps(packed_counts(counts))) == packed_counts(counts)
