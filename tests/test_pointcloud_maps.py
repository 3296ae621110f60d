"""Coordinate sets and kernel maps: native against plain torch, both against dense convolutions."""

from __future__ import annotations

import copy
import gc
import random
import weakref

import gossamer.pointcloud as pc
import lidar
import pytest
import torch
import torch.nn.functional as F
from gossamer.pointcloud import native, plain
from torch import Tensor


def drawn_coords(rng: random.Random) -> Tensor:
    """int32 [N, 1 + D], no row twice, shuffled or not, in boxes here and far away."""
    dims, samples = rng.choice([1, 2, 3, 4]), rng.choice([1, 2, 3])
    boxes = [(0, 8), (-6, 6), (0, 40), (-3000, 3000)]
    low, high = rng.choice([*boxes, (-(2**20), -(2**20) + 12)] if dims < 4 else boxes)
    count = rng.choice([0, 1, 2, 50, 400, 1000])
    if count == 1000 and dims in (2, 3):
        count = 17000  # two parts
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    batch = torch.randint(0, samples, (count, 1), generator=generator)
    cells = torch.randint(low, high, (count, dims), generator=generator)
    coords = torch.unique(torch.cat([batch, cells], 1).int(), dim=0)
    if rng.random() < 0.8:
        coords = coords[torch.randperm(len(coords), generator=generator)]
    return coords


