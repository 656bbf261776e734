"""The model against its definition by loops, in every precision and mode; its size, its start and its bad input."""

import contextlib
import math
import os
import shutil

import pytest
import torch
from torch import Tensor

from armd import ARCHITECTURES, ARMD, Order, score
from armd.attention import Kernel
from armd.config import Architecture
from armd.layers import initialise
from tests.memory import DeviceOnly
from tests.models import tiny_model
from tests.oracle import logits_by_loop
from tests.orders import NAMES, generator, orders


@pytest.mark.parametrize("n_neighbours", [0, 1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_forward_is_the_definition(name: str, n_neighbours: int) -> None:
    """Every kind of order against loops over ranks. Fails with `<=` for `<` in boolean_mask."""
    model, order = tiny_model(n_neighbours=n_neighbours), orders(9)[name]
    tokens = torch.randint(13, (2, 9), generator=generator())
    with torch.no_grad():
        logits = model(tokens, order)
        for row in range(2):
            expected = logits_by_loop(model, tokens[row].tolist(), order, row)
            torch.testing.assert_close(logits[row], expected, rtol=1e-5, atol=1e-5)


def test_the_last_two_stream_layer_computes_keys_and_values_alone_from_content() -> None:
    """Counted in rows of 9 tokens. Fails when hidden_by_rank sends it through both_streams."""
    model, rows = tiny_model(n_layers=4, n_two_stream_layers=2), {}
    for depth, layer in enumerate([*model.two_stream_layers, *model.causal_layers]):
        for name in ("attention.query", "attention.key_value", "attention.out", "mlp_in"):
            module = layer.get_submodule(name)
            module.register_forward_hook(lambda _, given, __, at=(depth, name): rows.update({at: given[0].shape[:-1]}))
    with torch.no_grad():
        model(torch.zeros(1, 9, dtype=torch.int64), Order.left_to_right(9))
    for depth in range(4):
        assert rows[depth, "attention.key_value"] == (1, 9)
        for name in ("attention.query", "attention.out", "mlp_in"):
            assert rows[depth, name] == ((2, 1, 9) if depth == 0 else (1, 9))


# Precision and modes


def results(model: ARMD, order: Order, run: torch.nn.Module | None = None, **arguments: object) -> list[Tensor]:
    """The mean loss, the logits and every gradient of `run`, the model itself or a compiled form of it."""
    tokens = torch.randint(13, (2, order.length), generator=generator())
    logits = (model if run is None else run)(tokens, order, **arguments)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return [loss.detach(), logits.detach(), *gradients]


def all_gradients(outcome: list[Tensor]) -> Tensor:
    """The gradients among `results`, as one vector."""
    return torch.cat([gradient.flatten() for gradient in outcome[2:]])


MODES = ["left to right", "by sequence", "strided 3, prefix, ragged"]


@pytest.mark.parametrize("name", MODES)
def test_bfloat16_autocast(name: str) -> None:
    """Within bfloat16's three digits; prefix aggregation, a long sum, stays in float32 all the same.

    Fails without `enabled=False` in first_streams.
    """
    model, order = tiny_model().float(), orders(32)[name]
    exact = results(model, order)
    aggregated: list[Tensor] = []
    model.query_norm.register_forward_pre_hook(lambda _, inputs: aggregated.append(inputs[0]))
    results(model, order)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = results(model, order)
    assert torch.equal(aggregated[0], aggregated[1])
    assert rounded[1].dtype == torch.bfloat16
    assert float(rounded[0]) == pytest.approx(float(exact[0]), rel=0.01)
    for a, b in ((exact[1], rounded[1]), (all_gradients(exact), all_gradients(rounded))):
        assert (a - b.float()).norm() < 0.05 * a.norm()


@pytest.mark.parametrize("name", MODES)
def test_float32_is_float64_rounded(name: str) -> None:
    model, order = tiny_model(), orders(32)[name]
    exact = results(model, order)
    for a, b in zip(exact, results(model.float(), order), strict=True):
        assert (a - b).norm() < 1e-4 * a.norm()


@pytest.mark.parametrize("kernel", [None, "flex"])
@pytest.mark.parametrize("name", MODES)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_activation_checkpointing_changes_nothing_but_memory(
    name: str, kernel: Kernel | None, flex_backward: None
) -> None:
    """Bit for bit. Fails where _run calls the layer at once: then as much is kept as before."""
    model, order = tiny_model().float(), orders(32)[name]
    kept = {}
    for model.activation_checkpointing in (False, True):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            outcome = results(model, order, kernel=kernel)
        kept[model.activation_checkpointing] = sum(sizes), outcome
    assert kept[True][0] < 0.6 * kept[False][0]
    for plain, recomputed in zip(kept[False][1], kept[True][1], strict=True):
        assert torch.equal(plain, recomputed)


def test_activation_checkpointing_costs_nothing_where_no_gradient_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    model.activation_checkpointing = True
    monkeypatch.setattr("armd.model.checkpoint", None)
    with torch.no_grad():
        model(torch.zeros(1, 9, dtype=torch.int64), Order.left_to_right(9))


@pytest.mark.parametrize(("name", "checkpointing"), [("by sequence", True), ("strided 3, prefix, ragged", False)])
def test_torch_compile_traces_the_whole_model(name: str, checkpointing: bool) -> None:
    """Forward and backward as one graph each, without a compiler. Fails with an `if` on any tensor in the pass."""
    torch._dynamo.reset()
    model, order = tiny_model(n_layers=3).float(), orders(32)[name]
    eager = results(model, order)
    model.activation_checkpointing = checkpointing
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for a, b in zip(eager, results(model, order, compiled), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile wants a C++ compiler")
def test_torch_compile_computes_the_same() -> None:
    torch._dynamo.reset()
    model, order = tiny_model(n_layers=2, n_two_stream_layers=1).float(), orders(32)["random"]
    eager = results(model, order)
    for a, b in zip(eager, results(model, order, torch.compile(model, fullgraph=True)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward_never_wait_for_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, where a tensor has no value to wait for, and with every tensor made there, not copied to it.

    Fails with `torch.arange(...)` without a device in rotary_angles or aggregate, and with `.item()` anywhere.
    """
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it knows no meta device
    model, order = tiny_model().to("meta"), orders(9)[name].to("meta")
    tokens = torch.zeros(2, 9, dtype=torch.int64, device="meta")
    with DeviceOnly("meta"):
        model(tokens, order).sum().backward()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", MODES)
def test_on_a_gpu(name: str) -> None:
    """The kernels that run there agree with the CPU's, and nothing in the second pass waits for the device."""
    model, order = tiny_model(d_model=64, n_heads=2).float(), orders(32)[name]
    assert model.kernel(order, "cuda") == ("flex" if name.startswith("strided") else "causal")
    tokens = torch.randint(13, (2, 32), generator=generator())
    expected = model(tokens, order)
    expected_gradients = torch.autograd.grad(expected.square().mean(), list(model.parameters()))
    model, tokens, order = model.cuda(), tokens.cuda(), order.to("cuda")
    model(tokens, order).square().mean().backward()  # compiles FlexAttention
    torch.cuda.set_sync_debug_mode("error")
    try:
        logits = model(tokens, order)
        gradients = torch.autograd.grad(logits.square().mean(), list(model.parameters()))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip((expected, *expected_gradients), (logits, *gradients), strict=True):
        assert (a - b.cpu()).norm() < 1e-2 * a.norm()


# Size and start


@pytest.mark.parametrize(("name", "count"), [("tiny", 7_254_400), ("small", 123_628_288), ("medium", 353_596_416)])
def test_parameter_counts_of_the_presets(name: str, count: int) -> None:
    """With GPT-2's vocabulary. The head is tied to the embedding; the layers hold 12 d^2 each.

    Fails with n_causal one larger in ARMD.__init__.
    """
    architecture = ARCHITECTURES[name]
    with torch.device("meta"):
        model = ARMD(architecture.model_config(50_257, 1024))
    d, layers = architecture.d_model, architecture.n_layers
    by_hand = 50_257 * d + 1024 * architecture.d_prefix + layers * (12 * d * d + 2 * d)
    by_hand += architecture.n_two_stream_layers * 2 * d  # null keys
    by_hand += 4 * d + 2 * architecture.n_neighbours * d  # start vector and three norms; neighbours on either side
    assert sum(parameter.numel() for parameter in model.parameters()) == count == by_hand


def test_the_presets_are_the_papers() -> None:
    small, medium = ARCHITECTURES["small"], ARCHITECTURES["medium"]
    assert (small.n_layers, small.n_two_stream_layers, small.d_model, small.n_heads) == (12, 6, 768, 12)
    assert (medium.n_layers, medium.n_two_stream_layers, medium.d_model, medium.n_heads) == (24, 12, 1024, 16)


def test_a_model_built_on_the_meta_device_starts_like_any_other() -> None:
    """Nothing is left out by `initialise`, and nothing outside the parameters needs a value."""
    config = ARCHITECTURES["tiny"].model_config(20, 16)
    with torch.device("meta"):
        model = ARMD(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not list(model.buffers())
    model = model.to_empty(device="cpu")
    initialise(model, config.n_layers, generator(5))
    for a, b in zip(model.parameters(), ARMD(config, generator=generator(5)).parameters(), strict=True):
        assert torch.equal(a, b)


def test_same_generator_same_weights() -> None:
    config = ARCHITECTURES["tiny"].model_config(20, 16)
    one, other = ARMD(config, generator=generator(5)), ARMD(config, generator=generator(5))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    initialise(other, other.config.n_layers, generator(6))
    assert not torch.equal(one.embedding.weight, other.embedding.weight)


@pytest.mark.parametrize("n_neighbours", [0, 2])
def test_initialisation_row_by_row(n_neighbours: int) -> None:
    """The table of `initialise`. Fails when any of its rows is changed in the code."""
    d, n_layers = 96, 3
    architecture = Architecture(
        n_layers=n_layers, n_two_stream_layers=2, d_model=d, n_heads=4, d_prefix=32, n_neighbours=n_neighbours
    )
    model = ARMD(architecture.model_config(200, 64), generator=generator())
    residual = 1 / math.sqrt(2 * n_layers)
    deviations = {
        "embedding.weight": 0.02,
        "start": 0.02,
        "attention.null": 0.02,
        "attention.query.weight": d**-0.5,
        "attention.key_value.weight": d**-0.5,
        "attention.out.weight": d**-0.5 * residual,
        "mlp_in.weight": d**-0.5,
        "mlp_out.weight": (4 * d) ** -0.5 * residual,
    }
    checked = 0
    for name, parameter in model.named_parameters():
        if "norm" in name:
            loud = name == "query_norm.weight" and not n_neighbours
            assert torch.equal(parameter, torch.full_like(parameter, 3.0 if loud else 1.0)), name
        elif name == "neighbour_weights":  # offsets -2, -1, 1, 2
            assert torch.equal(parameter.abs(), torch.tensor([0.0, 1.0, 1.0, 0.0])[:, None].expand_as(parameter))
            assert torch.equal(parameter[1], torch.ones(d))
            assert abs(float(parameter[2].detach().mean())) < 4 / math.sqrt(d)
        elif name == "prefix_table":
            rotation = (1 / 10_000 ** (torch.arange(0, 32, 2) / 32)) * torch.arange(64)[:, None]
            expected = torch.cat([rotation.sin(), rotation.cos()], dim=1) / 4
            torch.testing.assert_close(parameter, expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(parameter.norm(dim=1), torch.ones(64))
        else:
            wanted = next(deviations[key] for key in deviations if name == key or name.endswith("." + key))
            tolerance = 4 / math.sqrt(2 * parameter.numel())  # four standard errors
            assert float(parameter.detach().std()) == pytest.approx(wanted, rel=tolerance), name
            assert abs(float(parameter.detach().mean())) < 4 * wanted / math.sqrt(parameter.numel()), name
        checked += 1
    # Embedding, table, start; a layer's; null keys; norms; neighbours.
    assert checked == 3 + 7 * n_layers + 2 + 3 + (n_neighbours > 0)


def test_initial_loss_is_that_of_guessing() -> None:
    config = ARCHITECTURES["tiny"].model_config(100, 64)
    model = ARMD(config, generator=generator())
    tokens = torch.randint(100, (4, 64), generator=generator())
    loss = -float(score(model, tokens, Order.left_to_right(64)).mean())
    assert abs(loss - math.log(100)) < 0.3


# Bad input


@pytest.mark.parametrize(
    ("tokens", "order", "message"),
    [
        (torch.zeros(1, 5, dtype=torch.int64), Order.left_to_right(4), "4"),
        (torch.zeros(1, 40, dtype=torch.int64), Order.left_to_right(40), "max_length"),
        (torch.zeros(3, 4, dtype=torch.int64), Order.stack([Order.left_to_right(4)] * 2), "2 orders"),
        (torch.zeros(1, 4, dtype=torch.int64), Order.left_to_right(4).to("meta"), "on meta, the tokens on cpu"),
    ],
)
def test_input_that_does_not_fit_is_refused(tokens: Tensor, order: Order, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model()(tokens, order)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"n_two_stream_layers": 13}, "n_two_stream_layers must be between 1 and n_layers = 12, not 13"),
        ({"n_two_stream_layers": 0}, "n_two_stream_layers must be between 1 and n_layers = 12, not 0"),
        ({"d_model": 0}, "d_model must be at least 1, not 0"),
        ({"n_heads": -1}, "n_heads must be at least 1, not -1"),
        ({"n_heads": 7}, "d_model = 768 must be an even multiple of n_heads = 7"),
        ({"d_model": 36}, "d_model = 36 must be an even multiple of n_heads = 12"),
        ({"d_prefix": 5}, "d_prefix must be an even number of at least 2, not 5"),
        ({"n_neighbours": -1}, "n_neighbours must be at least 0, not -1"),
    ],
    ids=str,
)
def test_shapes_that_make_no_model_are_refused(shape: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Architecture(**shape)
