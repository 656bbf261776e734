"""`armd sample`: text from a trained model, no cluster."""

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from jobs import model, options
from jobs.terminal import printable
from pipelines.errors import UserError

if TYPE_CHECKING:
    from armd import ARMD, SamplingParams, Tokenizer
    from armd.text import TextBuilder
    from jobs.watch import Watch

COMMAND = "armd sample"


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Write text with a trained model."""

    model_dir: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL_DIR")] = tyro.MISSING
    """The export stage's directory: a folder or a URI."""
    prompt: str = ""
    """Text to continue; empty: from nothing."""
    template: str | None = None
    """Text to fill in instead: [MASK] stands for one token, [MASK:4] for four."""
    n_streams: int = 4
    """Tokens written in parallel at a step; 1 is plain left-to-right."""
    mode: Literal["parallel", "exact"] = "parallel"
    """exact verifies what was drafted in parallel: texts as if written one token at a time in the same order."""
    threshold: float = 0.0
    """In parallel mode, fill only places where the most probable token reaches this; the others wait."""
    max_entropy: float | None = None
    """In parallel mode, fill places, the surest first, until the entropies of those before exceed this many nats."""
    max_tokens: int | None = None
    """Tokens to write at most; None: 128, or as many as the model's length leaves."""
    temperature: float = 1.0
    """Below 1 more probable text, 0 the most probable token each time."""
    top_p: float = 1.0
    """Draw only from the most probable tokens up to this sum."""
    top_k: int = 0
    """Draw only from so many most probable tokens; 0: from all."""
    stop: tuple[str, ...] = ()
    """Strings that end a text; what stands before the first of them is printed."""
    seed: int | None = 0
    """The same seed writes the same text; None: another one each time."""
    n: int = 1
    """Texts to write."""
    watch: bool = False
    """Show on a terminal how the text fills in, each stream in its colour, what is not yet verified dim."""
    json: bool = False
    """Print one JSON object instead."""

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n must be at least 1, not {self.n}")
        if self.template is not None and self.prompt:
            raise ValueError("prompt must be left out with template, which holds all text that is known")
        if not all(self.stop):
            raise ValueError("stop must hold no empty string, which every text begins with")
        if self.template is not None and self.stop:
            raise ValueError("stop must be left out with template, where every mask is filled")
        if self.template is not None and self.max_tokens is not None:
            raise ValueError(
                f"max_tokens must be left out with template, whose masks say how many, not {self.max_tokens}"
            )


def main(arguments: Sequence[str]) -> int:
    """Run the command; the exit status."""
    chosen = options.parse(SampleOptions(), arguments, command=COMMAND, description=SampleOptions.__doc__ or "")
    with options.naming_options(SampleOptions(), arguments, command=COMMAND):
        samples, seconds = _write(chosen)
    if chosen.json:
        tokens = sum(len(sample["tokens"]) for sample in samples)
        print(json.dumps({"model": chosen.model_dir, "samples": samples, "tokens_per_second": tokens / seconds}))
        return 0
    for number, sample in enumerate(samples, start=1):
        if len(samples) > 1:
            print(f"--- {number} of {len(samples)}")
        text = sample["prompt"] + sample["text"]
        print(printable(text) if sys.stdout.isatty() else text)
    return 0


