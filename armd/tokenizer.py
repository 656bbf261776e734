"""Text to token ids and back: a trained byte-level BPE, GPT-2's, BERT's word pieces, or any tokenizer.json."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

EOS_TOKEN = "<|endoftext|>"
_EOS_NAMES = (EOS_TOKEN, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]")
_BOS_NAMES = ("[CLS]", "<|begin_of_text|>", "<s>", "<bos>", "[BOS]")
_PAD_NAMES = ("[PAD]", "<pad>", "<|pad|>", "<|padding|>")
_BERT_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# Longer texts are encoded piece by piece, because the library keeps some 100 bytes a token while it encodes one text.
_PIECE = 1 << 20  # characters


class Tokenizer:
    """A vocabulary with its rules, the same whichever files it came from.

    A literal special token in a text (somebody's document may quote "<|endoftext|>") is encoded as ordinary text unless
    `allow_special` is set.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        """Wrap `backend`, which is not to be used elsewhere.

        Raises:
            ValueError: it has none of the known end-of-text tokens.
        """
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True
        self._backend = backend
        vocabulary = backend.get_vocab(with_added_tokens=True)
        names = [name for name in _EOS_NAMES if name in vocabulary]
        if not names:
            raise ValueError(f"the tokenizer has no end-of-text token: none of {', '.join(_EOS_NAMES)}")
        self.eos_token = names[0]
        """The token that ends every document."""
        self.eos_id = vocabulary[names[0]]
        """Its id."""
        self.bos_id = next((vocabulary[name] for name in _BOS_NAMES if name in vocabulary), self.eos_id)
        """Id of the token that may begin a sequence; the end-of-text token where there is no other, as in GPT-2."""
        self.pad_id = next((vocabulary[name] for name in _PAD_NAMES if name in vocabulary), None)
        """Id of the padding token; None where there is none."""
        self.vocab_size = max(vocabulary.values()) + 1
        """Ids run from 0 to vocab_size - 1."""
        self._json: str = backend.to_str(pretty=False) + "\n"
        self.sha256 = hashlib.sha256(self._json.encode("utf-8")).hexdigest()
        """SHA-256 of `to_json()`, hexadecimal: the tokenizer's identity."""

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a tokenizer.json, or a folder that holds one, GPT-2's encoder.json and vocab.bpe, or BERT's vocab.txt.

        Raises:
            ValueError: naming `path`, which is missing, damaged or nothing of the kind.
        """
        path = Path(path)
        if not path.exists():
            raise ValueError(f"there is no tokenizer at {path}")
        files, read = _reader(path)
        try:
            return cls(read(*files))
        except Exception as error:  # the library raises bare Exceptions
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"cannot read the tokenizer {', '.join(map(str, files))}: {reason}") from None

    @classmethod
    def from_json(cls, text: str) -> "Tokenizer":
        """The tokenizer whose `to_json()` is `text`.

        Raises:
            ValueError: `text` is not a tokenizer.json.
        """
        try:
            return cls(tokenizers.Tokenizer.from_str(text))
        except Exception as error:
            raise ValueError(f"not a tokenizer.json: {error}") from None

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn a byte-level BPE of at most `vocab_size` entries; the same texts always give the same tokenizer.

        Every text can be encoded and comes back exactly, since the 256 bytes are in the vocabulary.

        Raises:
            ValueError: `vocab_size` has no room for the 256 bytes and the end-of-text token.
        """
        if vocab_size < 257:
            raise ValueError(f"vocab_size must be at least 257 (256 bytes and the end-of-text token), not {vocab_size}")
        backend = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            show_progress=False,
            special_tokens=[EOS_TOKEN],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        backend.train_from_iterator((piece for text in texts for piece in _pieces([text])), trainer=trainer)
        return cls(backend)

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Ids of `text`; no end-of-text token is added."""
        return self.encode_batch([text], allow_special)[0]

    def encode_batch(self, texts: Sequence[str], allow_special: bool = False) -> list[list[int]]:
        """Ids of each text, in parallel unless TOKENIZERS_PARALLELISM says otherwise.

        A text of more than a million characters is encoded in pieces that end, where possible, at a line's end between
        two words, else before a space behind a word, where GPT-2's and BERT's rules give the same ids as for the whole.
        """
        pieces = [list(_pieces([text])) for text in texts]
        self._backend.encode_special_tokens = not allow_special
        flat = iter(self._backend.encode_batch_fast([p for parts in pieces for p in parts], add_special_tokens=False))
        return [[token for _ in parts for token in next(flat).ids] for parts in pieces]

    def encode_stream(self, parts: Iterable[str]) -> Iterator[list[int]]:
        """Ids of a text of any length that comes in parts, a list at a time; holds a part and a million characters.

        Wherever the parts are cut, all lists together are what `encode` gives for the whole text.
        """
        return (self.encode(piece) for piece in _pieces(parts))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, special tokens shown; bytes that are not UTF-8 become U+FFFD."""
        return str(self._backend.decode([int(token) for token in ids], skip_special_tokens=False))

    def to_json(self) -> str:
        """The content of tokenizer.json: one line, the same for equal tokenizers."""
        return self._json

    def save(self, path: str | Path) -> None:
        """Write `path` (a tokenizer.json), the folders above it included."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(self._json, encoding="utf-8")


def _reader(path: Path) -> tuple[list[Path], Callable[..., tokenizers.Tokenizer]]:
    """The files that make up the tokenizer at `path`, and what reads them."""
    if path.is_file():
        return [path], _read_bert if path.name == "vocab.txt" else _read_json
    kinds: list[tuple[tuple[str, ...], Callable[..., tokenizers.Tokenizer]]] = [
        (("tokenizer.json",), _read_json),
        (("encoder.json", "vocab.bpe"), _read_gpt2),
        (("vocab.json", "merges.txt"), _read_gpt2),
        (("vocab.txt",), _read_bert),
    ]
    for names, read in kinds:
        if all((path / name).is_file() for name in names):
            return [path / name for name in names], read
    raise ValueError(f"no tokenizer in {path}: expected tokenizer.json, encoder.json with vocab.bpe, or vocab.txt")


def _read_json(path: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))


def _read_gpt2(vocabulary: Path, merges: Path) -> tokenizers.Tokenizer:
    lines = [
        line for line in merges.read_text(encoding="utf-8").split("\n") if line and not line.startswith("#version")
    ]
    pairs = [(left, right) for left, right in (line.split(" ") for line in lines)]
    backend = _byte_level(models.BPE(json.loads(vocabulary.read_text(encoding="utf-8")), pairs))
    backend.add_special_tokens([EOS_TOKEN])
    return backend


def _read_bert(path: Path) -> tokenizers.Tokenizer:
    entries = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    vocabulary = {entry.rstrip("\r"): index for index, entry in enumerate(entries)}
    cased = any(entry != entry.lower() for entry in vocabulary if not entry.startswith("["))
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    backend.normalizer = normalizers.BertNormalizer(lowercase=not cased)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens([name for name in _BERT_SPECIALS if name in vocabulary])
    return backend


def _byte_level(model: models.Model) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _pieces(parts: Iterable[str]) -> Iterator[str]:
    """The text that `parts` make up, in pieces of at most `_PIECE` characters that do not depend on the parts."""
    rest = ""
    for part in parts:
        text, start = rest + part, 0
        while len(text) - start > _PIECE:
            end = _cut(text, start, start + _PIECE)
            yield text[start:end]
            start = end
        rest = text[start:]
    yield rest


def _cut(text: str, start: int, end: int) -> int:
    """Where to end a piece that begins at `start` and may reach to `end`, which is inside the text.

    Behind a lone line end between two words; where there is none, before a space behind a word; else at `end`.
    """
    cut = text.rfind("\n", start, end)
    while cut > start and (text[cut - 1].isspace() or text[cut + 1].isspace()):
        cut = text.rfind("\n", start, cut)
    if cut > start:
        return cut + 1
    behind_words = (i for i in range(end, start, -1) if text[i] in " \t\n" and not text[i - 1].isspace())
    return next(behind_words, end)
