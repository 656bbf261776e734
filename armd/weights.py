"""A model on disk: config.json, model.safetensors, tokenizer.json and SHA256SUMS in one folder.

SHA256SUMS is written last and checked first, in the format of `sha256sum -c`; nothing here can execute code.
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from armd.config import MODEL_FILES, ModelConfig
from armd.model import ARMD
from armd.models import MODELS, Model, name_of
from armd.tokenizer import Tokenizer

*FILES, SUMS = MODEL_FILES


def save(path: str | Path, model: Model, tokenizer: Tokenizer) -> None:
    """Write `model`, ARMD or a baseline (as float32), and `tokenizer` into the folder `path`, made where it is missing.

    Raises:
        ValueError: the tokenizer's vocabulary is not the model's.
    """
    _check_vocabulary(model.config, tokenizer)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SUMS).unlink(missing_ok=True)
    config = {"model": name_of(model), **model.config.to_dict()}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    state = {name: tensor.detach().float().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    tokenizer.save(folder / "tokenizer.json")
    (folder / SUMS).write_text("".join(f"{_sha256(folder / name)}  {name}\n" for name in FILES), encoding="utf-8")


def load(path: str | Path, *, device: torch.device | str = "cpu") -> tuple[ARMD, Tokenizer]:
    """The ARMD model, in evaluation mode, and the tokenizer of the folder `path`.

    Raises:
        ValueError: a file is missing, does not match its sum, or does not fit the others; the message names it.
    """
    model, tokenizer = load_any(path, device=device)
    if not isinstance(model, ARMD):
        raise ValueError(f"{path} holds the baseline {type(model).__name__}, which has no order to choose; not ARMD")
    return model, tokenizer


def load_any(path: str | Path, *, device: torch.device | str = "cpu") -> tuple[Model, Tokenizer]:
    """As `load`, whichever of `MODELS` the folder holds."""
    folder = Path(path)
    verify(folder)
    try:
        about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = MODELS[about.pop("model", "armd")]
        config = ModelConfig(**about)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'} is not a model's configuration: {error}") from error
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    _check_vocabulary(config, tokenizer)
    with torch.device("meta"):
        model = kind(config)
    try:
        state = load_file(folder / "model.safetensors", device=str(device))
        model.load_state_dict(state, assign=True)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{folder / 'model.safetensors'} does not hold this model: {error}") from error
    return model.eval(), tokenizer


def verify(path: str | Path) -> dict[str, str]:
    """Compare every file of a model's folder with SHA256SUMS; the sums by file name.

    Raises:
        ValueError: the folder, a file or its sum is missing, or a file is not what was saved.
    """
    folder = Path(path)
    if not (folder / SUMS).is_file():
        raise ValueError(f"{folder} holds no saved model: there is no {SUMS} in it")
    lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    for name in FILES:
        if name not in sums or not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing")
        if _sha256(folder / name) != sums[name]:
            raise ValueError(f"{folder / name} is damaged: its SHA-256 is not the one in {SUMS}")
    return sums


def _check_vocabulary(config: ModelConfig, tokenizer: Tokenizer) -> None:
    if tokenizer.vocab_size != config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} entries, the model has {config.vocab_size}: they are no pair"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
