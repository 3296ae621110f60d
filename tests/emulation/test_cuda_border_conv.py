"""From the public functions of 2:4 convolutions down to the kernels, as on an emulated GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conv_cases import CASES, LAST, typical
from emulated_gpu import DECODE, PREFILL, STREAM, WGMMA, Gpu
from gossamer import _C, _self_check
from gossamer.formats import Sparse24Conv, Sparse24ConvPanels
from gossamer.nn import SparseConv
from gossamer.ops import sparse24_conv, sparse24_conv_product
from gossamer.ops.sparse24_conv import sparse24_conv_by_way, sparse24_conv_choice
from gossamer.ops.sparse24_conv import sparse24_conv_ways as ways_of
from gossamer.prune import magnitude_24
from sparse24_conv import Conv24
from torch import Tensor, nn

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")
HALVES = (torch.bfloat16, torch.float16)
SAME = {"stride": (1, 1), "dilation": (1, 1), "padding": (1, 1)}


def run(conv: Conv24, **rest: Any) -> Tensor:
    panels = Sparse24ConvPanels.from_sparse24(conv.weight)
    return sparse24_conv(conv.x, panels, conv.bias, **conv.case.geometry, **rest)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_conv_matches_dense(gpu: Gpu, dtype: torch.dtype, channels_last: bool) -> None:
    for capability, kernels in ((80, (PREFILL,)), (90, (WGMMA, STREAM))):
        gpu.describe(capability, multiprocessors=4)
        case = typical(dtype=dtype, channels_last=channels_last, group_in=64, group_out=40)
        conv = Conv24.of(case)
        y = run(conv, activation="relu")
        assert gpu.kernel in kernels
        expected = conv.expected()
        assert torch.equal(y, expected.relu().to(dtype))
        assert y.stride() == expected.stride()


def test_pointwise_convolutions_are_gemms(gpu: Gpu) -> None:
    case = typical(
        **{**SAME, "padding": (0, 0)}, kernel=(1, 1), group_in=72, group_out=50,
        dtype=torch.bfloat16, channels_last=True, batch=1, extents=(5, 9),
    )  # fmt: skip
    for capability, kernel in ((80, DECODE), (90, STREAM)):
        gpu.describe(capability, multiprocessors=132)
        conv = Conv24.of(case)
        assert torch.equal(run(conv), conv.expected().bfloat16())
        assert gpu.kernel == kernel
        # With several groups, or a stride, pixels are gathered.
        for other in (replace(case, groups=2, group_out=48), replace(case, stride=(2, 1))):
            conv = Conv24.of(other)
            assert torch.equal(run(conv), conv.expected().bfloat16())
            assert gpu.kernel == PREFILL


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_a_residual_is_added(gpu: Gpu, activation: str | None, channels_last: bool) -> None:
    conv = Conv24.of(typical(**SAME, group_in=24, dtype=torch.float16, channels_last=channels_last))
    expected = conv.expected()
    residual = torch.randint(-9, 9, expected.shape).half()
    sums = expected + residual.double()
    given = residual if channels_last else residual.to(memory_format=torch.channels_last)
    y = run(conv, residual=given, activation=activation)
    expected = sums if activation is None else getattr(F, activation)(sums)
    torch.testing.assert_close(y.double(), expected, rtol=2**-9, atol=2**-9)
    assert y.stride() == conv.expected().stride()
    with pytest.raises(ValueError, match="residual has shape"):
        run(conv, residual=residual[..., 1:])


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("number", range(2, 300, 9))
def test_any_convolution_matches_dense(gpu: Gpu, number: int, capability: int) -> None:
    gpu.describe(capability, multiprocessors=8)
    case = replace(
        CASES[number],
        group_in=(8, 64, 13, 40, 128)[number % 5],
        dtype=(*HALVES, torch.float32)[number % 3],
    )
    conv = Conv24.of(case)
    y, expected = run(conv), conv.expected()
    assert torch.equal(y, expected.to(case.dtype))
    if len(case.kernel) < 3:  # torch's 3-D convolution of float64 forgets the memory format
        assert y.stride() == expected.stride()


def test_what_has_no_kernel_is_dense(gpu: Gpu) -> None:
    for case, why in (
        (typical(group_in=12, dtype=torch.bfloat16), "no multiple of 8"),
        (typical(group_in=8, groups=2, group_out=24, dtype=torch.bfloat16), "none of 16"),
        (typical(group_in=64), "no exact sparse product"),
    ):
        conv = Conv24.of(case)
        panels = Sparse24ConvPanels.from_sparse24(conv.weight)
        chosen = sparse24_conv_choice(conv.x.shape, panels, **case.geometry)
        assert chosen["kernel"] == "dense"
        assert why in chosen["why"]
        assert torch.equal(run(conv), conv.expected().to(case.dtype))
        assert ways_of(conv.x.shape, panels, **case.geometry) == []
        way = ("prefill", 128, 128, 1, 1, 0)
        with pytest.raises(ValueError, match="no kernel computes this convolution"):
            sparse24_conv_by_way(way, conv.x, panels, **case.geometry)


def test_empty_and_unbatched(gpu: Gpu) -> None:
    conv = Conv24.of(typical(**SAME, group_in=64, dtype=torch.bfloat16))
    expected = conv.expected().bfloat16()
    panels = Sparse24ConvPanels.from_sparse24(conv.weight)
    y = sparse24_conv(conv.x[0], panels, conv.bias, **conv.case.geometry)
    assert torch.equal(y, expected[0])
    assert sparse24_conv(conv.x[:0], panels, padding=1).shape == (0, *expected.shape[1:])


def test_x_off_alignment_is_moved(gpu: Gpu) -> None:
    conv = Conv24.of(typical(**SAME, group_in=64, dtype=torch.bfloat16, channels_last=True))
    memory = torch.zeros(conv.x.numel() + 1).bfloat16()[1:]
    x = memory.as_strided(conv.x.shape, conv.x.stride(), 1).copy_(conv.x)
    assert x.data_ptr() % 16 != 0
    conv.x = x
    assert torch.equal(run(conv), conv.expected().bfloat16())
    pixels = x.movedim(1, -1)[:, None]
    out = torch.empty(*pixels.shape[:-1], 21).bfloat16()
    panels = Sparse24ConvPanels.from_sparse24(conv.weight).panels
    one, none = (1, 1, 1), (0, 1, 1)
    with pytest.raises(ValueError, match="no multiple of 16 bytes"):
        _C.sparse24_conv_cuda(
            out, pixels, panels, None, 1, (1, 3, 3), one, none, one, "none", None, None
        )


def test_x_without_pixels(gpu: Gpu) -> None:
    conv = Conv24.of(typical(**SAME, group_in=64, dtype=torch.bfloat16))
    panels = Sparse24ConvPanels.from_sparse24(conv.weight)
    for capability in (80, 90):
        gpu.describe(capability)
        y = sparse24_conv(conv.x[:, :, :0], panels, conv.bias, padding=(3, 1))
        assert conv.bias is not None
        assert torch.equal(y, conv.bias[:, None, None].expand_as(y))


def test_strided_x_is_read_as_it_is(gpu: Gpu) -> None:
    conv = Conv24.of(typical(**SAME, group_in=64, dtype=torch.float16))
    x = torch.zeros(*conv.x.shape[:-1], 2 * conv.x.shape[-1]).half()[..., ::2].copy_(conv.x)
    conv.x = x.transpose(2, 3)
    assert torch.equal(run(conv), conv.expected().half())


def test_ways_by_name(gpu: Gpu) -> None:
    case = typical(**SAME, group_in=64, group_out=70, dtype=torch.bfloat16)
    conv = Conv24.of(replace(case, bias=False))
    panels = Sparse24ConvPanels.from_sparse24(conv.weight)
    expected = conv.expected().bfloat16()
    for capability, kernels in ((80, {"prefill"}), (90, {"prefill", "wgmma", "stream"})):
        gpu.describe(capability, multiprocessors=4)
        ways = ways_of(conv.x.shape, panels, padding=1)
        assert {way[0] for way in ways} == kernels
        for way in ways:
            y = sparse24_conv_by_way(way, conv.x, panels, padding=1)
            assert torch.equal(y, expected)


def test_panels_are_exact_and_go_back(gpu: Gpu) -> None:
    for groups, shape in ((1, (21, 19, 3, 3)), (2, (32, 8, 2)), (1, (5, 64, 1, 3, 2))):
        for dtype in (*HALVES, torch.float32):
            dense = magnitude_24(torch.randn(shape), dim=1).to(dtype)
            weight = Sparse24Conv.from_dense(dense, groups)
            panels = Sparse24ConvPanels.from_sparse24(weight)
            assert torch.equal(panels.to_dense(), dense)
            back = panels.to_sparse24().validate()
            assert torch.equal(back.values, weight.values)
            assert torch.equal(back.indices, weight.indices)
    with pytest.raises(ValueError, match="panels have shape"):
        Sparse24ConvPanels(panels.panels[:, :-1], shape, 1, dtype)


def test_layer(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = nn.Conv2d(64, 64, 3, padding=1, dtype=torch.bfloat16)
    layer = SparseConv.from_dense(dense, prune="magnitude").eval()
    x = torch.randn(2, 64, 6, 5).bfloat16().to(memory_format=torch.channels_last)
    with torch.no_grad():
        before = layer(x)
        state = {key: t.clone() for key, t in layer.state_dict().items()}
        assert layer.pack().packed
        y = layer(x)
        assert gpu.kernel == PREFILL
        torch.testing.assert_close(y, before, rtol=2**-7, atol=2**-7)
        # A float32 layer, and one of few channels, stay as they are.
        assert not SparseConv.from_dense(nn.Conv2d(64, 64, 3), prune="magnitude").pack().packed
        small = nn.Conv2d(4, 64, 3, dtype=torch.float16)
        assert not SparseConv.from_dense(small, prune="magnitude").pack().packed
        gpu.describe(90, multiprocessors=4)  # whose TMA walks in steps of up to 8
        for stride in (1, 9):
            wide = nn.Conv2d(64, 128, 3, stride, dtype=torch.float16)
            packed = SparseConv.from_dense(wide, prune="magnitude").pack().packed
            assert packed == (stride == 1)
        gpu.describe()
    for key, t in layer.state_dict().items():
        assert torch.equal(t, state[key])
    twin = SparseConv.from_dense(dense, prune="magnitude").eval().pack()
    twin.load_state_dict(state)
    assert torch.equal(twin(x), y)
    assert torch.equal(layer.unpack()(x), before)


def test_gradient_of_a_packed_weight_reaches_x(gpu: Gpu) -> None:
    conv = Conv24.of(typical(**SAME, group_in=64, dtype=torch.float16))
    conv.x.requires_grad_()
    y = run(conv)
    dense = conv.case.dense(conv.x.double(), conv.weight.to_dense().double(), conv.bias.double())
    dy = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, conv.x, dy)
    (expected,) = torch.autograd.grad(dense, conv.x, dy.double())
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-5)


def test_a_weight_in_training_is_dense(gpu: Gpu) -> None:
    conv = Conv24.of(typical(**SAME, group_in=64, dtype=torch.float16))
    chosen = sparse24_conv_choice(conv.x.shape, conv.weight, **conv.case.geometry)
    assert (chosen["target"], chosen["kernel"]) == ("torch", "dense")
    y = sparse24_conv(conv.x, conv.weight, conv.bias, **conv.case.geometry)
    assert torch.equal(y, conv.expected().half())


def test_choice_is_that_of_the_device() -> None:
    def choice(capability: int, *shape: int, extent: int = 56, **rest: Any) -> dict[str, Any]:
        weight = Sparse24Conv.from_dense(torch.zeros(shape).bfloat16())
        panels = Sparse24ConvPanels.from_sparse24(weight)
        device = {
            "capability": capability,
            "multiprocessors": 108,
            "shared_bytes": (163 if capability == 80 else 99 if capability == 89 else 227) << 10,
            "l2_bytes": 40 << 20,
        }
        x = (8, shape[1], extent, extent)
        return sparse24_conv_choice(x, panels, device=device, **rest)

    few, many = (64, 64, 3, 3), (256, 256, 3, 3)
    chosen = choice(80, *few, padding=1)
    assert (chosen["target"], chosen["kernel"], chosen["tile_n"]) == ("sm_80", "prefill", 64)
    assert (chosen["rows"], chosen["pays"]) == ("pixels", True)
    assert choice(80, *many, padding=1)["tile_n"] == 128
    assert choice(89, *few, padding=1)["tile_m"] == 128  # 256 do not fit
    assert choice(90, *many, padding=1)["target"] == "sm_90"
    assert choice(90, *many, padding=1)["kernel"] == "wgmma"
    assert choice(90, *many, extent=7, padding=1)["kernel"] == "stream"
    assert choice(90, *many, stride=9)["target"] == "sm_80"  # more than TMA walks
    assert not choice(90, *many, stride=9)["pays"]
    assert not choice(90, *few, padding=1)["pays"]  # half of a tile of 128 outputs
    assert not choice(80, 16, 64, 3, 3, padding=1)["pays"]
    assert choice(80, 256, 64, 1, 1)["rows"] == "matrix"
    # Few outputs of many pixels have smaller tiles than a GEMM.
    assert [choice(80, 64, 256, 1, 1)[key] for key in ("rows", "tile_n", "pays")] == [
        "pixels",
        64,
        True,
    ]
    shared = [choice(80, 512, 512, 3, 3, extent=e, padding=1)["split_k"] for e in (7, 56)]
    assert shared[0] > 1 == shared[1]
    with pytest.raises(ValueError, match=r"compute capability 7\.0"):
        choice(70, *few)
    panels = Sparse24ConvPanels.from_sparse24(Sparse24Conv.from_dense(torch.zeros(few)))
    none = {"capability": 80, "multiprocessors": 0, "shared_bytes": 0, "l2_bytes": 0}
    with pytest.raises(ValueError, match="0 multiprocessors"):
        sparse24_conv_choice((8, 64, 56, 56), panels, device=none)
    assert ways_of((8, 64, 56, 56), panels) == []


def test_wrong_kernels_of_convolutions_are_found(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.describe(90, multiprocessors=4)
    assert _self_check.wrong_results.__wrapped__(torch.device("cpu")) is None
    native = _C.sparse24_conv_cuda

    def wrong_stream(out: Tensor, *args: Any) -> None:
        native(out, *args)
        if gpu.kernel == STREAM:
            out.neg_()

    monkeypatch.setattr(_C, "sparse24_conv_cuda", wrong_stream)
    fault = _self_check.wrong_results.__wrapped__(torch.device("cpu"))
    assert fault is not None
    assert "torch.bfloat16 of 2:4 convolutions, torch.float16 of 2:4 convolutions" in fault


def test_memory_format_of_three_axes(gpu: Gpu) -> None:
    weight = magnitude_24(torch.randn(32, 64, 2, 3, 3).bfloat16(), dim=1)
    panels = Sparse24ConvPanels.from_sparse24(Sparse24Conv.from_dense(weight))
    x = torch.randn(1, 64, 4, 5, 6).bfloat16()
    for memory_format in (torch.contiguous_format, LAST[5]):
        given = x.contiguous(memory_format=memory_format)
        y, expected = sparse24_conv(given, panels), F.conv3d(given.double(), weight.double())
        torch.testing.assert_close(y.double(), expected, rtol=2**-7, atol=2**-4)
        assert y.is_contiguous(memory_format=memory_format)
    assert sparse24_conv_product.choose_cuda.cache_info().currsize > 0
