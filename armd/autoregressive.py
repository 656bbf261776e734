"""The autoregressive baseline: a plain causal transformer of the same layers, with a key/value cache.

Token n is predicted from a learned start vector and tokens 1 .. n-1, left to right. Layers, widths, initialisation and
the tied head are ARMD's, so a comparison is between the ways of predicting and of nothing else.

Shapes: B sequences, N tokens, R rows of a text in a step, M rows of all, H heads, A head width, D model width, V words.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armd.attention import rotary_angles
from armd.cached_layer import CachedLayer, RowNorm, rotary_rows
from armd.config import ModelConfig
from armd.layers import Layer, initialise
from armd.products import product
from armd.rows import Seen
from armd.sampling import SamplingParams, distribution, draw, parts


class AutoregressiveLM(nn.Module):
    """The baseline; `n_two_stream_layers`, `d_prefix` and `n_neighbours` of the configuration mean nothing to it."""

    def __init__(self, config: ModelConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.start = nn.Parameter(torch.empty(config.d_model))
        self.input_norm = nn.RMSNorm(config.d_model, eps=1e-6)
        self.layers: Sequence[Layer] = nn.ModuleList(  # type: ignore[assignment]
            Layer(config, two_stream=False) for _ in range(config.n_layers)
        )
        self.final_norm = nn.RMSNorm(config.d_model, eps=1e-6)
        initialise(self, config.n_layers, generator)

    def forward(self, tokens_BN: Tensor) -> Tensor:
        """Logits (B, N, V): [b, n] predicts token n from the tokens before it."""
        return self.head(self._hidden(tokens_BN))

    def nats(self, tokens_BN: Tensor, drawn: None = None) -> tuple[Tensor, int]:
        """(sum of negative log-likelihoods in nats, number of tokens); exact, and nothing is drawn for it."""
        logits_BNV = self(tokens_BN)
        total = F.cross_entropy(logits_BNV.flatten(0, 1).float(), tokens_BN.flatten(), reduction="sum")
        return total, tokens_BN.numel()

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[list[int]]:
        """At most `params.max_tokens` tokens after each prompt, one a step and text; a stop token is not returned.

        Each text has a generator of its own. Where prompts differ in length, short ones are continued while long ones
        are still read, so that all texts stand at the same position. `params.n_streams` means nothing here.

        Raises:
            ValueError: a prompt and its continuation are longer than the model's max_length, or `params` asks for what
                only an engine does.
        """
        params.check_plain()
        known = [len(prompt) for prompt in prompts]
        ends = [n + params.max_tokens for n in known]
        longest = max(ends, default=0)
        if longest > self.config.max_length:
            raise ValueError(f"{longest} tokens are more than the model's max_length of {self.config.max_length}")
        texts = [list(prompt) for prompt in prompts]
        generators = [params.generator() for _ in prompts]
        decoder = _Decoder(self, len(prompts), longest)
        rows = [text[: min(known)] for text in texts]
        for place in range(min(known, default=0), longest):
            logits_BV = decoder.step(rows)
            writing = [b for b, text in enumerate(texts) if len(text) == place < ends[b]]
            if writing:
                logits_MV = logits_BV if len(writing) == len(texts) else logits_BV[writing]
                numbers = [torch.rand(1, dtype=torch.float64, generator=generators[b]) for b in writing]
                uniform_M = torch.cat(numbers).to(logits_MV.device)
                drawn = [draw(distribution(logits_MV[part], params), uniform_M[part]) for part in parts(logits_MV)]
                for b, token in zip(writing, torch.cat(drawn).tolist(), strict=True):
                    if (
                        token not in params.stop_ids
                    ):  # a text without its stop token falls behind and is written no more
                        texts[b].append(token)
            if not any(place < len(text) < end for text, end in zip(texts, ends, strict=True)):
                break
            rows = [text[place : place + 1] or [0] for text in texts]
        return [text[n:] for text, n in zip(texts, known, strict=True)]

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of normalised hidden rows (..., D)."""
        return product(hidden, self.embedding.weight)

    def _hidden(self, tokens_BN: Tensor) -> Tensor:
        """The last layer's output (B, N, D), normalised: row n has seen tokens 1 .. n-1."""
        x = self._inputs(tokens_BN[:, :-1])
        positions_1N = torch.arange(x.shape[1], device=x.device)[None]
        rotary = rotary_angles(positions_1N, self.config.d_model // self.config.n_heads)[:, None]
        for layer in self.layers:
            x = layer.causal_stream(x, rotary)
        return self.final_norm(x)

    def _inputs(self, tokens_BN: Tensor) -> Tensor:
        """(B, 1 + N, D): the start vector, then the embeddings, normalised."""
        start_B1D = self.start.expand(len(tokens_BN), 1, -1)
        return self.input_norm(torch.cat([start_B1D, self.embedding(tokens_BN)], dim=1))


class _Decoder:
    """What `generate` keeps of its texts, and the step that advances all of them.

    Its layers are those that ARMD decodes with, its storage is claimed once, so that a comparison is fair.
    """

    def __init__(self, model: AutoregressiveLM, n_texts: int, length: int) -> None:
        config = model.config
        head_width = config.d_model // config.n_heads
        storage = model.start.new_empty(config.n_layers, 2, n_texts, length, config.n_heads, head_width)
        self._model = model
        self._layers = [*map(CachedLayer, model.layers, storage)]
        self._input_norm = RowNorm(model.input_norm)
        self._rotary = rotary_rows(torch.arange(length, device=storage.device), head_width)
        self._first_places_B = torch.arange(n_texts, device=storage.device) * length
        self._n_cached = 0

    def step(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Append each text's next tokens, as many of one as of another; logits (B, V) of what follows them.

        The first step has the start vector in front.
        """
        model = self._model
        x_BRD = F.embedding(torch.tensor(rows, dtype=torch.long, device=model.start.device), model.embedding.weight)
        if not self._n_cached:
            x_BRD = torch.cat([model.start.expand(len(rows), 1, -1), x_BRD], dim=1)
        n_texts, n_rows, _ = x_BRD.shape
        start, end = self._n_cached, self._n_cached + n_rows
        self._n_cached = end
        places_M = (self._first_places_B[:, None] + torch.arange(start, end, device=x_BRD.device)).flatten()
        rotary_M = self._rotary[start:end].repeat(2 * n_texts, 1, 1, 1)
        mask = None
        if n_rows > 1:
            mask = x_BRD.new_full((n_rows, end), -torch.inf).triu_(1 + start)
        runs = [(slice(0, n_texts), slice(0, n_texts * n_rows), Seen(slice(0, end), mask))]
        x_MD = self._input_norm(x_BRD.flatten(0, 1))
        for layer in self._layers:
            normed_MD = layer.normed(x_MD)
            q_MHA = layer.project(normed_MD, normed_MD, rotary_M, places_M)
            x_MD = layer.finish(x_MD, layer.attend(q_MHA, runs))
        return product(model.final_norm(x_MD[n_rows - 1 :: n_rows]), model.embedding.weight)
