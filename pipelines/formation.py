"""How documents become sequences: named, versioned presets, so that a perplexity says under which protocol it stands.

The published numbers of diffusion language models follow different ones; `packed` is the project's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines.errors import UserError

if TYPE_CHECKING:
    from armd.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Formation:
    """What stands around documents and around sequences of N tokens."""

    version: int = 1
    """To be raised when the same preset begins to give other sequences."""
    row_ends: bool = True
    """An end-of-text token follows every document."""
    empty_rows: bool = False
    """An empty document counts, as nothing but its end."""
    block_specials: bool = False
    """A sequence is a begin token, N - 2 tokens of the stream, and an end-of-text token."""
    padded: bool = False
    """A sequence is one document between a begin token and an end-of-text token, cut or padded to N."""

    @property
    def special_places(self) -> int:
        """Places of a sequence that are not the stream's."""
        return 2 if self.block_specials or self.padded else 0


FORMATIONS = {
    "packed": Formation(),
    "sedd-radd": Formation(empty_rows=True),
    "mdlm-bd3lm": Formation(row_ends=False, block_specials=True),
    "lm1b-wrap": Formation(block_specials=True),
    "lm1b-pad": Formation(row_ends=False, padded=True),
}
"""The presets by name: the project's own, and those of SEDD and RADD, MDLM and BD3-LM, and LM1B wrapped or padded."""


def specials(name: str, tokenizer: "Tokenizer") -> dict[str, int]:
    """Ids of the tokens that the preset `name` puts around sequences: `begin`, `end` and `pad`, as far as it does.

    Raises:
        UserError: the preset pads, and the tokenizer has no token for it.
    """
    formation = FORMATIONS[name]
    if not formation.padded:
        return {"begin": tokenizer.bos_id, "end": tokenizer.eos_id} if formation.block_specials else {}
    if tokenizer.pad_id is None:
        raise UserError(
            f"the formation {name!r} pads its sequences, and the tokenizer has no padding token ([PAD] or <pad>)",
            "give --corpus.tokenizer BERT's vocab.txt or another one with a padding token, or choose another "
            "--corpus.formation",
        )
    return {"begin": tokenizer.bos_id, "end": tokenizer.eos_id, "pad": tokenizer.pad_id}


def row(ids: Sequence[int], length: int, special: dict[str, int]) -> list[int]:
    """A document as one sequence of `length` tokens: begin, as much of it as there is room for, end, padding."""
    body = [special["begin"], *ids[: length - 2], special["end"]]
    return body + [special["pad"]] * (length - len(body))


def described(name: str, tokenizer: "Tokenizer") -> dict[str, Any]:
    """What a manifest says of the preset `name`."""
    formation = FORMATIONS[name]
    return {"name": name, "version": formation.version, "specials": specials(name, tokenizer)}
