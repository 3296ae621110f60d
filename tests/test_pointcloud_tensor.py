"""Sparse tensors: what they hold, compute and refuse; points to voxels."""

from __future__ import annotations

import copy
import pickle

import gossamer.pointcloud as pc
import pytest
import torch
from gossamer.pointcloud import plain
from torch import Tensor


def scene(count: int = 40, channels: int = 3, **kwargs: object) -> pc.SparseTensor:
    coords = torch.cat([torch.randint(0, 2, (count, 1)), torch.randint(0, 9, (count, 3))], 1)
    coords = coords.int().unique(dim=0)
    coords = coords[torch.randperm(len(coords))]
    return pc.SparseTensor(coords, torch.randn(len(coords), channels), **kwargs)


def test_rows_keep_their_order_and_share_the_coordinates() -> None:
    x = scene(spatial_shape=(9, 10, 11), batch_size=3)
    before = x.coords.clone()
    y = 2 * x.replace_feats(x.feats.exp()) - x / 4
    assert torch.equal(y.coords, before)
    assert y.coordinates is x.coordinates
    torch.testing.assert_close(y.feats, 2 * x.feats.exp() - x.feats / 4)
    torch.testing.assert_close((1 / x).feats, 1 / x.feats)
    assert (y.stride, y.spatial_shape, y.batch_size) == ((1, 1, 1), (9, 10, 11), 3)
    assert repr(x).startswith(f"SparseTensor({len(x)} voxels, 3 channels, 3-D, batch_size=3, spat")
    assert x.to(torch.bfloat16).dtype == torch.bfloat16
    assert x.to("cpu").coordinates is x.coordinates


def test_dense_and_back_with_gradients() -> None:
    x = scene(spatial_shape=(9, 10, 11), batch_size=3)
    feats = x.feats.double().requires_grad_()
    dense = x.replace_feats(feats).dense()
    assert dense.shape == (3, 3, 9, 10, 11)
    assert dense.is_contiguous()
    back = pc.SparseTensor.from_dense(dense)
    assert torch.equal(back.dense(), dense)
    assert len(back) == len(x)
    pc.cat([back, back * 3]).feats.square().sum().backward()
    torch.testing.assert_close(feats.grad, 20 * feats.detach())
    mask = torch.rand(3, 9, 10, 11) < 0.1
    assert len(pc.SparseTensor.from_dense(dense, mask)) == mask.sum()
    unbounded = scene()
    assert unbounded.dense().shape[2:] == tuple(unbounded.coords[:, 1:].amax(0) + 1)
    assert unbounded.dense((9, 9, 20)).shape[2:] == (9, 9, 20)
    with pytest.raises(ValueError, match=r"do not fit the shape \[2, 9, 9\]"):
        unbounded.dense((2, 9, 9))
    nothing = pc.SparseTensor(torch.zeros(0, 3).int(), torch.zeros(0, 5), batch_size=2)
    assert nothing.dense((4, 4)).shape == (2, 5, 4, 4)


def test_tensors_at_the_same_voxels_combine_in_any_order_of_rows() -> None:
    x = scene(batch_size=2)
    rows = torch.randperm(len(x))
    y = pc.SparseTensor(x.coords[rows], x.feats[rows], batch_size=2)
    assert torch.equal((x - y).feats, torch.zeros_like(x.feats))
    assert torch.equal(pc.cat([y, x]).feats, torch.cat([y.feats, y.feats], 1))
    # The same numbers as views of other memory, and what a pickle or a copy brings.
    strided = torch.randn(3, len(x)).t()
    for other in (pickle.loads(pickle.dumps(x)), copy.deepcopy(x), x.replace_feats(strided)):
        assert torch.equal((x + other).feats, x.feats + other.feats)
        assert torch.equal(other.coords, x.coords)
    fewer = pc.SparseTensor(x.coords[1:], x.feats[1:])
    with pytest.raises(ValueError, match=r"SparseTensor \+: the coordinates differ"):
        x + fewer
    with pytest.raises(ValueError, match="SparseTensor cat: the coordinates differ"):
        pc.cat([x, pc.SparseTensor(x.coords, x.feats, stride=2)])
    with pytest.raises(ValueError, match="cat: no tensors"):
        pc.cat([])


