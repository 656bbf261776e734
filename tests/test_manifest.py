"""pipelines.manifest: what a finished stage leaves, and what is not taken for one."""

import time
from pathlib import Path

import pytest

from pipelines import storage
from pipelines.errors import UserError
from pipelines.manifest import is_done, read_manifest, verify_files, write_manifest


def test_manifest_says_what_when_where_and_with_which_versions(tmp_path: Path) -> None:
    folder = str(tmp_path / "stage")
    assert not is_done(folder)
    manifest = write_manifest(folder, "corpus", {"tokens": 3, "betas": (1, 2)}, time.time() - 5)
    assert is_done(folder)
    assert read_manifest(folder) == manifest
    assert (manifest["tokens"], manifest["betas"]) == (3, [1, 2])
    assert manifest["stage"] == "corpus"
    assert 5 <= manifest["seconds"] < 6
    assert manifest["started"].endswith("+00:00")
    assert manifest["host"]
    assert set(manifest["versions"]) == {"python", "torch", "ray", "deepspeed", "pyarrow", "armd"}
    assert manifest["versions"]["python"].count(".") == 2


@pytest.mark.parametrize("content", [b"", b'{"stage": "tra', b"[]", b"\xff"])
def test_a_torn_manifest_is_not_a_finished_stage(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    assert not is_done(str(tmp_path))
    with pytest.raises(UserError, match=r"manifest\.json cannot be read"):
        read_manifest(str(tmp_path))


def test_missing_manifest(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        assert not is_done(str(folder))
        with pytest.raises(UserError, match="did not finish") as error:
            read_manifest(str(folder))
        assert "armd run" in error.value.fix


def test_manifest_refuses_what_json_cannot_say(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_manifest(str(tmp_path), "train", {"loss": float("inf")}, time.time())
    assert not is_done(str(tmp_path))


def test_verify_files_names_the_first_that_differs(tmp_path: Path) -> None:
    entries = []
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text(name)
        entries.append({"path": name, "sha256": storage.sha256_bytes(name.encode())})
    verify_files(str(tmp_path), entries)
    (tmp_path / "b").write_text("B")
    (tmp_path / "c").unlink()
    with pytest.raises(UserError, match=r"/b does not match its manifest"):
        verify_files(str(tmp_path), entries)
    with pytest.raises(UserError, match=r"/c is missing"):
        verify_files(str(tmp_path), [entries[0], entries[2]])
