"""A model's folder on this machine, whether it was exported here or to an object store."""

from pathlib import Path

import pytest
import serving_parts

import armd
import armd.weights
from armd.config import MODEL_FILES
from pipelines import storage
from pipelines.model_folder import local_model

URI = "memory://bucket/model_folder/export"


def upload(saved: Path) -> None:
    for file in saved.iterdir():
        storage.write_bytes(f"{URI}/{file.name}", file.read_bytes())


def test_the_names_are_those_that_the_library_writes(tmp_path: Path) -> None:
    assert {file.name for file in serving_parts.save(tmp_path / "saved").iterdir()} == set(MODEL_FILES)


def test_a_local_model_stays_where_it_is(tmp_path: Path) -> None:
    saved = serving_parts.save(tmp_path / "saved")
    with local_model(str(saved)) as folder:
        assert folder == str(saved)
    assert saved.is_dir()


def test_a_remote_model_is_here_for_the_block_and_is_what_lies_there_now(tmp_path: Path) -> None:
    for seed in (0, 1):  # a second model under the same name
        saved = serving_parts.save(tmp_path / str(seed), seed=seed)
        upload(saved)
        with local_model(URI) as folder:
            assert {file.name for file in Path(folder).iterdir()} == set(MODEL_FILES)
            assert armd.weights.verify(folder) == armd.weights.verify(saved)
            model, _ = armd.load(folder)
        assert not Path(folder).exists()
        assert model.embedding.weight.sum() == armd.load(saved)[0].embedding.weight.sum()  # the weights outlive it


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    upload(serving_parts.save(tmp_path / "saved"))
    storage.remove_tree(f"{URI}/tokenizer.json")
    with local_model(URI) as folder, pytest.raises(ValueError, match=r"tokenizer.json is missing"):
        armd.load(folder)
