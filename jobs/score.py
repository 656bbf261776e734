"""`armd score`: the likelihood of a text file under a trained model, no cluster."""

import codecs
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from jobs import model, options
from pipelines import storage
from pipelines.errors import UserError

if TYPE_CHECKING:
    from armd import ARMD, Order

COMMAND = "armd score"
CHUNK = 1 << 20  # bytes read at once
BATCH = 8  # windows scored at once, at most
LOGITS = 1 << 27  # numbers in a batch's logits, at most: half a gigabyte in float32, of which there are two copies


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """Nats, perplexity and bits per byte of a text file of any size: left to right, and in other orders if asked to.

    UTF-8; read once, a piece at a time, and scored in windows of the model's length, each from nothing.
    """

    model_dir: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL_DIR")] = tyro.MISSING
    """The export stage's directory: a folder or a URI."""
    file: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE")] = tyro.MISSING
    """Text file, a path or a URI; - reads standard input."""
    n_streams: int = 1
    """Score in the order that sampling with this many streams has; 1 is left-to-right."""
    one_by_one: bool = False
    """Score that order with one token a block too: tells what the order costs from what parallel tokens cost."""
    random_orders: int = 0
    """Score under this many random orders of each window: their mean, and the tighter importance-weighted bound."""
    seed: int = 0
    """Seed of the random orders."""
    json: bool = False
    """Print one JSON object instead."""

    def __post_init__(self) -> None:
        if self.n_streams < 1:
            raise ValueError(f"n_streams must be at least 1, not {self.n_streams}")
        if self.one_by_one and self.n_streams == 1:
            raise ValueError("n_streams must be at least 2 with --one-by-one, not 1")
        if self.random_orders < 0:
            raise ValueError(f"random_orders must be at least 0, not {self.random_orders}")


