"""Block-sparse layers on a GPU: results of every kernel and tile, and what only a GPU can show."""

from __future__ import annotations

import copy
from dataclasses import replace

import gossamer
import pytest
import torch
import torch.nn.functional as F
from conv_cases import CASES, block_sparse, typical
from gossamer import Block, blocksparse_conv, blocksparse_linear
from gossamer.formats import BlockSparse
from gossamer.nn import SparseConv2d
from gossamer.ops.blocksparse import blocksparse_by_way
from gossamer.ops.blocksparse_choice import blocksparse_choice, blocksparse_ways
from torch import Tensor, nn

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.filterwarnings("ignore:Using padding='same'"),
]
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (*HALVES, torch.float32, torch.float64)
FIELDS = ("values", "crow_indices", "col_indices")
# Batch, C_in, C_out, extent, kernel: few pixels and many, few outputs and many.
LAYERS = (
    (1, 64, 64, 7, 3),
    (2, 512, 512, 7, 3),
    (32, 128, 128, 28, 3),
    (64, 64, 64, 56, 3),
    (64, 256, 256, 14, 3),
    (64, 512, 512, 28, 1),
)


def on_gpu(weight: BlockSparse) -> BlockSparse:
    return weight.to("cuda")


@pytest.mark.parametrize("number", range(300))
def test_any_convolution_matches_dense(number: int) -> None:
    case = CASES[number]
    weight, x = case.weight(), case.x()
    bias = torch.randn(case.shape[0]).to(case.dtype) if case.bias else None
    oracle = case.oracle(x, weight, bias)
    given = None if bias is None else bias.cuda()
    y = blocksparse_conv(x.cuda(), on_gpu(weight), given, **case.geometry)
    oracle.check(y.cpu())
    residual = torch.randn(y.shape).to(case.dtype)
    y = blocksparse_conv(x.cuda(), on_gpu(weight), given, **case.geometry, residual=residual.cuda())
    oracle.y = oracle.y + residual.double()
    oracle.limit += torch.finfo(case.dtype).eps * residual.double().abs()
    oracle.check(y.cpu())


