"""Products of 16-bit numbers on a CPU for which torch has loops alone: they go through float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gossamer
import pytest
import torch
from gossamer import _wide
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = {"mm", "addmm", "bmm", "matmul", "convolution", "convolution_backward"}
DTYPES = [torch.bfloat16, torch.float16]


class Narrow(TorchDispatchMode):
    """Lists torch's products of 16-bit numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if name in PRODUCTS and args[0].dtype.itemsize == 2:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=[True, False], ids=["loops", "oneDNN"])
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(_wide, "_by_onednn", lambda dtype: not request.param)
    return bool(request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("a", [(32, 24), (2, 16, 24), (24,), (0, 24), (32, 0)], ids=str)
def test_product(a: tuple[int, ...], dtype: torch.dtype, loops: bool) -> None:
    left, right = torch.randn(a).to(dtype), torch.randn(a[-1], 8).to(dtype)
    with Narrow() as narrow:
        y = _wide.matmul(left, right)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), left.double() @ right.double(), rtol=0.01, atol=0.05)
    if loops:
        assert not narrow.found


def test_few_rows_times_a_transposed_matrix_are_dot_products(loops: bool) -> None:
    a, b = torch.randn(15, 24).bfloat16(), torch.randn(8, 24).bfloat16()
    with Narrow() as narrow:
        _wide.matmul(a, b.t())
    assert narrow.found == ["mm"]
    with Narrow() as narrow:
        _wide.matmul(a, b.t().contiguous())
    assert narrow.found == ([] if loops else ["mm"])


def linear_24(x: Tensor) -> tuple[Tensor, list[Tensor]]:
    made = gossamer.nn.SparseLinear.from_dense(nn.Linear(32, 48), "2:4", prune="magnitude")
    layer = made.to(x.dtype)
    return layer(x), list(layer.parameters())


def conv_24(x: Tensor) -> tuple[Tensor, list[Tensor]]:
    made = gossamer.nn.SparseConv2d.from_dense(
        nn.Conv2d(32, 24, 3, padding=1), "2:4", prune="magnitude"
    )
    layer = made.to(x.dtype)
    return layer(x.t().reshape(1, 32, 5, 5)), list(layer.parameters())


def conv_of_blocks(x: Tensor) -> tuple[Tensor, list[Tensor]]:
    made = gossamer.nn.SparseConv2d.from_dense(
        nn.Conv2d(32, 24, 3, padding=1), gossamer.Block(4, 4), prune="magnitude", density=0.5
    )
    layer = made.to(x.dtype)
    return layer(x.t().reshape(1, 32, 5, 5)), list(layer.parameters())


def masked_conv(x: Tensor) -> tuple[Tensor, list[Tensor]]:
    layer = gossamer.nn.PositionMaskedConv2d(32, 24, 3, padding=1).to(x.dtype)
    layer.set_mask(torch.arange(25).view(5, 5) > 0)  # too few to skip: the product is dense
    return layer(x.t().reshape(1, 32, 5, 5)), list(layer.parameters())


def zeros_of_x(x: Tensor) -> tuple[Tensor, list[Tensor]]:
    weight = (torch.randn(32, 24) / 5).to(x.dtype).requires_grad_()
    return gossamer.actsparse_linear(x, weight), [weight]


def spikes(x: Tensor) -> tuple[Tensor, list[Tensor]]:
    weight = (torch.randn(32, 24) / 5).to(x.dtype).requires_grad_()
    return gossamer.spike_linear((x > 0).to(x.dtype), weight), [weight]


def experts(x: Tensor) -> tuple[Tensor, list[Tensor]]:
    weights = (torch.randn(2, 24, 32) / 5).to(x.dtype).requires_grad_()
    return gossamer.grouped_linear(x, weights, torch.tensor([9, 25])), [weights]


def codes(x: Tensor) -> tuple[Tensor, list[Tensor]]:
    weight = (torch.randn(40, 32) / 5).to(x.dtype).requires_grad_()
    return gossamer.topk_encode(x, weight, k=3)[0], [weight]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "run",
    [linear_24, conv_24, conv_of_blocks, masked_conv, zeros_of_x, spikes, experts, codes],
    ids=lambda run: run.__name__,
)
def test_operations(
    run: Callable[[Tensor], tuple[Tensor, list[Tensor]]],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same results as by oneDNN, to rounding, without a product of 16-bit numbers by torch."""
    results = []
    for loops in (False, True):
        monkeypatch.setattr(_wide, "_by_onednn", lambda dtype, loops=loops: not loops)
        torch.manual_seed(0)
        x = torch.randn(25, 32).to(dtype).requires_grad_()
        with Narrow() as narrow:
            y, parameters = run(x)
            y.backward(torch.randn_like(y))
        if loops:
            assert not narrow.found
        results.append([y, x.grad, *(p.grad for p in parameters)])
    for by_onednn, by_float32 in zip(*results, strict=True):
        if by_onednn is None:
            assert by_float32 is None
        else:
            torch.testing.assert_close(by_float32, by_onednn, rtol=0.05, atol=0.05)
