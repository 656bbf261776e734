"""pipelines.formation: every preset's sequences, shards and reader together, against its plain definition."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from armd.tokenizer import Tokenizer
from pipelines import corpus
from pipelines.corpus_config import CorpusConfig
from pipelines.errors import UserError
from pipelines.formation import FORMATIONS
from pipelines.sources import Unit
from pipelines.windows import WindowIndex

N = 12
ROWS = ["the cat sat on the mat", "", "a dog", "the old red barn " * 6, "  ", "we saw it rain", "no"] * 4
WORDS = sorted({word for text in ROWS for word in text.split()})


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def in_tasks(function: Callable[[Unit], dict], units: list[Unit]) -> enumerate:
        return enumerate(json.loads(json.dumps(function(unit))) for unit in units)

    monkeypatch.setattr(corpus, "in_tasks", in_tasks)


@pytest.fixture
def bert(tmp_path: Path) -> str:
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    return str(path)


def make(tmp_path: Path, formation: str, tokenizer: str | None, length: int = N) -> WindowIndex:
    for name in ("train", "held-out"):
        (tmp_path / name).mkdir(exist_ok=True)
        for part, rows in enumerate([ROWS[i : i + 5] for i in range(0, len(ROWS), 5)]):
            text = "".join(json.dumps({"text": row}) + "\n" for row in rows)
            (tmp_path / name / f"{part}.jsonl").write_text(text)
    config = CorpusConfig(
        sources=(str(tmp_path / "train"),),
        validation_sources=(str(tmp_path / "held-out"),),
        tokenizer=tokenizer,
        vocab_size=300,
        sequence_length=length,
        formation=formation,
        unit_bytes=100,
    )
    manifest = corpus.run(config, {}, str(tmp_path / formation))
    assert manifest["formation"]["name"] == formation
    assert len(manifest["splits"]["train"]["shards"]) > 2
    return WindowIndex(str(tmp_path / formation), "train")


def sequences(formation: str, tokenizer: Tokenizer) -> list[list[int]]:
    """By the presets' definitions, one row at a time."""
    begin, end = tokenizer.bos_id, tokenizer.eos_id
    rows = [tokenizer.encode(row) for row in ROWS if row.strip()]
    if formation == "lm1b-pad":
        return [[begin, *row[: N - 2], end] + [tokenizer.pad_id or 0] * (N - 2 - len(row)) for row in rows]
    if formation == "sedd-radd":
        rows = [tokenizer.encode(row) if row.strip() else [] for row in ROWS]
    between = [] if formation == "mdlm-bd3lm" else [end]
    stream = [token for row in rows for token in [*row, *between]]
    if formation in ("mdlm-bd3lm", "lm1b-wrap"):
        return [[begin, *stream[i : i + N - 2], end] for i in range(0, len(stream) - N + 3, N - 2)]
    return [stream[i : i + N] for i in range(0, len(stream) - N + 1, N)]


@pytest.mark.parametrize("formation", FORMATIONS)
@pytest.mark.parametrize("given", [True, False])
def test_sequences_are_as_the_protocol_says(tmp_path: Path, bert: str, formation: str, given: bool) -> None:
    if formation == "lm1b-pad" and not given:
        with pytest.raises(UserError, match=r"'lm1b-pad' pads .* no padding token") as error:
            make(tmp_path, formation, None)
        assert "--corpus.formation" in error.value.fix
        return
    index = make(tmp_path, formation, bert if given else None)
    tokenizer = Tokenizer.load(tmp_path / formation)
    assert (tokenizer.bos_id == tokenizer.eos_id) is not given
    expected = sequences(formation, tokenizer)
    assert [index[i].tolist() for i in range(len(index))] == expected
    assert index[0].dtype == np.int64
    assert index.dropped_tokens < N


def test_the_row_length_decides_about_padded_shards_only(tmp_path: Path, bert: str) -> None:
    shards = {}
    for formation, length in itertools.product(("lm1b-pad", "lm1b-wrap"), (12, 16)):
        make(tmp_path, formation, bert, length)
        shards[formation, length] = sorted(path.name for path in (tmp_path / formation / "shards").iterdir())
    assert shards["lm1b-wrap", 12] == shards["lm1b-wrap", 16]
    assert shards["lm1b-pad", 12] != shards["lm1b-pad", 16]