@pytest.mark.parametrize(
    "block", [Block(16, 16), Block(32, 32), Block(64, 64), Block(24, 8)], ids=str
)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_layers_match_dense(layer: tuple[int, ...], block: Block) -> None:
    batch, c_in, c_out, extent, kernel = layer
    case = typical(
        batch=batch, group_in=c_in, group_out=c_out, kernel=(kernel, kernel),
        extents=(extent, extent), padding=(kernel // 2, kernel // 2), block=block, density=0.25,
    )  # fmt: skip
    for dtype, memory_format in (
        (torch.bfloat16, torch.channels_last),
        (torch.float16, torch.contiguous_format),
        (torch.float32, torch.channels_last),
    ):
        weight = on_gpu(replace(case, dtype=dtype).weight())
        x = torch.randn(batch, c_in, extent, extent, device="cuda").to(dtype)
        x = x.contiguous(memory_format=memory_format)
        y = blocksparse_conv(x, weight, **case.geometry)
        assert y.is_contiguous(memory_format=memory_format)
        replace(case, dtype=dtype).oracle(x, weight, None).check(y)
        assert torch.equal(blocksparse_conv(x, weight, **case.geometry), y)


@pytest.mark.parametrize(
    "block", [Block(16, 16), Block(32, 32), Block(64, 64), Block(16, 64), Block(64, 32)], ids=str
)
@pytest.mark.parametrize("kernel", [1, 3])
def test_every_way_matches_dense(block: Block, kernel: int) -> None:
    case = typical(
        batch=9, group_in=200, group_out=600, kernel=(kernel, kernel), extents=(33, 31),
        padding=(kernel // 2, kernel // 2), block=block, density=0.2,
    )  # fmt: skip
    for dtype in HALVES:
        weight = on_gpu(replace(case, dtype=dtype).weight())
        x = torch.randn(9, 200, 33, 31, device="cuda").to(dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        oracle = replace(case, dtype=dtype).oracle(x, weight, None)
        for way in blocksparse_ways(x.shape, weight, **case.geometry, channels_last=True):
            for _ in range(3):
                oracle.check(blocksparse_by_way(way, x, weight, **case.geometry))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 7, 16, 17, 300, 20000])
def test_linear_of_any_number_of_rows(rows: int, dtype: torch.dtype) -> None:
    weight = block_sparse((272, 520), Block(16, 16), dtype=dtype)
    x = torch.randn(rows, 523, device="cuda").to(dtype)
    for given in (x[:, :520], x[:, 3:].contiguous()):
        y, dense = blocksparse_linear(given, on_gpu(weight)), weight.to_dense().cuda()
        expected = given.double() @ dense.double().t()
        torch.testing.assert_close(y.double(), expected, rtol=2**-7, atol=2**-5)
    assert blocksparse_linear(x[:0, :520], on_gpu(weight)).shape == (0, 272)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_formats_are_those_of_the_cpu(dtype: torch.dtype) -> None:
    for case in CASES[:60]:
        dense = replace(case, dtype=dtype).weight().to_dense()
        cpu, gpu = (
            BlockSparse.from_dense(d, case.block, groups=case.groups) for d in (dense, dense.cuda())
        )
        for name in FIELDS:
            assert torch.equal(getattr(gpu, name).cpu(), getattr(cpu, name))
        assert torch.equal(gpu.validate().to_dense().cpu(), cpu.to_dense())


def test_bad_weights_are_reported_as_on_the_cpu() -> None:
    weight = block_sparse((21, 19, 3, 3), Block(4, 4), 0.9)
    for name, at, value in (("crow_indices", 1, 10**9), ("col_indices", 3, -1), ("values", -1, 1)):
        spoilt = replace(weight, **{name: getattr(weight, name).clone()})
        getattr(spoilt, name).view(-1)[at] = value
        messages = []
        for given in (spoilt, on_gpu(spoilt)):
            with pytest.raises(ValueError, match="BlockSparse: ") as error:
                given.validate()
            messages.append(str(error.value))
        assert messages[0] == messages[1]


def test_indices_that_nobody_checked_stay_in_memory() -> None:
    weight = on_gpu(block_sparse((64, 64, 3, 3), Block(16, 16), dtype=torch.bfloat16))
    x = torch.randn(2, 64, 9, 9, device="cuda").bfloat16()
    for name in ("crow_indices", "col_indices"):
        spoilt = replace(weight, **{name: getattr(weight, name).clone()})
        getattr(spoilt, name)[1:] = 2**31 - 1
        blocksparse_conv(x, spoilt, padding=1)
        spoilt.to_dense()
    torch.cuda.synchronize()


@pytest.mark.parametrize("channels_last", [True, False])
def test_gradient_is_that_of_the_dense_layer(channels_last: bool) -> None:
    case = typical(channels_last=channels_last, dtype=torch.float64)
    weight, x = on_gpu(case.weight()), case.x().cuda().requires_grad_()
    bias = torch.randn(21, dtype=torch.float64, device="cuda", requires_grad=True)
    weight.values.requires_grad_()
    y = blocksparse_conv(x, weight, bias, **case.geometry, activation="silu")
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, weight.values, bias), dy)
    dense = F.silu(case.dense(x, weight.to_dense(), bias))
    for ours, theirs in zip(
        found, torch.autograd.grad(dense, (x, weight.values, bias), dy), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_graph_replays() -> None:
    case = typical(block=Block(16, 16), group_in=64, group_out=64, dtype=torch.bfloat16)
    weight, x = on_gpu(case.weight()), case.x().cuda()
    expected = blocksparse_conv(x, weight, **case.geometry)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = blocksparse_conv(x, weight, **case.geometry)
    for _ in range(3):
        y.zero_()
        graph.replay()
        assert torch.equal(y, expected)


def test_streams() -> None:
    weight = on_gpu(block_sparse((256, 256), Block(32, 32), dtype=torch.bfloat16))
    inputs = [torch.randn(300, 256, device="cuda").bfloat16() for _ in range(4)]
    expected = [blocksparse_linear(x, weight) for x in inputs]
    torch.cuda.synchronize()
    results: list[Tensor] = []
    for x in inputs:
        with torch.cuda.stream(torch.cuda.Stream()):
            results.append(blocksparse_linear(x, weight))
    torch.cuda.synchronize()
    assert all(map(torch.equal, results, expected))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_layer_on_another_than_the_current_gpu() -> None:
    case = typical(dtype=torch.float16)
    weight, x = case.weight().to("cuda:1"), case.x().to("cuda:1")
    case.oracle(x, weight, None).check(blocksparse_conv(x, weight, **case.geometry))
    assert torch.cuda.current_device() == 0


def layer_and_x() -> tuple[nn.Module, Tensor]:
    dense = nn.Conv2d(64, 96, 3, padding=1)
    layer = SparseConv2d.from_dense(dense, Block(16, 16), prune="magnitude", density=0.25)
    return layer.eval(), torch.randn(2, 64, 14, 14)


def test_moves_between_cpu_and_gpu() -> None:
    layer, x = layer_and_x()
    expected = layer(x)
    moved = copy.deepcopy(layer).cuda()
    torch.testing.assert_close(moved(x.cuda()).cpu(), expected, rtol=1e-4, atol=1e-5)
    for key, tensor in moved.state_dict().items():
        assert torch.equal(tensor.cpu(), layer.state_dict()[key]), key
    assert torch.equal(moved.cpu()(x), expected)


def test_compile_and_autocast() -> None:
    layer, x = layer_and_x()
    layer, x = layer.cuda(), x.cuda().to(memory_format=torch.channels_last)
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        y = layer(x)
        compiled = torch.compile(layer, fullgraph=True)(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, compiled)


def test_mistakes_are_named() -> None:
    weight = block_sparse((40, 64), Block(8, 8))
    x = torch.randn(3, 64, device="cuda")
    with pytest.raises((ValueError, RuntimeError), match="cpu"):
        blocksparse_linear(x, weight)
    with pytest.raises((ValueError, RuntimeError), match="cpu"):
        blocksparse_linear(x.cpu(), on_gpu(weight))
    with pytest.raises((ValueError, RuntimeError), match="cpu"):
        blocksparse_linear(x, on_gpu(weight), torch.zeros(40))


def test_convert_measures_on_the_gpu() -> None:
    model = nn.Sequential(nn.Conv2d(64, 128, 3), nn.ReLU(), nn.Conv2d(128, 64, 1)).cuda().bfloat16()
    x = torch.randn(4, 64, 28, 28, device="cuda").bfloat16().to(memory_format=torch.channels_last)
    report = gossamer.convert(
        model, Block(32, 32), prune="magnitude", density=0.25, sample_input=x, force=True
    )
    assert {layer.kernel for layer in report.layers} <= {"sm_80/mma", "sm_90/wgmma"}
    assert all(layer.speedup is not None and layer.speedup > 0 for layer in report.layers)
    assert model(x).isfinite().all()


def test_choice_and_info_name_the_kernels() -> None:
    weight = on_gpu(block_sparse((64, 64), Block(16, 16), dtype=torch.bfloat16))
    assert blocksparse_choice((300, 64), weight)["kernel"] in ("mma", "wgmma")
    page = str(gossamer.info())
    assert "blocksparse_conv on cuda:" in page
    assert "blocksparse_linear on cuda:" in page
