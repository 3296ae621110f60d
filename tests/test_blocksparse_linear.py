"""blocksparse_linear against the dense product on the same weights: targets, dtypes, shapes."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, SHAPES, SumOracle
from conv_cases import BLOCKS, block_sparse
from gossamer import Block, blocksparse_linear, reference
from gossamer.formats import BlockSparse
from torch import Tensor

# Those whose products the serial kernel forms in no time.
SMALL = [shape for shape in SHAPES if shape[0] * shape[1] * shape[2] < 500_000]


def oracle(x: Tensor, weight: BlockSparse, bias: Tensor | None = None) -> SumOracle:
    dense, x = weight.to_dense().detach().double(), x.detach().double()
    y, size = x @ dense.t(), x.abs() @ dense.abs().t()
    if bias is not None:
        y, size = y + bias.double(), size + bias.double().abs()
    return SumOracle(y, size, dense.shape[1], weight.dtype)


@pytest.mark.parametrize("shape", SMALL, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_dense(
    blocksparse_target: str, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    m, n, k = shape
    x, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
    for block in (*BLOCKS, Block(64, 64)):
        weight = block_sparse((n, k), block, dtype=dtype)
        oracle(x, weight, bias).check(blocksparse_linear(x, weight, bias))
    oracle(x, weight).check(blocksparse_linear(x, weight))


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_no_block_and_all_of_them(blocksparse_target: str, density: float) -> None:
    weight, x, bias = block_sparse((9, 13), Block(4, 4), density), torch.randn(5, 13), torch.ones(9)
    assert weight.density == density
    oracle(x, weight, bias).check(blocksparse_linear(x, weight, bias))


def test_reference_is_the_dense_product() -> None:
    weight, bias = block_sparse((9, 13), Block(4, 4), dtype=torch.float64), torch.randn(9).double()
    x = torch.randn(2, 3, 13).double()
    y = reference.blocksparse_linear(x, weight, bias, "silu")
    dense = torch.nn.functional.linear(x, weight.to_dense(), bias)
    torch.testing.assert_close(y, torch.nn.functional.silu(dense))


@pytest.mark.parametrize("leading", [(), (0,), (1,), (2, 0), (2, 3), (2, 1, 3, 1, 2, 1, 2, 1)])
def test_any_leading_shape(leading: tuple[int, ...]) -> None:
    weight, x = block_sparse((7, 10), Block(2, 4)), torch.randn(*leading, 10)
    y = blocksparse_linear(x, weight)
    assert y.is_contiguous()
    torch.testing.assert_close(y, x @ weight.to_dense().t())


def test_any_strides() -> None:
    weight = block_sparse((7, 10), Block(2, 4))
    for x in (
        torch.randn(10, 5).t(),
        torch.randn(5, 20)[:, ::2],
        torch.randn(1, 10).expand(5, 10),
        torch.randn(3, 5, 10).transpose(0, 1),
        torch._neg_view(torch.randn(5, 10)),
    ):
        torch.testing.assert_close(blocksparse_linear(x, weight), x @ weight.to_dense().t())


WEIGHT = block_sparse((6, 12), Block(2, 4))
CONV = block_sparse((6, 12, 1), Block(2, 4))
ERRORS = {
    "0-d x": (ValueError, "0-d", lambda: blocksparse_linear(torch.tensor(1.0), WEIGHT)),
    "features": (
        ValueError,
        "x has 11 features, the weight expects 12",
        lambda: blocksparse_linear(torch.ones(3, 11), WEIGHT),
    ),
    "dtype of x": (
        TypeError,
        "bfloat16.*float32",
        lambda: blocksparse_linear(torch.ones(3, 12).bfloat16(), WEIGHT),
    ),
    "length of bias": (
        ValueError,
        r"\[5\].*\[6\]",
        lambda: blocksparse_linear(torch.ones(3, 12), WEIGHT, torch.ones(5)),
    ),
    "dense weight": (
        TypeError,
        "Tensor.*from_dense",
        lambda: blocksparse_linear(torch.ones(3, 12), WEIGHT.to_dense()),
    ),
    "a convolution's weight": (
        ValueError,
        r"\[6, 12, 1\].*blocksparse_conv",
        lambda: blocksparse_linear(torch.ones(3, 12), CONV),
    ),
    "device of x": (
        ValueError,
        "meta.*cpu",
        lambda: blocksparse_linear(torch.ones(3, 12, device="meta"), WEIGHT),
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_mistakes_are_errors_with_values(case: str) -> None:
    error, text, mistake = ERRORS[case]
    with pytest.raises(error, match=text):
        mistake()
