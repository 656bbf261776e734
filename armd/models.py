"""The models by name: ARMD and the baselines it is compared with."""

from armd.autoregressive import AutoregressiveLM
from armd.masked_diffusion import MaskedDiffusionLM
from armd.model import ARMD

Model = ARMD | AutoregressiveLM | MaskedDiffusionLM

MODELS: dict[str, type[ARMD] | type[AutoregressiveLM] | type[MaskedDiffusionLM]] = {
    "armd": ARMD,
    "autoregressive": AutoregressiveLM,
    "masked_diffusion": MaskedDiffusionLM,
}
"""Names as a training configuration and a saved model's config.json have them."""


def name_of(model: Model) -> str:
    """The name in `MODELS` of a model's kind.

    Raises:
        ValueError: it is none of them, such as a compiled model, whose original is meant.
    """
    for name, kind in MODELS.items():
        if type(model) is kind:
            return name
    raise ValueError(f"a model must be one of {', '.join(MODELS)}, not {type(model).__name__}")
