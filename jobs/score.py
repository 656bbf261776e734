"""`armd score`: the likelihood of a text file under a trained model, no cluster."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from jobs import model, options
from pipelines import storage
from pipelines.errors import UserError

if TYPE_CHECKING:
    from armd.tokenizer import Tokenizer

COMMAND = "armd score"
PIECE = 1 << 20  # characters tokenized at once; a piece ends where a line does
BATCH = 8  # windows scored at once


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """Nats, perplexity and bits per byte of a UTF-8 text file, read in windows of the model's length."""

    model_dir: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL_DIR")] = tyro.MISSING
    """The export stage's directory: a folder or a URI."""
    file: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE")] = tyro.MISSING
    """Text file, a path or a URI; - reads standard input."""
    n_streams: int = 1
    """Score in the order that sampling with this many streams has; 1 is left-to-right."""
    json: bool = False
    """Print one JSON object instead."""

    def __post_init__(self) -> None:
        if self.n_streams < 1:
            raise ValueError(f"n_streams must be at least 1, not {self.n_streams}")


@dataclass
class Total:
    """What has been counted so far."""

    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0


def main(arguments: Sequence[str]) -> int:
    """Run the command; the exit status."""
    import armd

    chosen = options.parse(ScoreOptions(), arguments, command=COMMAND, description=ScoreOptions.__doc__ or "")
    total = _score(chosen)
    if total.tokens == 0:
        raise UserError(f"{chosen.file} holds no text", "give a file with text in it")
    result: dict[str, Any] = {
        "model": chosen.model_dir,
        "file": chosen.file,
        "n_streams": chosen.n_streams,
        **asdict(total),
        "nats_per_token": total.nats / total.tokens,
        "perplexity": armd.perplexity(total.nats, total.tokens),
        "bits_per_byte": armd.bits_per_byte(total.nats, total.bytes),
    }
    if chosen.json:
        print(json.dumps(result))
    else:
        print(f"{total.tokens:,} tokens, {total.bytes:,} bytes, S={chosen.n_streams}")
        print(f"nats           {total.nats:,.2f}  ({result['nats_per_token']:.4f} a token)")
        print(f"perplexity     {result['perplexity']:,.3f}")
        print(f"bits per byte  {result['bits_per_byte']:.4f}")
    return 0


def _score(chosen: ScoreOptions) -> Total:
    """Score every token once: full windows in batches, then what is left as one shorter window."""
    import torch

    import armd

    total = Total()
    pieces = _pieces(chosen.file)  # opens the file before the model is loaded
    network, tokenizer = model.load(chosen.model_dir)
    length = network.config.max_length
    device = next(network.parameters()).device

    def add(rows: list[list[int]]) -> None:
        tokens = torch.tensor(rows, device=device)
        n = tokens.shape[1]
        order = armd.Order.left_to_right(n) if chosen.n_streams == 1 else armd.Order.strided(n, chosen.n_streams)
        total.nats -= armd.score(network, tokens, order).double().sum().item()
        total.tokens += tokens.numel()

    pending: list[int] = []
    for ids in _tokens(pieces, tokenizer, total):
        pending += ids
        while len(pending) >= BATCH * length:
            add([pending[start : start + length] for start in range(0, BATCH * length, length)])
            del pending[: BATCH * length]
    for start in range(0, len(pending), length):
        add([pending[start : start + length]])
    return total


def _tokens(pieces: Iterator[str], tokenizer: "Tokenizer", total: Total) -> Iterator[list[int]]:
    for piece in pieces:
        total.bytes += len(piece.encode("utf-8"))
        yield tokenizer.encode(piece)


def _pieces(file: str) -> Iterator[str]:
    """The text in pieces of about `PIECE` characters that end where a line does."""
    try:
        stream = sys.stdin.buffer if file == "-" else storage.open_read(file)
    except OSError as error:
        raise UserError(
            storage.redacted(f"cannot read {file}: {error.strerror or error}"), "give a text file that exists"
        ) from error
    return _read(stream, file)


def _read(stream: Any, file: str) -> Iterator[str]:
    with stream:
        while lines := stream.readlines(PIECE):
            try:
                yield b"".join(lines).decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{file} is not UTF-8 text: {error.reason} at byte {error.start} of a piece",
                    "convert it, e.g. `iconv -f latin1 -t utf-8`",
                ) from error
