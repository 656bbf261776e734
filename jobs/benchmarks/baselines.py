"""What ARMD's decoding is held against: other ways to write as many tokens with a transformer of the same shape.

Weights are random, as time does not depend on them; none of these stops early.
"""

import importlib.util
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import nn

from armd import AutoregressiveLM, MaskedDiffusionLM, ModelConfig, SamplingParams
from armd.randomness import seeded

Baseline = Literal["autoregressive", "masked-diffusion", "gpt2"]

Write = Callable[[int], object]
"""Writes so many texts at once."""


class Evaluations:
    """A contestant that counts its forward passes, by a hook on a module that each of them calls once."""

    def __init__(self, module: nn.Module, write: Write, batch: int) -> None:
        self.count = 0
        """Of the latest run."""
        self._module, self._write, self._batch = module, write, batch

    def __call__(self) -> None:
        self.count = 0
        hook = self._module.register_forward_hook(self._counted)
        self._write(self._batch)
        hook.remove()

    def _counted(self, *_: object) -> None:
        self.count += 1


def missing(baseline: Baseline) -> str | None:
    """Why `baseline` cannot be measured here, and what would mend it; None where it can."""
    if baseline == "gpt2" and importlib.util.find_spec("transformers") is None:
        return "transformers is not installed: pip install -c constraints.txt '.[bench]'"
    return None


def autoregressive(
    config: ModelConfig, n_tokens: int, batches: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> Mapping[str, tuple[int, Evaluations]]:
    """The autoregressive baseline with its cache: contestants with their batch, by name."""
    model = AutoregressiveLM(config, generator=seeded("bench")).to(device, dtype).eval()
    params = SamplingParams(max_tokens=n_tokens)

    def write(batch: int) -> None:
        model.generate([[]] * batch, params)

    return {f"autoregressive, batch {batch}": (batch, Evaluations(model.final_norm, write, batch)) for batch in batches}


def masked_diffusion(
    config: ModelConfig, n_tokens: int, n_steps: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> Mapping[str, tuple[int, Evaluations]]:
    """MDLM's ancestral sampler on so many steps of time, one text; without evaluations where no token appears."""
    model = MaskedDiffusionLM(config, generator=seeded("bench")).to(device, dtype).eval()

    def sampler(steps: int) -> Write:
        return lambda batch: model.sample(batch, n_tokens, n_steps=steps)

    return {f"MDLM T={steps}, batch 1": (1, Evaluations(model.final_norm, sampler(steps), 1)) for steps in n_steps}


def gpt2(
    config: ModelConfig, n_tokens: int, batches: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> Mapping[str, tuple[int, Evaluations]]:
    """GPT-2 of the same shape and `generate` as `transformers` have them, from one token, from the whole vocabulary."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=n_tokens + 1,
        n_embd=config.d_model,
        n_layer=config.n_layers,
        n_head=config.n_heads,
        bos_token_id=0,
        eos_token_id=None,
    )
    model = GPT2LMHeadModel(shape).to(device, dtype).eval()

    def write(batch: int) -> None:
        start = torch.zeros(batch, 1, dtype=torch.long, device=device)
        model.generate(start, attention_mask=torch.ones_like(start), do_sample=True, top_k=0, max_new_tokens=n_tokens)

    return {f"GPT-2, batch {batch}": (batch, Evaluations(model.transformer.ln_f, write, batch)) for batch in batches}