def drawn_window(rng: random.Random, dims: int) -> native.Window:
    def sizes(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.randint(low, high) for _ in range(dims))

    if rng.random() < 0.3:  # centred
        kernel = tuple(rng.choice([1, 3, 5] if dims < 3 else [1, 3]) for _ in range(dims))
        dilation = sizes(1, 2)
        padding = tuple(k // 2 * d for k, d in zip(kernel, dilation, strict=True))
        return kernel, (1,) * dims, padding, dilation
    return sizes(1, 6 - dims), sizes(1, 4), sizes(0, 3), sizes(1, 3)


@pytest.mark.parametrize("seed", range(4))
def test_native_equals_plain_torch_at_any_number_of_threads(seed: int, threads: int) -> None:
    rng = random.Random(seed)
    for draw in range(10):
        coords = drawn_coords(rng)
        dims = coords.shape[1] - 1
        window = drawn_window(rng, dims)
        what = f"draw {draw}: {list(coords.shape)}, {window}"
        torch.set_num_threads(rng.choice([1, 2, 5]))
        box = native.bounds(coords)
        assert box == plain.bounds(coords), what
        order, repeated, _ = native.sort(coords, box)
        expected, *_ = plain.sort(coords, box)
        assert repeated == 0
        assert (order is None) == (expected is None), what
        assert order is None or torch.equal(order, expected), what
        ascending = coords if order is None else coords[order.long()]
        shape = tuple(rng.randint(1, 10) for _ in range(dims))
        for rule, bounded in (("reached", None), ("reached", shape), ("spread", None),
                              ("spread", shape), ("floored", None)):  # fmt: skip
            out = native.outputs(coords, order, box, window, rule, bounded)
            plainly = plain.outputs(coords, *window, rule, bounded)
            assert torch.equal(out, plainly), f"{what}, {rule} in {bounded}"
            if bounded is not None:
                continue
            voxels, results = (coords, order, ascending), (out, None, out)
            walkers, targets = (voxels, results) if rule == "spread" else (results, voxels)
            target_box = native.bounds(targets[0])
            found = native.match(*walkers[:2], *targets[:2], target_box, window)
            wanted = plain.match(walkers[2], targets[2], target_box, *window)
            assert all(map(torch.equal, found, wanted)), f"{what}, {rule}"
        found = native.match(coords, order, coords, order, box, window)
        wanted = plain.match(ascending, ascending, box, *window)
        assert all(map(torch.equal, found, wanted)), f"{what}, to themselves"


def convolved(x: pc.SparseTensor, weight: Tensor, kernel_map: pc.KernelMap) -> Tensor:
    """The sum over pairs, in the rows' order; weight [C_out, C_in, *kernel]."""
    out = x.feats.new_zeros(kernel_map.n_out, len(weight))
    taps = weight.flatten(2).permute(2, 1, 0)
    for t, (begin, end) in enumerate(kernel_map.tap_offsets.unfold(0, 2, 1).tolist()):
        rows_in, rows_out = kernel_map.in_index[begin:end], kernel_map.out_index[begin:end]
        assert (rows_in.diff() > 0).all()
        assert (rows_out.diff() > 0).all()
        if kernel_map.in_order is not None:
            rows_in = kernel_map.in_order[rows_in.long()]
        if kernel_map.out_order is not None:
            rows_out = kernel_map.out_order[rows_out.long()]
        out.index_add_(0, rows_out, x.feats[rows_in.long()] @ taps[t])
    return out


def scattered(dims: int, channels: int = 2) -> pc.SparseTensor:
    """At a tenth of the cells of an odd grid, rows shuffled."""
    shape = (9, 7, 6, 5)[:dims]
    dense = torch.randn(3, channels, *shape, dtype=torch.float64)
    dense *= torch.rand(3, 1, *shape) < 0.1
    dense[1] = 0  # an empty sample
    x = pc.SparseTensor.from_dense(dense)
    rows = torch.randperm(len(x))
    return pc.SparseTensor(x.coords[rows], x.feats[rows], spatial_shape=shape, batch_size=3)


CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_maps_are_those_of_the_dense_convolutions(dims: int) -> None:
    for kernel, stride, padding, dilation in [
        (3, 1, 1, 1), (3, 2, 1, 1), (2, 2, 0, 1), (3, 2, 2, 3), (4, 3, 1, 1), (1, 2, 0, 1),
        (2, 3, 0, 2), (5, 1, 2, 1), (3, 1, 2, 2), (2, 1, 0, 1),
    ]:  # fmt: skip
        x = scattered(dims)
        weight = torch.randn(3, 2, *(kernel,) * dims, dtype=torch.float64)
        window = {"stride": stride, "padding": padding, "dilation": dilation}
        what = f"kernel {kernel}, {window}"
        expected = CONV[dims](x.dense(), weight, **window)
        out, kernel_map = x.coordinates.strided(kernel, **window)
        y = pc.SparseTensor(out, convolved(x, weight, kernel_map))
        assert y.spatial_shape == expected.shape[2:], what
        torch.testing.assert_close(y.dense(), expected, msg=what)
        # Given outputs, whatever their order, have the values that the dense ones have there.
        given = pc.Coordinates(y.coords.flip(0), 3, y.spatial_shape, out.stride)
        same, kernel_map = x.coordinates.strided(kernel, **window, rule="given", target=given)
        assert same is given
        torch.testing.assert_close(
            pc.SparseTensor(given, convolved(x, weight, kernel_map)).dense(), expected
        )
        # With "floor", those that exist.
        out, kernel_map = x.coordinates.strided(kernel, **window, rule="floor")
        cells = x.coords.clone()
        cells[:, 1:] = cells[:, 1:].div(stride, rounding_mode="floor")
        assert torch.equal(out.coords, cells.unique(dim=0)), what
        y = pc.SparseTensor(out, convolved(x, weight, kernel_map))
        inside = (out.coords[:, 1:] < torch.tensor(expected.shape[2:])).all(1)
        at = out.coords[inside].long().unbind(1)
        torch.testing.assert_close(y.feats[inside], expected.movedim(1, -1)[at], msg=what)
        # Transposed, with an output_padding that the stride allows.
        expected = CONV_TRANSPOSE[dims](
            x.dense(), weight.transpose(0, 1), **window, output_padding=stride - 1
        )
        out, kernel_map = x.coordinates.transposed(kernel, **window, output_padding=stride - 1)
        y = pc.SparseTensor(out, convolved(x, weight, kernel_map))
        assert y.spatial_shape == expected.shape[2:], what
        torch.testing.assert_close(y.dense(), expected, msg=what)
        # Submanifold, even kernels reaching one further up than down.
        low = (kernel - 1) // 2 * dilation
        high = (kernel - 1) * dilation - low
        padded = F.pad(x.dense(), (low, high) * dims)
        expected = CONV[dims](padded, weight, dilation=dilation).movedim(1, -1)
        y = convolved(x, weight, x.coordinates.submanifold(kernel, dilation))
        torch.testing.assert_close(y, expected[x.coords.long().unbind(1)], msg=what)


def test_an_inverse_returns_by_the_same_pairs() -> None:
    x = scattered(3).coordinates
    half, down = x.strided(3, 2, 1)
    quarter, _ = half.strided(2, 2)
    back, up = quarter.inverse(2)
    assert back.is_same(half)
    back, up = back.inverse(3, stride=2)
    assert back._set is x._set
    assert torch.equal(up.in_index, down.out_index)
    assert torch.equal(up.out_index, down.in_index)
    assert (up.n_in, up.n_out) == (len(half), len(x))
    assert up.out_order is x.order
    with pytest.raises(ValueError, match=r"no convolution with kernel \(5, 5, 5\) made these"):
        quarter.inverse(5)
    with pytest.raises(ValueError, match="none is known"):
        x.inverse(2)


def test_maps_are_made_once_for_each_geometry_and_freed_with_the_last_tensor() -> None:
    x = scattered(2)
    coordinates = x.coordinates
    assert coordinates.submanifold(3) is coordinates.submanifold((3, 3))
    out, kernel_map = coordinates.strided(3, 2, 1)
    again, same = coordinates.strided(3, 2, 1)
    assert again.is_same(out)
    assert same is kernel_map
    for other in (
        coordinates.strided(3, 2, 0)[1],
        coordinates.strided(3, 2, 1, rule="floor")[1],
        coordinates.strided(3, 2, 1, dilation=2)[1],
        coordinates.transposed(3, 2, 1)[1],
    ):
        assert other is not kernel_map
    assert (x + x).coordinates.submanifold(3) is coordinates.submanifold(3)
    alive = weakref.ref(kernel_map)
    gc.disable()  # no cycles
    try:
        del x, coordinates, out, again, same, kernel_map, other
        assert alive() is None
    finally:
        gc.enable()


def test_far_and_large() -> None:
    edge = 2**20
    corners = [[0, -edge, -edge, -edge], [0, edge, edge, edge], [0, 0, 0, 0]]
    neighbours = [[0, edge, edge, edge - 1], [0, -edge, -edge, 1 - edge]]
    x = pc.Coordinates(torch.tensor(corners + neighbours, dtype=torch.int32))
    assert x.order.tolist() == [0, 4, 2, 3, 1]
    assert x.submanifold(3).pairs == 9
    assert x.strided(3, 2, 1)[1].pairs == 3 + 2 * 2  # odd ones between two outputs
    with pytest.raises(ValueError, match="more cells than 64-bit keys number"):
        x.transposed(2, 2)  # twice as far
    largest = 2**31 - 1
    plane = pc.Coordinates(torch.tensor([[0, largest, -largest], [0, largest, largest]]))
    assert plane.submanifold(3).pairs == 2
    with pytest.raises(ValueError, match="from 2147483647 to 2147483648 along axis 0 leave"):
        plane.transposed(2, (1, 2))
    with pytest.raises(ValueError, match="more cells than 64-bit keys number"):
        pc.Coordinates(torch.tensor([[0, 0, largest, -largest], [0, largest, 1, largest]]))
    hyper = torch.randint(-(2**14), 2**14, (500, 4))
    hyper = pc.Coordinates(F.pad(hyper, (1, 0)).unique(dim=0))
    assert hyper.submanifold(3).pairs >= 500
    assert hyper.strided(2, 2)[1].pairs == 500


@pytest.mark.parametrize("dims", [1, 2, 3, 4])
def test_a_scene_without_voxels_and_one_with_a_single_one(dims: int) -> None:
    none = pc.Coordinates(torch.zeros(0, 1 + dims, dtype=torch.int32), batch_size=2)
    one = pc.Coordinates(torch.full((1, 1 + dims), 3, dtype=torch.int32))
    for x in (none, one):
        assert x.submanifold(3).pairs == len(x)
        for rule in ("dense", "floor"):
            out, kernel_map = x.strided(2, 2, rule=rule)
            assert len(out) == kernel_map.pairs == len(x)
            assert out.inverse(2)[1].n_out == len(x)
        out, kernel_map = x.transposed(2, 2)
        assert len(out) == kernel_map.pairs == len(x) * 2**dims
    assert none.submanifold(3).tap_offsets.tolist() == [0] * (3**dims + 1)
    assert one.batch_size == 4
    empty = pc.Coordinates(torch.zeros(0, 1 + dims, dtype=torch.int32), batch_size=4)
    assert one.strided(3, rule="given", target=empty)[1].pairs == 0
    assert empty.strided(3, rule="given", target=one)[1].pairs == 0


def test_refuses_what_it_cannot_mean() -> None:
    coords = torch.tensor([[0, 4, 1], [1, 2, 1], [0, 4, 1], [1, 2, 1]])
    with pytest.raises(ValueError, match=r"2 of 4 coordinates repeat .* in row 2: \[0, 4, 1\]"):
        pc.Coordinates(coords)
    two = coords[:2]
    with pytest.raises(TypeError, match=r"coords are torch\.float32, expected torch\.int32"):
        pc.Coordinates(two.float())
    with pytest.raises(ValueError, match=r"coords have shape \[2\]"):
        pc.Coordinates(two[0, :2])
    with pytest.raises(ValueError, match="range from 0 to 4294967296, beyond the int32"):
        pc.Coordinates(two * 2**30)
    with pytest.raises(ValueError, match="row 0 has the batch index -1"):
        pc.Coordinates(two - 1)
    with pytest.raises(ValueError, match="batch_size is 1, row 1 has the batch index 1"):
        pc.Coordinates(two, batch_size=1)
    with pytest.raises(ValueError, match=r"1 of 2 .* shape \[4, 9\], .* row 0: \[0, 4, 1\]"):
        pc.Coordinates(two, spatial_shape=(4, 9))
    x = pc.Coordinates(two, spatial_shape=(5, 9))
    with pytest.raises(
        ValueError, match=r"leave the shape \(-1, 1\) of the spatial shape \(5, 9\)"
    ):
        x.strided((7, 9))
    with pytest.raises(ValueError, match="rule is 'sparse', expected one of dense, floor, given"):
        x.strided(3, rule="sparse")
    with pytest.raises(ValueError, match="rule 'given' needs a target"):
        x.strided(3, rule="given")
    with pytest.raises(ValueError, match="kernel_size is 0, expected an integer of at least 1"):
        x.submanifold(0)
    with pytest.raises(ValueError, match="more than 32768 taps"):
        x.submanifold(201)
    target = pc.Coordinates(two, batch_size=3)
    with pytest.raises(ValueError, match="target is 2-D, batch 3 on cpu; the input 2-D, batch 2"):
        x.strided(3, rule="given", target=target)


def test_a_lidar_scene_has_the_pairs_that_plain_torch_finds(threads: int) -> None:
    voxels = lidar.shuffled_voxels(lidar.scene(beams=24, azimuths=600))
    x = pc.Coordinates(voxels)
    torch.set_num_threads(3)
    found = x.submanifold(3)
    ones = (1,) * 3
    wanted = plain.match(x.sorted(), x.sorted(), x.bounds, (3, 3, 3), ones, ones, ones)
    assert torch.equal(found.out_index, wanted[0])
    assert torch.equal(found.in_index, wanted[1])
    assert copy.deepcopy(x).is_same(x)
