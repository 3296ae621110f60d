"""From the public functions over voxels down to the kernels, as on a GPU, with these emulated."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from emulated_gpu import Gpu
from gossamer import _C
from gossamer import pointcloud as pc
from gossamer.ops import pointcloud_conv, pointcloud_layout
from pointcloud_cases import CASES, ConvOracle, PointcloudCase, WeightGradOracle
from torch import Tensor

MMA, FMA, GROUPED = range(3)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TYPICAL = PointcloudCase((3, 3), 40, 35, 0.5, 20, 37)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_plain_torch(gpu: Gpu, dtype: torch.dtype) -> None:
    """Groups too; 1500 voxels are for a GPU."""
    for i, case in enumerate(case for case in CASES if case.n_in < 1000):
        feats, weight, bias = operands = [t.requires_grad_() for t in case.operands(dtype)]
        map, activation = case.map(shuffled=i % 3 > 0), (None, "relu", "gelu", "silu")[i % 4]
        with torch.no_grad():
            y = pointcloud_conv(feats, weight, bias, map, case.groups, activation)
        ConvOracle(feats, weight, bias, map, case.groups, activation).check(y)
        y = pointcloud_conv(feats, weight, bias, map, case.groups)
        dy = torch.randn(y.shape).to(dtype)
        dx, dw, db = torch.autograd.grad(y, operands, dy)
        back = weight.unflatten(2, (case.groups, -1)).transpose(1, 3).flatten(2)
        ConvOracle(dy, back, None, map.transposed(), case.groups).check(dx)
        WeightGradOracle(dy, feats, map, case.groups).check(dw)
        torch.testing.assert_close(db, dy.sum(0))
        if case.groups > 1:
            assert gpu.kernel == GROUPED
    pointcloud_conv(*TYPICAL.operands(dtype), TYPICAL.map())
    assert gpu.kernel == (MMA if dtype.itemsize == 2 else FMA)


def test_strides_and_float64(gpu: Gpu) -> None:
    map = TYPICAL.map()
    for dtype in (*DTYPES, torch.float64):
        feats, weight, bias = TYPICAL.operands(dtype)
        y = pointcloud_conv(feats, weight, bias, map)
        ConvOracle(feats, weight, bias, map).check(y)
        wide = torch.full((TYPICAL.n_in, 45), float("nan"), dtype=dtype)
        wide[:, 3:23] = feats
        for x in (wide[:, 3:23], feats.t().contiguous().t()):
            got = pointcloud_conv(x, weight.mT.contiguous().mT, bias.repeat(2)[: len(bias)], map)
            assert torch.equal(got, y)


def test_autocast_and_layers(gpu: Gpu) -> None:
    coords = (torch.rand(1, 9, 8, 7) < 0.4).nonzero().int()
    x = pc.SparseTensor(coords, torch.randn(len(coords), 4))
    net = torch.nn.Sequential(
        pc.SubmanifoldConv3d(4, 16, 3), pc.Conv3d(16, 24, 2, stride=2), pc.InverseConv3d(24, 8, 2)
    )
    exact = net(x).feats
    assert gpu.kernel == FMA
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x).feats
    assert (y.dtype, gpu.kernel) == (torch.bfloat16, MMA)
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.05)
    y.float().square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) and p.grad.any() for p in net.parameters())


def test_layouts_live_as_long_as_the_map(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def counted(name: str) -> Any:
        make = getattr(pointcloud_layout, name)
        return lambda *args: made.append(name) or make(*args)

    for name in ("_make_table", "_make_segments"):
        monkeypatch.setattr(pointcloud_layout, name, counted(name))
    before = len(pointcloud_layout._layouts)
    for shuffled in (True, False):
        map, made[:] = TYPICAL.map(shuffled), []
        feats, weight, bias = (t.requires_grad_() for t in TYPICAL.operands(torch.float32))
        for _ in range(3):
            pointcloud_conv(feats, weight, bias, map).square().sum().backward()
        # Of the map and of the transposed one, and the pairs.
        assert sorted(made) == ["_make_segments", "_make_table", "_make_table"]
        # What is written into a map counts.
        was = pointcloud_conv(feats, weight, bias, map)
        map.in_index.add_(0)
        assert torch.equal(pointcloud_conv(feats, weight, bias, map), was)
        assert len(made) == 4
    del map, was
    gc.collect()
    assert len(pointcloud_layout._layouts) == before


with torch.random.fork_rng():
    torch.manual_seed(0)  # messages name numbers of the map
    FEATS, WEIGHT, BIAS = TYPICAL.operands(torch.float32)
    MAP = TYPICAL.map()


def changed(name: str, at: int, value: int) -> dict[str, Any]:
    tensor = getattr(MAP, name).clone()
    tensor[at] = value
    return {name: tensor}


@pytest.mark.parametrize(
    ("operands", "of_map", "error", "text"),
    [
        ({"weight": WEIGHT[:8]}, {}, ValueError, r"neighbours has shape \[9, 128\], expected \[8"),
        ({"bias": BIAS.half()}, {}, TypeError, "float16"),
        ({"activation": "tanh"}, {}, ValueError, "tanh"),
        ({}, {"in_index": MAP.in_index.long()}, TypeError, "in_index is torch.int64"),
        ({}, {"in_index": MAP.in_index[1:]}, ValueError, "in_index has shape"),
        ({}, changed("in_index", 0, -1), ValueError, r"in_index holds -1 to 39, there are 40"),
        ({}, changed("out_index", 1, 0), ValueError, r"out_index\[1\] is 0, not above"),
        ({}, changed("tap_offsets", 1, 900), ValueError, "do not ascend"),
        ({}, changed("tap_offsets", 0, 1), ValueError, "do not ascend from 0"),
        ({}, changed("in_order", 3, 40), ValueError, r"in_order holds [01] to 40, there are 40"),
        ({}, changed("out_order", 1, int(MAP.out_order[0])), ValueError, "a row twice"),
    ],
)
def test_mistakes(
    gpu: Gpu, operands: dict[str, Any], of_map: dict[str, Any], error: type, text: str
) -> None:
    given = {"feats": FEATS, "weight": WEIGHT, "bias": None, "map": replace(MAP, **of_map)}
    with pytest.raises(error, match=text):
        pointcloud_conv(**(given | operands))


def test_what_the_border_refuses(gpu: Gpu) -> None:
    def conv(**other: Tensor | None) -> None:
        table = pointcloud_layout.output_table(
            (MAP.in_index, MAP.out_index, MAP.tap_offsets, None, None), 40, 35
        )
        operands: dict[str, Any] = {
            "out": torch.empty(35, 37),
            "feats": FEATS,
            "weight": WEIGHT,
            "bias": None,
            **table._asdict(),
            "groups": 1,
            "activation": "none",
        }
        _C.pointcloud_conv_cuda(**(operands | other))

    conv()
    with pytest.raises(TypeError, match="float64, a GPU has kernels of its own"):
        conv(feats=FEATS.double())
    with pytest.raises(ValueError, match=r"rows has shape \[5\], expected \[128\]"):
        conv(rows=MAP.in_index[:5].contiguous())
    with pytest.raises(ValueError, match=r"128 positions and \d+ visits for 129 outputs"):
        conv(out=torch.empty(129, 37))
    with pytest.raises(TypeError, match="begins is int64"):
        conv(begins=MAP.tap_offsets)
    gpu.describe(capability=75)
    with pytest.raises(ValueError, match=r"compute capability 7\.5, the kernels need 8\.0"):
        conv()
