"""Kernel maps by the kernels of a GPU, emulated: those of the CPU, pair by pair."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from emulated_gpu import Gpu
from emulator import Emulator, KernelLibrary
from gossamer import _C
from gossamer import pointcloud as pc
from gossamer.ops.pointcloud_layout import output_table, pair_segments, vouch
from gossamer.pointcloud import native
from pointcloud_cases import drawn_map, tensors_of
from test_pointcloud_maps import drawn_coords, drawn_window
from torch import Tensor
from voxel_conv import build
from voxel_layouts import plain_segments, plain_table

Side = tuple[Tensor, Tensor | None]


@pytest.fixture
def kernels(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> Iterator[KernelLibrary]:
    """Host tensors are a GPU's in here, as far as maps go."""
    library, module = build(emulator), torch.zeros(1, dtype=torch.int64)
    library.call("maps_module", module)
    _C.attach_cuda(int(module))
    monkeypatch.setattr(native, "on_gpu", lambda coords: True)
    yield library
    _C.attach_cuda(0)


def on_both(call: Callable[[], Any]) -> tuple[Any, Any]:
    """By the kernels of a GPU, and by the CPU's."""
    with pytest.MonkeyPatch.context() as on_cpu:
        on_cpu.setattr(native, "on_gpu", lambda coords: False)
        wanted = call()
    return call(), wanted


def check_match(walkers: Side, targets: Side, window: native.Window, what: str) -> None:
    box = native.bounds(targets[0])
    found, wanted = on_both(lambda: native.match(*walkers, *targets, box, window))
    assert all(map(torch.equal, found, wanted)), what


def check_sort(coords: Tensor, what: str) -> Tensor | None:
    box = native.bounds(coords)
    order = native.sort(coords, box)[0]
    ascending = coords if order is None else coords[order].contiguous()
    for rows in (coords, ascending, torch.cat([coords, coords[3:5], coords[:4]])):
        found, wanted = on_both(lambda rows=rows: native.sort(rows, box))
        assert found[1:] == wanted[1:], what
        if not wanted[1]:
            assert (found[0] is None) == (wanted[0] is None), what
            assert found[0] is None or torch.equal(found[0], wanted[0]), what
    return order


def check_outputs(
    coords: Tensor,
    order: Tensor | None,
    window: native.Window,
    rule: str,
    shape: tuple[int, ...] | None,
    what: str,
) -> Tensor:
    box = native.bounds(coords)
    made, wanted = on_both(lambda: native.outputs(coords, order, box, window, rule, shape))
    assert torch.equal(made, wanted), f"{what}, {rule} in {shape}"
    return wanted


@pytest.mark.parametrize("seed", range(3))
def test_pairs_are_those_of_the_cpu(kernels: KernelLibrary, seed: int) -> None:
    rng = random.Random(seed)
    for draw in range(8):
        coords = drawn_coords(rng)[: 300 if seed else 80]
        dims = coords.shape[1] - 1
        window = drawn_window(rng, dims)
        what = f"draw {draw}: {list(coords.shape)}, {window}"
        order = check_sort(coords, what)
        inputs = coords, order
        with kernels.schedule("early" if draw % 2 else "late", draw):
            check_match(inputs, inputs, window, what)
            for rule in ("reached", "floored", "spread"):
                made = check_outputs(*inputs, window, rule, None, what)[:900]
                check_outputs(*inputs, window, rule, tuple(rng.choices(range(1, 9), k=dims)), what)
                sides = (inputs, (made, None)) if rule == "spread" else ((made, None), inputs)
                check_match(*sides, window, f"{what}, {rule}")


@pytest.mark.parametrize(
    ("count", "dims", "size", "dtype"),
    [
        (0, 3, 0.1, torch.float32),
        (1, 2, 1.0, torch.float64),
        (900, 3, 0.4, torch.float32),
        (300, 4, 0.7, torch.bfloat16),
        (400, 1, 0.01, torch.float16),
    ],
)
def test_voxels_are_those_of_the_cpu(
    kernels: KernelLibrary, count: int, dims: int, size: float, dtype: torch.dtype
) -> None:
    points, features = torch.randn(count, dims).to(dtype), torch.randn(count, 5).to(dtype)
    batch = torch.randint(0, 3, (count,))
    if count > 10:
        features[3, 2] = torch.nan
    for seed, reduce in enumerate(("mean", "first", "max")):

        def voxelize(reduce: str = reduce) -> list[Tensor]:
            given = features.clone().requires_grad_()
            x, of_point = pc.voxelize(points, size, reduce, given, batch, batch_size=3)
            (dx,) = torch.autograd.grad(x.feats, given, x.feats.detach().nan_to_num())
            return [x.coords, of_point, x.feats.nan_to_num(7.0), dx]

        with kernels.schedule(("late", "early")[seed % 2], seed):
            found, wanted = on_both(voxelize)
        assert all(map(torch.equal, found, wanted)), reduce
    with pytest.raises(ValueError, match=r"point 1, \[2.0, nan\], is not finite"):
        pc.voxelize(torch.tensor([[0.0, 1.0], [2.0, torch.nan]]), 1.0)