def test_collate_makes_one_batch() -> None:
    x, empty = scene(batch_size=3), (torch.zeros(0, 3).int(), torch.zeros(0, 3))
    cells = torch.tensor([[-4, 0, 2], [5, 5, 5]])
    batch = pc.collate([x, empty, (cells, torch.ones(2, 3))])
    assert batch.batch_size == 5
    assert torch.equal(batch.coords[: len(x)], x.coords)
    assert batch.coords[len(x) :].tolist() == [[4, -4, 0, 2], [4, 5, 5, 5]]
    assert torch.equal(batch.feats, torch.cat([x.feats, torch.ones(2, 3)]))
    shapes = [scene(spatial_shape=shape) for shape in ((9, 9, 20), (12, 9, 9))]
    assert pc.collate(shapes).spatial_shape == (12, 9, 20)
    with pytest.raises(ValueError, match="in sample 1"):
        pc.collate([x, x.replace_feats(x.feats[:, :2])])
    with pytest.raises(ValueError, match="no samples"):
        pc.collate([])
    with pytest.raises(TypeError, match="sample 1 is tuple of Tensor, Tensor, int, expected a Sp"):
        pc.collate([x, (cells, torch.ones(2, 3), 7)])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="sample 0 is NoneType"):
        pc.collate([None])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"coordinates of sample 0 have shape \[3\]"):
        pc.collate([(cells[0], torch.ones(1, 3))])
    arrays = pc.collate([(cells.numpy(), torch.ones(2, 3).numpy())])
    assert torch.equal(arrays.coords[:, 1:], cells.int())


def test_feats_and_coords_must_agree() -> None:
    x = scene()
    with pytest.raises(ValueError, match="expected \\[N, C\\] and \\[N, 1 \\+ D\\]"):
        pc.SparseTensor(x.coords, x.feats[1:])
    with pytest.raises(ValueError, match="feats have shape"):
        x.replace_feats(x.feats[:, 0])
    with pytest.raises(ValueError, match="have a stride, shape and batch size already"):
        pc.SparseTensor(x.coordinates, x.feats, stride=2)
    with pytest.raises(ValueError, match=r"give \[1, 3\], expected|give .*expected"):
        x + torch.zeros(2, len(x), 3)
    for coords, feats in ((x.coords.numpy(), x.feats), (x.coords, [[1.0]] * len(x))):
        with pytest.raises(TypeError, match=r"(ndarray|list), expected a Tensor"):
            pc.SparseTensor(coords, feats)
    sizes = torch.tensor([9, 9, 9]).numpy()  # as a config's array has them
    numpy = pc.SparseTensor(x.coords, x.feats, sizes[0], sizes, sizes[0])
    assert (numpy.stride, numpy.spatial_shape, numpy.batch_size) == ((9,) * 3, (9,) * 3, 9)
    for some, error in ({"batch_size": 2.0}, TypeError), ({"batch_size": 2**40}, ValueError):
        with pytest.raises(error, match="batch_size is"):
            pc.SparseTensor(x.coords, x.feats, **some)
    with pytest.raises(ValueError, match=r"below 2\*\*62"):
        pc.SparseTensor(x.coords, x.feats, spatial_shape=(2**70, 9, 9))
    every_other = pc.SparseTensor(x.coords.repeat(1, 2)[:, :4], x.feats)  # not contiguous
    assert torch.equal((every_other + x).feats, 2 * x.feats)


@pytest.mark.parametrize(
    ("count", "dims", "size", "dtype"),
    [
        (0, 3, 0.1, torch.float32),
        (1, 2, 1.0, torch.float64),
        (40000, 3, 0.1, torch.float32),
        (3000, 4, 0.3, torch.bfloat16),
        (2000, 1, 0.01, torch.float16),
    ],
)
def test_voxelize_equals_plain_torch_at_any_number_of_threads(
    count: int, dims: int, size: float, dtype: torch.dtype, threads: int
) -> None:
    points = torch.randn(count, dims).to(dtype)
    batch = torch.randint(0, 3, (count,))
    features = torch.randn(count, 5).to(dtype)
    if count > 10:
        features[3, 2] = float("nan")
    exact = points if dtype == torch.float64 else points.float()
    coords, of_point, _, _ = plain.voxels(exact, batch.int(), (size,) * dims)
    for reduce in ("mean", "first", "max"):
        expected = plain.reduce(features, of_point, len(coords), reduce)
        bits: list[Tensor] = []
        for team in (1, 3):
            torch.set_num_threads(team)
            x, found = pc.voxelize(points, size, reduce, features, batch, batch_size=3)
            assert torch.equal(x.coords, coords)
            assert torch.equal(found, of_point)
            assert x.coordinates.order is None
            torch.testing.assert_close(x.feats, expected, equal_nan=True)
            bits.append(x.feats.view(torch.uint8))
        assert torch.equal(*bits)


