"""The attention kernels: which one is chosen, and that all of them compute the same."""

import itertools

import pytest
import torch

from armd import Order
from armd.attention import Attention, Kernel, attend, block_mask, boolean_mask, choose_kernel
from tests.memory import DeviceOnly, LargestTensor
from tests.models import tiny_model
from tests.oracle import attend_by_loop, blocks_by_loop
from tests.orders import BLOCKS, NAMES, SINGLE, generator, orders

# FlexAttention says at its first call on a CPU that it was not compiled; that is what these tests are for.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")


@pytest.mark.parametrize(
    ("one_by_one", "head_width", "device", "kernel"),
    [
        (True, 8, "cpu", "causal"),
        (True, 64, "cuda", "causal"),
        (False, 64, "cpu", "mask"),
        (False, 64, "mps", "mask"),
        (False, 64, "cuda", "flex"),
        (False, 16, "cuda", "flex"),
        (False, 48, "cuda", "flex"),
        (False, 14, "cuda", "mask"),
    ],
)
def test_kernel_by_order_width_and_device(one_by_one: bool, head_width: int, device: str, kernel: Kernel) -> None:
    """Fails when any condition of choose_kernel is left out."""
    assert choose_kernel(one_by_one=one_by_one, head_width=head_width, device=torch.device(device)) == kernel


