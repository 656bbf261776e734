"""ARMD, the auto-regressive masked diffusion model: trains like an autoregressive model, writes many tokens at once."""

from importlib import metadata

from armd.config import ARCHITECTURES, Architecture, ModelConfig
from armd.engine import Completion, Engine, Event, Written, generate, infill
from armd.likelihood import bits_per_byte, perplexity, score
from armd.model import ARMD
from armd.order import Order
from armd.sampling import SamplingParams
from armd.tokenizer import Tokenizer
from armd.weights import load, save

try:
    __version__ = metadata.version("armd")
except metadata.PackageNotFoundError:  # run from a source tree that was not installed
    __version__ = "0+source"

__all__ = [
    "ARCHITECTURES",
    "ARMD",
    "Architecture",
    "Completion",
    "Engine",
    "Event",
    "ModelConfig",
    "Order",
    "SamplingParams",
    "Tokenizer",
    "Written",
    "bits_per_byte",
    "generate",
    "infill",
    "load",
    "perplexity",
    "save",
    "score",
]
