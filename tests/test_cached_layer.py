"""A layer over rows; that all of it is the layer of the parallel pass, test_decoder.py holds."""

import pytest
import torch

from armd.cached_layer import RowNorm
from tests.orders import generator


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [0.0, 1e-4, 1.0, 1e4])
def test_the_norm_of_rows_is_the_norm(size: float, dtype: torch.dtype) -> None:
    """Rows of 1e-4 fail without eps, or with that of another width."""
    norm = torch.nn.RMSNorm(48, eps=1e-6, dtype=dtype)
    torch.nn.init.normal_(norm.weight, generator=generator())
    rows = size * torch.randn(3, 48, generator=generator(1)).to(dtype)
    with torch.no_grad():
        torch.testing.assert_close(RowNorm(norm)(rows), norm(rows))
