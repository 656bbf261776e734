"""The export stage: from the last sharded checkpoint to a model folder that `armd.load` reads, and the proof that it
is the model that was trained: its held-out loss is measured again, by another path, and compared."""

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import armd
from armd.config import MODEL_FILES, Architecture
from armd.models import MODELS, Model
from armd.objective import nats
from armd.tokenizer import Tokenizer
from pipelines import checkpoint, ema, runtime, storage
from pipelines.batches import held_out_draw
from pipelines.errors import UserError
from pipelines.manifest import read_manifest, write_manifest
from pipelines.progress import Progress, silent
from pipelines.train_config import TrainConfig
from pipelines.windows import WindowIndex

# The exported weights are float32. Training in float32 must be met to rounding; bfloat16 rounds every weight and
# activation to 8 bits, which averages out over thousands of tokens to about 1e-4 of the loss.
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-3}


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What the export stage needs to know besides its inputs."""

    batch_size: int = 8
    """Held-out windows scored at once."""


def run(
    config: ExportConfig, inputs: Mapping[str, str], output_dir: str, progress: Progress = silent
) -> dict[str, Any]:
    """Write the model folder; the manifest holds the held-out loss measured here and the one that training reported.

    Raises:
        UserError: the checkpoint does not verify, or the exported model's loss is not the one that training reported.
    """
    started = time.time()
    body = runtime.near_a_gpu(export, config, inputs, output_dir, progress=progress)
    return write_manifest(output_dir, "export", body, started)


def export(config: ExportConfig, inputs: Mapping[str, str], output_dir: str, progress: Progress) -> dict[str, Any]:
    """The export itself, in this process and on its best device; the body of the manifest."""
    trained = read_manifest(inputs["train"])
    path = storage.join(inputs["train"], trained["checkpoint"])
    with tempfile.TemporaryDirectory(prefix="armd-export-") as scratch:
        tokenizer = Tokenizer.load(storage.fetch_file(storage.join(inputs["corpus"], "tokenizer.json"), scratch))
        about = checkpoint.verified(path)
        progress.update(1, 4, "steps", "checkpoint verified")
        model = load_checkpoint(tokenizer, path, about, scratch)
        progress.update(2, 4, "steps", "weights gathered")
        model = model.to("cuda" if torch.cuda.is_available() else "cpu")
        validation = WindowIndex(inputs["corpus"], "validation")
        loss = held_out_loss(model, validation, TrainConfig.from_dict(about["config"]), config.batch_size)
        progress.update(3, 4, "steps", f"held-out loss {loss:.4f}")
        reported = trained["final"]["validation_nats_per_token"]
        if not abs(loss - reported) <= TOLERANCE[trained["dtype"]] * max(1.0, reported):
            raise UserError(
                f"the exported model's held-out loss is {loss:.6f} nats a token, training reported {reported:.6f}",
                "this is a defect: keep the training stage's directory and report it",
            )
        folder = Path(scratch, "model")
        armd.save(folder, model, tokenizer)
        # SHA256SUMS last: on its own it promises the others.
        for name in MODEL_FILES:
            storage.put_file(str(folder / name), storage.join(output_dir, name))
    progress.update(4, 4, "steps", "saved")
    return {
        "validation_nats_per_token": loss,
        "training_reported": reported,
        "parameters": trained["parameters"],
        "model": model.config.to_dict(),
        "checkpoint": path,
        "averaged_weights": trained["final"]["averaged_weights"],
    }


def load_checkpoint(tokenizer: Tokenizer, path: str, about: Mapping[str, Any], scratch: str) -> Model:
    """The model of a verified checkpoint in float32: its averaged weights where it has them."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    architecture = Architecture(**about["config"]["architecture"])
    model = MODELS[about["config"]["model"]](architecture.model_config(tokenizer.vocab_size, about["sequence_length"]))
    folder = checkpoint.local_copy(path, dict(about), scratch)
    if about["config"]["ema_decay"] is not None:
        shapes = {f"model.{name}": parameter.shape for name, parameter in model.named_parameters()}
        state = ema.gather(folder, shapes)
    else:
        state = get_fp32_state_dict_from_zero_checkpoint(folder, tag=checkpoint.TAG)
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in state.items()})
    return model.eval()


@torch.no_grad()
def held_out_loss(model: Model, windows: WindowIndex, config: TrainConfig, batch_size: int) -> float:
    """Mean nats a token over the windows that training validated on: left to right, or a baseline's own measure."""
    n = min(config.validation_windows, len(windows))
    total = 0.0
    for first in range(0, n, batch_size):
        rows = range(first, min(n, first + batch_size))
        tokens = torch.from_numpy(np.stack([windows[i] for i in rows])).to(model.embedding.weight.device)
        loss_sum, _ = nats(model, tokens, held_out_draw(config, 1, rows, n, windows.sequence_length))
        total += float(loss_sum)
    return total / (n * windows.sequence_length)
