"""ARMD, the auto-regressive masked diffusion model: trains like an autoregressive model, writes many tokens at once.

Names are imported when they are first used (PEP 562): a process that only tokenizes does not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from armd.autoregressive import AutoregressiveLM
    from armd.config import ARCHITECTURES, Architecture, ModelConfig
    from armd.engine import Engine, generate, infill
    from armd.likelihood import (
        bits_per_byte,
        importance_weighted,
        perplexity,
        score,
        score_orders,
        score_random_orders,
    )
    from armd.masked_diffusion import MaskedDiffusionLM
    from armd.model import ARMD
    from armd.order import Order
    from armd.request import Completion, Event, Written
    from armd.sampling import SamplingParams
    from armd.tokenizer import Tokenizer
    from armd.weights import load, save

    __version__: str

_MODULES = {
    "autoregressive": ("AutoregressiveLM",),
    "config": ("ARCHITECTURES", "Architecture", "ModelConfig"),
    "engine": ("Engine", "generate", "infill"),
    "likelihood": (
        "bits_per_byte",
        "importance_weighted",
        "perplexity",
        "score",
        "score_orders",
        "score_random_orders",
    ),
    "masked_diffusion": ("MaskedDiffusionLM",),
    "model": ("ARMD",),
    "order": ("Order",),
    "request": ("Completion", "Event", "Written"),
    "sampling": ("SamplingParams",),
    "tokenizer": ("Tokenizer",),
    "weights": ("load", "save"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "ARCHITECTURES",
    "ARMD",
    "Architecture",
    "AutoregressiveLM",
    "Completion",
    "Engine",
    "Event",
    "MaskedDiffusionLM",
    "ModelConfig",
    "Order",
    "SamplingParams",
    "Tokenizer",
    "Written",
    "bits_per_byte",
    "generate",
    "importance_weighted",
    "infill",
    "load",
    "perplexity",
    "save",
    "score",
    "score_orders",
    "score_random_orders",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'armd' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"armd.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("armd")
    except metadata.PackageNotFoundError:  # run from a source tree that was not installed
        return "0+source"