@pytest.mark.parametrize("name", NAMES)
def test_what_kernel_answers_is_what_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when the forward pass calls choose_kernel itself, whatever `kernel` says."""
    model, order = tiny_model(), orders(9)[name]
    assert model.kernel(order, "cpu") == ("causal" if name in SINGLE else "mask")
    asked: list[torch.nn.Module] = []
    monkeypatch.setattr(type(model), "kernel", lambda *_: asked.append(model) or "mask")
    masks: list[object] = []
    monkeypatch.setattr("armd.attention.F.scaled_dot_product_attention", _recording(masks))
    with torch.no_grad():
        model(torch.zeros(2, 9, dtype=torch.int64), order)
    assert asked == [model]
    assert all(isinstance(mask, torch.Tensor) for mask in masks)
    assert len(masks) == 5  # two streams, the query stream alone, two causal layers


def test_causal_kernels_are_refused_for_larger_blocks() -> None:
    with pytest.raises(ValueError, match="one token a block, the order has 3"):
        tiny_model()(torch.zeros(1, 9, dtype=torch.int64), Order.strided(9, 3), kernel="causal")


@pytest.mark.parametrize("name", NAMES)
def test_masks_are_the_loops(name: str) -> None:
    """Fails with `<=` for `<` in boolean_mask."""
    order = orders(9)[name]
    causal = boolean_mask(order.block_ends.reshape(-1, 9))
    strict = boolean_mask(order.block_starts.reshape(-1, 9) + 1)
    n_masks = 1 if order.positions.ndim == 1 else 2
    assert causal.shape == strict.shape == (n_masks, 1, 9, 9)
    for row in range(n_masks):
        blocks = blocks_by_loop(order, row)
        for n, i in itertools.product(range(9), range(9)):
            assert bool(causal[row, 0, n, i]) == (blocks[i] <= blocks[n])
            assert bool(strict[row, 0, n, i]) == (i == 0 or blocks[i - 1] < blocks[n])  # key i is rank i - 1


@pytest.mark.parametrize("kernel", ["mask", "flex"])
@pytest.mark.parametrize("name", BLOCKS)
def test_strict_and_causal_attention_are_the_loops(name: str, kernel: Kernel) -> None:
    """One head against one softmax at a time. Fails when `strict` puts the null key behind the others."""
    order = orders(9)[name]
    attention = Attention(8, 1, null_key=True).double()
    torch.nn.init.normal_(attention.null, generator=generator())
    q, k, v = (torch.randn(2, 1, 9, 8, generator=generator(seed), dtype=torch.float64) for seed in range(3))
    build = boolean_mask if kernel == "mask" else block_mask
    causal, strict = build(order.block_ends.reshape(-1, 9)), build(order.block_starts.reshape(-1, 9) + 1)
    with torch.no_grad():
        got_causal, got_strict = attention.causal(q, k, v, causal), attention.strict(q, k, v, strict)
        for row in range(2):
            blocks = blocks_by_loop(order, row)
            up_to = [[i for i in range(9) if blocks[i] <= blocks[n]] for n in range(9)]
            null_and_earlier = [[0, *(i + 1 for i in range(9) if blocks[i] < blocks[n])] for n in range(9)]
            with_null = [torch.cat([attention.null[which, 0], rows[row, 0]]) for which, rows in enumerate((k, v))]
            expected = attend_by_loop(q[row, 0], k[row, 0], v[row, 0], up_to)
            torch.testing.assert_close(got_causal[row], expected)
            torch.testing.assert_close(got_strict[row], attend_by_loop(q[row, 0], *with_null, null_and_earlier))


@pytest.mark.parametrize("name", ["shared", "by sequence"])
def test_flex_attention_over_many_tiles(name: str, flex_backward: None) -> None:
    """More ranks than a tile: tiles that are skipped, whole and cut, forward and backward in float32.

    Fails when `block_mask` reads every sequence's limits from the first one's.
    """
    length = 300
    order = Order.strided(length, 7, prefix=20)
    if name == "by sequence":
        order = Order.stack([order, Order.strided(length, 150)])
    q, k, v = (torch.randn(2, 2, length, 16, generator=generator(seed)).requires_grad_() for seed in range(3))
    weight = torch.randn(2, 2, length, 16, generator=generator(3))
    for limits in (order.block_ends, order.block_starts + 1):
        limits_BN = limits.reshape(-1, length)
        results = []
        for mask in (boolean_mask(limits_BN), block_mask(limits_BN)):
            out = attend(q, k, v, mask)
            results.append((out, *torch.autograd.grad((out * weight).sum(), (q, k, v))))
        for dense, flex in zip(*results, strict=True):
            torch.testing.assert_close(flex, dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", BLOCKS)
def test_the_model_on_flex_attention_is_the_model_on_masks(name: str, flex_backward: None) -> None:
    """Logits and every gradient; the masked model is held against loops in test_model.py.

    Fails with `<=` for `<` in block_mask.
    """
    model, order = tiny_model(), orders(9)[name]
    tokens = torch.randint(13, (2, 9), generator=generator())
    results = []
    for kernel in ("mask", "flex"):
        logits = model(tokens, order, kernel=kernel)
        results.append((logits, *torch.autograd.grad(logits.square().sum(), list(model.parameters()))))
    for dense, flex in zip(*results, strict=True):
        torch.testing.assert_close(flex, dense, rtol=1e-6, atol=1e-6)


def test_a_shared_order_has_one_mask_for_the_batch() -> None:
    limits = orders(9)["strided 2"].block_ends
    assert boolean_mask(limits[None]).shape == (1, 1, 9, 9)
    assert block_mask(limits[None]).kv_num_blocks.shape[0] == 1


@pytest.mark.parametrize("name", BLOCKS)
def test_masks_are_built_without_waiting_for_the_device(name: str) -> None:
    """As test_model.py says of the whole pass. Fails with `torch.arange(...)` without a device in boolean_mask."""
    limits_BN = orders(9)[name].block_ends.reshape(-1, 9).to("meta")
    with DeviceOnly("meta"):
        boolean_mask(limits_BN)
        block_mask(limits_BN)


def test_one_token_a_block_makes_nothing_of_n_by_n_elements() -> None:
    """No mask and no scores, for a random permutation too. Fails with `kernel="mask"`."""
    model, length = tiny_model(max_length=1024).float(), 1024
    tokens = torch.randint(13, (1, length), generator=generator())
    with LargestTensor() as seen:
        model(tokens, Order.random(length, generator=generator())).sum().backward()
    assert seen.numel < length * length / 4


def _recording(masks: list[object]):  # type: ignore[no-untyped-def]
    attention = torch.nn.functional.scaled_dot_product_attention

    def record(*args, attn_mask=None, **kwargs):  # type: ignore[no-untyped-def]
        masks.append(attn_mask)
        return attention(*args, attn_mask=attn_mask, **kwargs)

    return record
