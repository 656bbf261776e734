"""pipelines.records: every record is a document, empty, or reported with its line and the reason."""

import gzip
import io
import itertools
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from pipelines import byte_stream, records, storage
from pipelines.corpus_config import Reading
from pipelines.documents import Documents
from pipelines.errors import UserError
from pipelines.records import Record, counted_from, read_records
from pipelines.sources import InputFile, Unit, input_files

ZSTD = zstandard.ZstdCompressor(write_checksum=True)
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": lambda data: gzip.compress(data[:5]) + gzip.compress(data[5:]),  # two members, as `cat a.gz b.gz` makes
    ".zst": lambda data: ZSTD.compress(data[:5]) + ZSTD.compress(data[5:]),
}


def read(folder: Path, name: str, data: bytes, field: str = "text", **reading: str) -> list[Record]:
    (folder / name).write_bytes(data)
    (file,) = input_files([str(folder / name)])
    return list(read_records(file, Reading(text_field=field, **reading)))


def parquet(table: pa.Table, **options: object) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("kind", ["txt", "md"])
def test_text_file_is_one_document(tmp_path: Path, kind: str, ending: str) -> None:
    data = b"\xef\xbb\xbfone\r\ntwo\n\n\r three\xc3\xa9"
    assert read(tmp_path, f"x.{kind}{ending}", COMPRESS[ending](data)) == [
        Record(line=0, text="one\ntwo\n\n\r three\u00e9")
    ]


@pytest.mark.parametrize("ending", COMPRESS)
def test_jsonl(tmp_path: Path, ending: str) -> None:
    lines = [
        b'\xef\xbb\xbf{"text": "first\\r\\nline"}\r',
        b"",
        b'{"text": ""}',
        b'{"text": "torn',
        b'{"other": 1}',
        b'{"text": null}',
        b'{"text": ["a"]}',
        b'["text"]',
        b'{"text": "bad \xff byte"}',
        b'{"text": "\\ud800"}',
        b'{"text": "nul \\u0000"}',
        b"[" * 100_000,
        b'{"text": "x", "n": ' + b"9" * 5000 + b"}",
        '{"text": "line separators \u2028 \x85 stay"}'.encode(),
        b'{"text": "no line end"}',
    ]
    records = read(tmp_path, f"x.jsonl{ending}", COMPRESS[ending](b"\n".join(lines)))
    assert [(record.line, record.text) for record in records if not record.reason] == [
        (1, "first\nline"),
        (3, ""),
        (14, "line separators \u2028 \x85 stay"),
        (15, "no line end"),
    ]
    reasons = {record.line: record.reason for record in records if record.reason}
    assert list(reasons) == [4, 5, 6, 7, 8, 9, 10, 11, 12, 13]
    expected = ["not JSON", "no field 'text'", "NoneType", "list", "not a JSON object", "0xff", "surrogate", "NUL"]
    for line, part in enumerate([*expected, "not JSON", "not JSON"], 4):
        assert part in reasons[line], (line, reasons[line])
    assert not any(record.text for record in records if record.reason)


def test_other_field(tmp_path: Path) -> None:
    assert read(tmp_path, "x.jsonl", b'{"body": "a", "text": 1}\n', "body") == [Record(line=1, text="a")]


