"""Pooling by the kernels of a GPU, emulated: what the CPU's kernel makes of the same pairs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from emulator import Emulator, KernelLibrary
from gossamer import _C
from gossamer import pointcloud as pc
from gossamer.ops import pointcloud_pool as pooling
from gossamer.ops.pointcloud_layout import PoolLists
from pointcloud_cases import drawn_map
from test_pointcloud_pool import pairs_of, scene
from torch import Tensor
from voxel_conv import build

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@pytest.fixture
def kernels(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> Iterator[KernelLibrary]:
    """Pooling runs as on a GPU where it is asked to."""
    library, module = build(emulator), torch.zeros(1, dtype=torch.int64)
    library.call("maps_module", module)
    _C.attach_cuda(int(module))
    monkeypatch.setattr(pooling, "has_kernels", lambda device: True)
    yield library
    _C.attach_cuda(0)


def check(feats: Tensor, map: pc.KernelMap, what: str) -> None:
    """Bit for bit but for sums, in double both, that the GPU takes in parts."""
    pairs, back = pairs_of(map), pairs_of(map.transposed())
    for mean in (False, True):
        found, wanted = (sum_pool(feats, *pairs, mean) for sum_pool in SUMS)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6, equal_nan=True, msg=what)
    found, wanted = (max_pool(feats, *pairs, map.repeats) for max_pool in MAXIMA)
    assert torch.equal(found[0].nan_to_num(7.0), wanted[0].nan_to_num(7.0)), what
    assert torch.equal(found[1], wanted[1]), what
    dy = torch.randn(found[0].shape).to(feats.dtype)
    dx, wanted_dx = (grad(dy, found[1], *back) for grad in GRADIENTS)
    assert torch.equal(dx, wanted_dx), what


SUMS = (pooling._sum_cuda, pooling._sum_native)
MAXIMA = (pooling._max_cuda, pooling._max_native)
GRADIENTS = (pooling._max_grad_cuda, pooling._max_grad_native)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_that_of_the_cpu(kernels: KernelLibrary, dtype: torch.dtype) -> None:
    for seed, (channels, kernel, stride) in enumerate(
        ((1, 3, 1), (5, 2, 2), (67, (1, 3, 2), 2), (1030, 1, 1))
    ):
        x = scene(channels, (3, 4, 5) if channels > 67 else (5, 4, 6), dtype)
        x.feats[::7] = 1.0  # equal maxima
        x.feats[3], x.feats[5], x.feats[8, 0] = torch.nan, -torch.inf, torch.inf
        coordinates = x.coordinates
        maps = [coordinates.strided(kernel, stride)[1], coordinates.samples()]
        with kernels.schedule(("late", "early")[seed % 2], seed):
            for map in maps:
                check(x.feats, map, f"{channels} channels, {map}")


def test_long_lists_in_parts(kernels: KernelLibrary) -> None:
    """Of samples with 2,000 voxels and more, without voxels, and with one."""
    samples = torch.tensor([2100, 0, 1, 1800]).repeat_interleave(torch.tensor([2100, 0, 1, 1800]))
    batch = torch.tensor([0] * 2100 + [2] + [3] * 1800)
    coords = torch.stack([batch, torch.arange(len(samples))], 1).int()
    feats = torch.randn(len(coords), 6).to(torch.float16)
    feats[::50] = 4.0
    feats[700, 1] = feats[1900, 1] = torch.nan
    x = pc.SparseTensor(coords[torch.randperm(len(coords))], feats, batch_size=4)
    map = x.coordinates.samples()
    check(x.feats, map, "samples")


def test_pairs_that_are_not_there(kernels: KernelLibrary) -> None:
    for n_in, n_out in ((0, 5), (5, 0), (0, 0)):
        map = drawn_map((3,), n_in, n_out, 0.0)
        check(torch.randn(n_in, 3), map, f"{n_in} to {n_out}")
    check(torch.randn(4, 0), drawn_map((3,), 4, 4, 1.0), "no channels")


def test_lists_that_nobody_checked_stay_in_memory(kernels: KernelLibrary) -> None:
    feats, order = torch.randn(40, 5), torch.randint(-(2**31), 2**31 - 1, (30,)).int()
    rows = torch.randint(-(2**31), 2**31 - 1, (90,)).int()
    begins = torch.randint(-(2**40), 2**40, (31,))
    winner = torch.zeros(40, 5, dtype=torch.int32)
    for reduce in ("sum", "mean", "max", "winners"):
        of = winner[:30].contiguous() if reduce == "max" else winner
        out = torch.zeros(30, 5)
        pooling.reduce_lists(out, feats, PoolLists(rows, begins), reduce, order, of)
    made = PoolLists(rows, begins)
    _C.pointcloud_list_pairs_cuda(*made, order.repeat(3), begins.repeat(3)[:90], rows, order, 30)


def test_what_the_border_refuses(kernels: KernelLibrary) -> None:
    feats, lists = torch.randn(4, 3), PoolLists(torch.zeros(4).int(), torch.tensor([0, 2, 4]))

    def pool(**other: object) -> None:
        operands = {"out": torch.empty(2, 3), "feats": feats, "winner": None}
        operands |= {**lists._asdict(), "out_order": None, "reduce": "sum", "splits": 1}
        _C.pointcloud_pool_cuda(**(operands | {"partial": None, "took": None} | other))

    pool()
    for other, error, text in (
        ({"reduce": "most"}, ValueError, "reduce 'most'"),
        ({"reduce": "max"}, ValueError, "max needs the winners"),
        ({"splits": 3}, ValueError, "3 parts need their results"),
        ({"begins": torch.tensor([0, 4])}, ValueError, r"begins has shape \[2\], expected \[3\]"),
        ({"out": torch.empty(2, 4)}, ValueError, r"out has shape \[2, 4\], expected \[2, 3\]"),
        ({"rows": torch.zeros(4)}, TypeError, "rows is float32"),
    ):
        with pytest.raises(error, match=text):
            pool(**other)
