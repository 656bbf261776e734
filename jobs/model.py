"""A trained model by its folder, for the commands that need no cluster."""

from typing import TYPE_CHECKING

from pipelines import storage
from pipelines.errors import UserError
from pipelines.model_folder import local_model

if TYPE_CHECKING:
    from armd.model import ARMD
    from armd.tokenizer import Tokenizer


def load(model_dir: str) -> "tuple[ARMD, Tokenizer]":
    """The model, on the GPU where there is one, and the tokenizer of a folder or URI that `armd run` exported.

    Raises:
        UserError: there is no model, or it is damaged.
    """
    import torch

    import armd

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not storage.exists(model_dir):
        raise UserError(
            storage.redacted(f"there is no model folder {model_dir}"),
            "give the export stage's directory, which `armd run` prints",
        )
    try:
        with local_model(model_dir) as folder:
            return armd.load(folder, device=device)
    except ValueError as error:
        raise UserError(
            str(error), "give the export stage's directory; if it is damaged, remove it and run `armd run` again"
        ) from error
