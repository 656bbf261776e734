"""pipelines.duplicates: later copies against a plain dictionary, over units and splits."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipelines import corpus
from pipelines.corpus_config import CorpusConfig, Reading
from pipelines.duplicates import hash_unit, later_copies, without_duplicates
from pipelines.shard_file import unpacked_counts
from pipelines.sources import Unit, input_files, work_units

words = st.sampled_from([0, 1, 7 << 60, (7 << 60) + 1, 15 << 60])
halves = st.tuples(words, words)


@given(lists=st.lists(st.lists(halves, max_size=12), min_size=1, max_size=6))
def test_later_copies_are_those_that_a_set_has_seen(lists: list[list[tuple[int, int]]]) -> None:
    seen: set[tuple[int, int]] = set()
    expected = []
    for hashes in lists:
        places = []
        for place, one in enumerate(hashes):
            if one in seen:
                places.append(place)
            seen.add(one)
        expected.append(places)
    arrays = [np.array(hashes, dtype=np.uint64).reshape(-1, 2) for hashes in lists]
    assert [found.tolist() for found in later_copies(arrays)] == expected


def units_of(folder: Path, files: dict[str, list[str]]) -> list[Unit]:
    for name, texts in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return work_units(input_files([str(folder)]), 1, validation_fraction=0.0)


def dropped(units: list[Unit]) -> list[list[int]]:
    return [unpacked_counts(unit.dropped).tolist() if unit.dropped else [] for unit in units]


def test_documents_with_text_are_numbered_and_the_first_stays(tmp_path: Path) -> None:
    files = {"a": ["one", "", "two", "one"], "b": [" ", "three", "two", "three"], "c": ["four"]}
    units = units_of(tmp_path, files)
    paths = [hash_unit(unit, str(tmp_path / "out"), Reading())["path"] for unit in units]
    assert dropped(without_duplicates(units, str(tmp_path / "out"), paths)) == [[2], [1, 2], []]
    assert without_duplicates(units, str(tmp_path / "out"), paths)[2] == replace(units[2], n_hashed=1)


def test_what_is_held_out_stays_and_leaves_training(tmp_path: Path) -> None:
    first, second = units_of(tmp_path, {"a": ["one", "two"], "b": ["two", "two", "three"]})
    units = [first, replace(second, validation_fraction=1.0)]
    paths = [hash_unit(unit, str(tmp_path / "out"), Reading())["path"] for unit in units]
    assert dropped(without_duplicates(units, str(tmp_path / "out"), paths)) == [[1], [1]]


def test_files_of_both_lists_that_are_named_alike_are_two(tmp_path: Path) -> None:
    for folder, texts in (("training", ["one", "two", "six"]), ("held-out", ["abc", "def", "ghi"])):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "x.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        os.utime(path, ns=(5, 5))
    config = CorpusConfig(sources=(str(tmp_path / "training"),), validation_sources=(str(tmp_path / "held-out"),))
    units = corpus.work_units(config)
    paths = [hash_unit(unit, str(tmp_path / "out"), Reading())["path"] for unit in units]
    assert dropped(without_duplicates(units, str(tmp_path / "out"), paths)) == [[], []]
