"""Pooling of voxels: against plain torch, gradients, threads, mistakes."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import DTYPES
from gossamer import pointcloud as pc
from gossamer import reference
from gossamer.ops.pointcloud_pool import pointcloud_pool
from torch import Tensor, nn


def scene(
    channels: int = 5, shape: tuple[int, ...] = (7, 6, 8), dtype: torch.dtype = torch.float32
) -> pc.SparseTensor:
    """Three samples, the second of them empty, in no order of rows."""
    mask = torch.rand(3, *shape) < 0.3
    mask[1] = False
    coords = mask.nonzero().int()
    coords = coords[torch.randperm(len(coords))]
    feats = torch.randn(len(coords), 2 * channels)[:, ::2].to(dtype)
    return pc.SparseTensor(coords, feats, spatial_shape=shape, batch_size=3)


def pairs_of(kernel_map: pc.KernelMap) -> tuple[Any, ...]:
    names = ("in_index", "out_index", "tap_offsets", "in_order", "out_order", "n_out")
    return tuple(getattr(kernel_map, name) for name in names)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_matches_plain_torch(dtype: torch.dtype) -> None:
    for channels, kernel, stride in ((1, 3, 1), (5, 2, 2), (67, 3, 2), (130, (1, 5, 2), 3)):
        x = scene(channels, dtype=dtype)
        if channels == 5:
            x.feats[::7] = 1.0  # equal maxima
            x.feats[3], x.feats[5], x.feats[8, 0] = torch.nan, -torch.inf, torch.inf
        for kernel_map in (x.coordinates.strided(kernel, stride)[1], x.coordinates.samples()):
            check_map(x, kernel_map)


def check_map(x: pc.SparseTensor, kernel_map: pc.KernelMap) -> None:
    pairs = pairs_of(kernel_map)
    repeats = kernel_map.repeats
    best, winner = torch.ops.gossamer.pointcloud_max_pool(x.feats, *pairs, repeats)
    for may_repeat in {repeats, True}:
        want = reference.pointcloud_max_pool(x.feats, *pairs, may_repeat)
        assert torch.equal(best.nan_to_num(7.0), want[0].nan_to_num(7.0))
        assert torch.equal(winner, want[1])
    dy, back = torch.randn_like(best), (*pairs_of(kernel_map.transposed()),)
    got = torch.ops.gossamer.pointcloud_max_pool_grad(dy, winner, *back)
    torch.testing.assert_close(got, reference.pointcloud_max_pool_grad(dy, winner, *back))
    for mean in (False, True):
        got = torch.ops.gossamer.pointcloud_sum_pool(x.feats, *pairs, mean)
        want = reference.pointcloud_sum_pool(x.feats, *pairs, mean)
        torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gpu_pools_as_the_cpu_does(dtype: torch.dtype) -> None:
    x = scene(dtype=dtype)
    x.feats[::7] = 1.0
    layers = (pc.MaxPool3d(3, 2), pc.AvgPool3d(2, 2), pc.GlobalMaxPool(), pc.GlobalSumPool())
    for layer in layers:
        results = []
        for device in ("cpu", "cuda"):
            of = pc.SparseTensor(
                x.coords.to(device), x.feats.to(device), spatial_shape=(7, 6, 8), batch_size=3
            )
            feats = of.feats.detach().requires_grad_()
            y = layer(of.replace_feats(feats))
            y = y if isinstance(y, Tensor) else y.feats
            (dx,) = torch.autograd.grad(y.square().sum(), feats)
            results.append((y.detach().cpu(), dx.cpu()))
        for cpu, gpu in zip(*results, strict=True):
            torch.testing.assert_close(gpu, cpu)


def test_a_full_grid_is_pooled_as_by_torch() -> None:
    dense = torch.randn(2, 3, 7, 6, 8)
    full = pc.SparseTensor.from_dense(dense)
    for window in ((2, 2, 0), (3, 2, 1), (3, 1, 1)):
        torch.testing.assert_close(
            pc.MaxPool3d(*window)(full).dense(), nn.MaxPool3d(*window)(dense), rtol=0, atol=0
        )
        torch.testing.assert_close(
            pc.AvgPool3d(*window, count_empty=True)(full).dense(), nn.AvgPool3d(*window)(dense)
        )
    inside = pc.AvgPool3d(3, 2, 1)(full).dense()
    torch.testing.assert_close(inside, nn.AvgPool3d(3, 2, 1, count_include_pad=False)(dense))


def test_voxels_that_are_not_there_take_no_part() -> None:
    coords = torch.tensor([[0, 0], [0, 1], [0, 6], [2, 3]], dtype=torch.int32)
    x = pc.SparseTensor(coords, torch.tensor([[-3.0], [-1.0], [-5.0], [2.0]]), batch_size=4)
    assert pc.MaxPool1d(2)(x).feats.flatten().tolist() == [-1, -5, 2]
    assert pc.AvgPool1d(2)(x).feats.flatten().tolist() == [-2, -5, 2]
    assert pc.AvgPool1d(2, count_empty=True)(x).feats.flatten().tolist() == [-2, -2.5, 1]
    target = pc.SparseTensor(coords, torch.zeros(4, 1), stride=2, batch_size=4)
    assert pc.MaxPool1d(2)(x, target).feats.flatten().tolist() == [-1, 0, 0, 0]
    assert pc.GlobalMaxPool()(x).flatten().tolist() == [-1, 0, 2, 0]
    assert pc.GlobalAvgPool()(x).flatten().tolist() == [-3, 0, 2, 0]
    assert pc.GlobalSumPool()(x).flatten().tolist() == [-9, 0, 2, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_mean_over_all_cells_is_rounded_once(dtype: torch.dtype) -> None:
    x = pc.SparseTensor.from_dense(40000 + 20000 * torch.rand(1, 3, 6, 6, 6)).to(dtype=dtype)
    y = pc.AvgPool3d(3, count_empty=True)(x).dense()
    wanted = nn.AvgPool3d(3)(x.dense().double())
    assert y.dtype == dtype
    assert torch.equal(y, wanted.to(dtype))


@pytest.mark.parametrize("layer", [pc.GlobalMaxPool, pc.GlobalAvgPool, pc.GlobalSumPool])
def test_global_pools_are_those_of_each_sample(layer: type[nn.Module]) -> None:
    x = scene()
    y = layer()(x)
    for b in (0, 2):
        of = x.feats[x.coords[:, 0] == b]
        want = {"Max": of.amax(0), "Avg": of.mean(0), "Sum": of.sum(0)}[layer.__name__[6:9]]
        torch.testing.assert_close(y[b], want)
    assert not y[1].any()


def reductions(x: pc.SparseTensor) -> list[tuple[pc.KernelMap, str]]:
    maps = [x.coordinates.strided(3, 2, 1)[1], x.coordinates.samples()]
    return list(itertools.product(maps, ("max", "mean", "sum")))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of vmap, in jacrev
def test_gradients_of_any_order() -> None:
    x = scene(2, (3, 2, 4), torch.float64)
    feats = torch.randperm(x.feats.numel()).double().view_as(x.feats).requires_grad_()
    for kernel_map, reduce in reductions(x):

        def pool(feats: Tensor, m: pc.KernelMap = kernel_map, r: str = reduce) -> Tensor:
            return pointcloud_pool(feats, m, r)

        torch.autograd.gradcheck(pool, (feats,))
        torch.autograd.gradgradcheck(pool, (feats,), fast_mode=True)
        square = torch.func.grad(lambda feats, pool=pool: pool(feats).square().sum())
        (want,) = torch.autograd.grad(pool(feats).square().sum(), feats)
        torch.testing.assert_close(square(feats.detach()), want)
        both = torch.func.vmap(square)(torch.stack([feats.detach(), 2 * feats.detach()]))
        torch.testing.assert_close(both, torch.stack([want, 2 * want]))
        rows = torch.func.jacrev(pool)(feats.detach())
        assert torch.equal(rows, torch.autograd.functional.jacobian(pool, feats.detach()))


def test_same_bits_for_any_number_of_threads(threads: int) -> None:
    x = scene(70, (40, 30, 20))
    results = []
    for count in (1, 2, 3, 4):
        torch.set_num_threads(count)
        feats = x.feats.detach().requires_grad_()
        ys = [pointcloud_pool(feats, *reduction) for reduction in reductions(x)]
        g = torch.autograd.grad(sum((y * y).sum() for y in ys), feats)
        results.append([*ys, *g])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_registered_ops() -> None:
    x = scene()
    kernel_map = x.coordinates.strided(3, 2, 1)[1]
    pairs, back = pairs_of(kernel_map), pairs_of(kernel_map.transposed())
    feats = x.feats.detach().requires_grad_()
    of = torch.ops.gossamer
    y, winner = of.pointcloud_max_pool(feats.detach(), *pairs, False)
    torch.library.opcheck(of.pointcloud_sum_pool, (feats, *pairs, True))
    torch.library.opcheck(of.pointcloud_max_pool, (feats, *pairs, False))
    torch.library.opcheck(of.pointcloud_max_pool_grad, (y.requires_grad_(), winner, *back))


def test_mistakes() -> None:
    x = scene()
    kernel_map = x.coordinates.strided(3, 2, 1)[1]
    with pytest.raises(ValueError, match="reduce 'median'"):
        pointcloud_pool(x.feats, kernel_map, "median")
    with pytest.raises(ValueError, match=rf"\[4, 5\], expected \[{len(x)}, C\]"):
        pointcloud_pool(x.feats[:4], kernel_map)
    with pytest.raises(TypeError, match="int64"):
        pointcloud_pool(x.feats.long(), kernel_map)
    ranks, last = kernel_map.out_index, kernel_map.n_out
    for name, at, value, text in (
        ("in_index", 2, len(x), f"is {len(x)}, there are {len(x)}"),
        ("out_index", 0, -1, "is -1"),
        ("out_index", -1, last, f"is {last}, there are {last}"),
        ("out_index", 0, ranks[1] + 1, r"\[1\] is .*, below"),
        ("tap_offsets", 1, -1, "below the one before"),
        ("in_order", 3, -1, "is -1"),
    ):
        broken = getattr(kernel_map, name).clone()
        broken[at] = value
        for reduce in ("max", "sum"):
            with pytest.raises(ValueError, match=text):
                pointcloud_pool(x.feats, replace(kernel_map, **{name: broken}), reduce)
    with pytest.raises(TypeError, match="Tensor, expected SparseTensor"):
        pc.GlobalMaxPool()(x.feats)
    with pytest.raises(ValueError, match="2 spatial axes, the kernel 3"):
        pc.MaxPool3d(2)(scene(2, (4, 5)))
    with pytest.raises(ValueError, match="outputs 'given'"):
        pc.MaxPool3d(2, outputs="given")
