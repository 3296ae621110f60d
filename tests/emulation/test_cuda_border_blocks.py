"""From the public functions of blocks down to the kernels, as on a GPU, with these emulated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from blocksparse_conv import BlockConv
from conv_cases import CASES, ConvCase, block_sparse, typical
from emulated_gpu import Gpu
from gossamer import _C, Block, _self_check, blocksparse_conv, blocksparse_linear
from gossamer.formats import BlockSparse, BlockSparsePanels
from gossamer.nn import SparseConv
from gossamer.ops.blocksparse import blocksparse_by_way
from gossamer.ops.blocksparse_choice import blocksparse_choice, blocksparse_ways
from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")
MMA, FMA, WGMMA = range(3)
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
LARGE = {"block": Block(32, 32), "group_in": 72, "group_out": 40}


def on_cpu(gpu: Gpu, call: Callable[[], Any]) -> Any:
    _C.attach_cuda(0)
    try:
        return call()
    finally:
        gpu.describe()


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conv_matches_dense(gpu: Gpu, dtype: torch.dtype, channels_last: bool) -> None:
    case = typical(dtype=dtype, channels_last=channels_last, **LARGE)
    conv = BlockConv.of(case)
    y = blocksparse_conv(conv.x, conv.weight, conv.bias, **case.geometry, activation="relu")
    assert gpu.kernel == (MMA if dtype.itemsize == 2 else FMA)
    assert torch.equal(y, conv.expected().relu().to(dtype))
    assert y.stride() == case.dense(conv.x, conv.weight.to_dense(), None).stride()


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_residual_is_added_by_the_kernel(
    gpu: Gpu, dtype: torch.dtype, channels_last: bool
) -> None:
    for case in (
        typical(dtype=dtype, channels_last=channels_last, **LARGE),
        typical(dtype=dtype, channels_last=channels_last, block=Block(5, 3)),
        typical(
            dtype=dtype, channels_last=channels_last, kernel=(3,), extents=(21,), stride=(1,),
            padding=(1,), dilation=(1,), **LARGE,
        ),
        typical(
            dtype=dtype, channels_last=channels_last, kernel=(2, 1, 3), extents=(3, 4, 5),
            stride=(1, 2, 1), padding=(0, 0, 1), dilation=(1, 1, 1), **LARGE,
        ),
    ):  # fmt: skip
        conv = BlockConv.of(case, residual=True)
        assert conv.residual is not None
        last = conv.residual.movedim(1, -1)
        strided = conv.residual.repeat_interleave(2, 0)[::2]
        for residual in (conv.residual, last.contiguous().movedim(-1, 1), strided):
            y = blocksparse_conv(
                conv.x, conv.weight, conv.bias, **case.geometry, activation="relu",
                residual=residual,
            )  # fmt: skip
            assert torch.equal(y, conv.expected().relu().to(dtype))


def test_hopper_has_a_kernel_of_its_own(gpu: Gpu) -> None:
    gpu.describe(capability=90)
    linear = typical(
        batch=300, block=Block(32, 32), group_in=64, group_out=96, kernel=(), extents=(),
        dtype=torch.bfloat16,
    )  # fmt: skip
    conv = BlockConv.of(linear)
    y = blocksparse_linear(conv.x, conv.weight, conv.bias, activation="relu")
    assert gpu.kernel == WGMMA
    assert torch.equal(y, conv.expected().relu().bfloat16())
    residual = torch.randn(y.shape).bfloat16()
    added = blocksparse_linear(conv.x, conv.weight, conv.bias, None, residual)
    exact = conv.expected() + residual.double()
    torch.testing.assert_close(added.double(), exact, rtol=2**-8, atol=1e-4)
    # Memory that TMA cannot address has the other kernel, and so has what it is too small for.
    moved = torch.empty(conv.x.numel() + 1).bfloat16()[1:].view_as(conv.x).copy_(conv.x)
    assert torch.equal(blocksparse_linear(moved, conv.weight, conv.bias, activation="relu"), y)
    assert gpu.kernel == MMA
    for case in (
        typical(dtype=torch.float16, group_in=64, group_out=40, block=Block(16, 16)),
        typical(dtype=torch.float16, group_in=64, group_out=40, block=Block(16, 8)),
    ):
        conv = BlockConv.of(case)
        y = blocksparse_conv(conv.x, conv.weight, conv.bias, **case.geometry)
        assert gpu.kernel == (WGMMA if case.block.cols == 16 else MMA)
        assert torch.equal(y, conv.expected().half())
    assert _self_check.wrong_results.__wrapped__(torch.device("cpu")) is None


def test_ways_by_name(gpu: Gpu) -> None:
    gpu.describe(capability=90)
    case = typical(dtype=torch.bfloat16, **LARGE)
    conv = BlockConv.of(case)
    x, weight = conv.x, replace(conv.weight)
    expected = case.dense(x.double(), weight.to_dense().double(), None).bfloat16()
    ways = blocksparse_ways(x.shape, weight, **case.geometry, channels_last=True)
    assert {way[0] for way in ways} == {"mma", "wgmma"}
    for way in ways:
        assert torch.equal(blocksparse_by_way(way, x, weight, **case.geometry), expected)
        assert gpu.kernel == (WGMMA if way[0] == "wgmma" else MMA)
    with pytest.raises(ValueError, match="as wgmma 128 x 256 in clusters of 2"):
        blocksparse_by_way(("wgmma", 128, 256, 2), x, weight, **case.geometry)
    moved = torch.empty(weight.values.numel() + 1).bfloat16()[1:].view_as(weight.values)
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        blocksparse_by_way(ways[-1], x, replace(weight, values=moved), **case.geometry)
    _C.attach_cuda(0)
    with pytest.raises(ValueError, match="x is on the CPU"):
        blocksparse_by_way(ways[0], x, weight, **case.geometry)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_matches_dense(gpu: Gpu, dtype: torch.dtype) -> None:
    for rows, shape in ((1, (40, 65)), (70, (130, 48))):
        weight = block_sparse(shape, Block(16, 16), dtype=dtype)
        wide = torch.randn(2, rows, shape[1] + 3).to(dtype)
        for x in (wide[..., : shape[1]], wide[..., 3:].contiguous()):
            y, expected = blocksparse_linear(x, weight), x.double() @ weight.to_dense().double().t()
            torch.testing.assert_close(y.double(), expected, rtol=2**-7, atol=2**-5)
    assert blocksparse_linear(torch.ones(0, 48).to(dtype), weight).shape == (0, 130)


@pytest.mark.parametrize("number", range(1, 300, 12))
def test_any_convolution_matches_dense(gpu: Gpu, number: int) -> None:
    case = CASES[number]
    weight, x = case.weight(), case.x()
    case.oracle(x, weight, None).check(blocksparse_conv(x, weight, **case.geometry))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_formats_are_those_of_the_cpu(gpu: Gpu, dtype: torch.dtype) -> None:
    def blocks_of(dense: Tensor, case: ConvCase) -> BlockSparse:
        return BlockSparse.from_dense(dense, case.block, groups=case.groups)

    for number in range(0, 60, 5):
        case = replace(CASES[number], dtype=dtype)
        dense = case.weight().to_dense()
        ours = blocks_of(dense, case).validate()
        theirs = on_cpu(gpu, partial(blocks_of, dense, case))
        for name in ("values", "crow_indices", "col_indices"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))
        assert torch.equal(ours.to_dense(), dense.where(dense != 0, 0))


def spoil(weight: BlockSparse, name: str, at: int, value: int) -> BlockSparse:
    spoilt = replace(weight, **{name: getattr(weight, name).clone()})
    getattr(spoilt, name).view(-1)[at] = value
    return spoilt


@pytest.mark.parametrize(
    ("name", "at", "value"),
    [
        ("crow_indices", 0, 1),
        ("crow_indices", 1, 10**9),
        ("crow_indices", -1, 2),
        ("col_indices", 3, -1),
        ("col_indices", 1, 0),
        ("col_indices", -1, 10**6),
        ("values", -1, 1),
    ],
)
def test_bad_weights_are_reported_as_on_the_cpu(gpu: Gpu, name: str, at: int, value: int) -> None:
    weight = spoil(block_sparse((21, 19, 3, 3), Block(4, 4), 0.9), name, at, value)

    def complaint() -> str:
        with pytest.raises(ValueError, match="BlockSparse: ") as error:
            weight.validate()
        return str(error.value)

    assert complaint() == on_cpu(gpu, complaint)


def test_padding_is_read_only_where_there_is_some(gpu: Gpu) -> None:
    weight = block_sparse((16, 8, 3, 3), Block(4, 4), 0.9)
    assert weight.validate() is weight


@pytest.mark.parametrize("channels_last", [True, False])
def test_gradient_is_that_of_the_dense_layer(gpu: Gpu, channels_last: bool) -> None:
    case = typical(channels_last=channels_last)
    weight, x, bias = case.weight(), case.x().requires_grad_(), torch.randn(21, requires_grad=True)
    weight.values.requires_grad_()
    y = blocksparse_conv(x, weight, bias, **case.geometry, activation="silu")
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, weight.values, bias), dy)
    dense = torch.nn.functional.silu(case.dense(x, weight.to_dense(), bias))
    expected = torch.autograd.grad(dense, (x, weight.values, bias), dy)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_layer(gpu: Gpu) -> None:
    dense = torch.nn.Conv2d(32, 48, 3, padding=1, dtype=torch.bfloat16)
    layer = SparseConv.from_dense(dense, Block(16, 16), prune="magnitude", density=0.5)
    x = torch.randn(1, 32, 6, 5, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    with torch.no_grad():
        y = layer(x)
        case = typical(batch=1, padding=(1, 1), bias=True, dtype=torch.bfloat16)
        assert isinstance(layer.weight, BlockSparse)
        case.oracle(x, layer.weight, layer.bias).check(y)
    assert gpu.kernel == MMA
    twin = SparseConv.from_dense(dense, Block(16, 16), prune="magnitude", density=0.5)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x), y)


def test_panels_are_refused(gpu: Gpu) -> None:
    panels = BlockSparsePanels.from_blocksparse(block_sparse((8, 8), Block(4, 4)))
    with pytest.raises(ValueError, match="panels are what a CPU's kernels read"):
        blocksparse_linear(torch.ones(2, 8), panels)


def test_gpu_too_old_is_named(gpu: Gpu) -> None:
    gpu.describe(capability=75)
    with pytest.raises(ValueError, match=r"compute capability 7\.5, the kernels need 8\.0"):
        blocksparse_linear(torch.ones(2, 8), block_sparse((8, 8), Block(4, 4)))


def test_choice_is_that_of_the_device(gpu: Gpu) -> None:
    weight = block_sparse((64, 64, 3, 3), Block(32, 32), dtype=torch.bfloat16)
    here = {"capability": 80, "multiprocessors": 1, "shared_bytes": 227 << 10, "l2_bytes": 50 << 20}
    chosen = blocksparse_choice((8, 64, 28, 28), weight, padding=1, device=here)
    assert (chosen["target"], chosen["kernel"]) == ("sm_80", "mma")
    pixels, outputs = chosen["tile_pixels"], chosen["tile_outputs"]
    assert chosen["blocks"] == -(-8 * 28 * 28 // pixels) * -(-64 // outputs)
    exact = block_sparse((64, 64, 3, 3), Block(32, 32), dtype=torch.float32)
    assert blocksparse_choice((8, 64, 28, 28), exact, device=here)["kernel"] == "fma"
    with pytest.raises(ValueError, match=r"compute capability 7\.0"):
        blocksparse_choice((1, 64, 9, 9), weight, device={**here, "capability": 70})


def test_what_32_bits_do_not_count_is_refused(gpu: Gpu) -> None:
    ones, zeros, many = (1, 1, 1), (0, 0, 0), 1 << 30
    pixels = (1, 1, 1, many, 8)
    rest = ("bfloat16", 8, 8, 1, 1, ones)
    with pytest.raises(ValueError, match="reach further than a GPU's kernels count"):
        _C.blocksparse_choose(pixels, pixels, *rest, (1, 1, 4), zeros, ones, True, 1, 0)
    pixels = (1, many, 1, 4, 8)
    with pytest.raises(ValueError, match="1073741824 x 1 x 4 outputs"):
        _C.blocksparse_choose(pixels, pixels, *rest, ones, zeros, ones, True, 1, 0)


def test_wrong_kernels_of_blocks_are_found(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _self_check.wrong_results.__wrapped__(torch.device("cpu")) is None
    right = blocksparse_conv

    def wrong_where_channels_are_last(x: Tensor, *args: object, **rest: object) -> Tensor:
        y: Tensor = right(x, *args, **rest)  # type: ignore[arg-type]
        return y if x.is_contiguous() else -y

    monkeypatch.setattr(_self_check, "blocksparse_conv", wrong_where_channels_are_last)
    fault = _self_check.wrong_results.__wrapped__(torch.device("cpu"))
    assert fault is not None
    assert "torch.float16 of blocks, torch.channels_last" in fault
    assert "contiguous" not in fault
