"""From the public functions of k-sparse codes down to the kernels of a GPU, with these emulated."""

from __future__ import annotations

import pytest
import torch
from emulated_gpu import Gpu
from gossamer import _C, topk_decode, topk_encode
from gossamer.ops import topk, topk_encoder, topk_gradient
from test_topk import CASES, check_all, check_autoencoder

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CUDA = (topk._decode_cuda, topk_gradient._values_cuda, topk_gradient._weight_cuda)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_plain_torch(gpu: Gpu, dtype: torch.dtype) -> None:
    for case in CASES:
        check_all(case, dtype, CUDA)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_encode_is_topk_of_the_dense_layer(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Several products of a few tokens, too, and codes that are longer than the kernel has room."""
    monkeypatch.setattr(topk_encoder, "DENSE_BYTES", 7000)
    x, weight, bias = (torch.randn(s).to(dtype) for s in ((9, 12), (1100, 12), (1100,)))
    dense = torch.nn.functional.linear(x, weight, bias)
    for k in (1, 33, 1024, 1100):
        values, indices = topk_encode(x, weight, bias, k=k)
        wanted, order = dense.sort(dim=-1, descending=True, stable=True)
        if dtype == torch.float32:  # the order of a product's sums is torch's
            assert torch.equal(indices, order[:, :k])
        torch.testing.assert_close(values, wanted[:, :k].relu())
    empty, _ = topk_encode(x[:0], weight, bias, k=3)
    assert empty.shape == (0, 3)


def test_strides_and_float64(gpu: Gpu) -> None:
    for dtype in (*DTYPES, torch.float64):
        values, indices, weight, bias = CASES[5].operands(dtype)
        y = topk_decode(values, indices, weight, bias)
        for w in (weight.t().contiguous().t(), weight.repeat(1, 2)[:, : weight.shape[1]]):
            again = topk_decode(values.t().contiguous().t(), indices.repeat(1, 2)[:, :12], w, bias)
            torch.testing.assert_close(again, y, rtol=0, atol=0)


def test_an_index_outside_gives_nan(gpu: Gpu) -> None:
    values, indices, weight, _ = CASES[5].operands(torch.float32)
    values, weight = values.requires_grad_(), weight.requires_grad_()
    wild = indices.clone()
    wild[3, 2], wild[5, 1] = -1, 2**40
    y = topk_decode(values, wild, weight)
    inside = torch.ones(len(y), dtype=torch.bool)
    inside[[3, 5]] = False
    assert y[~inside].isnan().all()
    torch.testing.assert_close(y[inside], topk_decode(values, indices, weight)[inside])
    # What has no row adds to none.
    dv, dw = torch.autograd.grad(y, (values, weight), torch.ones_like(y))
    assert dv[3, 2].isnan()
    assert int(dv.isnan().sum()) == 2
    kept = values.detach().clone()
    kept[3, 2] = kept[5, 1] = 0
    torch.testing.assert_close(
        dw, torch.ops.gossamer.topk_weight(kept, indices, torch.ones_like(y), len(weight))
    )


def test_autoencoder_is_the_dense_one(gpu: Gpu) -> None:
    check_autoencoder()


def test_what_the_border_refuses(gpu: Gpu) -> None:
    values, indices, weight, bias = CASES[5].operands(torch.float32)
    y = torch.empty(len(values), weight.shape[1])
    given = (y, values, indices, weight, bias)
    _C.topk_decode_cuda(*given)
    for at, other, error, text in (
        (3, weight.double(), TypeError, "float64, a GPU has kernels of its own"),
        (3, weight[:0], ValueError, "into no rows"),
        (3, weight[:, ::2], ValueError, "columns must be contiguous"),
        (2, indices.float(), TypeError, "indices are float32"),
        (1, values.half(), TypeError, "values is float16"),
        (0, y[1:], ValueError, r"out has shape \[64, 129\], expected \[65, 129\]"),
        (4, bias[1:], ValueError, "bias has shape"),
    ):
        with pytest.raises(error, match=text):
            _C.topk_decode_cuda(*given[:at], other, *given[at + 1 :])
    order, begins = torch.zeros(values.numel(), dtype=torch.int64), torch.zeros(91).long()
    with pytest.raises(ValueError, match=r"begins has shape \[90\], expected \[91\]"):
        _C.topk_weight_cuda(weight, values, indices, y, begins[1:], order)
    with pytest.raises(ValueError, match="k is 12, a GPU's kernel selects 1 to 9 of 9"):
        _C.topk_select_cuda(values, indices, values.new_empty(65, 9), True)
    gpu.describe(capability=75)
    with pytest.raises(ValueError, match=r"compute capability 7\.5, the kernels need 8\.0"):
        _C.topk_decode_cuda(*given)
