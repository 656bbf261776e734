"""pipelines.sample_order: one epoch is a permutation; a mixture keeps to its weights and loses and repeats nothing."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.errors import UserError
from pipelines.sample_order import SampleOrder, Turns
from pipelines.windows import Part, Permutation


def windows(*parts: tuple[float, int]) -> Any:
    """What `SampleOrder` asks of a `WindowIndex`: parts with a weight and a number of windows."""
    made, start = [], 0
    for weight, count in parts:
        made.append(Part(weight, range(start, start + count), 0))
        start += count
    return SimpleNamespace(parts=made)


def test_without_weights_each_epoch_is_its_permutation() -> None:
    order = SampleOrder(windows((1.0, 37)), seed=5)
    for epoch in (0, 1, 7):
        assert [order[epoch * 37 + i] for i in range(37)] == [Permutation(37, 5, epoch)[i] for i in range(37)]


@given(weights=st.lists(st.floats(0.05, 20), min_size=1, max_size=6), sample=st.integers(0, 10**12))
def test_turns_add_up(weights: list[float], sample: int) -> None:
    """By counting; and after a thousand turns everyone has had his share to a thousandth."""
    turns = Turns(weights)
    seen: Counter[int] = Counter()
    for i in range(1500):
        part, before = turns[i]
        assert before == seen[part]
        seen[part] += 1
        for each, weight in enumerate(weights):
            assert abs(seen[each] - (i + 1) * weight / sum(weights)) < len(weights) + 2
    part, before = turns[sample]
    assert turns[sample + 1000] == (part, before + sum(turns[i][0] == part for i in range(1000)))


def test_a_mixture_keeps_to_its_weights_and_goes_through_each_source_in_turn() -> None:
    order = SampleOrder(windows((0.75, 40), (0.25, 500)), seed=3)
    drawn = [order[i] for i in range(2000)]
    first = [window for window in drawn if window < 40]
    second = [window for window in drawn if window >= 40]
    assert (len(first), len(second)) == (1500, 500)
    for epoch in range(1500 // 40):
        assert sorted(first[epoch * 40 : (epoch + 1) * 40]) == list(range(40))
    assert sorted(second) == list(range(40, 540))
    assert [SampleOrder(windows((0.75, 40), (0.25, 500)), seed=3)[i] for i in (1999, 7, 800)] == [
        drawn[i] for i in (1999, 7, 800)
    ]
    assert [SampleOrder(windows((0.75, 40), (0.25, 500)), seed=4)[i] for i in range(40)] != drawn[:40]


def test_a_source_without_a_window_is_named() -> None:
    with pytest.raises(UserError, match="source 2 of 2") as error:
        SampleOrder(windows((0.5, 10), (0.5, 0)), seed=0)
    assert "--corpus.weights" in error.value.fix


def test_weights_go_from_the_corpus_to_the_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    from armd.tokenizer import Tokenizer
    from pipelines import corpus
    from pipelines.corpus_config import CorpusConfig
    from pipelines.windows import WindowIndex

    monkeypatch.setattr(corpus, "in_tasks", lambda function, units: enumerate(function(unit) for unit in units))
    for name, word, count in (("large", "cat", 60), ("small", "dog", 9), ("tiny", "owl", 4)):
        (tmp_path / name).mkdir()
        for number in range(count):
            (tmp_path / name / f"{number:02}.txt").write_text(f"{word} number {number} " * 20)
    sources = tuple(str(tmp_path / name) for name in ("large", "small", "tiny"))
    config = CorpusConfig(sources=sources, weights=(1, 2, 1), vocab_size=300, sequence_length=16, unit_bytes=2_000)
    manifest = corpus.run(config, {}, str(tmp_path / "out"))
    train = manifest["splits"]["train"]
    assert [part["weight"] for part in train["mixture"]] == [1, 2, 1]
    assert sum(part["shards"] for part in train["mixture"]) == len(train["shards"])
    assert "mixture" not in manifest["splits"]["validation"]
    index = WindowIndex(str(tmp_path / "out"), "train")
    tokenizer = Tokenizer.load(tmp_path / "out")
    for part, word, shard in zip(index.parts, ("cat", "dog", "owl"), _streams(tmp_path / "out", train), strict=True):
        expected = shard[: len(shard) // 16 * 16].reshape(-1, 16)
        np.testing.assert_array_equal(np.stack([index[i] for i in part.windows]), expected)
        assert word in tokenizer.decode(expected[0])
    order = SampleOrder(index, seed=0)
    words = Counter(tokenizer.decode(index[order[i]]).count("dog") > 0 for i in range(100))
    assert words[True] == 50


def _streams(folder: Path, train: dict) -> list:
    import numpy as np

    streams, start = [], 0
    for part in train["mixture"]:
        shards = train["shards"][start : start + part["shards"]]
        streams.append(np.concatenate([np.load(folder / shard["path"]) for shard in shards]))
        start += part["shards"]
    return streams