def _write(chosen: SampleOptions) -> tuple[list[dict[str, Any]], float]:
    """The samples, and the seconds that writing took."""
    import armd
    from armd.text import TextBuilder

    params = armd.SamplingParams(  # complains of a value before the model is loaded
        max_tokens=128 if chosen.max_tokens is None else chosen.max_tokens,
        n_streams=chosen.n_streams,
        mode=chosen.mode,
        threshold=chosen.threshold,
        max_entropy=chosen.max_entropy,
        temperature=chosen.temperature,
        top_p=chosen.top_p,
        top_k=chosen.top_k,
        seed=chosen.seed,
    )
    network, tokenizer = model.load(chosen.model_dir)
    template = _template(chosen, params.max_tokens, tokenizer, network.config.max_length)
    # In a template every hole is filled: no stop token ends it before the text that is known to follow.
    params = dataclasses.replace(
        params, stop_ids=(tokenizer.eos_id,), min_tokens=0 if chosen.template is None else len(template)
    )
    requests = [
        dataclasses.replace(params, seed=None if chosen.seed is None else chosen.seed + number)
        for number in range(chosen.n)
    ]
    texts = [TextBuilder(tokenizer, chosen.stop, params.stop_ids) for _ in requests]
    watch = _watch(chosen, tokenizer, template)
    began = time.perf_counter()
    _decode(network, template, requests, texts, watch)
    seconds = time.perf_counter() - began
    samples = []
    for one, request in zip(texts, requests, strict=True):
        text = one.take()
        if chosen.template is not None:
            fill = iter(one.tokens)
            text = tokenizer.decode([next(fill) if token is None else token for token in template])
        samples.append(
            {
                "prompt": chosen.prompt,
                "text": text,
                "tokens": one.tokens,
                "logprobs": one.logprobs,
                "step_of_token": one.step_of_token,
                "steps": one.steps,
                "accepted": one.accepted if chosen.mode == "exact" else 0,
                "rejected": one.rejected,
                "finish_reason": one.finish_reason,
                "stop_reason": one.stop_reason,
                "seed": request.seed,
            }
        )
    return samples, seconds


def _template(chosen: SampleOptions, max_tokens: int, tokenizer: "Tokenizer", length: int) -> list[int | None]:
    """What is known and what is to be written: token ids, None for each hole."""
    from armd.template import parse_template

    if chosen.template is not None:
        template = parse_template(chosen.template, tokenizer.encode)
        if len(template) > length:
            raise UserError(
                f"the template has {len(template)} tokens, the model's length is {length}", "shorten --template"
            )
        return template
    prompt = tokenizer.encode(chosen.prompt)
    room = length - len(prompt)
    wanted = min(max_tokens, room) if chosen.max_tokens is None else max_tokens
    if room < 1:
        raise UserError(f"the prompt has {len(prompt)} tokens, the model's length is {length}", "shorten --prompt")
    if wanted > room:
        raise UserError(
            f"--max-tokens {wanted} does not fit: the prompt has {len(prompt)} tokens, the model's length is {length}",
            f"give --max-tokens of at most {room}",
        )
    return [*prompt, *[None] * wanted]


def _watch(chosen: SampleOptions, tokenizer: "Tokenizer", template: list[int | None]) -> "Watch | None":
    """The live view, where it was asked for and there is a terminal to show it on."""
    if not chosen.watch or chosen.json:
        return None
    from rich.console import Console

    from jobs.watch import Watch

    console = Console()
    # Not `is_terminal`: FORCE_COLOR, which build servers set, makes that true of a file.
    if not console.file.isatty() or console.is_dumb_terminal:
        return None
    return Watch(console, tokenizer, template, chosen.n_streams, chosen.n)


def _decode(
    network: "ARMD",
    template: list[int | None],
    requests: Sequence["SamplingParams"],
    texts: Sequence["TextBuilder"],
    watch: "Watch | None",
) -> None:
    """Write all requests, each into its text."""
    import armd

    engine = armd.Engine(network, max_slots=min(len(requests), 32))
    numbers = {engine.submit_template(template, params): number for number, params in enumerate(requests)}
    with watch or contextlib.nullcontext():
        while not engine.idle:
            for event in engine.step():
                number = numbers[event.request_id]
                if watch is not None:
                    watch.show(number, event)
                texts[number].feed(event)
                if (
                    texts[number].finish_reason is not None
                ):  # by a stop string perhaps, of which the engine knows nothing
                    engine.cancel(event.request_id)
