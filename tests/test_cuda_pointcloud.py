"""Point clouds on a GPU, what only a GPU can show; tests/test_pointcloud_conv.py has the rest."""

from __future__ import annotations

import pytest
import torch
from cuda_graphs import captured
from gossamer import fold_batchnorm, reference
from gossamer import pointcloud as pc
from gossamer.ops import pointcloud_conv
from gossamer.ops.pointcloud_pool import pointcloud_pool
from pointcloud_cases import ConvOracle, PointcloudCase, WeightGradOracle, tensors_of
from torch import Tensor

pytestmark = pytest.mark.cuda
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def scene(voxels: int, channels: int, dtype: torch.dtype = torch.float32) -> pc.SparseTensor:
    """A rough surface, in no order of rows."""
    points = torch.rand(voxels, 3) * torch.tensor([120.0, 120.0, 6.0])
    points[:, 2] = points[:, 2].floor() / 3 + 3 * (points[:, :2] / 20).sin().sum(1)
    coords = torch.unique(points.floor().int(), dim=0)
    coords = torch.nn.functional.pad(coords[torch.randperm(len(coords))], (1, 0))
    return pc.SparseTensor(coords.cuda(), torch.randn(len(coords), channels).cuda().to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [(4, 32), (32, 32), (64, 96), (96, 128), (256, 256), (17, 513)])
def test_layers_of_a_scene(width: tuple[int, int], dtype: torch.dtype) -> None:
    """Every tile, with more blocks than a GPU runs at once."""
    x = scene(30_000, width[0], dtype)
    map = x.coordinates.submanifold(3)
    weight = (torch.randn(27, *width) / 27).cuda().to(dtype)
    y = pointcloud_conv(x.feats, weight, None, map, activation="relu")
    ConvOracle(x.feats, weight, None, map, activation="relu").check(y)
    assert torch.equal(pointcloud_conv(x.feats, weight, None, map, activation="relu"), y)
    dw = torch.ops.gossamer.pointcloud_conv_weight_grad(y, x.feats, *tensors_of(map), 1)
    WeightGradOracle(y, x.feats, map).check(dw)
    assert torch.equal(
        torch.ops.gossamer.pointcloud_conv_weight_grad(y, x.feats, *tensors_of(map), 1), dw
    )


def same_maps(coords: Tensor, kernel: int, stride: int, dilation: int) -> None:
    """Of a layer that keeps the voxels, of strided ones, and of a transposed one."""
    made = []
    for device in ("cuda", "cpu"):
        of = pc.Coordinates(coords.to(device))
        maps = [of.submanifold(kernel, dilation)]
        window = {"stride": stride, "padding": kernel // 2, "dilation": dilation}
        for out, map in (
            of.strided(kernel, **window),
            of.strided(kernel, **window, rule="floor"),
            of.transposed(kernel, **window),
        ):
            maps.append(map)
            made.append(out.coords.cpu())
        for map in maps:
            made += [t if t is None else t.cpu() for t in tensors_of(map)]
    half = len(made) // 2
    for found, wanted in zip(made[:half], made[half:], strict=True):
        assert (found is None) == (wanted is None)
        assert found is None or torch.equal(found, wanted)


def test_maps_are_those_of_the_cpu() -> None:
    street = scene(100_000, 1).coords.cpu()
    for kernel, stride, dilation in ((3, 2, 1), (2, 2, 1), (3, 3, 2), (1, 1, 1)):
        same_maps(street, kernel, stride, dilation)
    far = torch.randint(-(2**15), 2**15, (3_000, 5))  # whose cells are too many to mark
    far[:, 0] = 0
    for coords in (street[:0], street[:1], torch.unique(far[:, :4].int(), dim=0)):
        same_maps(coords, 3, 2, 1)
    same_maps(torch.unique((far % 9).int(), dim=0), 2, 2, 1)


def test_maps_wait_for_the_gpu_once() -> None:
    x = scene(3_000, 1).coordinates
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchronizing") as waits:
            x.submanifold(3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in waits if "synchronizing" in str(w.message)]) == 1


def test_voxelize_waits_twice() -> None:
    """For the box of the cells, and for how many of them hold a point."""
    points = torch.randn(3_000, 3).cuda()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchronizing") as waits:
            pc.voxelize(points, 0.3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in waits if "synchronizing" in str(w.message)]) == 2


