"""What a corpus is made of and how it is cut. Imports nothing heavy."""

import math
from dataclasses import dataclass

from pipelines import detokenizers
from pipelines.formation import FORMATIONS


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How the files' content becomes documents."""

    text_field: str = "text"
    """Field of .jsonl and column of .parquet that holds the document."""
    document_separator: str = ""
    """What stands between two documents of a .txt or .md file, CRLF the same as LF; "": the file is one document."""
    detokenizer: str = ""
    """The rules that undo a benchmark's spacing, by its name."""


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Documents from `sources`, tokenised, some of them held out, packed into one stream of tokens a split.

    Raises:
        ValueError: naming the field and the value that does not fit.
    """

    sources: tuple[str, ...] = ("python-docs",)
    """Files (.txt .md .jsonl .parquet, plain or .gz/.zst), folders, globs, URIs; python-docs: Python's own docs;
    datasets:NAME:CONFIG:SPLIT: a data set of the Hugging Face hub."""
    tokenizer: str | None = None
    """Tokenizer to use: a tokenizer.json, or a folder with one or with GPT-2's or BERT's files; None: train a BPE."""
    vocab_size: int = 2048
    """Entries of a trained tokenizer, at most; a given one has its own."""
    sequence_length: int = 256
    """Tokens a training window."""
    validation_fraction: float = 0.05
    """Share of the documents held out, chosen by a hash of their text; not used where validation_sources are given."""
    validation_sources: tuple[str, ...] = ()
    """Sources, named alike, whose documents are the held-out ones; all of `sources` is then trained on."""
    text_field: str = "text"
    """Field of .jsonl and column of .parquet that holds the document."""
    document_separator: str = ""
    """What stands between two documents of a .txt or .md file, such as a line end; "": the file is one document."""
    detokenizer: str = ""
    """Undo the spacing of a benchmark's text, a document at a time: wikitext, ptb, lm1b or lambada; "": leave it."""
    drop_duplicates: bool = False
    """Keep the first of documents with the same text only; a held-out one before one that is trained on."""
    formation: str = "packed"
    """How documents become sequences: packed, or a published protocol: sedd-radd, mdlm-bd3lm, lm1b-wrap, lm1b-pad.

    The losses count lm1b-pad's padding as text."""
    weights: tuple[float, ...] = ()
    """Shares of the sources in training, one for each source; (): as much of each as there is."""
    max_quarantined: float = 0.001
    """Share of the records that may be unreadable; the stage stops early where it will clearly be more."""
    unit_bytes: int = 64_000_000
    """Input files are taken together to this many bytes, at most; each such unit of work makes one shard a split."""
    tokenizer_sample_bytes: int = 16_000_000
    """Bytes of training text, at most, that a tokenizer is trained on."""

    def __post_init__(self) -> None:
        if isinstance(self.sources, str) or not self.sources or not all(self.sources):
            raise ValueError(f"sources must be one or more files, folders or URIs, not {self.sources!r}")
        if isinstance(self.validation_sources, str) or not all(self.validation_sources):
            raise ValueError(f"validation_sources must be files, folders or URIs, not {self.validation_sources!r}")
        if self.tokenizer == "":
            raise ValueError("tokenizer must be a path, or None to train one, not ''")
        if self.vocab_size < 257:
            raise ValueError(f"vocab_size must be at least 257 (256 bytes and the end of text), not {self.vocab_size}")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must be more than 0 and less than 1, not {self.validation_fraction}")
        if not 0 <= self.max_quarantined <= 1:
            raise ValueError(f"max_quarantined must be between 0 and 1, not {self.max_quarantined}")
        if not self.text_field:
            raise ValueError("text_field must name a field, not ''")
        for name in ("text_field", "document_separator"):
            if not _is_unicode(getattr(self, name)):
                raise ValueError(f"{name} must be text that UTF-8 can encode, not {getattr(self, name)!r}")
        for name, known in (("detokenizer", detokenizers.NAMES), ("formation", tuple(FORMATIONS))):
            if getattr(self, name) not in known:
                choices = ", ".join(choice or "''" for choice in known)
                raise ValueError(f"{name} must be one of {choices}, not {getattr(self, name)!r}")
        least = 2 + FORMATIONS[self.formation].special_places
        if self.sequence_length < least:
            raise ValueError(f"sequence_length must be at least {least}, not {self.sequence_length}")
        if self.weights:
            self._check_weights()
        for name in ("unit_bytes", "tokenizer_sample_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    @property
    def reading(self) -> Reading:
        """How files are read."""
        return Reading(
            text_field=self.text_field,
            document_separator=self.document_separator,
            detokenizer=self.detokenizer,
        )

    def _check_weights(self) -> None:
        if len(self.weights) != len(self.sources):
            raise ValueError(f"weights must be one for each of the {len(self.sources)} sources, not {self.weights}")
        if not all(math.isfinite(weight) and weight > 0 for weight in self.weights):
            raise ValueError(f"weights must be more than 0 and finite, not {self.weights}")
        if min(self.weights) < sum(self.weights) / 1000:
            raise ValueError(f"weights must be at least a thousandth of their sum, not {self.weights}")


def _is_unicode(text: str) -> bool:
    """False where `text` has half of a surrogate pair, as a byte of the command line that is not UTF-8 becomes."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
