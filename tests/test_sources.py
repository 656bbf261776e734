"""pipelines.sources: which files, in which order, in which units; and the errors for sources that give none."""

import itertools
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines import python_docs
from pipelines.corpus_config import CorpusConfig
from pipelines.errors import UserError
from pipelines.sources import InputFile, check_apart, fingerprint, input_files, work_units


def write(folder: Path, *names: str, text: str = "some text") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def names(sources: list[str], root: Path) -> list[str]:
    return [os.path.relpath(file.uri, root) for file in input_files(sources)]


@pytest.mark.parametrize("pattern", ["", "*/b.txt", "**/*.txt", "*/deeper/b.txt"])
def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
    write(tmp_path, "other/b.txt", "other/deeper/b.txt")
    write(tmp_path, "a.txt", "sub/b.txt")
    scandir = os.scandir

    def refusing(path: str) -> object:
        if str(path).endswith("/sub"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError, match=r"cannot be read: .*Permission denied: .*/sub"):
        input_files([str(tmp_path / pattern)])


def test_a_link_to_a_training_file_is_not_held_out(tmp_path: Path) -> None:
    write(tmp_path / "training", "a.txt", "b.txt")
    (tmp_path / "held-out").mkdir()
    (tmp_path / "held-out" / "c.txt").symlink_to(tmp_path / "training" / "b.txt")
    training, held_out = (input_files([str(tmp_path / name)]) for name in ("training", "held-out"))
    for pair in ((training, held_out), (held_out, training)):
        with pytest.raises(UserError, match=r"\.txt is in --corpus\.sources and in --corpus\.validation-sources"):
            check_apart(*pair)


def test_folder_is_read_recursively_and_in_order(tmp_path: Path) -> None:
    write(tmp_path, "b.txt", "a/z.md", "a/c.jsonl.zst", "a.parquet", "README", "image.png", ".git/x.txt", "d.TXT.GZ")
    files = input_files([str(tmp_path)])
    assert [(os.path.relpath(f.uri, tmp_path), f.format, f.compression) for f in files] == [
        ("a.parquet", "parquet", ""),
        ("a/c.jsonl.zst", "jsonl", "zst"),
        ("a/z.md", "md", ""),
        ("b.txt", "txt", ""),
        ("d.TXT.GZ", "txt", "gz"),
    ]
    assert files[0].size == 9


def test_files_globs_and_several_sources(tmp_path: Path) -> None:
    write(tmp_path, "b.txt", "a.txt", "sub/c.txt", "we[ird].txt")
    assert names([str(tmp_path / "*.txt")], tmp_path) == ["a.txt", "b.txt", "we[ird].txt"]
    assert names([str(tmp_path / "**" / "c.*")], tmp_path) == ["sub/c.txt"]
    assert names([str(tmp_path / "we[ird].txt")], tmp_path) == ["we[ird].txt"]
    assert names([str(tmp_path / "sub"), str(tmp_path / "b.txt"), str(tmp_path / "*")], tmp_path) == [
        "sub/c.txt",
        "b.txt",
        "a.txt",
        "we[ird].txt",
    ]


def test_object_store_uri() -> None:
    import fsspec

    store = fsspec.filesystem("memory")
    store.pipe({"/sources-test/b.txt": b"b", "/sources-test/a.jsonl": b"a", "/sources-test/x.bin": b"x"})
    try:
        for source in ("memory://sources-test", "memory://sources-test/*"):
            assert [file.uri for file in input_files([source])] == [
                "memory:///sources-test/a.jsonl",
                "memory:///sources-test/b.txt",
            ]
    finally:
        store.rm("/sources-test", recursive=True)


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("nowhere", "does not exist"),
        ("nowhere/*.txt", "matches no file"),
        ("empty-folder", "empty folder"),
        ("empty-files", "every file is empty"),
        ("others", "no file of a kind that can be read"),
        ("others/data.csv", "no file of a kind that can be read"),
        ("nosuch://x", "nosuch://x"),
    ],
)
def test_sources_without_text_are_user_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "good.txt", "others/data.csv")
    write(tmp_path, "empty-files/a.txt", "empty-files/b.jsonl", text="")
    (tmp_path / "empty-folder").mkdir()
    for call in (input_files, fingerprint):
        with pytest.raises(UserError, match=what) as error:
            call(["good.txt", source])
        assert source in error.value.what
        assert error.value.fix


