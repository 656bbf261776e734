"""A trained model by its folder, for the commands that need no cluster."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines import storage
from pipelines.errors import UserError

if TYPE_CHECKING:
    from armd.model import ARMD
    from armd.tokenizer import Tokenizer


def load(model_dir: str) -> "tuple[ARMD, Tokenizer]":
    """The model, on the GPU where there is one, and the tokenizer of a folder or URI that `armd run` exported.

    Raises:
        UserError: there is no model, or it is damaged.
    """
    import torch

    import armd.weights

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not storage.exists(model_dir):
        raise UserError(
            storage.redacted(f"there is no model folder {model_dir}"),
            "give the export stage's directory, which `armd run` prints",
        )
    try:
        if storage.is_local(model_dir):
            return armd.weights.load(storage.absolute(model_dir), device=device)
        with tempfile.TemporaryDirectory(prefix="armd-model-") as folder:
            for name in (*armd.weights.FILES, armd.weights.SUMS):
                if storage.exists(storage.join(model_dir, name)):
                    Path(folder, name).write_bytes(storage.read_bytes(storage.join(model_dir, name)))
            return armd.weights.load(folder, device=device)
    except ValueError as error:
        raise UserError(
            str(error), "give the export stage's directory; if it is damaged, remove it and run `armd run` again"
        ) from error
