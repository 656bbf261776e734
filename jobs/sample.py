"""`armd sample`: text from a trained model, no cluster."""

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from jobs import model, options
from pipelines.errors import UserError

COMMAND = "armd sample"


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Write text with a trained model."""

    model_dir: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL_DIR")] = tyro.MISSING
    """The export stage's directory: a folder or a URI."""
    prompt: str = ""
    """Text to continue; empty: from nothing."""
    n_streams: int = 4
    """Tokens written in parallel at a step; 1 is plain left-to-right."""
    max_tokens: int | None = None
    """Tokens to write at most; None: 128, or as many as the model's length leaves."""
    temperature: float = 1.0
    """Below 1 more probable text, 0 the most probable token each time."""
    top_p: float = 1.0
    """Draw only from the most probable tokens up to this sum."""
    seed: int | None = 0
    """The same seed writes the same text; None: another one each time."""
    n: int = 1
    """Texts to write."""
    json: bool = False
    """Print one JSON object instead."""

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n must be at least 1, not {self.n}")


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
        print(sample["prompt"] + sample["text"])
    return 0


def _write(chosen: SampleOptions) -> tuple[list[dict[str, Any]], float]:
    """The samples, and the seconds that writing took."""
    import armd

    params = armd.SamplingParams(  # complains of a value before the model is loaded
        max_tokens=128 if chosen.max_tokens is None else chosen.max_tokens,
        n_streams=chosen.n_streams,
        temperature=chosen.temperature,
        top_p=chosen.top_p,
        seed=chosen.seed,
    )
    network, tokenizer = model.load(chosen.model_dir)
    prompt = tokenizer.encode(chosen.prompt)
    length = network.config.max_length
    room = length - len(prompt)
    wanted = min(params.max_tokens, room) if chosen.max_tokens is None else chosen.max_tokens
    if room < 1:
        raise UserError(f"the prompt has {len(prompt)} tokens, the model's length is {length}", "shorten --prompt")
    if wanted > room:
        raise UserError(
            f"--max-tokens {wanted} does not fit: the prompt has {len(prompt)} tokens, the model's length is {length}",
            f"give --max-tokens of at most {room}",
        )
    requests = [
        dataclasses.replace(
            params,
            max_tokens=wanted,
            seed=None if chosen.seed is None else chosen.seed + number,
            stop_ids=(tokenizer.eos_id,),
        )
        for number in range(chosen.n)
    ]
    began = time.perf_counter()
    completions = armd.generate(network, [prompt] * chosen.n, requests)
    seconds = time.perf_counter() - began
    samples = [
        {
            "prompt": chosen.prompt,
            "text": tokenizer.decode(completion.tokens),
            "tokens": completion.tokens,
            "step_of_token": completion.step_of_token,
            "steps": completion.steps,
            "finish_reason": completion.finish_reason,
            "seed": request.seed,
        }
        for completion, request in zip(completions, requests, strict=True)
    ]
    return samples, seconds