def test_fingerprint_follows_the_files(tmp_path: Path) -> None:
    write(tmp_path, "a.txt", "b.txt")
    first = fingerprint([str(tmp_path)])
    assert first == fingerprint([str(tmp_path)])
    assert (first[0]["files"], first[0]["bytes"]) == (2, 18)
    os.utime(tmp_path / "a.txt", ns=(1, 1))
    touched = fingerprint([str(tmp_path)])
    write(tmp_path, "c.txt")
    assert len({str(first), str(touched), str(fingerprint([str(tmp_path)]))}) == 3


@pytest.mark.parametrize("source", ["texts", "texts/*.txt", "texts/a.txt", "texts/**/*.txt"])
def test_a_source_that_was_moved_is_the_same(tmp_path: Path, source: str) -> None:
    old, new = tmp_path / "old", tmp_path / "deep" / "er"
    write(old, "texts/a.txt", "texts/sub/b.txt")
    shutil.copytree(old, new)  # keeps the modification times
    before, after = (str(folder / source) for folder in (old, new))
    assert fingerprint([before]) == fingerprint([after])
    (moved,) = {file.name for file in input_files([after])} - {"0:sub/b.txt"}
    assert moved == "0:a.txt"
    assert [file.identity for file in input_files([before])] == [file.identity for file in input_files([after])]
    (new / "texts" / "a.txt").rename(new / "texts" / "c.txt")
    if source != "texts/a.txt":
        assert fingerprint([before]) != fingerprint([after])


def test_files_of_two_sources_are_never_the_same(tmp_path: Path) -> None:
    """Same name, size and time, other text: their shards must not stand in for one another."""
    write(tmp_path, "x/a.txt", text="some text")
    write(tmp_path, "y/a.txt", text="more text")
    for name in ("x", "y"):
        os.utime(tmp_path / name / "a.txt", ns=(1, 1))
    first, second = input_files([str(tmp_path / "x"), str(tmp_path / "y")])
    assert first.identity != second.identity


def test_names_in_an_object_store_are_relative() -> None:
    import fsspec

    store = fsspec.filesystem("memory")
    store.pipe({"/names-test/in/b.txt": b"b"})
    try:
        for source in ("memory://names-test", "memory://names-test/", "memory://names-test/*/b.txt"):
            assert [file.name for file in input_files([source])] == ["0:in/b.txt"]
        assert [file.name for file in input_files(["python-docs", "memory://names-test/in/b.txt"])][-1] == "1:b.txt"
    finally:
        store.rm("/names-test", recursive=True)


sizes = st.lists(st.integers(0, 5_000_000), max_size=40)


