"""2:4 convolutions on a GPU: results of every kernel and tile, and what only a GPU can show."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import gossamer
import pytest
import torch
from conv_cases import CASES, LAST, ConvCase, typical
from cuda_graphs import captured
from gossamer.formats import Sparse24Conv, Sparse24ConvPanels
from gossamer.nn import SparseConv2d
from gossamer.ops import cuda_workspace, sparse24_conv
from gossamer.ops.sparse24_conv import (
    sparse24_conv_by_way,
    sparse24_conv_choice,
    sparse24_conv_ways,
)
from test_sparse24_conv import oracle, weight_of
from torch import Tensor, nn

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.filterwarnings("ignore:Using padding='same'"),
]
HALVES = (torch.bfloat16, torch.float16)
# Batch, C_in, C_out, extent, kernel, stride: few pixels and many, few outputs and many.
LAYERS = (
    (1, 64, 64, 7, 3, 1),
    (2, 512, 512, 7, 3, 1),
    (32, 128, 128, 28, 3, 1),
    (64, 64, 64, 56, 3, 1),
    (16, 256, 256, 14, 3, 2),
    (16, 128, 512, 28, 1, 1),
    (8, 256, 512, 56, 1, 2),
)
# On Hopper of the kernel whose blocks share a tile, and of the one whose tiles are whole.
SHARED, WHOLE = (2, 512, 512, 7, 3, 1), (32, 128, 128, 28, 3, 1)


def on_gpu(weight: Sparse24Conv) -> Sparse24ConvPanels:
    return Sparse24ConvPanels.from_sparse24(weight.to("cuda"))


def drawn(number: int) -> ConvCase:
    """One of CASES, of channels that the kernels take: every other one as Hopper's want them."""
    case = CASES[number]
    grouped = case.groups > 1 and number % 2 == 0
    return replace(
        case,
        groups=case.groups if grouped else 1,
        group_in=(8, 64, 24, 128)[number % 4],
        group_out=16 * case.group_out if grouped else case.group_out,
        dtype=HALVES[number // 4 % 2],
    )


def case_of(layer: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> ConvCase:
    batch, c_in, c_out, extent, kernel, stride = layer
    return typical(
        batch=batch, group_in=c_in, group_out=c_out, kernel=(kernel, kernel), dtype=dtype,
        extents=(extent, extent), stride=(stride, stride), padding=(kernel // 2, kernel // 2),
    )  # fmt: skip


def x_of(case: ConvCase) -> Tensor:
    x = torch.randn(case.batch, case.group_in, *case.extents, device="cuda").to(case.dtype)
    return x.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("number", range(300))
def test_any_convolution_matches_dense(number: int) -> None:
    case, act = drawn(number), (None, "relu", "gelu", "silu")[number % 3]
    weight, x = weight_of(case), case.x()
    bias = torch.randn(case.shape[0]).to(case.dtype) if case.bias else None
    panels, given = on_gpu(weight), None if bias is None else bias.cuda()
    y = sparse24_conv(x.cuda(), panels, given, **case.geometry, activation=act)
    oracle(case, x, weight, bias, act).check(y.cpu())
    last = None if x.is_contiguous() else LAST.get(x.dim())
    assert y.is_contiguous(memory_format=last or torch.contiguous_format)
    exact, residual = oracle(case, x, weight, bias), torch.randn(y.shape).to(case.dtype)
    y = sparse24_conv(x.cuda(), panels, given, **case.geometry, residual=residual.cuda())
    # A sum that is rounded before the residual is added to it.
    exact.limit += torch.finfo(case.dtype).eps * (exact.y.abs() + residual.double().abs())
    exact.y = exact.y + residual.double()
    exact.check(y.cpu())
    exact = oracle(case, x, weight, None)
    for way in sparse24_conv_ways(x.shape, panels, **case.geometry):
        exact.check(sparse24_conv_by_way(way, x.cuda(), panels, **case.geometry).cpu())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_every_way_matches_dense(layer: tuple[int, ...], dtype: torch.dtype) -> None:
    case = case_of(layer, dtype)
    weight, x = weight_of(case).to("cuda"), x_of(case)
    panels, exact = Sparse24ConvPanels.from_sparse24(weight), oracle(case, x, weight, None)
    ways = sparse24_conv_ways(x.shape, panels, **case.geometry)
    hopper = torch.cuda.get_device_capability() == (9, 0)
    kernels = {"prefill", "wgmma", "stream"} if hopper else {"prefill"}
    assert {way[0] for way in ways} == kernels
    for way in ways:
        y = sparse24_conv_by_way(way, x, panels, **case.geometry)
        exact.check(y)
        for _ in range(3):
            assert torch.equal(sparse24_conv_by_way(way, x, panels, **case.geometry), y), way
    y = sparse24_conv(x, panels, **case.geometry)
    exact.check(y)
    assert y.is_contiguous(memory_format=torch.channels_last)
    again = sparse24_conv(x.contiguous(), panels, **case.geometry)
    assert again.is_contiguous()
    assert torch.equal(again, y)


@pytest.mark.parametrize("layer", [SHARED, WHOLE], ids=str)
def test_runs_are_bitwise_equal(layer: tuple[int, ...]) -> None:
    case = case_of(layer)
    panels, x = on_gpu(weight_of(case)), x_of(case)
    first = sparse24_conv(x, panels, **case.geometry)
    for _ in range(20):
        assert torch.equal(sparse24_conv(x, panels, **case.geometry), first)


@pytest.mark.parametrize("layer", [SHARED, WHOLE], ids=str)
def test_graph_replays_with_other_inputs(layer: tuple[int, ...]) -> None:
    case = case_of(layer)
    panels, x = on_gpu(weight_of(case)), x_of(case)

    def call() -> Tensor:
        return sparse24_conv(x, panels, **case.geometry)

    assert torch.equal(captured(call), call())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    for _ in range(3):
        x.copy_(x_of(case))
        y.zero_()
        graph.replay()
        assert torch.equal(y, call())


@pytest.mark.parametrize("layer", [SHARED, WHOLE], ids=str)
def test_streams(layer: tuple[int, ...]) -> None:
    case = case_of(layer)
    panels, inputs = on_gpu(weight_of(case)), [x_of(case) for _ in range(2)]
    expected = [sparse24_conv(x, panels, **case.geometry) for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    results: list[list[Tensor]] = [[] for _ in inputs]
    for _ in range(10):
        for x, stream, mine in zip(inputs, streams, results, strict=True):
            with torch.cuda.stream(stream):
                mine.append(sparse24_conv(x, panels, **case.geometry))
    torch.cuda.synchronize()
    for mine, y in zip(results, expected, strict=True):
        assert all(torch.equal(result, y) for result in mine)
    assert not any(counters.any() for counters in cuda_workspace._counters.values())


@pytest.mark.parametrize("layer", [SHARED, WHOLE], ids=str)
def test_a_thread_may_begin_with_it(layer: tuple[int, ...]) -> None:
    # The driver, which describes tensors to Hopper's copies, knows no device in a thread until the
    # runtime has bound one.
    case = case_of(layer)
    panels, x = on_gpu(weight_of(case)), x_of(case)
    expected = sparse24_conv(x, panels, **case.geometry)
    torch.cuda.synchronize()
    with ThreadPoolExecutor(1) as fresh:
        y = fresh.submit(sparse24_conv, x, panels, **case.geometry).result()
    assert torch.equal(y, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_layer_on_another_than_the_current_gpu() -> None:
    case = typical(dtype=torch.float16, group_in=64)
    weight, x = weight_of(case), case.x()
    panels = Sparse24ConvPanels.from_sparse24(weight.to("cuda:1"))
    y = sparse24_conv(x.to("cuda:1"), panels, **case.geometry)
    oracle(case, x, weight, None).check(y.cpu())
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_non_finite_x_goes_through_stored_positions_only(dtype: torch.dtype) -> None:
    case = typical(group_in=64, group_out=48, dtype=dtype)
    weight, x = weight_of(case), case.x()
    x[1, 4, 3, 3], x[0, 12, 0, 0] = torch.nan, torch.inf
    slots = replace(weight, values=torch.ones_like(weight.values)).to_dense()
    met = case.dense((~x.isfinite()).double(), slots.double(), None) > 0
    panels = on_gpu(weight)
    for way in sparse24_conv_ways(x.shape, panels, **case.geometry):
        y = sparse24_conv_by_way(way, x.cuda(), panels, **case.geometry).cpu()
        assert torch.equal(~y.isfinite(), met)


def layer_and_x(dtype: torch.dtype = torch.bfloat16) -> tuple[SparseConv2d, Tensor]:
    dense = nn.Conv2d(128, 128, 3, padding=1, device="cuda", dtype=dtype)
    layer = SparseConv2d.from_dense(dense, prune="magnitude").eval()
    return layer, torch.randn(2, 128, 14, 14, device="cuda").to(dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_packed_layer_in_both_memory_formats(dtype: torch.dtype) -> None:
    layer, x = layer_and_x(dtype)
    with torch.no_grad():
        expected = layer.to_dense().double()(x.double())
        assert layer.pack().packed
        found = []
        for memory_format in (torch.contiguous_format, torch.channels_last):
            y = layer(x.contiguous(memory_format=memory_format))
            assert y.is_contiguous(memory_format=memory_format)
            torch.testing.assert_close(y.double(), expected, rtol=2**-7, atol=2**-9)
            found.append(y)
    assert torch.equal(*found)


def test_compile_and_autocast() -> None:
    layer, x = layer_and_x()
    with torch.no_grad():
        y = layer.pack()(x)
        assert torch.equal(torch.compile(layer, fullgraph=True)(x), y)
        last = x.to(memory_format=torch.channels_last)
        assert torch.equal(torch.compile(layer, fullgraph=True)(last), y)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            assert torch.equal(layer(x.float()), y)


@pytest.mark.parametrize("channels_last", [True, False])
def test_gradient_of_a_packed_weight_reaches_x(channels_last: bool) -> None:
    case = typical(group_in=64, group_out=48, dtype=torch.float16, channels_last=channels_last)
    weight, x = weight_of(case), case.x().cuda().requires_grad_()
    y = sparse24_conv(x, on_gpu(weight), **case.geometry, activation="silu")
    dy = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, x, dy)
    wide = x.detach().double().requires_grad_()
    dense = nn.functional.silu(case.dense(wide, weight.to_dense().cuda().double(), None))
    (expected,) = torch.autograd.grad(dense, wide, dy.double())
    most = float(expected.abs().max())
    torch.testing.assert_close(found.double(), expected, rtol=2**-7, atol=2**-7 * most)


def test_layer_is_trained_then_packed() -> None:
    layer, x = layer_and_x(torch.float32)
    layer.train()
    assert isinstance(layer.weight, Sparse24Conv)
    assert not layer.pack().packed  # float32
    dense = layer.to_dense()
    dy = torch.randn(layer(x).shape, device="cuda")
    for of in (layer, dense):
        (of(x) * dy).sum().backward()
    assert layer.values is not None
    weight, found = layer.weight, layer.values.grad
    slots = replace(weight, values=torch.ones_like(weight.values)).to_dense()
    kept = replace(weight, values=found).to_dense()
    torch.testing.assert_close(kept, dense.weight.grad * slots, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(layer.bias.grad, dense.bias.grad, rtol=1e-4, atol=1e-3)
    before = layer.values.detach().clone()
    torch.optim.SGD(layer.parameters(), 1e-4).step()
    assert not torch.equal(layer.values, before)
    layer, x = layer.bfloat16().eval(), x.bfloat16()
    with torch.no_grad():
        expected = layer(x)
        assert layer.pack().packed
        torch.testing.assert_close(layer(x), expected, rtol=2**-6, atol=2**-6)


def test_state_goes_to_the_cpu_and_back() -> None:
    layer, x = layer_and_x()
    portable = {key: t.clone() for key, t in layer.state_dict().items()}
    with torch.no_grad():
        expected = layer.pack()(x)
        state = layer.state_dict()
        assert all(torch.equal(state[key], t) for key, t in portable.items())
        host = SparseConv2d(128, 128, 3, padding=1, dtype=torch.bfloat16).eval()
        host.load_state_dict({key: t.cpu() for key, t in state.items()})
        y = host.pack()(x.cpu())
        torch.testing.assert_close(y, expected.cpu(), rtol=2**-6, atol=2**-6)
        other, _ = layer_and_x()
        other.pack().load_state_dict(host.state_dict())
        assert other.packed
        assert torch.equal(other(x), expected)


def test_layer_moves_to_the_cpu_and_back() -> None:
    layer, x = layer_and_x()
    with torch.no_grad():
        expected, state = layer.pack()(x), layer.state_dict()
        moved = copy.deepcopy(layer)
        assert moved.packed
        assert torch.equal(moved(x), expected)
        moved.cpu()
        torch.testing.assert_close(moved(x.cpu()), expected.cpu(), rtol=2**-6, atol=2**-6)
        moved.cuda().pack()  # a CPU may have had no faster layout, and the layer none there
        assert torch.equal(moved(x), expected)
    assert all(torch.equal(t, state[key]) for key, t in moved.state_dict().items())


def test_mistakes_are_named() -> None:
    case = typical(group_in=64, dtype=torch.bfloat16)
    weight, x = weight_of(case), case.x()
    for held in (on_gpu(weight), weight.to("cuda")):
        with pytest.raises((ValueError, RuntimeError), match="cpu"):
            sparse24_conv(x, held)
    for held in (Sparse24ConvPanels.from_sparse24(weight), weight):
        with pytest.raises((ValueError, RuntimeError), match="cpu"):
            sparse24_conv(x.cuda(), held)
    with pytest.raises((ValueError, RuntimeError), match="cpu"):
        sparse24_conv(x.cuda(), on_gpu(weight), torch.zeros(21).bfloat16())
    residual = torch.zeros(2, 21, 9, 7).bfloat16()
    with pytest.raises((ValueError, RuntimeError), match="cpu"):
        sparse24_conv(x.cuda(), on_gpu(weight), residual=residual)


def test_convert_measures_on_the_gpu() -> None:
    model = nn.Sequential(nn.Conv2d(128, 128, 3), nn.ReLU(), nn.Conv2d(128, 256, 1))
    model = model.cuda().bfloat16()
    x = torch.randn(4, 128, 28, 28, device="cuda").bfloat16().to(memory_format=torch.channels_last)
    report = gossamer.convert(model, prune="magnitude", sample_input=x, force=True)
    assert all("sm_" in (layer.kernel or "") for layer in report.layers)
    assert all(layer.speedup is not None and layer.speedup > 0 for layer in report.layers)
    assert model(x).isfinite().all()


def test_choice_names_a_kernel_or_says_why_not() -> None:
    case = case_of(WHOLE)
    chosen = sparse24_conv_choice((1, 128, 28, 28), on_gpu(weight_of(case)), **case.geometry)
    assert chosen["target"] in ("sm_80", "sm_90")
    assert chosen["pays"]
    few = typical(group_in=12, dtype=torch.bfloat16)
    chosen = sparse24_conv_choice((1, 12, 9, 9), on_gpu(weight_of(few)), **few.geometry)
    assert chosen["kernel"] == "dense"
    assert "multiple of 8" in chosen["why"]
