"""Evaluation: what the exported model predicts on held-out text, how fast it writes, and what it writes.

Everything goes through the library's public functions, so that the numbers are those a user of the library gets.
"""

import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines import held_out, runtime, storage
from pipelines.errors import UserError
from pipelines.manifest import read_manifest, write_manifest
from pipelines.model_folder import local_model
from pipelines.progress import Progress, silent

NAME = "evaluation.json"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is measured on the exported model.

    Raises:
        ValueError: naming the field and the value that does not fit.
    """

    streams: tuple[int, ...] = (1, 2, 4)
    """Numbers of streams to score and to sample with; 1 is plain left-to-right."""
    max_windows: int = 64
    """Held-out windows scored, from the split's beginning, at most."""
    batch_size: int = 8
    """Windows scored at once."""
    sample_tokens: int = 128
    """Tokens of a sample, its prompt not counted; fewer where the model's length leaves less room."""
    prompts: tuple[str, ...] = ("The",)
    """Texts to continue; a sample from nothing is always made."""
    n_samples: int = 1
    """Samples for each prompt and number of streams."""
    temperature: float = 0.8
    """Of the samples; 1 draws from the model as it is."""
    top_p: float = 0.95
    """Of the samples: keeps the most probable tokens up to this sum."""
    seed: int = 0
    """Seed of the first sample; the others count up from it."""
    repeats: int = 3
    """Timed texts for each number of streams; the median is reported."""

    def __post_init__(self) -> None:
        for name in ("max_windows", "batch_size", "sample_tokens", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not self.streams or min(self.streams) < 1:
            raise ValueError(f"streams must be numbers of at least 1, not {self.streams}")
        if self.n_samples < 0:
            raise ValueError(f"n_samples must be at least 0, not {self.n_samples}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be at least 0 and finite, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be more than 0 and at most 1, not {self.top_p}")


def run(
    config: EvaluateConfig, inputs: Mapping[str, str], output_dir: str, progress: Progress = silent
) -> dict[str, Any]:
    """Evaluate the model of `inputs["export"]` on the validation split of `inputs["corpus"]`.

    Runs here, or as one task on a GPU where the work goes to a cluster that has any.

    Returns:
        The manifest: per number of streams nats_per_token, perplexity, bits_per_byte and tokens_per_second; the unigram
        baseline; the samples with the step at which each token was written. evaluation.json holds the same.

    Raises:
        UserError: an input is unfinished or damaged, or holds no held-out window.
    """
    started = time.time()
    storage.make_dir(output_dir)
    inputs = {name: inputs[name] for name in ("corpus", "export")}
    body = runtime.near_a_gpu(evaluate, config, inputs, progress=progress)
    storage.write_json(storage.join(output_dir, NAME), body)
    return write_manifest(output_dir, "evaluate", body, started)


def evaluate(config: EvaluateConfig, inputs: Mapping[str, str], progress: Progress = silent) -> dict[str, Any]:
    """The evaluation itself, in this process and on its best device."""
    import torch

    import armd

    device = "cuda" if torch.cuda.is_available() else "cpu"
    corpus = read_manifest(inputs["corpus"])
    read_manifest(inputs["export"])
    with tempfile.TemporaryDirectory(prefix="armd-") as cache, local_model(inputs["export"]) as folder:
        try:
            model, tokenizer = armd.load(folder, device=device)
        except ValueError as error:
            raise UserError(str(error), "run the export stage again: remove its folder's manifest.json") from None
        held_out.check_tokenizer(inputs["corpus"], tokenizer, inputs["export"])
        windows = held_out.windows(inputs["corpus"], config.max_windows, cache)
        bytes_ = _text_bytes(windows.reshape(-1), tokenizer)

        meter = _Meter(config, windows.size, progress)
        by_streams = {}
        for n_streams in config.streams:
            tokens = torch.from_numpy(windows).to(device)
            scored = _score(model, tokens, n_streams, config.batch_size, bytes_, meter)
            by_streams[str(n_streams)] = {**scored, **_time_sampling(model, n_streams, config, meter)}
        return {
            "streams": by_streams,
            "unigram": _unigram(corpus),
            "samples": _samples(model, tokenizer, config, meter),
            "windows": len(windows),
            "window_tokens": windows.shape[1],
            "bytes": bytes_,
            "repeats": config.repeats,
            "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads",
            "temperature": config.temperature,
            "top_p": config.top_p,
        }


class _Meter:
    """Counts scored and sampled tokens of the whole evaluation for the progress line."""

    def __init__(self, config: EvaluateConfig, window_tokens: int, progress: Progress) -> None:
        sampled = (config.repeats + 1 + config.n_samples * (len(config.prompts) + 1)) * config.sample_tokens
        self._total = len(config.streams) * (window_tokens + sampled)
        self._done = 0
        self._progress = progress
        self.add(0, "")

    def add(self, tokens: int, note: str) -> None:
        self._done += tokens
        self._progress.update(min(self._done, self._total), self._total, "tokens", note)


def _text_bytes(stream: Any, tokenizer: Any) -> int:
    """UTF-8 bytes of the documents in a stream of token ids; the marks between them are no text.

    The windows are consecutive, so only the stream's two ends can cut through a character.
    """
    marks = {tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id}
    documents: list[list[int]] = [[]]
    for token in stream.tolist():
        if token in marks:
            documents.append([])
        else:
            documents[-1].append(token)
    return sum(len(tokenizer.decode(document).encode("utf-8")) for document in documents)


def _score(model: Any, windows: Any, n_streams: int, batch_size: int, n_bytes: int, meter: _Meter) -> dict[str, Any]:
    """Likelihood of the windows in the order that sampling with `n_streams` streams has."""
    import armd

    length = windows.shape[1]
    order = armd.Order.left_to_right(length) if n_streams == 1 else armd.Order.strided(length, n_streams)
    nats = 0.0
    for batch in windows.split(batch_size):
        nats -= armd.score(model, batch, order).double().sum().item()
        meter.add(batch.numel(), f"held-out text, S={n_streams}")
    tokens = windows.numel()
    return {
        "nats_per_token": nats / tokens,
        "perplexity": armd.perplexity(nats, tokens),
        "bits_per_byte": armd.bits_per_byte(nats, n_bytes),
        "tokens": tokens,
    }


def _time_sampling(model: Any, n_streams: int, config: EvaluateConfig, meter: _Meter) -> dict[str, Any]:
    """Tokens a second of one text at a time: the median of `repeats` after one that is not counted."""
    import armd

    length = min(config.sample_tokens, model.config.max_length)
    rates = []
    for repeat in range(config.repeats + 1):
        params = armd.SamplingParams(max_tokens=length, n_streams=n_streams, seed=config.seed + repeat)
        began = time.perf_counter()
        (completion,) = armd.generate(model, [[]], params)
        rates.append(len(completion.tokens) / (time.perf_counter() - began))
        meter.add(length, f"speed, S={n_streams}")
    return {
        "tokens_per_second": statistics.median(rates[1:]),
        "tokens_per_second_runs": rates[1:],
        "sampled_tokens": length,
        "steps": completion.steps,
    }


def _samples(model: Any, tokenizer: Any, config: EvaluateConfig, meter: _Meter) -> list[dict[str, Any]]:
    """One text from nothing and one for each prompt, each with every number of streams."""
    import armd

    samples = []
    for prompt in ("", *config.prompts):
        ids = tokenizer.encode(prompt)
        room = min(config.sample_tokens, model.config.max_length - len(ids))
        if room < 1:
            raise UserError(
                f"the prompt {prompt[:40]!r} has {len(ids)} tokens, the model's length is {model.config.max_length}",
                "shorten it: --evaluate.prompts",
            )
        for number in range(config.n_samples):
            for n_streams in config.streams:
                params = armd.SamplingParams(
                    max_tokens=room,
                    n_streams=n_streams,
                    temperature=config.temperature,
                    top_p=config.top_p,
                    seed=config.seed + number,
                )
                (completion,) = armd.generate(model, [ids], params)
                samples.append(_sample(tokenizer, prompt, ids, completion, params))
                meter.add(room, f"samples, S={n_streams}")
    return samples


def _sample(tokenizer: Any, prompt: str, ids: list[int], completion: Any, params: Any) -> dict[str, Any]:
    pieces = _pieces(tokenizer, ids + completion.tokens)
    steps = [None] * len(ids) + completion.step_of_token
    return {
        "prompt": prompt,
        "n_streams": params.n_streams,
        "seed": params.seed,
        "steps": completion.steps,
        "text": tokenizer.decode(completion.tokens),
        "tokens": [
            {"text": text, "step": step, "prompt": step is None} for text, step in zip(pieces, steps, strict=True)
        ],
    }


def _pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text that each token adds; a character cut between tokens goes to the one that completes it."""
    pieces = []
    shown = ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end])
        complete = text if end == len(ids) else text.rstrip("\ufffd")
        grown = complete if complete.startswith(shown) and len(complete) > len(shown) else shown
        pieces.append(grown[len(shown) :])
        shown = grown
    return pieces


def _unigram(corpus: Mapping[str, Any]) -> dict[str, float]:
    """The baseline that knows only how frequent each token is, on the whole validation split."""
    import armd

    nats = float(corpus["unigram"]["validation_nats_per_token"])
    return {"nats_per_token": nats, "perplexity": armd.perplexity(nats, 1)}
