"""blocksparse_conv against torch's dense convolution on the same weights, on every target."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, SumOracle, integers
from conv_cases import CASES, CONVS, LAST, ConvCase, block_sparse, typical
from gossamer import Block, blocksparse_conv, blocksparse_linear, reference
from gossamer.formats import BlockSparse
from torch import Tensor

# torch says that 'same' with an even kernel copies x.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


def call(case: ConvCase, x: Tensor, weight: BlockSparse, bias: Tensor | None) -> Tensor:
    return blocksparse_conv(x, weight, bias, **case.geometry)


@pytest.mark.parametrize("case", CASES, ids=map(str, range(len(CASES))))
def test_matches_dense(blocksparse_target: str, case: ConvCase) -> None:
    weight, x = case.weight(), case.x()
    bias = torch.randn(case.shape[0]).to(case.dtype) if case.bias else None
    y = call(case, x, weight, bias)
    case.oracle(x, weight, bias).check(y)
    if x.dim() in LAST and not x.is_contiguous():
        assert y.is_contiguous(memory_format=LAST[x.dim()])
    else:
        assert y.is_contiguous()


BLOCKS = [
    Block(*size)
    for size in ((1, 4), (1, 16), (4, 4), (4, 1), (8, 8), (16, 16), (32, 32), (64, 64), (7, 64))
]


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_block_on_any_layer(blocksparse_target: str, dtype: torch.dtype, block: Block) -> None:
    for group_in, group_out in ((64, 64), (70, 33), (3, 5)):
        case = typical(
            block=block, dtype=dtype, group_in=group_in, group_out=group_out, extents=(5, 6)
        )
        weight, x, bias = case.weight(), case.x(), torch.randn(group_out).to(dtype)
        case.oracle(x, weight, bias).check(call(case, x, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whole_numbers_are_exact(blocksparse_target: str, dtype: torch.dtype) -> None:
    case = typical(dtype=dtype)
    weight = case.weight()
    values = weight.values.copy_(weight.values.float().clamp(-3, 3).round().to(dtype))
    x = integers(*case.x().shape, limit=3, dtype=dtype)
    y = call(
        case, x, BlockSparse(values, weight.crow_indices, weight.col_indices, case.shape), None
    )
    assert torch.equal(y, case.dense(x.double(), weight.to_dense().double(), None).to(dtype))


def test_float64_matches_dense(serial_target: str) -> None:
    for case in CASES[:40]:
        case = typical(**{**vars(case), "dtype": torch.float64})
        weight, x = case.weight(), case.x()
        bias = torch.randn(case.shape[0], dtype=torch.float64)
        case.oracle(x, weight, bias).check(call(case, x, weight, bias))


@pytest.mark.parametrize("padding", [1, (2, 0), "same"])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_padding_modes(axes: int, mode: str, padding: int | str | tuple[int, ...]) -> None:
    kernel = (3, 2, 3)[:axes]
    if isinstance(padding, tuple):
        padding = (2, 0, 1)[:axes]
    weight = block_sparse((6, 4, *kernel), Block(2, 4))
    x = torch.randn(2, 4, *(6, 5, 4)[:axes])
    layer = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)[axes - 1]
    twin = layer(4, 6, kernel, padding=padding, padding_mode=mode, bias=False)
    with torch.no_grad():
        twin.weight.copy_(weight.to_dense())
    y = blocksparse_conv(x, weight, padding=padding, padding_mode=mode)
    torch.testing.assert_close(y, twin(x))


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "silu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activation(blocksparse_target: str, dtype: torch.dtype, activation: str | None) -> None:
    case = typical(dtype=dtype)
    weight, x, bias = case.weight(), case.x(), torch.linspace(-9, 9, case.shape[0]).to(dtype)
    y = blocksparse_conv(x, weight, bias, **case.geometry, activation=activation)
    oracle = case.oracle(x, weight, bias)
    oracle.y = reference.activate(oracle.y, activation)
    oracle.limit *= 1.2
    oracle.check(y)


@pytest.mark.parametrize("act", ["relu", "gelu", "silu", None])
def test_residual(blocksparse_target: str, act: str | None) -> None:
    tails = (typical(dtype=dtype, block=Block(16, 16), group_out=40) for dtype in DTYPES)
    first = ("relu", "gelu", "silu", None).index(act)
    for number, case in enumerate((*CASES[first::4], *tails)):
        weight, x = case.weight(), case.x()
        bias = torch.randn(case.shape[0]).to(case.dtype) if case.bias else None
        oracle = case.oracle(x, weight, bias)
        residual = torch.randn(oracle.y.shape).to(case.dtype)
        if number % 4 and case.channels_last and x.dim() in LAST:  # mostly in the layout of x
            residual = residual.to(memory_format=LAST[x.dim()])
        y = blocksparse_conv(x, weight, bias, **case.geometry, activation=act, residual=residual)
        if case.dtype == torch.float32:  # the same sums in the same order
            plain = blocksparse_conv(x, weight, bias, **case.geometry)
            same = blocksparse_conv(x, weight, bias, **case.geometry, residual=residual)
            assert torch.equal(same, plain + residual), case
        wide = [t.double().abs() for t in (x, weight.to_dense())]
        size = case.dense(*wide, None if bias is None else bias.double().abs())
        exact = reference.activate(oracle.y + residual.double(), act)
        size = 1.2 * (size + residual.double().abs())
        SumOracle(exact, size, weight.to_dense()[0].numel(), case.dtype).check(y)


def test_residual_of_a_linear_layer_without_batch_and_with_gradient() -> None:
    weight = block_sparse((6, 10), Block(2, 4))
    x, residual = torch.randn(2, 3, 10), torch.randn(2, 3, 6, requires_grad=True)
    expected = F.relu(blocksparse_linear(x, weight) + residual)
    with torch.no_grad():
        y = blocksparse_linear(x, weight, activation="relu", residual=residual)
        assert torch.equal(y, expected)
        exact = reference.blocksparse_linear(x, weight, None, "relu", residual)
        torch.testing.assert_close(y, exact)
    y = blocksparse_linear(x, weight, activation="relu", residual=residual)
    (gradient,) = torch.autograd.grad(y.sum(), residual)
    assert torch.equal(gradient, (expected > 0).float())
    conv, image = block_sparse((6, 5, 3), Block(2, 4)), torch.randn(5, 9)
    added = torch.randn(6, 7)
    y = blocksparse_conv(image, conv, residual=added)
    assert torch.equal(y, blocksparse_conv(image, conv) + added)
    with torch.autocast("cpu", torch.bfloat16):
        assert blocksparse_conv(image, conv, residual=added).dtype == torch.bfloat16


def test_residual_mistakes() -> None:
    weight, x = block_sparse((6, 5, 3), Block(2, 4)), torch.randn(2, 5, 9)
    for size in ((2, 6, 1), (1, 6, 7), (6, 7)):
        with pytest.raises(ValueError, match=r"residual has shape .*, the result \[2, 6, 7\]"):
            blocksparse_conv(x, weight, residual=torch.ones(size))
    with pytest.raises(ValueError, match=r"residual has shape \[7\], the result"):
        blocksparse_conv(x, weight, residual=torch.ones(7, requires_grad=True))
    with pytest.raises(TypeError, match=r"residual is .*float64, the weight"):
        blocksparse_conv(x, weight, residual=torch.ones(2, 6, 7).double())


def test_reference_is_torchs_convolution() -> None:
    for case in CASES[::7]:
        if isinstance(case.padding, str):
            continue
        weight = case.weight().to(torch.float64)
        x, bias = case.x().double(), torch.randn(case.shape[0], dtype=torch.float64)
        padding = [(size, size) for size in case.padding]
        y = reference.blocksparse_conv(x, weight, bias, case.stride, padding, case.dilation)
        torch.testing.assert_close(y, case.dense(x, weight.to_dense(), bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_non_finite_x_goes_through_live_blocks_only(
    blocksparse_target: str, dtype: torch.dtype, poison: float
) -> None:
    case = typical(dtype=dtype, groups=2, group_in=5, group_out=9, block=Block(4, 4), density=0.3)
    weight, x = case.weight(), case.x()
    x[1, 4, 3, 3] = x[0, 5, 0, 0] = poison
    finite = torch.where(x.isfinite(), x, 0)
    one = [(1, 1), (1, 1)]
    want = reference.blocksparse_conv(
        x.double(), weight.to(torch.float64), None, *one[:1], one, *one[:1]
    )
    y = call(case, x, weight, None)
    assert torch.equal(y.isnan(), want.isnan())
    clean = want.isfinite()
    assert torch.equal(y.isfinite(), clean)
    assert torch.equal(y[clean], call(case, finite, weight, None)[clean])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_beside_x_is_read(blocksparse_target: str, dtype: torch.dtype) -> None:
    case = typical(dtype=dtype, batch=1)
    weight = case.weight()
    for group_in in (19, 17, 1):
        weight = block_sparse((21, group_in, 3, 3), Block(8, 8), 1.0, 1, dtype)
        around = torch.full((9 * 7 * group_in + 128,), torch.nan, dtype=dtype)
        inside = around[64:-64].view(1, 9, 7, group_in)
        x = inside.copy_(torch.randn(inside.shape)).movedim(-1, 1)
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert call(case, x, weight, None).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_result_every_time_and_for_any_thread_count(
    blocksparse_target: str, threads: int, dtype: torch.dtype
) -> None:
    case = typical(dtype=dtype)
    weight, x = case.weight(), case.x()
    torch.set_num_threads(1)
    expected = call(case, x, weight, None)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert torch.equal(call(case, x, weight, None), expected)


def test_dilation_wider_than_x(target: str) -> None:
    dense = torch.randn(16, 8, 3, 3)
    weight = BlockSparse.from_dense(dense, Block(4, 4))
    for dilation in (7, 40, 1 << 20):
        x = torch.randn(2, 8, 9, 9)
        y = blocksparse_conv(x, weight, padding=dilation, dilation=dilation)
        expected = torch.conv2d(x, dense, padding=dilation, dilation=dilation)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_unbatched_and_strided_x() -> None:
    case = typical()
    weight, x = case.weight(), case.x()
    torch.testing.assert_close(
        call(case, x[0], weight, None), case.dense(x, weight.to_dense(), None)[0]
    )
    for view in (
        torch.randn(2, 19, 7, 9).transpose(2, 3),
        torch.randn(2, 38, 9, 14)[:, ::2, :, ::2],
        torch.randn(1, 19, 9, 7).expand(2, -1, -1, -1),
        torch._neg_view(torch.randn(2, 19, 9, 7)),
    ):
        torch.testing.assert_close(
            call(case, view, weight, None), case.dense(view, weight.to_dense(), None)
        )
    values = weight.values.transpose(1, 2).contiguous().transpose(1, 2)
    crow = weight.crow_indices.repeat_interleave(2)[::2]
    strided = BlockSparse(values, crow, weight.col_indices, case.shape)
    assert torch.equal(call(case, x, strided, None), call(case, x, weight, None))


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_numbers_stand_for_every_axis_as_in_torch(axes: int) -> None:
    weight = block_sparse((4, 2, *(3,) * axes), Block(2, 2), groups=2)
    x = torch.randn(1, 4, *(9,) * axes)
    for stride, padding, dilation in ((2, 1, 1), ((1,), (2,), (2,)), ((2,) * axes, 0, 1)):
        expected = CONVS[axes - 1](x, weight.to_dense(), None, stride, padding, dilation, 2)
        y = blocksparse_conv(x, weight, None, stride, padding, dilation)
        torch.testing.assert_close(y, expected)


WEIGHT = block_sparse((6, 4, 3, 3), Block(2, 4))
X = torch.ones(1, 4, 5, 5)
DENSE, LINEAR, META = WEIGHT.to_dense(), block_sparse((4, 4), Block(2, 2)), WEIGHT.to("meta")
ERRORS = {
    "channels": (ValueError, r"\[1, 3, 5, 5\].*4 channels", lambda: conv(torch.ones(1, 3, 5, 5))),
    "dimensions": (ValueError, r"\[5, 5\].*4 dimensions", lambda: conv(torch.ones(5, 5))),
    "dtype of x": (TypeError, "float64.*float32", lambda: conv(X.double())),
    "whole numbers": (TypeError, "int64", lambda: conv(X.long())),
    "dtype of bias": (TypeError, "float64.*float32", lambda: conv(bias=torch.ones(6).double())),
    "length of bias": (ValueError, r"\[4\].*\[6\]", lambda: conv(bias=torch.ones(4))),
    "kernel too large": (ValueError, r"\[2, 5\].*\[3, 3\]", lambda: conv(torch.ones(1, 4, 2, 5))),
    "stride": (ValueError, "stride 0", lambda: conv(stride=0)),
    "strides": (ValueError, r"stride \(1, 2, 3\)", lambda: conv(stride=(1, 2, 3))),
    "stride of words": (TypeError, "stride", lambda: conv(stride=("1", "2"))),
    "no tensor": (TypeError, "x is NoneType", lambda: conv(None)),
    "no tensor, linear": (TypeError, "x is int", lambda: blocksparse_linear(3, LINEAR)),
    "stride of a fraction": (TypeError, r"stride 1\.5, expected whole", lambda: conv(stride=1.5)),
    "huge padding": (ValueError, r"padding 4611.*2\*\*30", lambda: conv(padding=2**62)),
    "padding": (ValueError, "padding -1", lambda: conv(padding=-1)),
    "padding in words": (ValueError, "'full'", lambda: conv(padding="full")),
    "same with stride": (
        ValueError,
        r"'same' with stride \[2, 2\]",
        lambda: conv(padding="same", stride=2),
    ),
    "padding mode": (ValueError, "'mirror'", lambda: conv(padding_mode="mirror")),
    "dilation": (ValueError, "dilation 0", lambda: conv(dilation=0)),
    "activation": (ValueError, "tanh", lambda: conv(activation="tanh")),
    "dense weight": (
        TypeError,
        "Tensor.*from_dense",
        lambda: blocksparse_conv(X, torch.ones(6, 4, 3, 3)),
    ),
    "linear weight": (
        ValueError,
        "blocksparse_linear",
        lambda: blocksparse_conv(X, block_sparse((4, 4), Block(2, 2))),
    ),
    "device of x": (ValueError, "meta.*cpu", lambda: conv(X.to("meta"))),
    "device of bias": (ValueError, "cpu.*meta", lambda: conv(bias=torch.ones(6, device="meta"))),
    "device of the weight": (
        ValueError,
        "cpu.*meta",
        lambda: blocksparse_conv(X, WEIGHT.to("meta")),
    ),
}


def conv(x: Tensor = X, **arguments: object) -> Tensor:
    return blocksparse_conv(x, WEIGHT, **arguments)


@pytest.mark.parametrize("case", ERRORS)
def test_mistakes_are_errors_with_values(case: str) -> None:
    error, text, mistake = ERRORS[case]
    with pytest.raises(error, match=text):
        mistake()


HOSTILE = {
    "a column past the last": ("column 9 of block 1.*\\[0, 9\\)", [0, 2, 3, 4], [0, 9, 1, 1]),
    "a negative column": ("column -1 of block 0", [0, 2, 3, 4], [-1, 2, 1, 1]),
    "columns out of order": ("column 1 of block 1.*follows 3", [0, 2, 3, 4], [3, 1, 1, 1]),
    "a column twice": ("column 3 of block 1.*follows 3", [0, 2, 3, 4], [3, 3, 1, 1]),
    "rows that decrease": ("decrease from 3 to 2", [0, 3, 2, 4], [0, 1, 2, 1]),
    "rows past the blocks": ("end with 9, there are 4", [0, 3, 4, 9], [0, 1, 2, 1]),
    "rows far past the blocks": ("decrease", [0, 2**31 - 1, 4, 4], [0, 1, 2, 1]),
    "rows before the blocks": ("begin with -4", [-4, 2, 3, 4], [0, 1, 2, 1]),
    "rows that skip": ("begin with 1", [1, 2, 3, 4], [0, 1, 2, 1]),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_indices_are_checked_at_every_call(blocksparse_target: str, case: str) -> None:
    text, crow, col = HOSTILE[case]
    indices = (torch.tensor(crow, dtype=torch.int32), torch.tensor(col, dtype=torch.int32))
    weight = BlockSparse(torch.ones(4, 2, 4), *indices, (6, 4, 3, 3))
    for use in (lambda: blocksparse_conv(X, weight), weight.to_dense, weight.validate):
        with pytest.raises(ValueError, match=text):
            use()
    with pytest.raises(ValueError, match=text):
        torch.ops.gossamer.blocksparse_gather(torch.ones(6, 9, 4), *indices, 2, 4, 1)


def test_meta_gives_the_shape() -> None:
    y = blocksparse_conv(X.to("meta"), WEIGHT.to("meta"), stride=2, activation="gelu")
    assert y.is_meta
    assert y.shape == (1, 6, 2, 2)


def test_empty_extents_are_torchs() -> None:
    """An x without positions has an output where the padding alone holds a kernel."""
    x = torch.ones(2, 4, 0, 5)
    with pytest.raises(ValueError, match=r"extents \[0, 5\]"):
        blocksparse_conv(x, WEIGHT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = F.conv2d(
            torch.ones(2, 4, 1, 5) * 0, WEIGHT.to_dense(), torch.ones(6), padding=(2, 1)
        )
    y = blocksparse_conv(x, WEIGHT, torch.ones(6), padding=(2, 1))
    assert torch.equal(y, expected[:, :, :2])