@dataclass
class Total:
    """What has been counted so far."""

    tokens: int = 0
    bytes: int = 0
    windows: int = 0
    nats: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Negative log-likelihood by the way in which it was scored, in the order of `LABELS`."""


LABELS = {
    "left_to_right": "left to right",
    "strided": "{n_streams} streams",
    "strided_one_by_one": "{n_streams} streams, one token a block",
    "random_mean": "random orders, mean of {random_orders}",
    "random_weighted": "random orders, weighted bound of {random_orders}",
}
"""The ways of scoring, as JSON and the table name them."""


def main(arguments: Sequence[str]) -> int:
    """Run the command; the exit status."""
    chosen = options.parse(ScoreOptions(), arguments, command=COMMAND, description=ScoreOptions.__doc__ or "")
    total = _score(chosen)
    if total.tokens == 0:
        raise UserError(f"{chosen.file} holds no text", "give a file with text in it")
    result = _result(chosen, total)
    if chosen.json:
        print(json.dumps(result))
    else:
        _print_table(chosen, result)
    return 0


def _result(chosen: ScoreOptions, total: Total) -> dict[str, Any]:
    """What `--json` prints: at its top the order that `--n-streams` names, under `scores` every way of scoring."""
    import armd

    scores = {
        way: {
            "nats": nats,
            "nats_per_token": nats / total.tokens,
            "perplexity": armd.perplexity(nats, total.tokens),
            "bits_per_byte": armd.bits_per_byte(nats, total.bytes),
        }
        for way, nats in total.nats.items()
    }
    result = {
        "model": chosen.model_dir,
        "file": chosen.file,
        "n_streams": chosen.n_streams,
        "random_orders": chosen.random_orders,
        "seed": chosen.seed,
        "tokens": total.tokens,
        "bytes": total.bytes,
        "windows": total.windows,
        **scores["left_to_right" if chosen.n_streams == 1 else "strided"],
        "scores": scores,
    }
    if chosen.one_by_one:
        per_token = {way: score["nats_per_token"] for way, score in scores.items()}
        result["order_gap"] = per_token["strided_one_by_one"] - per_token["left_to_right"]
        result["independence_gap"] = per_token["strided"] - per_token["strided_one_by_one"]
    return result


def _print_table(chosen: ScoreOptions, result: dict[str, Any]) -> None:
    print(f"{result['tokens']:,} tokens, {result['bytes']:,} bytes, {result['windows']:,} windows")
    labels = {way: LABELS[way].format(**vars(chosen)) for way in result["scores"]}
    width = max(map(len, labels.values()))
    print(f"{'':{width}}  {'nats':>16}  {'a token':>8}  {'perplexity':>12}  {'bits per byte':>13}")
    for way, score in result["scores"].items():
        numbers = f"{score['nats']:16,.2f}  {score['nats_per_token']:8.4f}  {score['perplexity']:12,.3f}"
        print(f"{labels[way]:{width}}  {numbers}  {score['bits_per_byte']:13.4f}")
    if chosen.one_by_one:
        print(f"order gap {result['order_gap']:.4f}, independence gap {result['independence_gap']:.4f} nats a token")


def _score(chosen: ScoreOptions) -> Total:
    """Score every token once a way: full windows in batches, then what is left as one shorter window."""
    total = Total()
    text = _text(chosen.file, total)  # opens the file before the model is loaded
    network, tokenizer = model.load(chosen.model_dir)
    length = network.config.max_length
    batch = max(1, min(BATCH, LOGITS // (length * network.config.vocab_size)))
    pending: list[int] = []
    for ids in tokenizer.encode_stream(text):
        pending += ids
        while len(pending) >= batch * length:
            _add(
                total, [pending[start : start + length] for start in range(0, batch * length, length)], network, chosen
            )
            del pending[: batch * length]
    for start in range(0, len(pending), length):
        _add(total, [pending[start : start + length]], network, chosen)
    return total


def _add(total: Total, windows: list[list[int]], network: "ARMD", chosen: ScoreOptions) -> None:
    """Score some windows of equal length."""
    import torch

    import armd

    tokens = torch.tensor(windows, device=next(network.parameters()).device)
    for way, order in _orders(chosen, tokens.shape[1]).items():
        total.nats[way] -= armd.score(network, tokens, order).double().sum().item()
    if chosen.random_orders:
        logp = armd.score_random_orders(
            network, tokens, chosen.random_orders, seed=chosen.seed, first_row=total.windows
        )
        total.nats["random_mean"] -= logp.mean(dim=1).sum().item()
        total.nats["random_weighted"] -= armd.importance_weighted(logp).sum().item()
    total.tokens += tokens.numel()
    total.windows += len(windows)


def _orders(chosen: ScoreOptions, length: int) -> "dict[str, Order]":
    """The orders of a window that are not random."""
    import armd

    orders = {"left_to_right": armd.Order.left_to_right(length)}
    if chosen.n_streams > 1:
        orders["strided"] = armd.Order.strided(length, chosen.n_streams)
    if chosen.one_by_one:
        orders["strided_one_by_one"] = armd.Order.given(orders["strided"].positions)
    return orders


def _text(file: str, total: Total) -> Iterator[str]:
    """The text a part at a time, its bytes counted in `total`."""
    try:
        stream = sys.stdin.buffer if file == "-" else storage.open_read(file)
    except OSError as error:
        raise UserError(
            storage.redacted(f"cannot read {file}: {error.strerror or error}"), "give a text file that exists"
        ) from error
    return _read(stream, file, total)


def _read(stream: Any, file: str, total: Total) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    with stream:
        while True:
            data = stream.read(CHUNK)
            held_back, _ = decoder.getstate()  # the beginning of a character that the last part ended in
            try:
                yield decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{file} is not UTF-8 text: {error.reason} at byte {total.bytes - len(held_back) + error.start}",
                    "convert it, e.g. `iconv -f latin1 -t utf-8`",
                ) from error
            total.bytes += len(data)
            if not data:
                return