@pytest.mark.cuda
def test_a_gpu_voxelizes_as_the_cpu_does() -> None:
    points, features = torch.randn(3000, 3), torch.randn(3000, 5)
    for reduce in ("mean", "first", "max"):
        results = []
        for device in ("cpu", "cuda"):
            given = features.to(device).requires_grad_()
            x, found = pc.voxelize(points.to(device), 0.3, reduce, given)
            (dx,) = torch.autograd.grad(x.feats.square().sum(), given)
            results.append((x.coords.cpu(), found.cpu(), x.feats.detach().cpu(), dx.cpu()))
        for cpu, gpu in zip(*results, strict=True):
            torch.testing.assert_close(gpu, cpu)


def test_gradients_of_voxelize() -> None:
    points = torch.randn(60, 2, dtype=torch.float64)
    features = torch.randn(60, 3, dtype=torch.float64, requires_grad=True)
    for reduce in ("mean", "first", "max"):

        def reduced(f: Tensor, how: str = reduce) -> Tensor:
            return pc.voxelize(points, 1.0, how, f)[0].feats

        assert torch.autograd.gradcheck(reduced, features)
        assert torch.autograd.gradgradcheck(reduced, features)
        (want,) = torch.autograd.grad(reduced(features).square().sum(), features)
        got = torch.func.grad(lambda f, reduced=reduced: reduced(f).square().sum())(features)
        torch.testing.assert_close(got, want)
        given = points.clone().requires_grad_()
        y = pc.voxelize(given, 1.0, reduce)[0].feats
        got = torch.func.grad(
            lambda p, how=reduce: pc.voxelize(p, 1.0, how)[0].feats.square().sum()
        )
        torch.testing.assert_close(got(points), torch.autograd.grad(y.square().sum(), given)[0])
    tied = torch.zeros(2, 1, requires_grad=True)
    pc.voxelize(torch.zeros(2, 2), 1.0, "max", tied)[0].feats.sum().backward()
    assert tied.grad.tolist() == [[1], [0]]


def test_voxelize_refuses_with_values() -> None:
    points = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    for error, text, kwargs in [
        (ValueError, r"point 1, \[2, nan\], is not finite", {"points": points.log().sqrt()}),
        (ValueError, r"point 0, \[0, 1e\+12\], is not finite or lies", {"points": points * 1e12}),
        (TypeError, "points are ndarray, expected a Tensor", {"points": points.numpy()}),
        (TypeError, "batch are list, expected a Tensor", {"batch": [0, 0]}),
        (TypeError, "features are list", {"features": [0, 1]}),
        (ValueError, "voxel_size is -1.0,", {"voxel_size": torch.tensor(-1.0)}),
        (TypeError, "points are torch.int64", {"points": points.long()}),
        (ValueError, r"points have shape \[2\]", {"points": points[0]}),
        (ValueError, "voxel_size is 0,", {"voxel_size": 0}),
        (ValueError, r"voxel_size is \(1, 2, 3\),", {"voxel_size": (1, 2, 3)}),
        (ValueError, "reduce is 'sum', expected one of mean", {"reduce": "sum"}),
        (ValueError, r"features have shape \[1, 2\]", {"features": points[:1]}),
        (TypeError, "features are torch.int64", {"features": points.long()}),
        (ValueError, "batch ranges from -1 to 0", {"batch": torch.tensor([0, -1])}),
        (TypeError, "batch is torch.float32", {"batch": points[:, 0]}),
        (ValueError, "lie outside of the spatial shape", {"spatial_shape": (2, 2)}),
    ]:
        arguments = {"points": points, "voxel_size": 1.0, **kwargs}
        if "nan" in text:
            arguments["points"] = torch.tensor([[0.0, 1.0], [2.0, float("nan")]])
        with pytest.raises(error, match=text):
            pc.voxelize(**arguments)


def test_coordinates_are_the_tensor_s_own() -> None:
    coords = torch.tensor([[0, 1, 2], [0, 3, 4]], dtype=torch.int32)
    x = pc.SparseTensor(coords, torch.randn(2, 1))
    coords[0, 1] = 3
    coords[0, 2] = 4
    assert x.coords.tolist() == [[0, 1, 2], [0, 3, 4]]
