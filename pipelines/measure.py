"""The measurements of a comparison: one exported model of any kind, on held-out windows, under every order.

The cost of writing in parallel has two parts (section 6.1 of the specification). The order gap is what the strided
order costs with one token a block, against left to right; the independence gap is what its blocks cost on top of that.
A stream that begins without left context costs c nats, so that S streams in a text of N tokens cost c (S - 1) / N nats
a token: `cost_of_a_stream` is c. `by_place` shows where in a stream it is paid, and what is bought back.

Shapes: B sequences, N tokens, S streams, K draws.
"""

import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines import held_out, runtime, storage
from pipelines.manifest import read_manifest, write_manifest
from pipelines.model_folder import local_model
from pipelines.progress import Progress, silent

if TYPE_CHECKING:
    from torch import Tensor

    from armd import ARMD, AutoregressiveLM, MaskedDiffusionLM

NAME = "measure.json"


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """What is measured on each exported model of a comparison.

    Raises:
        ValueError: naming the field and the value that does not fit.
    """

    streams: tuple[int, ...] = (2, 4, 8, 16)
    """Numbers of streams to score with, besides left to right; those beyond half the length are left out."""
    max_windows: int = 256
    """Held-out windows scored, at most, spread evenly over the split."""
    random_windows: int = 128
    """Of those, the first that are scored in random orders."""
    random_orders: int = 8
    """Random orders of each window, for the bounds over orders."""
    noise_draws: int = 16
    """Draws of noise for each window, for masked diffusion's ELBO."""
    batch_size: int = 32
    """Windows scored at once."""
    seed: int = 0
    """Seeds the random orders and the noise."""

    def __post_init__(self) -> None:
        for name in ("max_windows", "random_windows", "random_orders", "noise_draws", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not self.streams or min(self.streams) < 2:
            raise ValueError(f"streams must be numbers of at least 2, not {self.streams}")


def run(
    config: MeasureConfig, inputs: Mapping[str, str], output_dir: str, progress: Progress = silent
) -> dict[str, Any]:
    """Measure the model of `inputs["export"]` on the validation split of `inputs["corpus"]`.

    Returns:
        The manifest: the kind of model, the windows, and as far as the kind has them left_to_right, streams,
        random_orders and elbo, in nats a token; measure.json holds the same.

    Raises:
        UserError: an input is unfinished or damaged, or holds no held-out window.
    """
    started = time.time()
    storage.make_dir(output_dir)
    inputs = {name: inputs[name] for name in ("corpus", "export")}
    body = runtime.near_a_gpu(measure, config, inputs, progress=progress)
    storage.write_json(storage.join(output_dir, NAME), body)
    return write_manifest(output_dir, "measure", body, started)


def measure(config: MeasureConfig, inputs: Mapping[str, str], progress: Progress = silent) -> dict[str, Any]:
    """The measurement itself, in this process and on its best device."""
    import torch

    from armd.masked_diffusion import MaskedDiffusionLM
    from armd.model import ARMD
    from armd.models import name_of
    from armd.weights import load_any

    device = "cuda" if torch.cuda.is_available() else "cpu"
    exported = read_manifest(inputs["export"])
    with tempfile.TemporaryDirectory(prefix="armd-") as cache, local_model(inputs["export"]) as folder:
        model, tokenizer = load_any(folder, device=device)
        held_out.check_tokenizer(inputs["corpus"], tokenizer, inputs["export"])
        windows = torch.from_numpy(held_out.windows(inputs["corpus"], config.max_windows, cache, spread=True)).to(
            device
        )
        scorer = _Scorer(config, windows, progress)
        if isinstance(model, ARMD):
            found = scorer.armd(model)
        elif isinstance(model, MaskedDiffusionLM):
            found = scorer.masked_diffusion(model)
        else:
            found = scorer.autoregressive(model)
    return {
        "model": name_of(model),
        "parameters": exported["parameters"],
        "windows": len(windows),
        "window_tokens": windows.shape[1],
        **found,
    }


class _Scorer:
    """Scores the windows in batches and counts them for the progress line."""

    def __init__(self, config: MeasureConfig, windows_BN: "Tensor", progress: Progress) -> None:
        self._config = config
        self._windows = windows_BN
        self._progress = progress
        self._done = 0

    def armd(self, model: "ARMD") -> dict[str, Any]:
        """Left to right, strided in blocks and one by one, and in random orders."""
        import armd

        length = self._windows.shape[1]
        plain_N = self._mean_by_position(model, armd.Order.left_to_right(length))
        streams = {}
        for n_streams in self._config.streams:
            if n_streams > length // 2:
                continue
            blocks = armd.Order.strided(length, n_streams)
            one_by_one_N = self._mean_by_position(model, armd.Order.given(blocks.positions))
            parallel = -self._mean_by_position(model, blocks).mean().item()
            cost_N = plain_N - one_by_one_N
            order_gap = cost_N.mean().item()
            streams[str(n_streams)] = {
                "nats_per_token": parallel,
                "one_by_one": -one_by_one_N.mean().item(),
                "order_gap": order_gap,
                "independence_gap": parallel + one_by_one_N.mean().item(),
                "cost_of_a_stream": order_gap * length / (n_streams - 1),
                "by_place": by_place(cost_N, n_streams).tolist(),
            }
        return {
            "left_to_right": -plain_N.mean().item(),
            "streams": streams,
            "random_orders": self._random_orders(model),
        }

    def autoregressive(self, model: "AutoregressiveLM") -> dict[str, Any]:
        """Left to right, the only order there is."""
        return {"left_to_right": self._mean_nats(model, lambda first, batch: None, draws=1)}

    def masked_diffusion(self, model: "MaskedDiffusionLM") -> dict[str, Any]:
        """The negative ELBO, the mean of many draws of noise."""
        from armd.masked_diffusion import Noise

        n_rows, length = self._windows.shape
        draws = self._config.noise_draws

        def noise(draw: int, rows: range) -> Noise:
            return Noise.of_rows(rows, n_rows, length, "measure", self._config.seed, draw)

        return {"elbo": self._mean_nats(model, noise, draws), "noise_draws": draws}

    def _mean_by_position(self, model: "ARMD", order: Any) -> "Tensor":
        """(N,) float64: mean log-likelihood of the token at each position."""
        import armd

        total = sum(armd.score(model, batch, order).double().sum(dim=0) for _, batch in self._batches("windows"))
        return total / len(self._windows)  # type: ignore[return-value]

    def _mean_nats(self, model: Any, drawn: Any, draws: int) -> float:
        import torch

        from armd.objective import nats

        total = 0.0
        for draw in range(draws):
            for rows, batch in self._batches("windows"):
                with torch.no_grad():
                    total += float(nats(model, batch, drawn(draw, rows))[0])
        return total / (draws * self._windows.numel())

    def _random_orders(self, model: "ARMD") -> dict[str, Any]:
        """The two bounds over uniformly drawn orders, in nats a token."""
        import armd

        config = self._config
        windows = min(config.random_windows, len(self._windows))
        totals: defaultdict[str, float] = defaultdict(float)
        for rows, batch in self._batches("windows in random orders", windows):
            logp_BK = armd.score_random_orders(
                model, batch, config.random_orders, seed=config.seed, first_row=rows.start
            )
            totals["mean"] -= logp_BK.mean(dim=1).sum().item()
            totals["weighted"] -= armd.importance_weighted(logp_BK).sum().item()
        n_tokens = windows * self._windows.shape[1]
        return {
            **{name: nats / n_tokens for name, nats in totals.items()},
            "orders": config.random_orders,
            "windows": windows,
        }

    def _batches(self, unit: str, n_windows: int | None = None) -> Iterator[tuple[range, "Tensor"]]:
        """(rows, (B, N) tokens) of each batch."""
        n_windows = len(self._windows) if n_windows is None else n_windows
        for first in range(0, n_windows, self._config.batch_size):
            rows = range(first, min(n_windows, first + self._config.batch_size))
            yield rows, self._windows[rows.start : rows.stop]
            self._done += len(rows)
            self._progress.update(self._done, None, unit)


def by_place(cost_N: "Tensor", n_streams: int) -> "Tensor":
    """(N // S,) from (N,) nats by position: what tokens cost at each place in a stream, mean over all but the first.

    The first stream has its left context, so it pays nothing; where the streams differ in length, the places that not
    all of them have are left out.
    """
    import torch

    short, longer = divmod(len(cost_N), n_streams)
    starts = [stream * short + min(stream, longer) for stream in range(1, n_streams)]
    return torch.stack([cost_N[start : start + short] for start in starts]).mean(dim=0)
