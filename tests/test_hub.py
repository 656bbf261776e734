"""pipelines.hub: a data set fetched once, by the library itself from local files; and a hub that is not there."""

import json
import sys
from pathlib import Path

import pytest

from pipelines import hub, sources
from pipelines.corpus_config import Reading
from pipelines.errors import UserError
from pipelines.records import read_records


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A data set in a folder, which the library takes where it takes a name of the hub."""
    monkeypatch.setenv("ARMD_DATASETS", str(tmp_path / "fetched"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "poems"
    folder.mkdir()
    for split, count in (("train", 7), ("test", 2)):
        lines = [
            json.dumps({"text": f"{split} document {number}\nof two lines", "id": number}) for number in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return f"datasets:{folder}"


def texts(source: str) -> list[str]:
    files = sources.input_files([source])
    return [record.text for file in files for record in read_records(file, Reading())]


def test_a_split_is_a_source(dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert texts(dataset) == [f"train document {number}\nof two lines" for number in range(7)]
    identity = sources.fingerprint([dataset])
    monkeypatch.setitem(sys.modules, "datasets", None)  # what is here is used without the library and the hub
    assert texts(f"{dataset}::test") == ["test document 0\nof two lines", "test document 1\nof two lines"]
    assert sources.fingerprint([dataset]) == identity
    with pytest.raises(UserError, match="no split 'dev', only test, train"):
        sources.input_files([f"{dataset}::dev"])


@pytest.mark.parametrize(
    "reason", [ConnectionError("Couldn't reach 'a/b' on the Hub"), OSError("no route\nto host"), ValueError()]
)
def test_a_hub_that_cannot_be_reached_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: Exception
) -> None:
    monkeypatch.setenv("ARMD_DATASETS", str(tmp_path))

    def unreachable(*_: object) -> None:
        raise reason

    monkeypatch.setattr("datasets.load_dataset_builder", unreachable)
    with pytest.raises(UserError, match=r"the data set a/b cannot be fetched from the Hugging Face hub: \w") as error:
        sources.input_files(["datasets:a/b"])
    assert "huggingface.co can be reached" in error.value.fix
    assert "\n" not in error.value.what
    assert list(tmp_path.iterdir()) == []


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARMD_DATASETS", str(tmp_path))
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the `datasets` library") as error:
        sources.input_files(["datasets:a/b"])
    assert "armd[datasets]" in error.value.fix
