"""armd.tokenizer: round trips, files of three kinds, special tokens, long texts, errors."""

import hashlib
import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import armd.tokenizer
from armd.tokenizer import EOS_TOKEN, Tokenizer

TEXTS = ["the cat sat on the mat\n", "the dog and the cat\n\nran away", "caf\u00e9 \u4f60\u597d the end"] * 4


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return Tokenizer.train(TEXTS, 300)


@settings(max_examples=500, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_byte_level_round_trip(trained: Tokenizer, text: str) -> None:
    assert trained.decode(trained.encode(text)) == text


def test_training_is_deterministic_and_bounded(trained: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    again = Tokenizer.train(iter(TEXTS), 300)
    assert again.to_json() == trained.to_json()
    assert 257 < trained.vocab_size <= 300
    assert len(trained.encode("the cat")) < len("the cat")


def test_sha256_is_that_of_the_saved_file(trained: Tokenizer, tmp_path) -> None:
    path = tmp_path / "sub" / "tokenizer.json"
    trained.save(path)
    assert trained.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    for source in (path, path.parent, str(path)):
        loaded = Tokenizer.load(source)
        assert (loaded.sha256, loaded.eos_id, loaded.vocab_size) == (trained.sha256, trained.eos_id, trained.vocab_size)


def test_identity_does_not_depend_on_what_was_encoded(trained: Tokenizer) -> None:
    trained.encode(EOS_TOKEN, allow_special=True)
    assert Tokenizer.from_json(trained.to_json()).sha256 == trained.sha256


def test_quoted_special_token_stays_text(trained: Tokenizer) -> None:
    text = f"he wrote {EOS_TOKEN} and left"
    assert trained.eos_id not in trained.encode(text)
    assert trained.decode(trained.encode(text)) == text
    assert trained.encode(text, allow_special=True).count(trained.eos_id) == 1
    assert trained.eos_id not in trained.encode(text)
    assert trained.decode([trained.eos_id]) == EOS_TOKEN


def test_encode_batch_equals_encode(trained: Tokenizer) -> None:
    assert trained.encode_batch([*TEXTS, ""]) == [*(trained.encode(text) for text in TEXTS), []]
    assert trained.encode_batch([]) == []


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="ab \n\t\u00e9", max_size=80), piece=st.integers(4, 20))
def test_long_texts_round_trip_in_pieces(trained: Tokenizer, text: str, piece: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(armd.tokenizer, "_PIECE", piece)
        assert "".join(armd.tokenizer._pieces([text])) == text
        assert max(map(len, armd.tokenizer._pieces([text]))) <= piece
        assert trained.decode(trained.encode(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "the cat sat \n\n on the mat\nthe dog  \nran \nand\n ran\n" * 20,
        "the cat  sat \t on the   mat, \n\n the dog" * 30,  # no lone line end
    ],
)
def test_pieces_that_end_between_words_give_the_ids_of_the_whole(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    tokenizer = Tokenizer.train(["a \n b\n\n\n c  \n\t d"] * 20, 280)  # has merges of white space across line ends
    whole = tokenizer.encode(text)
    for piece in range(60, 100):
        monkeypatch.setattr(armd.tokenizer, "_PIECE", piece)
        assert len(list(armd.tokenizer._pieces([text]))) > 10
        assert tokenizer.encode(text) == whole


@settings(max_examples=200, deadline=None)
@given(parts=st.lists(st.text(alphabet="ab \n\t\u00e9", max_size=30), max_size=8), piece=st.integers(4, 20))
def test_a_stream_gives_the_ids_of_the_whole_wherever_it_is_cut(
    trained: Tokenizer, parts: list[str], piece: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(armd.tokenizer, "_PIECE", piece)
        assert [token for ids in trained.encode_stream(iter(parts)) for token in ids] == trained.encode("".join(parts))


def test_a_stream_is_never_held_whole(trained: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line of 2 MB: what is held does not grow with it."""
    monkeypatch.setattr(armd.tokenizer, "_PIECE", 1000)
    tracemalloc.start()
    n_tokens = sum(len(ids) for ids in trained.encode_stream("the cat sat " * 100 for _ in range(1700)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert n_tokens > 100_000
    assert peak < 300_000


def test_gpt2_folder(trained: Tokenizer, tmp_path) -> None:
    model = json.loads(trained.to_json())["model"]
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in model["merges"]), ""])
    for vocabulary, merge_file in (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")):
        folder = tmp_path / vocabulary
        folder.mkdir()
        (folder / vocabulary).write_text(json.dumps(model["vocab"]))
        (folder / merge_file).write_text(merges, encoding="utf-8")
        loaded = Tokenizer.load(folder)
        assert loaded.eos_token == EOS_TOKEN
        for text in (*TEXTS, f" a  b {EOS_TOKEN}"):
            assert loaded.encode(text) == trained.encode(text)


def test_bert_folder(tmp_path) -> None:
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s", ","]
    (tmp_path / "vocab.txt").write_text("\n".join(entries) + "\n")
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.eos_token, loaded.eos_id, loaded.vocab_size) == ("[SEP]", 3, 9)
    assert loaded.encode("The cats, zzz") == [5, 6, 7, 8, 1]
    assert loaded.decode([5, 6, 7]) == "the cats"


def test_padding_and_truncation_of_a_given_file_are_switched_off(trained: Tokenizer, tmp_path) -> None:
    settings_ = json.loads(trained.to_json())
    settings_["truncation"] = {"max_length": 2, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings_))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode(TEXTS[0]) == trained.encode(TEXTS[0])
    assert loaded.sha256 == trained.sha256


def test_errors_name_the_path(trained: Tokenizer, tmp_path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no tokenizer in .*tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{torn")
    with pytest.raises(ValueError, match=r"cannot read the tokenizer .*tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="not 256"):
        Tokenizer.train(TEXTS, 256)
    without = trained.to_json().replace(EOS_TOKEN, "<|other|>")
    with pytest.raises(ValueError, match="no end-of-text token"):
        Tokenizer.from_json(without)
