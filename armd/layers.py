"""What every model here is made of: the layer, and how weights start.

Pre-norm (RMSNorm), rotary embedding by position, GELU MLP of four times the width, no biases. The model (model.py) and
its baselines (autoregressive.py, masked_diffusion.py) differ in what their queries see, not in their layers.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armd.attention import Attention, Mask
from armd.config import ModelConfig
from armd.prefix import sinusoids
from armd.products import Projection


class Layer(nn.Module):
    """Attention and MLP with one set of weights for whichever stream passes through."""

    def __init__(self, config: ModelConfig, *, two_stream: bool) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.d_model, eps=1e-6)
        self.attention = Attention(config.d_model, config.n_heads, null_key=two_stream)
        self.mlp_norm = nn.RMSNorm(config.d_model, eps=1e-6)
        self.mlp_in = Projection(config.d_model, 4 * config.d_model)
        self.mlp_out = Projection(4 * config.d_model, config.d_model)

    def both_streams(self, xg: Tensor, rotary: Tensor, causal: Mask = None, strict: Mask = None) -> Tensor:
        """Content and query stream (2, B, N, D) after the layer: queries from each, keys and values from content alone.

        As one tensor the two take one product of each weight, and the weight's gradient is one product, not a sum of
        two.
        """
        attention, normed = self.attention, self.attention_norm(xg)
        k, v = attention.keys_values(normed[0], rotary)
        q_x, q_g = attention.queries(normed, rotary)
        return self.finish(xg, torch.stack([attention.causal(q_x, k, v, causal), attention.strict(q_g, k, v, strict)]))

    def query_stream(self, x: Tensor, g: Tensor, rotary: Tensor, strict: Mask = None) -> Tensor:
        """The query stream after the layer, where nobody reads content any more: of that, keys and values alone."""
        k, v = self.keys_values(x, rotary)
        return self.finish(g, self.attention.strict(self.queries(g, rotary), k, v, strict))

    def causal_stream(self, x: Tensor, rotary: Tensor, causal: Mask = None) -> Tensor:
        """The only stream after the layer, its queries, keys and values all its own."""
        attention, normed = self.attention, self.attention_norm(x)
        k, v = attention.keys_values(normed, rotary)
        return self.finish(x, attention.causal(attention.queries(normed, rotary), k, v, causal))

    def queries(self, x: Tensor, rotary: Tensor) -> Tensor:
        """Queries (B, H, N, A) of the rows of a stream."""
        return self.attention.queries(self.attention_norm(x), rotary)

    def keys_values(self, x: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, N, A) of the rows of a stream."""
        return self.attention.keys_values(self.attention_norm(x), rotary)

    def finish(self, x: Tensor, heads: Tensor) -> Tensor:
        """The rows (..., D) of a stream after the layer, from what the heads of their queries attended to (..., D)."""
        x = x + self.attention.out(heads)
        return x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))


def initialise(model: nn.Module, n_layers: int, generator: torch.Generator | None = None) -> None:
    """Draw all weights, in the order of `named_parameters`.

    | parameter                          | start                                                               |
    | ---------------------------------- | ------------------------------------------------------------------- |
    | embedding, start vector, null keys | normal, standard deviation 0.02                                     |
    | projections                        | normal, 1 / sqrt(columns in)                                        |
    | out and MLP-out projections        | that, divided by sqrt(2 n_layers): the residual stream is their sum |
    | position table                     | sines and cosines of unit norm a row                                |
    | weights of neighbours              | one on the left, signs drawn on the right, so that the sum of both  |
    |                                    | tells which is which; zero farther away than next door              |
    | norm of a query with no neighbours | three: its context says more at first than what the layers add      |
    | other norms                        | one                                                                 |
    """
    has_neighbours = getattr(model, "neighbour_weights", None) is not None
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(3.0 if name == "query_norm.weight" and not has_neighbours else 1.0)
            elif name == "neighbour_weights":  # offsets -n .. -1, 1 .. n
                right = len(parameter) // 2
                parameter.zero_()[right - 1] = 1.0
                parameter[right].bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
            elif name == "prefix_table":
                parameter.copy_(sinusoids(*parameter.shape))
            else:
                is_projection = parameter.ndim == 2 and "layers" in name
                deviation = parameter.shape[1] ** -0.5 if is_projection else 0.02
                if name.endswith(("out.weight", "mlp_out.weight")):
                    deviation /= math.sqrt(2 * n_layers)
                nn.init.normal_(parameter, std=deviation, generator=generator)
