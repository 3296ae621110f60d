"""The convolutions over voxels of a GPU, and the gradient of their weights, in float64's terms."""

from __future__ import annotations

import pytest
import torch
from devices import SCHEDULES, Sanitizers
from emulator import Emulator, KernelLibrary
from gossamer import _C
from pointcloud_cases import PointcloudCase
from torch import Tensor
from voxel_conv import TILES, VoxelConv, build

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (*HALVES, torch.float32)
PLAIN = PointcloudCase((3, 3), 90, 150, 0.5, 40, 48)

# One for each mechanism. Channels in eights are copied, the others go through registers.
CASES = {
    "copied": PLAIN,
    "several groups and tiles of outputs": PointcloudCase((2, 3), 170, 260, 0.3, 40, 136),
    "one channel": PointcloudCase((3, 3), 140, 130, 0.4, 1, 1),
    "a point's position": PointcloudCase((3, 3, 3), 150, 200, 0.2, 3, 32),
    "channels that end in a stage": PointcloudCase((2, 2), 70, 60, 0.6, 17, 33),
    "x copied, weights not": PointcloudCase((3,), 70, 60, 0.6, 24, 13),
    "weights copied, x not": PointcloudCase((3,), 70, 60, 0.6, 13, 24),
    "many outputs": PointcloudCase((1, 2), 20, 30, 0.8, 9, 513),
    "many channels": PointcloudCase((1, 2), 20, 30, 0.8, 513, 9),
    "more taps than a mask has bits": PointcloudCase((3, 5, 5), 30, 140, 0.1, 8, 8),
    "depthwise": PointcloudCase((3, 3), 90, 150, 0.5, 40, 40, 40),
    "depthwise in tails": PointcloudCase((3,), 90, 150, 0.5, 37, 37, 37),
    "two outputs a channel": PointcloudCase((2, 2), 40, 60, 0.5, 12, 24, 12),
    "groups of several": PointcloudCase((3,), 40, 60, 0.5, 12, 18, 3),
    "many groups": PointcloudCase((1, 2), 12, 20, 0.8, 1030, 1030, 1030),
    "one voxel": PointcloudCase((1,), 1, 1, 1.0, 8, 8),
    "nothing to add": PointcloudCase((3, 3), 0, 130, 0.0, 8, 8),
}


@pytest.fixture(scope="module")
def kernels(emulator: Emulator) -> KernelLibrary:
    return build(emulator)


def check_exact(actual: Tensor, expected: Tensor) -> None:
    """Every sum is exact, so the result is the true one, rounded once."""
    assert torch.equal(actual, expected.to(actual.dtype))


@pytest.mark.parametrize("name", CASES)
def test_matches_plain_torch(kernels: KernelLibrary, sanitizers: Sanitizers, name: str) -> None:
    for tile, dtype in enumerate((*HALVES, HALVES[0], torch.float32)):
        if sanitizers.on and tile in (0, 1):  # these differ in their sizes alone
            continue
        conv = VoxelConv.of(CASES[name], dtype, bias=tile != 1)
        expected = conv.expected()
        for schedule in ("late", "early"):
            with kernels.schedule(schedule, tile):
                check_exact(conv.run(kernels, tile if tile < 3 else -1), expected)


@pytest.mark.parametrize("name", CASES)
def test_gradient_matches_plain_torch(
    kernels: KernelLibrary, sanitizers: Sanitizers, name: str
) -> None:
    for seed, dtype in enumerate(DTYPES[1:] if sanitizers.on else DTYPES):
        conv = VoxelConv.of(CASES[name], dtype)
        expected = conv.expected_gradient()
        for schedule in ("late", "early")[: 1 if sanitizers.on else 2]:
            with kernels.schedule(schedule, seed):
                check_exact(conv.gradient(kernels), expected)


def test_gradient_of_several_segments_a_tap(kernels: KernelLibrary) -> None:
    for dtype in DTYPES:
        conv = VoxelConv.of(PointcloudCase((3,), 1200, 1100, 0.7, 5, 6), dtype)
        check_exact(conv.gradient(kernels), conv.expected_gradient())


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_passes_in_any_order(
    kernels: KernelLibrary, sanitizers: Sanitizers, dtype: torch.dtype
) -> None:
    # More stages than there are in shared memory, of several tiles both ways.
    conv = VoxelConv.of(CASES["several groups and tiles of outputs"], dtype)
    expected, gradient = conv.expected(), conv.expected_gradient()
    for schedule, seed in SCHEDULES[::3] if sanitizers.on else SCHEDULES:
        with kernels.schedule(schedule, seed):
            check_exact(conv.run(kernels, 2), expected)
            check_exact(conv.gradient(kernels), gradient)


