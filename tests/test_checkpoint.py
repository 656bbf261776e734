"""The commit protocol: a checkpoint is whole or does not count."""

from pathlib import Path

import pytest

from pipelines import checkpoint
from pipelines.errors import UserError

FILES = {"state/a.pt": b"weights " * 50, "state/b.pt": b"moments " * 50, "ema.safetensors": b"average"}


def save(folder: Path, step: int, attempt: str = "0" * 8, commit: bool = True) -> Path:
    scratch = folder / "scratch"
    for name, content in FILES.items():
        (scratch / name).parent.mkdir(parents=True, exist_ok=True)
        (scratch / name).write_bytes(content + str(step).encode())
    (scratch / "state" / "zero_to_fp32.py").write_text("print('not ours')")
    path = folder / checkpoint.name(step, attempt)
    entries = checkpoint.put_shards(str(scratch), str(path))
    if commit:
        checkpoint.commit(str(path), entries, {"step": step})
    return path


def test_the_newest_committed_one_counts(tmp_path: Path) -> None:
    assert checkpoint.newest(str(tmp_path)) is None
    save(tmp_path, 5)
    save(tmp_path, 100)
    save(tmp_path, 20)
    save(tmp_path, 300, commit=False)
    found = checkpoint.newest(str(tmp_path))
    assert found is not None
    assert found[1]["step"] == 100
    assert [entry["path"] for entry in found[1]["files"]] == sorted(FILES)  # DeepSpeed's script is not carried along


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "delete"])
def test_a_damaged_one_is_passed_over_and_named(
    tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    file = path / name
    content = file.read_bytes()
    if damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        file.unlink()
    found = checkpoint.newest(str(tmp_path))
    assert found is not None
    assert found[1]["step"] == 1
    assert path.name in caplog.text
    with pytest.raises(UserError, match=path.name):
        checkpoint.verified(str(path))


@pytest.mark.parametrize("content", [b"", b"0" * 64, b"\xff"])
def test_a_mark_that_is_not_the_manifests_sum_does_not_count(tmp_path: Path, content: bytes) -> None:
    path = save(tmp_path, 1)
    (path / "COMMITTED").write_bytes(content)
    assert checkpoint.newest(str(tmp_path)) is None


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name != "scratch"}


@pytest.mark.parametrize("keep", [1, 2, 3, 9])
def test_pruning_keeps_the_latest_and_those_before_it(tmp_path: Path, keep: int) -> None:
    saved = [save(tmp_path, step) for step in (1, 2, 3)]
    checkpoint.prune(str(tmp_path), str(saved[-1]), keep)
    assert left_in(tmp_path) == {path.name for path in saved[-keep:]}


def test_pruning_never_prefers_what_resuming_refused(tmp_path: Path) -> None:
    """A damaged checkpoint of a later step, or of this step by another attempt, is not "newer"."""
    for step, attempt in ((300, "a" * 8), (200, "f" * 8)):
        damaged = save(tmp_path, step, attempt)
        (damaged / "ema.safetensors").write_bytes(b"")
    latest = save(tmp_path, 200, "0" * 8)
    checkpoint.prune(str(tmp_path), str(latest), keep=1)
    assert left_in(tmp_path) == {latest.name}
    assert checkpoint.newest(str(tmp_path)) is not None


def test_a_new_attempt_sweeps_what_killed_ones_left(tmp_path: Path) -> None:
    good = save(tmp_path, 1)
    save(tmp_path, 2, attempt="a" * 8, commit=False)
    (tmp_path / f"{checkpoint.SCRATCH}abc").mkdir()
    checkpoint.sweep(str(tmp_path))
    assert left_in(tmp_path) == {good.name}


def test_files_that_another_writer_removed_are_not_committed(tmp_path: Path) -> None:
    path = save(tmp_path, 1, commit=False)
    entries = [{"path": "state/a.pt", "size": 1, "sha256": ""}, {"path": "state/gone.pt", "size": 1, "sha256": ""}]
    with pytest.raises(UserError, match="gone"):
        checkpoint.commit(str(path), entries, {"step": 1})
    assert checkpoint.newest(str(tmp_path)) is None
