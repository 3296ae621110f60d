"""Products of 16-bit numbers on a CPU for which torch has loops alone: they go through float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gossamer
import pytest
import torch
import torch.nn.functional as F
from gossamer import _wide
from gossamer.ops import conv_operands
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = {"mm", "addmm", "matmul", "convolution", "convolution_backward"}
DTYPES = [torch.bfloat16, torch.float16]


class Narrow(TorchDispatchMode):
    """Lists torch's products of 16-bit numbers, of which ``see`` shows those in kernels of ops."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (name := func.__name__.split(".")[0]) in PRODUCTS and args[0].dtype.itemsize == 2:
            self.found.append(name)
        return func(*args, **(kwargs or {}))

    def see(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def seen(*args: Any, **kwargs: Any) -> Any:
            if args[0].dtype.itemsize == 2:
                self.found.append(function.__name__)
            return function(*args, **kwargs)

        return seen


@pytest.fixture(params=[True, False], ids=["loops", "oneDNN"])
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(_wide, "_LOOPS", frozenset(DTYPES if request.param else ()))
    return bool(request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("a", [(32, 24), (2, 16, 24), (24,), (0, 24), (32, 0)], ids=str)
def test_product(a: tuple[int, ...], dtype: torch.dtype, loops: bool) -> None:
    left, right = torch.randn(a).to(dtype), torch.randn(a[-1], 8).to(dtype)
    with Narrow() as narrow:
        y = _wide.matmul(left, right)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), left.double() @ right.double(), rtol=0.01, atol=0.05)
    assert bool(narrow.found) != loops or 0 in a


def test_few_rows_times_a_transposed_matrix_are_dot_products(loops: bool) -> None:
    a, b = torch.randn(15, 24).bfloat16(), torch.randn(8, 24).bfloat16()
    with Narrow() as narrow:
        _wide.matmul(a, b.t())
    assert narrow.found
    with Narrow() as narrow:
        _wide.matmul(a, b.t().contiguous())
    assert bool(narrow.found) != loops
    c = torch.randn(4, 15, 24).bfloat16()  # 60 rows
    with Narrow() as narrow:
        _wide.matmul(c, b.t())
    assert bool(narrow.found) != loops


@pytest.mark.parametrize("right", [(24, 8), (24, 24), (3, 24, 8), (24, 0), (0, 8)], ids=str)
def test_product_in_pieces(right: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    left = torch.randn(*right[:-2], 5, right[-2]).bfloat16()
    b = torch.randn(right).bfloat16()
    for bytes_of_piece in (1, 24 * 4 * 3, 24 * 4 * 8):
        monkeypatch.setattr(_wide, "_PIECE_BYTES", bytes_of_piece)
        for each in (b, b.mT.contiguous().mT):
            y = _wide.wide_matmul(left, each)
            assert y.dtype == torch.float32
            assert y.is_contiguous()
            torch.testing.assert_close(y, left.float() @ b.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_is_rounded_once_through_float32(dtype: torch.dtype, loops: bool) -> None:
    x, weight, bias = (torch.randn(s).to(dtype) for s in ((40, 24), (8, 24), (8,)))
    y = _wide.linear(x, weight, bias, F.gelu)
    exact = F.gelu(F.linear(x.double(), weight.double(), bias.double()))
    assert y.dtype == dtype
    tolerance = torch.finfo(dtype).eps / (2 if loops else 0.25)
    torch.testing.assert_close(y.double(), exact, rtol=1.01 * tolerance, atol=tolerance / 4)
    without = _wide.linear(x, weight, None, None).double()
    torch.testing.assert_close(without, F.linear(x.double(), weight.double()), rtol=0.02, atol=0.02)


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
    fired = x + ((x > 0).to(x.dtype) - x).detach()
    return gossamer.spike_linear(fired, weight), [weight]


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
        monkeypatch.setattr(_wide, "_LOOPS", frozenset(DTYPES if loops else ()))
        torch.manual_seed(0)
        x = torch.randn(25, 32).to(dtype).requires_grad_()
        narrow = Narrow()
        with monkeypatch.context() as patch, narrow:
            for name in ("mm", "addmm"):
                patch.setattr(torch, name, narrow.see(getattr(torch, name)))
            patch.setitem(conv_operands._CONVS, 4, narrow.see(F.conv2d))
            y, parameters = run(x)
            y.backward(torch.randn_like(y))
        # torch's gradients of float16 convolutions are float32's anyway.
        narrow_otherwise = (run, dtype) != (conv_of_blocks, torch.float16)
        assert bool(narrow.found) == (narrow_otherwise and not loops)
        results.append([y, x.grad, *(p.grad for p in parameters)])
    for by_onednn, by_float32 in zip(*results, strict=True):
        if by_onednn is None:
            assert by_float32 is None
        else:
            torch.testing.assert_close(by_float32, by_onednn, rtol=0.05, atol=0.05)