@pytest.mark.parametrize("margin", [1, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_of_any_alignment(kernels: KernelLibrary, dtype: torch.dtype, margin: int) -> None:
    conv = VoxelConv.of(PointcloudCase((3,), 70, 60, 0.6, 24, 40), dtype)
    check_exact(conv.run(kernels, margin=margin), conv.expected())
    check_exact(conv.gradient(kernels, margin), conv.expected_gradient())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_activations(kernels: KernelLibrary, activation: str, dtype: torch.dtype) -> None:
    conv = VoxelConv.of(PLAIN, dtype)
    conv.x, conv.weight, conv.activation = conv.x / 16, conv.weight / 16, activation
    y, expected = conv.run(kernels).double(), conv.expected()
    roundoff = {torch.float32: 2.0**-21, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
    torch.testing.assert_close(y, expected, rtol=roundoff[dtype], atol=2.0**-21)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_sums_do_not_depend_on_their_tile(kernels: KernelLibrary, dtype: torch.dtype) -> None:
    """Bit for bit: other tiles, other neighbours in the tile, another place in it."""
    conv = VoxelConv.of(CASES["several groups and tiles of outputs"], dtype)
    conv.x, conv.weight = torch.randn(conv.x.shape).to(dtype), torch.randn(conv.weight.shape)
    conv.weight = conv.weight.to(dtype)
    y, table = conv.run(kernels), conv.table()
    for tile in range(len(TILES) if dtype != torch.float32 else 0):
        assert torch.equal(conv.run(kernels, tile), y)
    # Positions in any order, each group visiting all taps.
    order = torch.randperm(len(table.rows))
    groups, taps = len(table.begins) - 1, len(table.neighbours)
    shuffled = table._replace(
        neighbours=table.neighbours[:, order].contiguous(),
        rows=table.rows[order],
        begins=torch.arange(0, (groups + 1) * taps, taps, dtype=torch.int32),
        visited=(torch.arange(taps, dtype=torch.int32) << 4 | 15).repeat(groups),
    )
    assert torch.equal(conv.run(kernels, table=shuffled), y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_not_finite_reaches_its_pairs_alone(kernels: KernelLibrary, dtype: torch.dtype) -> None:
    for bad in (torch.nan, torch.inf):
        conv = VoxelConv.of(PLAIN, dtype)
        clean = conv.run(kernels)
        conv.x[6] = bad
        map = conv.map
        hit = map.in_order[map.in_index.long()] == 6
        reached = torch.zeros(map.n_out, dtype=torch.bool)
        reached[map.out_order[map.out_index.long()[hit]].long()] = True
        assert reached.any()
        assert not reached.all()
        y = conv.run(kernels)
        assert torch.equal(y[~reached], clean[~reached])
        assert not y[reached].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_tables_that_nobody_checked_stay_in_memory(
    kernels: KernelLibrary, dtype: torch.dtype
) -> None:
    """What comes out is anything; that nothing else was read or written, the sanitizers say."""
    wild = torch.tensor([2**31 - 1, -(2**31), -7, 10**6, 0, 1000], dtype=torch.int32)
    conv = VoxelConv.of(PLAIN, dtype)
    for _ in range(6):
        table = conv.table()._replace(**{k: t.clone() for k, t in conv.table()._asdict().items()})
        for t in table:
            t.view(-1)[torch.randint(t.numel(), (9,))] = wild[torch.randint(len(wild), (9,))]
        conv.run(kernels, table=table)


# ---- the choice ---------------------------------------------------------------------------------

H200 = {"capability": 90, "multiprocessors": 132, "shared_bytes": 227 << 10, "l2_bytes": 50 << 20}
L4 = {"capability": 89, "multiprocessors": 58, "shared_bytes": 99 << 10, "l2_bytes": 48 << 20}


def choose(outputs: int, c_out: int, device: dict[str, int] = H200) -> tuple[int, int]:
    chosen = _C.pointcloud_conv_choose_cuda("bfloat16", outputs, c_out, device)
    tile = chosen["tile_rows"], chosen["tile_outputs"]
    assert chosen["kernel"] == "mma"
    groups = -(-outputs // 128)
    assert chosen["blocks"] == groups * (128 // tile[0]) * -(-c_out // tile[1])
    return tile


def test_choice() -> None:
    assert choose(10**5, 128) == choose(10**5, 256) == (128, 128)
    assert choose(10**5, 64) == choose(10**5, 32) == (128, 64)  # there are no more outputs
    # Few of them do not leave most multiprocessors idle.
    assert choose(1500, 256) == choose(1, 1) == (64, 32)
    assert all(choose(n, c, L4) in TILES for n in (1, 10**4, 10**6) for c in (8, 96, 512))
    exact = _C.pointcloud_conv_choose_cuda("float32", 10**5, 64, L4)
    assert (exact["kernel"], exact["tile_rows"], exact["tile_outputs"]) == ("fma", 64, 64)
    with pytest.raises(ValueError, match=r"compute capability 7\.0"):
        _C.pointcloud_conv_choose_cuda("bfloat16", 9, 9, {**L4, "capability": 70})
    with pytest.raises(TypeError, match="float64"):
        _C.pointcloud_conv_choose_cuda("float64", 9, 9, L4)