@given(sizes=sizes, unit_bytes=st.integers(1, 3_000_000))
def test_units_hold_every_file_once_in_order_and_keep_to_their_size(sizes: list[int], unit_bytes: int) -> None:
    files = [
        InputFile(uri=str(number), name="", format="txt", compression="", size=size, version="")
        for number, size in enumerate(sizes)
    ]
    made = work_units(files, unit_bytes, validation_fraction=0.5)
    assert all(unit.validation_fraction == 0.5 for unit in made)
    units = [unit.files for unit in made]
    assert [file for unit in units for file in unit] == files
    assert all(units)
    for unit in units:
        assert len(unit) == 1 or sum(file.size for file in unit) <= unit_bytes
    for unit, following in itertools.pairwise(units):
        limit = min(unit_bytes, max(1_000_000, sum(sizes) // 16))
        assert sum(file.size for file in unit) + following[0].size > limit


@given(size=st.integers(1, 5_000_000), unit_bytes=st.integers(1, 3_000_000))
def test_a_large_plain_file_is_cut(size: int, unit_bytes: int) -> None:
    file = InputFile(uri="x", name="0:x", format="jsonl", compression="", size=size, version="")
    units = work_units([file], unit_bytes, validation_fraction=0.5)
    parts = [part for unit in units for part in unit.files]
    assert sum(part.read_bytes for part in parts) == size
    if len(parts) > 1:
        assert [part.begin for part in parts] == [0, *(part.end for part in parts[:-1])]
        assert parts[-1].end == size
        assert len({str(part.identity) for part in parts}) == len(parts)
        assert max(part.read_bytes for part in parts) <= max(10_000, min(unit_bytes, max(1_000_000, size // 16)))
    for whole in (replace(file, compression="gz"), replace(file, format="txt")):
        assert [unit.files for unit in work_units([whole], unit_bytes, validation_fraction=0.5)] == [(whole,)]


def test_units_keep_to_one_source_where_that_is_asked(tmp_path: Path) -> None:
    write(tmp_path, "a/1.txt", "a/2.txt", "b/1.txt")
    files = input_files([str(tmp_path / "a"), str(tmp_path / "b")])
    assert len(work_units(files, 1000, validation_fraction=0.5)) == 1
    units = work_units(files, 1000, validation_fraction=0.5, by_source=True)
    assert [[file.name for file in unit.files] for unit in units] == [["0:1.txt", "0:2.txt"], ["1:1.txt"]]


def test_python_docs_are_real_text() -> None:
    files = input_files(["python-docs"])
    paths = [file.uri.removeprefix("python-docs:") for file in files]
    assert paths == sorted(paths)
    assert not [path for path in paths if "/test/" in path or "site-packages" in path]
    (document,) = python_docs.documents("textwrap.py")
    assert document.startswith(
        "# textwrap\n\nText wrapping and filling.\n\n## class TextWrapper\n\nObject for wrapping"
    )
    assert "\n## dedent(text)\n\nRemove any common leading whitespace" in document
    assert python_docs.documents("textwrap.py") == [document]
    assert len(python_docs.documents(python_docs.TOPICS)) > 50
    assert python_docs.documents("keyword.py") != []
    assert python_docs.documents("this.py") == []


def test_module_document_reads_classes_methods_and_conditional_definitions() -> None:
    import ast

    source = '''
"""Top."""
class A(B):
    """About A.

    Not indented.
        Indented.
    """
    def f(self, x=1, *y, z: int):
        """About f."""
        def inner():
            """Not shown."""
    def undocumented(self): pass
if x:
    async def g():
        """About g.   """
'''
    assert python_docs.module_document("pkg.mod", ast.parse(source)) == (
        "# pkg.mod\n\nTop.\n\n## class A\n\nAbout A.\n\nNot indented.\n    Indented.\n\n"
        "## A.f(self, x=1, *y, z: int)\n\nAbout f.\n\n## g()\n\nAbout g.\n"
    )
    assert python_docs.module_document("empty", ast.parse("x = 1")) == ""


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sources", ()),
        ("sources", ("",)),
        ("sources", "python-docs"),
        ("validation_sources", ("",)),
        ("validation_sources", "python-docs"),
        ("tokenizer", ""),
        ("vocab_size", 256),
        ("sequence_length", 1),
        ("validation_fraction", 0),
        ("validation_fraction", 1.0),
        ("validation_fraction", float("nan")),
        ("max_quarantined", -0.1),
        ("max_quarantined", 1.1),
        ("document_separator", "\udc80"),
        ("text_field", "\udc80"),
        ("text_field", ""),
        ("detokenizer", "wiki"),
        ("formation", "pack"),
        ("weights", (1.0, 2.0)),
        ("weights", (0.0,)),
        ("weights", (float("inf"),)),
        ("unit_bytes", 0),
        ("tokenizer_sample_bytes", 0),
    ],
)
def test_config_names_the_bad_value(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field) as error:
        CorpusConfig(**{field: value})  # type: ignore[arg-type]
    assert repr(value) in str(error.value) or str(value) in str(error.value)