def test_coordinates_at_the_border_of_int32(kernels: KernelLibrary) -> None:
    """With keys that need all of 64 bits; and one too many."""
    most = 2**31 - 1
    ends = torch.tensor([[0, -(2**31), 0], [0, -(2**31), 1], [0, most - 1, 1], [0, most, 0]])
    inputs = ends.int(), None
    for kernel, padding, dilation in ((3, 1, 1), (2, 0, 1), (3, 7, 9), (3, 2**30, 2**30)):
        sizes = ((kernel, 1), (1, 1), (padding, 0), (dilation, 1))
        check_match(inputs, inputs, sizes, f"{sizes}")
    for stride in (2, 3, 7, 65535):  # of numbers that need all bits of a division
        for rule in ("reached", "floored"):
            sizes = ((3, 1), (stride, 1), (1, 0), (1, 1))
            check_outputs(*inputs, sizes, rule, None, f"{sizes}")
    corners = torch.tensor([[0, -(2**31), -(2**31)], [0, most, most]]).int()
    with pytest.raises(ValueError, match="more cells than 64-bit keys number"):
        pc.Coordinates(corners).submanifold(3)


# Kernel sizes, voxels on both sides, the share of pairs; more taps than masks of 32 and 64 bits.
LAYOUTS = {
    "typical": ((3, 3, 3), 300, 700, 0.2),
    "full": ((2, 2), 400, 400, 1.0),
    "one tap": ((1,), 130, 129, 0.7),
    "as many taps as 32 bits hold": ((31,), 90, 300, 0.3),
    "more": ((4, 8), 90, 300, 0.3),
    "taps that share bits": ((3, 5, 5), 60, 400, 0.1),
    "no outputs": ((3,), 4, 0, 0.0),
    "no pairs": ((3,), 0, 140, 0.0),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_are_those_of_plain_torch(kernels: KernelLibrary, name: str) -> None:
    for seed, shuffled in enumerate((True, False)):
        drawn = drawn_map(*LAYOUTS[name], shuffled)
        with kernels.schedule(("late", "early")[seed], seed):
            table = output_table(tensors_of(drawn), drawn.n_in, drawn.n_out)
            segments = pair_segments(tensors_of(drawn), drawn.n_in, drawn.n_out)
        wanted = plain_table(drawn)
        visits = len(wanted.visited)
        assert all(map(torch.equal, table[:3], wanted[:3])), name
        assert torch.equal(table.visited[:visits], wanted.visited), name
        assert all(map(torch.equal, segments, plain_segments(drawn))), name


def test_layouts_of_maps_that_nobody_checked(kernels: KernelLibrary) -> None:
    """Stay within their memory."""
    drawn = drawn_map((3, 3), 50, 200, 0.4)
    hostile = [t.clone() for t in tensors_of(drawn) if t is not None]
    for t in hostile:
        t[1::3] = torch.randint(-(2**31), 2**31 - 1, t[1::3].shape).to(t.dtype)
    for map in (hostile, [*hostile[:2], drawn.tap_offsets, *hostile[3:]]):
        made: Any = SimpleNamespace(tensors=tuple(map), n_in=50, n_out=200)
        vouch(made)
        output_table(tuple(map), 50, 200)
    pair_segments(tuple(map), 50, 200)


def test_what_the_border_refuses(gpu: Gpu) -> None:
    coords = torch.tensor([[0, 1], [0, 2], [0, 4]], dtype=torch.int32)
    box, window = ((0, 1), (0, 4)), ((3,), (1,), (1,), (1,))

    def count(**other: Tensor | None) -> None:
        keys = torch.empty(3, dtype=torch.int64)
        operands = {"counts": torch.empty(3, dtype=torch.int32), "walker_keys": keys}
        operands |= {"target_keys": keys.clone(), "walkers": coords, "walker_order": None}
        operands |= {"targets": coords, "target_order": None}
        _C.pointcloud_count_pairs_cuda(**(operands | other), target_box=box, window=window)

    count()
    with pytest.raises(ValueError, match=r"counts has shape \[3\], expected \[6\]"):
        count(walkers=coords.repeat(11, 1), walker_keys=torch.empty(33, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"keys has shape \[2\], expected \[3\]"):
        count(walker_keys=torch.empty(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"targets has shape \[3, 1\], expected \[3, 2\]"):
        count(targets=coords[:, :1].contiguous())
    with pytest.raises(TypeError, match="order is int64, expected int32"):
        count(target_order=torch.arange(3))
    # Sums that nobody made keep the kernel within its memory.
    keys, ends = torch.tensor([1, 2, 4]), torch.tensor([-5, 10**12, 2])
    ranks = torch.full((2, 4), 77, dtype=torch.int32)
    _C.pointcloud_write_pairs_cuda(ranks[0], ranks[1], ends, keys, keys, box, window)
