"""Small models for tests."""

import torch

from armd import ARMD
from armd.config import Architecture


def tiny_model(
    vocab_size: int = 13,
    max_length: int = 32,
    *,
    n_layers: int = 4,
    n_two_stream_layers: int = 2,
    d_model: int = 16,
    n_heads: int = 2,
    d_prefix: int = 8,
    n_neighbours: int = 2,
    seed: int = 0,
) -> ARMD:
    """A float64 model whose weights are large enough for every part to matter in its output."""
    architecture = Architecture(
        n_layers=n_layers,
        n_two_stream_layers=n_two_stream_layers,
        d_model=d_model,
        n_heads=n_heads,
        d_prefix=d_prefix,
        n_neighbours=n_neighbours,
    )
    model = ARMD(architecture.model_config(vocab_size, max_length), generator=torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0).add_(0.2 * torch.randn(parameter.shape, generator=generator))
            elif name == "neighbour_weights":
                parameter.normal_(std=0.5, generator=generator)
            elif parameter.ndim == 2 and "layers" in name:
                parameter.mul_(1.5)
            else:
                parameter.mul_(10)
    return model.double().eval()
