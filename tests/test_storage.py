"""pipelines.storage: whole or not at all, locally and on an fsspec file system; listings; messages without secrets."""

import dataclasses
import errno
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines import storage
from pipelines.errors import UserError


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "local":
        yield str(tmp_path / "root")
        return
    import fsspec

    name = f"root-{uuid.uuid4().hex}"
    yield f"memory://{name}"
    if fsspec.filesystem("memory").exists(f"/{name}"):
        fsspec.filesystem("memory").rm(f"/{name}", recursive=True)


def test_write_read_list_remove(root: str) -> None:
    path = storage.join(root, "a", "b.txt")
    assert not storage.exists(path)
    assert storage.list_names(root) == []
    storage.write_text(path, "\u00e9\n")
    storage.write_json(storage.join(root, "a", "c.json"), {"z": 1, "a": [None]})
    assert storage.exists(path)
    assert storage.isdir(root)
    assert not storage.isdir(path)
    assert storage.read_bytes(path) == b"\xc3\xa9\n"
    assert storage.read_text(path) == "\u00e9\n"
    assert storage.read_text(storage.join(root, "a", "c.json")) == '{\n  "a": [\n    null\n  ],\n  "z": 1\n}\n'
    assert storage.read_json(storage.join(root, "a", "c.json")) == {"z": 1, "a": [None]}
    assert storage.list_names(storage.join(root, "a")) == ["b.txt", "c.json"]
    assert storage.list_names(root) == ["a"]
    assert storage.sha256_file(path) == storage.sha256_bytes(b"\xc3\xa9\n")
    with storage.open_read(path) as file:
        file.seek(1)
        assert file.read() == b"\xa9\n"
    storage.remove_tree(path)
    assert storage.list_names(storage.join(root, "a")) == ["c.json"]
    storage.remove_tree(root)
    storage.remove_tree(root)
    assert not storage.exists(path)


def test_missing_files_are_file_not_found(root: str) -> None:
    for read in (storage.read_bytes, storage.read_json, storage.sha256_file):
        with pytest.raises(FileNotFoundError):
            read(storage.join(root, "nothing"))
    with pytest.raises(FileNotFoundError):
        storage.fetch_file(storage.join(root, "nothing"), root)


def test_find_and_glob(root: str) -> None:
    for name in ("b.txt", "a/x.txt", "a/y.md", ".hidden/z.txt", "a/.armd-1-2.tmp"):
        storage.write_text(storage.join(root, *name.split("/")), name)
    found = storage.find(root)
    assert [entry.uri.split("/root", 1)[1].split("/", 1)[1] for entry in found] == ["a/x.txt", "a/y.md", "b.txt"]
    assert [entry.size for entry in found] == [7, 6, 5]
    assert [entry.name for entry in found] == ["a/x.txt", "a/y.md", "b.txt"]
    assert storage.find(found[0].uri) == [dataclasses.replace(found[0], name="x.txt")]
    assert storage.find(storage.join(root, "nowhere")) == []
    assert [entry.uri for entry in storage.glob(storage.join(root, "*", "*.txt"))] == [found[0].uri]
    assert [entry.uri for entry in storage.glob(storage.join(root, "**", "*.txt"))] == [found[0].uri, found[2].uri]
    before = found[2].version
    storage.write_text(found[2].uri, "other")
    assert storage.find(found[2].uri)[0].version != before


