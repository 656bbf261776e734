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


def test_pruning_keeps_the_newest_and_this_attempts_work(tmp_path: Path) -> None:
    kept = [save(tmp_path, step) for step in (1, 2, 3)][1:]
    stale = save(tmp_path, 4, attempt="a" * 8, commit=False)
    current = save(tmp_path, 5, attempt="b" * 8, commit=False)
    checkpoint.prune(str(tmp_path), keep=2, attempt="b" * 8)
    left = {path.name for path in tmp_path.iterdir() if path.name.startswith("step-")}
    assert left == {kept[0].name, kept[1].name, current.name}
    assert not stale.exists()