def test_layers_wait_for_nobody() -> None:
    """Nor do their backward passes, at the first call with a map either."""
    x, weight = scene(3_000, 16), torch.randn(27, 16, 24).cuda().requires_grad_()
    map, feats = x.coordinates.submanifold(3), x.feats.requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = pointcloud_conv(feats, weight, None, map)
        for reduce in ("max", "mean", "sum"):
            y = pointcloud_pool(y, map, reduce)
            pointcloud_pool(y, x.coordinates.samples(), reduce).sum().backward(retain_graph=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool(feats.grad.isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_network_in_a_graph(dtype: torch.dtype) -> None:
    net = pc.models.MinkUNet14(4, 20, planes=(16, 32, 32, 64, 64, 32, 32, 16)).eval()
    fold_batchnorm(net)
    x = scene(20_000, 4)
    with torch.no_grad():
        cpu = pc.SparseTensor(x.coords.cpu(), x.feats.cpu())
        expected = net(cpu).feats
        net = net.cuda().to(dtype)
        given = x.replace_feats(x.feats.to(dtype))
        eager = net(given).feats
        assert torch.equal(captured(lambda: net(given).feats), eager)
    error = (eager.cpu().float() - expected).norm() / expected.norm()
    assert error < {torch.bfloat16: 0.1, torch.float16: 0.02, torch.float32: 1e-4}[dtype]


def test_pooling_in_a_graph() -> None:
    x = scene(3_000, 5)
    for layer in (pc.MaxPool3d(3, 2), pc.AvgPool3d(2, 2), pc.GlobalMaxPool(), pc.GlobalAvgPool()):

        def call(layer: torch.nn.Module = layer) -> Tensor:
            y = layer(x)
            return y if isinstance(y, Tensor) else y.feats

        assert torch.equal(captured(call), call())


def test_a_map_cannot_be_met_first_in_a_graph() -> None:
    layer, x = pc.SubmanifoldConv3d(16, 24, 3).cuda(), scene(300, 16)
    x.coordinates.submanifold(3)
    with torch.no_grad():
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with pytest.raises(RuntimeError, match="make one call before"), torch.cuda.graph(graph):
            layer(x)
        assert bool(layer(x).feats.isfinite().all())


def test_training_in_a_graph() -> None:
    layer, x = pc.SubmanifoldConv3d(16, 24, 3).cuda(), scene(3_000, 16)

    def gradient() -> Tensor:
        feats = x.feats.detach().requires_grad_()
        y = layer(x.replace_feats(feats)).feats.square().sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(y, (feats, layer.weight))])

    torch.testing.assert_close(captured(gradient), gradient())


def test_other_stream_and_autocast() -> None:
    layer, x = pc.SubmanifoldConv3d(16, 24, 3).cuda(), scene(3_000, 16)
    with torch.no_grad():
        y = layer(x).feats
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            again = layer(x).feats
        stream.synchronize()
        assert torch.equal(again, y)
        with torch.autocast("cuda", torch.bfloat16):
            assert layer(x).feats.dtype == torch.bfloat16


def test_a_map_freed_while_another_stream_reads_it() -> None:
    layer, x = pc.SubmanifoldConv3d(16, 16, 3).cuda(), scene(30_000, 16)
    stream = torch.cuda.Stream()
    with torch.no_grad():
        y = layer(x).feats
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)
            again = layer(x).feats
        taken = [len(t) for t in x.coordinates.submanifold(3).tensors if t is not None]
        del x
        for count in (*taken, 27 * len(y), len(y)) * 4:  # what would lie where the table lay
            torch.full((count,), 1 << 20, dtype=torch.int32, device="cuda")
        torch.cuda.synchronize()
        assert torch.equal(again, y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_depthwise_layers_of_a_scene(dtype: torch.dtype) -> None:
    x = scene(30_000, 70, dtype)
    map = x.coordinates.submanifold(3)
    weight = (torch.randn(27, 1, 70) / 3).cuda().to(dtype)
    y = pointcloud_conv(x.feats, weight, None, map, groups=70)
    ConvOracle(x.feats, weight, None, map, 70).check(y)
    dw = torch.ops.gossamer.pointcloud_conv_weight_grad(y, x.feats, *tensors_of(map), 70)
    WeightGradOracle(y, x.feats, map, 70).check(dw)
    again = torch.ops.gossamer.pointcloud_conv_weight_grad(y, x.feats, *tensors_of(map), 70)
    assert torch.equal(again, dw)


def test_float64_is_torchs() -> None:
    for case in (
        PointcloudCase((3, 3), 50, 60, 0.5, 12, 18, 3),
        PointcloudCase((3,), 50, 60, 0.5, 8, 8),
    ):
        with torch.device("cuda"):
            feats, weight, bias = case.operands(torch.float64)
            map = case.map()
        y = pointcloud_conv(feats, weight, bias, map, case.groups)
        rest = (*tensors_of(map), map.n_out, case.groups)
        assert torch.equal(y, reference.pointcloud_conv(feats, weight, bias, *rest))