def test_numbers_that_json_has_not_are_refused(root: str) -> None:
    path = storage.join(root, "x.json")
    storage.write_json(path, 1)
    with pytest.raises(ValueError, match="JSON compliant"):
        storage.write_json(path, float("nan"))
    assert storage.read_json(path) == 1


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_failed_write_leaves_the_old_content_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = str(tmp_path / "x")
    storage.write_bytes(path, b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    data: object = b"new"
    if call == "write":
        data = 5
    else:
        monkeypatch.setattr(os, call, fail)
    with pytest.raises((OSError, TypeError)):
        storage.write_bytes(path, data)  # type: ignore[arg-type]
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["x"]
    assert storage.read_bytes(path) == b"old"


def test_unfinished_writes_are_not_listed_and_can_be_removed(tmp_path: Path) -> None:
    (tmp_path / ".armd-77-abc.tmp").write_text("half")
    (tmp_path / "armd.tmp").write_text("somebody's")
    assert storage.list_names(str(tmp_path)) == ["armd.tmp"]
    storage.remove_unfinished(str(tmp_path))
    assert os.listdir(tmp_path) == ["armd.tmp"]
    storage.remove_unfinished(str(tmp_path / "nowhere"))


def test_put_file_moves(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    rename = os.replace

    def rename_within(old: str, new: str) -> None:
        if old == str(source):
            raise OSError(errno.EXDEV, "another file system")
        rename(old, new)

    for same_file_system in (True, False):
        source.write_bytes(b"content")
        if not same_file_system:
            monkeypatch.setattr(os, "replace", rename_within)
        target = storage.join(root, "deep", str(same_file_system))
        storage.put_file(str(source), target)
        monkeypatch.undo()
        assert storage.read_bytes(target) == b"content"
        assert not source.exists()
    assert storage.list_names(storage.join(root, "deep")) == ["False", "True"]


def test_scratch_file_goes_away_unless_moved(root: str, tmp_path: Path) -> None:
    with storage.scratch_file(root) as path:
        Path(path).write_text("x")
    assert not os.path.exists(path)
    with storage.scratch_file(root) as path:
        Path(path).write_text("x")
        storage.put_file(path, storage.join(root, "kept"))
    assert storage.list_names(root) == ["kept"]


def test_fetch_file_copies_a_remote_file_once_a_version(root: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    path = storage.join(root, "x.bin")
    storage.write_bytes(path, b"1")
    first = storage.fetch_file(path, str(cache))
    assert storage.is_local(path) == (first == path)
    if not storage.is_local(path):
        os.utime(first, (0, 0))
        assert storage.fetch_file(path, str(cache)) == first
        assert os.stat(first).st_mtime == 0
        storage.write_bytes(path, b"2")
        assert Path(storage.fetch_file(path, str(cache))).read_bytes() == b"2"
        assert not [name for name in os.listdir(cache) if name.endswith(".tmp")]


def test_local_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert storage.absolute("x/../y") == str(tmp_path / "y")
    assert storage.absolute("~/y") == "/home/somebody/y"
    assert storage.join("file:///y", "z") == "/y/z"
    assert storage.join("s3://bucket/x/", "y", "z") == "s3://bucket/x/y/z"


def test_check_writable(root: str, tmp_path: Path) -> None:
    storage.check_writable(root)
    assert storage.list_names(root) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*/file/below") as error:
        storage.check_writable(str(tmp_path / "file" / "below"))
    assert "--root" in error.value.fix


@pytest.mark.parametrize("uri", ["", " ", "s3://", "s3:///", "file://"])
def test_no_place_at_all(uri: str) -> None:
    with pytest.raises(ValueError, match=r"^root must be a folder"):
        storage.check_place(uri, "root")


@pytest.mark.parametrize("uri", ["runs", "/", ".", "~", "file:///", "s3://bucket", "memory:///x"])
def test_a_place(uri: str) -> None:
    storage.check_place(uri, "root")


def test_unknown_scheme_is_a_user_error() -> None:
    for call in (storage.check_writable, storage.exists, storage.read_bytes):
        with pytest.raises(UserError, match="nosuch://x"):
            call("nosuch://x/y")


@pytest.mark.parametrize(
    ("shown", "hidden"),
    [
        ("https://h/x?a=1&X-Amz-Signature=***&b=2", "https://h/x?a=1&X-Amz-Signature=0f0f&b=2"),
        ("https://h/x?sig=***", "https://h/x?sig=abc%2F"),
        ("s3://b/x?access_token=*** is bad", "s3://b/x?access_token=abc is bad"),
        ("https://h/?AWSAccessKeyId=***&x", "https://h/?AWSAccessKeyId=AKIA&x"),
        ('{"root": "s3://b?password=***"}', '{"root": "s3://b?password=abc"}'),
        ("https://h/x?design=oak&signal=1", "https://h/x?design=oak&signal=1"),
        ("token=abc of a sentence", "token=abc of a sentence"),
    ],
)
def test_messages_hide_secrets_of_a_query(shown: str, hidden: str) -> None:
    assert storage.redacted(hidden) == shown


def test_messages_hide_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "sesame-open-now")
    text = storage.redacted("ftp://me:pass@host/x failed with sesame-open-now, see s3://bucket/a@b")
    assert text == "ftp://host/x failed with ***, see s3://bucket/a@b"
    with pytest.raises(UserError) as error:
        storage.exists("nosuch://me:pass@host/x")
    assert "pass" not in json.dumps(error.value.args)