def test_lines_longer_than_a_chunk(tmp_path: Path) -> None:
    texts = ["a" * 2_500_000, "b", "c" * 1_048_576]
    data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    assert [record.text for record in read(tmp_path, "x.jsonl", data)] == texts


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_torn_archives_give_what_is_whole_and_one_report(tmp_path: Path, ending: str) -> None:
    generator = random.Random(0)
    texts = ["".join(generator.choices("abcdefghij ", k=2000)) for _ in range(2000)]
    data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    whole = COMPRESS[ending](data)
    records = read(tmp_path, f"x.jsonl{ending}", whole[: len(whole) // 2])
    assert records[-1].reason.startswith("damaged archive")
    assert records[-1].line == len(records)
    assert [record.text for record in records[:-1]] == texts[: len(records) - 1]
    assert len(records) > 100
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 16
    assert read(tmp_path, f"x.jsonl{ending}", bytes(flipped))[-1].reason
    (only,) = read(tmp_path, f"x.txt{ending}", whole[: len(whole) // 2])
    assert (only.line, only.text) == (0, "")
    assert only.reason.startswith("damaged archive")
    (only,) = read(tmp_path, f"x.txt{ending}", b"not an archive at all")
    assert only.reason.startswith("damaged archive")


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_short_torn_archive_gives_what_is_whole(tmp_path: Path, ending: str) -> None:
    """Of a text smaller than what is read at once."""
    generator = random.Random(0)
    texts = ["".join(generator.choices("abcdefghij ", k=1000)) for _ in range(800)]
    data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    assert len(data) < byte_stream.CHUNK
    whole = COMPRESS[ending](data)
    *records, last = read(tmp_path, f"x.jsonl{ending}", whole[: len(whole) * 3 // 4])
    assert [record.text for record in records] == texts[: len(records)]
    assert len(records) > 400
    assert last.reason.startswith("damaged archive")


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    assert read(tmp_path, "x.txt", b"abc\xa4\xa4") == [Record(line=0, reason="not UTF-8: byte 0xa4 at 3")]
    assert read(tmp_path, "x.txt", b"a\0b") == [Record(line=0, reason="holds a NUL character")]


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("type_", ["string", "large_string", "string_view", "dictionary"])
def test_parquet(tmp_path: Path, ending: str, type_: str) -> None:
    column = pa.array(["a\r\nb", None, "", "c\0", "d"])
    if type_ == "dictionary":
        column = column.dictionary_encode()
    elif type_ != "string":
        column = column.cast(getattr(pa, type_)())
    table = pa.table({"other": [1, 2, 3, 4, 5], "text": column})
    records = read(tmp_path, f"x.parquet{ending}", COMPRESS[ending](parquet(table, row_group_size=2)))
    assert [(record.line, record.text) for record in records if not record.reason] == [(1, "a\nb"), (3, ""), (5, "d")]
    assert [(record.line, record.reason) for record in records if record.reason] == [
        (2, "column 'text' is not text but NoneType"),
        (4, "holds a NUL character"),
    ]


def test_parquet_with_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    column = pa.array([b"good", b"\xff", b"also good"]).view(pa.string())
    records = read(tmp_path, "x.parquet", parquet(pa.table({"text": column}), store_schema=False))
    assert [record.text for record in records] == ["good", "", "also good"]
    assert records[1].reason == "not UTF-8: byte 0xff at 0"


def test_parquet_without_the_column_or_of_another_type(tmp_path: Path) -> None:
    data = parquet(pa.table({"body": ["a", "b"], "n": [1, 2]}))
    assert read(tmp_path, "x.parquet", data) == [Record(line=row, reason="no column 'text'") for row in (1, 2)]
    assert [record.reason for record in read(tmp_path, "x.parquet", data, "n")] == [
        "column 'n' is not text but int"
    ] * 2


def test_damaged_parquet(tmp_path: Path) -> None:
    texts = [f"document {number} " * 20 for number in range(3000)]
    data = parquet(
        pa.table({"text": texts}),
        row_group_size=1000,
        use_dictionary=False,
        write_page_checksum=True,
        compression="none",
    )
    (only,) = read(tmp_path, "x.parquet", data[: len(data) // 2])
    assert (only.line, only.reason[:14]) == (0, "not a Parquet ")
    at = data.index(b"document 1500 ")
    flipped = bytearray(data)
    flipped[at] ^= 1
    records = read(tmp_path, "x.parquet", bytes(flipped))
    assert [record.line for record in records] == list(range(1, 3001))
    bad = [record.line for record in records if record.reason]
    assert 1501 in bad
    assert 1001 <= bad[0] <= bad[-1] == 2000
    assert all(record.text == texts[record.line - 1] for record in records if not record.reason)


def test_a_file_that_vanished_is_not_a_bad_record(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("text")
    (file,) = input_files([str(tmp_path / "x.txt")])
    (tmp_path / "x.txt").unlink()
    with pytest.raises(UserError, match=r"x\.txt was listed but cannot be opened: No such file or directory"):
        list(read_records(file, Reading()))


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.txt.gz", "x.jsonl.zst", "x.parquet"])
def test_a_failing_disk_is_not_a_bad_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    class Failing(io.BytesIO):
        def read(self, *_: object) -> bytes:
            raise OSError("Input/output error")

    monkeypatch.setattr(storage, "open_read", lambda uri: Failing(b"x" * 1000))
    kind, _, compression = name.removeprefix("x.").partition(".")
    file = InputFile(uri=str(tmp_path / name), name="", format=kind, compression=compression, size=1000, version="")
    with pytest.raises(UserError, match=f"reading .*{name} failed: Input/output error"):
        list(read_records(file, Reading()))


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("separator", ["\n", "\n\n", "%", "--\n--"])
def test_documents_between_separators(
    tmp_path: Path, ending: str, separator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against str.split, whatever the pieces that are read; BOM and CRLF as in other files."""
    text = "one\n\n\n\ntwo%three\n%%--\n--\n--\r\rfour\n\nlast"
    data = b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode()
    pieces = text.split(separator)
    begins = [
        1 + separator.join(pieces[:i]).count("\n") + (separator.count("\n") if i else 0) for i in range(len(pieces))
    ]
    expected = [Record(line=line, text=piece) for line, piece in zip(begins, pieces, strict=True)]
    for size in (1, 2, 3, 7, 1 << 20):
        monkeypatch.setattr(byte_stream, "CHUNK", size)
        assert read(tmp_path, f"x.txt{ending}", COMPRESS[ending](data), document_separator=separator) == expected
    assert read(tmp_path, "y.md", f"a{separator}b{separator}".encode(), document_separator=separator)[-1].text == "b"


def test_a_separator_with_carriage_returns(tmp_path: Path) -> None:
    data = b"one\r\n--\r\ntwo\n--\nthree"
    records = read(tmp_path, "x.txt", data, document_separator="\r\n--\r\n")
    assert records == [Record(line=1, text="one"), Record(line=3, text="two"), Record(line=5, text="three")]


def test_one_bad_document_of_a_text_file(tmp_path: Path) -> None:
    records = read(tmp_path, "x.txt", b"good\n\nb\xffd\nis bad\n\nalso good\n\nnul \0\n", document_separator="\n\n")
    assert [(record.line, record.text, record.reason) for record in records] == [
        (1, "good", ""),
        (3, "", "not UTF-8: byte 0xff at 1"),
        (6, "also good", ""),
        (8, "", "holds a NUL character"),
    ]
    torn = gzip.compress(b"first\n\nsecond", 0)[:-12]
    assert read(tmp_path, "x.txt.gz", torn, document_separator="\n\n")[-1].reason.startswith("damaged archive")


def parts_of(file: InputFile, n_parts: int) -> list[InputFile]:
    ends = [part * file.size // n_parts for part in range(n_parts + 1)]
    return [replace(file, begin=begin, end=end) for begin, end in itertools.pairwise(ends)]


@pytest.mark.parametrize("n_parts", [1, 2, 3, 17, 400])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_parts_of_a_file_have_every_record_once(tmp_path: Path, kind: str, n_parts: int) -> None:
    texts = [f"document {number} {'long ' * (number % 23)}" for number in range(60)]
    lines = [json.dumps({"text": text}) for text in texts]
    lines[7:8] = [lines[7], "", "{torn"]
    lines[50] = "{" + "x" * 900
    (tmp_path / "x.jsonl").write_text("\ufeff" + "\n".join(lines))
    column = pa.array([None if number in (7, 50) else text for number, text in enumerate(texts)])
    (tmp_path / "x.parquet").write_bytes(parquet(pa.table({"text": column}), row_group_size=7))
    (file,) = input_files([str(tmp_path / f"x.{kind}")])
    whole = list(read_records(file, Reading()))
    assert sum(bool(record.reason) for record in whole) == 2
    data = (tmp_path / f"x.{kind}").read_bytes()
    found = []
    for part in parts_of(file, n_parts):
        from_byte, rows = counted_from(part)
        before = data[:from_byte].count(b"\n") + rows
        found += [replace(record, line=record.line + before) for record in read_records(part, Reading())]
    assert found == whole


def test_bad_records_of_parts_cost_no_reading_of_what_comes_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.jsonl").write_text(("x" * 499 + "\n") * 400)
    (file,) = input_files([str(tmp_path / "x.jsonl")])
    n_read = 0

    class Counting(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            nonlocal n_read
            data = super().read(size)
            n_read += len(data)
            return data

    monkeypatch.setattr(storage, "open_read", lambda uri: Counting(Path(uri).read_bytes()))
    monkeypatch.setattr(byte_stream, "CHUNK", 1000)
    monkeypatch.setattr(records, "CHUNK", 1000)
    entries = []
    for part in parts_of(file, 40):
        documents = Documents(Unit(files=(part,), validation_fraction=0.0), Reading())
        assert list(documents) == []
        entries += documents.quarantine
    assert [entry.get("from_byte", 0) // 500 + entry["line"] for entry in entries] == list(range(1, 401))
    assert n_read < 2 * file.size


def test_a_damaged_parquet_file_is_reported_once(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1 not at all" * 100)
    (file,) = input_files([str(tmp_path / "x.parquet")])
    records = [record for part in parts_of(file, 5) for record in read_records(part, Reading())]
    assert [(record.line, record.reason[:14]) for record in records] == [(0, "not a Parquet ")]


def test_a_parquet_footer_that_points_nowhere(tmp_path: Path) -> None:
    """Its row group is in one of the parts, and is reported there."""
    data = parquet(pa.table({"text": ["a", "b"]}), use_dictionary=False, compression="none")
    damaged = data.replace(b"\x26\x08", b"\x26\x7f")  # data_page_offset, a zigzag number: -64 for 4
    assert damaged != data
    (tmp_path / "x.parquet").write_bytes(damaged)
    (file,) = input_files([str(tmp_path / "x.parquet")])
    for n_parts in (1, 5):
        records = [record for part in parts_of(file, n_parts) for record in read_records(part, Reading())]
        assert [(record.line, record.reason[:13]) for record in records] == [(1, "its row group"), (2, "its row group")]


def test_a_parquet_footer_that_counts_other_rows(tmp_path: Path) -> None:
    data = parquet(pa.table({"text": ["a"] * 50}))
    damaged = data.replace(b"\x16\x64\x19", b"\x16\x66\x19")  # the file's num_rows, before the list of row groups
    assert damaged != data
    (only,) = read(tmp_path, "x.parquet", damaged)
    assert "row groups of 50 rows in a file of 51" in only.reason


def test_parquet_without_any_column(tmp_path: Path) -> None:
    data = parquet(pa.table({"n": [1, 2]}).select([]))  # Arrow writes a row group of no rows
    assert read(tmp_path, "x.parquet", data) == []


def test_a_large_row_group_is_read_a_piece_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"{number} {'long ' * 2000}" for number in range(1000)]
    options = {"use_dictionary": False, "compression": "none", "write_batch_size": 10}  # pages of 1 MB
    (tmp_path / "x.parquet").write_bytes(parquet(pa.table({"text": texts}), **options))
    (file,) = input_files([str(tmp_path / "x.parquet")])
    sizes: list[int] = []
    readinto = byte_stream.Reader.readinto
    monkeypatch.setattr(
        byte_stream.Reader, "readinto", lambda self, buffer: sizes.append(len(buffer)) or readinto(self, buffer)
    )
    assert [record.text for record in read_records(file, Reading())] == texts
    assert file.size > 10_000_000
    assert max(sizes) < 4 * byte_stream.CHUNK
