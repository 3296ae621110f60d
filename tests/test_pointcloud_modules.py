"""Layers over voxels as modules: dense twins, threads, compile, others' weights, U-Nets."""

from __future__ import annotations

import copy
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import same_state
from gossamer import fold_batchnorm
from gossamer import pointcloud as pc
from torch import Tensor, nn


def scene(
    channels: int = 4, shape: tuple[int, ...] = (9, 8, 7), density: float = 0.25
) -> pc.SparseTensor:
    """Three samples, the second of them empty, in no order of rows."""
    mask = torch.rand(3, *shape) < density
    mask[1] = False
    coords = mask.nonzero().int()
    coords = coords[torch.randperm(len(coords))]
    return pc.SparseTensor(
        coords, torch.randn(len(coords), channels), spatial_shape=shape, batch_size=3
    )


def at(dense: Tensor, y: pc.SparseTensor) -> Tensor:
    return dense.movedim(1, -1)[tuple(y.coords.long().unbind(1))]


LAYERS = (
    pc.SubmanifoldConv3d(4, 6, 3, 2, groups=2),
    pc.SubmanifoldConv3d(4, 6, (2, 4, 1)),
    pc.Conv3d(4, 6, 3, 2, 1),
    pc.Conv3d(4, 6, (3, 2, 3), 1, 1, bias=False),
    pc.ConvTranspose3d(4, 6, 3, 2, 1, 1, groups=2),
    pc.GenerativeConvTranspose3d(4, 6, 2, 2),
    pc.GenerativeConvTranspose3d(4, 6, 3, dilation=2),
)


def test_the_default_device_is_not_that_of_the_voxels() -> None:
    x, points = scene(), torch.rand(50, 3)
    wanted = [layer(x).feats for layer in LAYERS]
    voxels, _ = pc.voxelize(points, 0.2, features=points)
    with torch.device("meta"):
        again = pc.SparseTensor(x.coords, x.feats, spatial_shape=(9, 8, 7), batch_size=3)
        got = [layer(again).feats for layer in LAYERS]
        assert torch.equal(pc.voxelize(points, 0.2, features=points)[0].feats, voxels.feats)
    for y, feats in zip(got, wanted, strict=True):
        assert torch.equal(y, feats)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("layer", LAYERS, ids=repr)
def test_dense_layer_and_back(layer: Any) -> None:
    dense = layer.to_dense()
    back = type(layer).from_dense(dense)
    assert repr(back) == repr(layer)
    assert same_state(back, layer)
    x = scene()
    y, again = layer(x), back(x)
    assert torch.equal(again.feats, y.feats)
    if not isinstance(layer, pc.GenerativeConvTranspose):
        torch.testing.assert_close(y.feats, at(dense(x.dense()), y))


def test_modules_behave_as_modules() -> None:
    for layer in (*LAYERS, pc.InverseConv3d(4, 6, 2)):
        twin = copy.deepcopy(layer)
        assert same_state(twin, layer)
        nn.init.zeros_(twin.weight)
        assert layer.weight.any()
        twin.load_state_dict(layer.state_dict())
        assert same_state(twin, layer)
        assert layer.weight.shape == (*layer.kernel_size, 4 // layer.groups, 6)
    with torch.device("meta"):
        empty = pc.models.MinkUNet14(3, 5)
    assert all(p.is_meta for p in empty.parameters())
    filled = empty.to_empty(device="cpu")
    filled.load_state_dict(pc.models.MinkUNet14(3, 5).state_dict())
    assert "kernel_size=(3, 3, 3), stride=(2, 2, 2), padding=(1, 1, 1)" in repr(LAYERS[2])
    drawn = pc.Conv2d(8, 16, 3).weight
    assert 0.9 * 72**-0.5 < drawn.abs().max() <= 72**-0.5


def test_inverse_returns_to_the_voxels_it_came_from() -> None:
    x = scene()
    down, deeper = pc.Conv3d(4, 4, 3, 2, 1), pc.Conv3d(4, 4, 2, 2)
    up, higher = pc.InverseConv3d(4, 5, 3), pc.InverseConv3d(4, 4, 2)
    half = down(x)
    y = up(higher(deeper(half)))
    assert y.coordinates is not half.coordinates
    assert y.coordinates.is_same(x.coordinates)
    geometry = {"stride": 2, "padding": 1, "output_padding": (0, 1, 0)}
    back = up(half)
    dense = up.to_dense(**geometry)(half.dense())
    torch.testing.assert_close(back.feats, at(dense, back))
    twin = pc.ConvTranspose3d(4, 5, 3, 2, 1)  # the same, told where to go
    twin.load_state_dict(up.state_dict())
    assert torch.equal(twin(half, x).feats, back.feats)
    with pytest.raises(ValueError, match=r"kernel \(3, 3, 3\).*none is known"):
        up(scene())
    with pytest.raises(ValueError, match=r"kernel \(2, 2, 2\).*known: .*kernel \(3, 3, 3\)"):
        higher(half)
    with pytest.raises(ValueError, match="its outputs are remembered"):
        up(half, x)


def test_what_others_make_of_the_same_voxels_is_no_history() -> None:
    x = scene()
    down, up = pc.Conv3d(4, 4, 2, 2), pc.InverseConv3d(4, 4, 2)
    grow = pc.ConvTranspose3d(4, 4, 2, 2)
    for _ in range(2):  # the maps of the second pass are those of the first
        half = down(x)
        grown = grow(half)
        again = down(grown, half)  # the voxels of half, by another way
        assert len(grown) > len(x)
        assert again.coordinates.is_same(half.coordinates)
        assert up(half).coordinates.is_same(x.coordinates)
        assert up(pc.MaxPool3d(2)(x)).coordinates.is_same(x.coordinates)
        back = up(again)
        assert back.coordinates.is_same(grown.coordinates)
    # What made a target is known of the result, too, where nothing later has that kernel.
    low = pc.Conv3d(4, 4, 3, 3)(half)
    lower = pc.Conv3d(4, 4, 4, 4)(grown, low)
    home = pc.InverseConv3d(4, 4, 4)(lower)
    assert home.coordinates.is_same(grown.coordinates)
    assert up(pc.InverseConv3d(4, 4, 3)(lower)).coordinates.is_same(x.coordinates)
    # So does a sum, in either order, and what goes on from a way back.
    short, main = down(x), pc.Conv3d(4, 4, 3, 2, 1)(x, half)
    for both in (short + main, main * short, pc.cat([main, short])):
        assert pc.InverseConv3d(both.channels, 4, 2)(both).coordinates.is_same(x.coordinates)
        assert pc.InverseConv3d(both.channels, 4, 3)(both).coordinates.is_same(x.coordinates)
    assert pc.InverseConv3d(4, 4, 3)(down(pc.InverseConv3d(4, 4, 3)(main))).channels == 4
    for _ in range(50):  # and it does not grow
        again = down(grow(again), half)
    assert sum(map(len, again.coordinates._history.values())) < 8


def test_given_outputs() -> None:
    x = scene()
    layer = pc.Conv3d(4, 6, 3, 2, 1)
    dense = layer.to_dense()(x.dense())
    cells = pc.SparseTensor.from_dense(torch.ones(3, 1, *dense.shape[2:]))
    target = pc.SparseTensor(cells.coords.flip(0), cells.feats, stride=2, batch_size=3)
    y = layer(x, target)
    assert y.coordinates is target.coordinates
    torch.testing.assert_close(y.feats, at(dense, y))


def test_pointwise_layers_are_those_of_torch() -> None:
    x = scene()
    norm = pc.BatchNorm(4)
    twin = nn.BatchNorm1d(4)
    assert torch.equal(norm(x).feats, twin(x.feats))
    assert torch.equal(norm.eval()(x).feats, twin.eval()(x.feats))
    assert same_state(norm, twin)
    assert torch.equal(pc.ReLU()(x).feats, x.feats.relu())
    wide = pc.functional.wrap(nn.Linear(4, 9))
    assert torch.equal(wide(x).feats, wide.module(x.feats))
    assert wide(x).coordinates is x.coordinates
    mask = x.feats[:, 0] > 0
    for layer in (pc.Prune(mask), pc.Prune(lambda x: x.feats[:, 0] > 0)):
        y = layer(x)
        assert torch.equal(y.coords, x.coords[mask])
        assert torch.equal(y.feats, x.feats[mask])
        assert (y.batch_size, y.spatial_shape) == (x.batch_size, x.spatial_shape)
    with pytest.raises(TypeError, match="int64"):
        pc.Prune(mask.long())(x)
    with pytest.raises(ValueError, match=rf"\[3\], expected \[{len(x)}\]"):
        pc.Prune(mask[:3])(x)
    with pytest.raises(ValueError, match="4 channels, the layer normalises 5"):
        pc.BatchNorm(5)(x)
    with pytest.raises(ValueError, match="SparseTensor"):
        pc.functional.wrap(nn.Flatten(0))(x)


def test_synchronised_norms_of_one_process_are_the_others() -> None:
    x = scene(channels=6)
    inner = nn.Sequential(pc.BatchNorm(6), pc.SubmanifoldConv3d(6, 6, 3), pc.BatchNorm(6))
    model = nn.Sequential(inner, pc.functional.wrap(nn.BatchNorm1d(6)))
    twin = pc.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert same_state(model, twin)
    kinds = [type(m) for m in twin.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert set(kinds[:-1]) == {pc.SyncBatchNorm}
    assert kinds[-1] is nn.SyncBatchNorm
    for step in range(2):
        assert torch.equal(model(x).feats, twin(x).feats)
        assert same_state(model, twin), step
        model, twin = model.eval(), twin.eval()
    again = pc.SyncBatchNorm.convert_sync_batchnorm(twin)
    assert torch.equal(again(x).feats, model(x).feats)
    nothing = pc.SparseTensor(x.coords[:0], x.feats[:0])
    assert len(pc.SyncBatchNorm(6)(nothing)) == 0
    norm = pc.BatchNorm(6)
    shared = pc.SyncBatchNorm.convert_sync_batchnorm(nn.ModuleDict({"a": norm, "b": norm}))
    assert isinstance(shared, nn.ModuleDict)
    assert type(shared["a"]) is pc.SyncBatchNorm
    assert shared["a"] is shared["b"]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_a_synchronised_norm_of_a_group_of_one_trains_on_a_cpu(tmp_path: Path) -> None:
    x, norm, twin = scene(channels=6), pc.BatchNorm(6), pc.SyncBatchNorm(6)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        assert torch.equal(norm(x).feats, twin(x).feats)
        assert same_state(norm, twin)
    finally:
        torch.distributed.destroy_process_group()


def test_nothing_and_a_single_voxel() -> None:
    model = nn.Sequential(
        pc.SubmanifoldConv2d(3, 4, 3),
        pc.BatchNorm(4),
        pc.ReLU(),
        pc.Conv2d(4, 5, 3, 2, 1),
        pc.MaxPool2d(2),
        pc.GlobalAvgPool(),
    ).eval()
    none = torch.empty(0, 3, dtype=torch.int32)
    for train in (False, True):
        feats = torch.empty(0, 3, requires_grad=True)
        x = pc.SparseTensor(none, feats, spatial_shape=(9, 9), batch_size=2)
        y = model.train(train)(x)
        assert torch.equal(y, torch.zeros(2, 5))
        y.sum().backward()
        assert feats.grad is not None
    one = pc.SparseTensor(torch.tensor([[0, 2**20, -(2**20)]]), torch.randn(1, 3))
    y = pc.SubmanifoldConv2d(3, 4, 3)(one)
    assert y.coords.tolist() == [[0, 2**20, -(2**20)]]
    assert model.eval()(one).shape == (1, 5)


def test_a_nan_reaches_the_outputs_of_its_pairs_alone() -> None:
    x = scene()
    x.feats[5, 1] = torch.nan
    layer = pc.Conv3d(4, 6, 3, 2, 1)
    y = layer(x)
    hit = torch.zeros(len(x), 1)
    hit[5] = 1
    ones = pc.Conv3d(1, 1, 3, 2, 1, bias=False)
    nn.init.ones_(ones.weight)
    reached = ones(x.replace_feats(hit)).feats.squeeze(1) > 0
    assert torch.equal(y.feats.isnan().all(1), reached)
    assert torch.equal(y.feats.isnan().any(1), reached)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    x = scene()
    model = nn.Sequential(pc.SubmanifoldConv3d(4, 8, 3), pc.BatchNorm(8), pc.ReLU())
    x.feats.requires_grad_()
    with torch.autocast("cpu", dtype):
        y = model(x)
    assert y.dtype == dtype
    y.feats.float().sum().backward()
    assert model[0].weight.grad.dtype == torch.float32
    torch.testing.assert_close(y.feats.float(), model(x).feats, atol=0.05, rtol=0.05)


def test_same_bits_for_any_number_of_threads(threads: int) -> None:
    x = scene(20, (30, 28, 26), 0.2)
    layers = (
        pc.SubmanifoldConv3d(20, 40, 3),
        pc.SubmanifoldConv3d(20, 20, 3, groups=20),
        pc.Conv3d(20, 17, 3, 2, 1),
        pc.ConvTranspose3d(20, 9, 2, 2),
    )
    results = []
    for count in (1, 2, 3, 4):
        torch.set_num_threads(count)
        rows = []
        fresh = pc.SparseTensor(x.coords, x.feats, spatial_shape=x.spatial_shape, batch_size=3)
        for layer in layers:
            feats = fresh.feats.detach().requires_grad_()
            y = layer(fresh.replace_feats(feats))
            rows += [y.coords, y.feats]
            leaves = (feats, layer.weight)
            rows += torch.autograd.grad((y.feats * y.feats).sum(), leaves)
        results.append(rows)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_compiles_whole_on_fixed_coordinates() -> None:
    x = scene()
    model = nn.Sequential(pc.SubmanifoldConv3d(4, 8, 3), pc.BatchNorm(8), pc.ReLU()).eval()

    def run(feats: Tensor) -> Tensor:
        return model(x.replace_feats(feats)).feats

    want = run(x.feats)  # the map is made and kept here
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    feats = x.feats.detach().requires_grad_()
    y = compiled(feats)
    torch.testing.assert_close(y, want)
    g = torch.autograd.grad(y.sum(), (feats, model[0].weight))
    for got, expected in zip(
        g, torch.autograd.grad(run(feats).sum(), (feats, model[0].weight)), strict=True
    ):
        torch.testing.assert_close(got, expected)


def test_mistakes() -> None:
    x = scene()
    with pytest.raises(ValueError, match="4 channels, the weight expects 8"):
        pc.SubmanifoldConv3d(8, 4, 3)(x)
    with pytest.raises(ValueError, match="3 spatial axes, the kernel 2"):
        pc.SubmanifoldConv2d(4, 4, 3)(x)
    with pytest.raises(TypeError, match="Tensor, expected SparseTensor"):
        pc.Conv3d(4, 4, 3)(x.dense())
    of_any = (pc.BatchNorm(4), pc.ReLU(), pc.functional.wrap(nn.GELU()), pc.GlobalMaxPool())
    for layer in (*of_any, pc.Prune(torch.ones(len(x)) > 0), pc.AvgPool3d(2), pc.cat):
        with pytest.raises(TypeError, match="x is Tensor, expected SparseTensor"):
            layer([x.feats] if layer is pc.cat else x.feats)
    with pytest.raises(TypeError, match="target is Tensor, expected SparseTensor or Coord"):
        pc.MaxPool3d(2)(x, x.coords)
    with pytest.raises(ValueError, match="in_channels 4 and out_channels 6 in 3 groups"):
        pc.Conv3d(4, 6, 3, groups=3)
    with pytest.raises(ValueError, match="a number an axis, or take Conv2d"):
        pc.Conv(4, 4, 3)
    with pytest.raises(ValueError, match="outputs 'minkowski'"):
        pc.Conv3d(4, 4, 3, outputs="minkowski")
    with pytest.raises(ValueError, match=r"output_padding \(2, 2, 2\)"):
        pc.ConvTranspose3d(4, 4, 3, 2, output_padding=2)
    with pytest.raises(ValueError, match="its outputs are its inputs"):
        pc.SubmanifoldConv3d(4, 4, 3)(x, x)
    with pytest.raises(ValueError, match=r"leave the shape \(0, "):
        pc.Conv3d(4, 4, (10, 3, 3))(x)
    with pytest.raises(TypeError, match="no 4-D convolution"):
        pc.Conv4d(4, 4, 3).to_dense()
    with pytest.raises(ValueError, match="reaches"):
        pc.SubmanifoldConv3d(4, 4, 2, 2).to_dense()
    with pytest.raises(TypeError, match=r"Linear, expected torch.nn.Conv3d"):
        pc.Conv3d.from_dense(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="expected stride 1 and padding"):
        pc.SubmanifoldConv3d.from_dense(nn.Conv3d(2, 2, 3))
    with pytest.raises(ValueError, match="padding_mode 'circular'"):
        pc.Conv3d.from_dense(nn.Conv3d(2, 2, 3, padding_mode="circular"))
    with pytest.raises(ValueError, match=r"padding \(0, 0, 0\), expected \(1, 1, 1\)"):
        pc.GenerativeConvTranspose3d.from_dense(nn.ConvTranspose3d(2, 2, 3, 2))


# ---- weights of other libraries ------------------------------------------------------------


def spconv_weight(dense: Tensor) -> Tensor:
    """[C_out, C_in, *k] as spconv 2 stores it."""
    kernel = dense.shape[2:]
    if kernel.numel() == 1:
        return dense.flatten(1).t().reshape(len(dense), *kernel, -1)
    return dense.movedim(1, -1)


def taps_weight(dense: Tensor, first_fastest: bool) -> Tensor:
    """[C_out, C_in, *k] as [taps, C_in, C_out] in either order of taps; one tap as a matrix."""
    axes = list(range(2, dense.dim()))
    stored = dense.permute(*(axes[::-1] if first_fastest else axes), 1, 0).flatten(0, len(axes) - 1)
    return stored[0] if len(stored) == 1 else stored


@pytest.mark.parametrize("kernel", [1, 2, 3, (3, 2, 1), (1, 3, 5)])
@pytest.mark.parametrize("library", ["spconv", "minkowski", "torchsparse"])
def test_weights_of_other_libraries(library: str, kernel: Any) -> None:
    layer = pc.Conv3d(4, 6, kernel)
    model = nn.Sequential(layer, pc.BatchNorm(6), pc.functional.wrap(nn.Linear(6, 6)))
    dense = nn.Conv3d(4, 6, kernel)
    norm, linear = nn.BatchNorm1d(6), nn.Linear(6, 6)
    nn.init.uniform_(norm.weight)
    taps = dense.weight[0, 0].numel()
    weight = dense.weight.detach()
    bias = dense.bias.detach()
    mine = {f"1.{name}": t for name, t in norm.state_dict().items()}
    if library == "spconv":
        theirs = {"0.weight": spconv_weight(weight), "0.bias": bias, **mine}
    else:
        odd = library == "minkowski" or taps % 2 == 1
        theirs = {"0.kernel": taps_weight(weight, odd), "0.bias": bias, **mine}
        if library == "minkowski":
            theirs["0.bias"] = bias.unsqueeze(0)
            theirs = {name.replace("1.", "1.bn."): t for name, t in theirs.items()}
    theirs.update({f"2.module.{name}": t for name, t in linear.state_dict().items()})
    load = getattr(pc, f"load_{library}")
    model.load_state_dict(load(theirs, model))
    x = scene()
    y = model[0](x)
    torch.testing.assert_close(y.feats, at(dense(x.dense()), y))
    assert same_state(model[1], norm)
    assert same_state(model[2].module, linear)
    if isinstance(kernel, int) or library == "spconv":
        alone = load(theirs)
        assert torch.equal(alone["0.weight"], layer.weight)
        assert list(alone) == list(load(theirs, model))


def test_other_weights_that_do_not_fit() -> None:
    model = nn.Sequential(pc.Conv3d(4, 6, 3))
    with pytest.raises(ValueError, match=r"0.weight has shape \[6, 2, 3, 3, 4\], expected \[C_out"):
        pc.load_spconv({"0.weight": torch.zeros(6, 2, 3, 3, 4)}, model)
    with pytest.raises(ValueError, match=r"5 input and 6 output channels.*expects 4 and 6"):
        pc.load_minkowski({"0.kernel": torch.zeros(27, 5, 6)}, model)
    with pytest.raises(ValueError, match=r"\[8, 4, 6\], expected \[27, C_in, C_out\]"):
        pc.load_torchsparse({"0.kernel": torch.zeros(8, 4, 6)}, model)
    with pytest.raises(ValueError, match="a model says which"):
        pc.load_minkowski({"kernel": torch.zeros(18, 4, 6)})
    counted = {"0.weight": torch.zeros(6, 3, 3, 3, 4), "0.bias": torch.zeros(6)}
    counted["0._max_num_voxels_during_training"] = torch.tensor([7])
    model.load_state_dict(pc.load_spconv(counted, model))
    grouped = nn.Sequential(pc.Conv3d(4, 6, 3, groups=2))
    with pytest.raises(ValueError, match="in groups"):
        pc.load_spconv({"0.weight": torch.zeros(6, 3, 3, 3, 4)}, grouped)


@pytest.mark.parametrize("layout", ["KRSC", "RSKC", "RSCK"])
def test_layouts_of_spconv(layout: str) -> None:
    unstrided = [pc.Conv3d(4, 6, 1), pc.SubmanifoldConv3d(4, 6, 1), pc.ConvTranspose3d(4, 6, 1)]
    strided = [pc.Conv3d(4, 6, 1, 2), pc.ConvTranspose3d(4, 6, 1, (1, 2, 1))]
    for layer in [*unstrided, *strided, pc.Conv3d(4, 6, (3, 1, 2), 2)]:
        ours = layer.weight.detach()
        stored = {
            "KRSC": ours.movedim(-1, 0),
            "RSKC": ours.transpose(-1, -2),
            "RSCK": ours,
        }[layout].contiguous()
        if layout != "RSCK" and layer in unstrided:  # read as a matrix [C_in, C_out]
            stored = ours.reshape(stored.shape)
        got = pc.load_spconv({"a.weight": stored}, nn.ModuleDict({"a": layer}), layout)
        assert torch.equal(got["a.weight"], ours), layer


def test_other_checkpoints_as_they_are_found() -> None:
    model = nn.Sequential(pc.Conv3d(4, 6, 3), pc.BatchNorm(6))
    kernel, norm = torch.randn(27, 4, 6), nn.BatchNorm1d(6).state_dict()
    theirs = {"0.kernel": kernel, "0.bias": torch.randn(6)}
    theirs |= {f"1.bn.{name}": t for name, t in norm.items()}
    parallel = {f"module.{name}": t for name, t in theirs.items()}
    plain = pc.load_minkowski(theirs, model)
    assert all(torch.equal(t, plain[n]) for n, t in pc.load_minkowski(parallel, model).items())
    head = torch.randn(1, 5)  # a bias of no convolution
    assert pc.load_minkowski({**theirs, "2.bias": head}, model)["2.bias"] is head
    for load in (pc.load_spconv, pc.load_minkowski):  # one prefix goes, not two
        with pytest.raises(ValueError, match="none of the 1 entries"):
            load(
                {
                    "module.module.0.kernel": kernel,
                },
                model,
            )
    model.half().load_state_dict(plain)
    wrapped = nn.Module()
    wrapped.module = model[0]  # a name of the model's own
    assert list(pc.load_minkowski({"module.kernel": kernel}, wrapped)) == ["module.weight"]
    depthwise = nn.Sequential(pc.SubmanifoldConv2d(5, 5, (3, 2), groups=5))
    taps = torch.randn(6, 5)  # the first axis fastest
    weight = pc.load_minkowski({"0.kernel": taps}, depthwise)["0.weight"]
    assert torch.equal(weight[1, 1, 0], taps[4])
    for load in (pc.load_spconv, pc.load_minkowski, pc.load_torchsparse):
        stored = "weight" if load is pc.load_spconv else "kernel"
        with pytest.raises(ValueError, match=rf"none of the 2 entries .*0\.{stored}.*state_dict"):
            load({"state_dict": theirs, "epoch": 3}, model)
        for entry, kind in ((None, "NoneType"), (torch.zeros(27, 4, 6).int(), "int32")):
            with pytest.raises(TypeError, match=rf"0\.{stored} is .*{kind}"):
                load({f"0.{stored}": entry}, model)
    with pytest.raises(ValueError, match="dims is 0"):
        pc.load_minkowski(theirs, dims=0)
    with pytest.raises(ValueError, match="layout is 'HWIO', expected KRSC"):
        pc.load_spconv(theirs, model, "HWIO")


# ---- networks ------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [2, 3])
def test_a_u_net_learns(dims: int, threads: int) -> None:
    torch.set_num_threads(1)  # on a busy machine, teams wait at each of thousands of small steps
    x = scene(3, (16, 16, 16) if dims == 3 else (40, 40), 0.05)
    labels = (x.feats.sum(1) > 0).long()
    model = pc.models.MinkUNet(
        3, 2, blocks=(1,) * 8, planes=(8, 8, 8, 8, 8, 8, 8, 8), stem=8, dims=dims
    )
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    losses = []
    for _ in range(8):
        y = model(x)
        assert y.coordinates is x.coordinates or y.coordinates.is_same(x.coordinates)
        loss = nn.functional.cross_entropy(y.feats, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None for p in model.parameters())
    assert losses[-1] < 0.6 * losses[0]


def test_folded_batchnorms_change_nothing(threads: int) -> None:
    torch.set_num_threads(1)
    model = pc.models.MinkUNet(3, 2, (1,) * 8, (6, 5, 7, 8, 8, 7, 6, 5), stem=4)
    x = scene(3, (12, 12, 12), 0.1)
    for _ in range(3):
        model(x)  # statistics of its own
    want = model.eval()(x).feats
    report = fold_batchnorm(model)
    assert not report.left, str(report)
    assert len(report) == 33
    assert not any(isinstance(m, pc.BatchNorm) for m in model.modules())
    torch.testing.assert_close(model(x).feats, want, rtol=1e-4, atol=1e-4)


def test_u_nets_have_the_blocks_they_are_named_for() -> None:
    with torch.device("meta"):
        nets = [net(3, 20) for net in (pc.models.MinkUNet14, pc.models.MinkUNet18)]
        nets.append(pc.models.MinkUNet34(3, 20))
    blocks = [sum(isinstance(m, pc.models.ResidualBlock) for m in net.modules()) for net in nets]
    assert blocks == [8, 16, 23]
    with pytest.raises(ValueError, match=r"blocks \(1, 2\)"):
        pc.models.MinkUNet(3, 20, blocks=(1, 2))


def test_the_example_of_wafer_maps_runs(threads: int) -> None:
    torch.set_num_threads(1)
    example = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "wafer_maps.py"))
    assert 0 <= example["main"](["--size", "2000", "--steps", "2", "--batch", "4"]) <= 1


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_maps_that_a_transform_makes() -> None:
    net = nn.Sequential(
        pc.SubmanifoldConv3d(4, 6, 3), pc.Conv3d(6, 5, 3, 2, 1), pc.ConvTranspose3d(5, 3, 2, 2)
    ).double()
    for pool in (pc.GlobalAvgPool(), pc.GlobalMaxPool()):
        whole = nn.Sequential(net, pool)
        x = scene().to(dtype=torch.float64)
        dense = x.dense().requires_grad_()
        fresh = pc.SparseTensor(x.coords, x.feats, spatial_shape=x.spatial_shape, batch_size=3)

        def loss(feats: Tensor, x: pc.SparseTensor = fresh, whole: nn.Module = whole) -> Tensor:
            return whole(x.replace_feats(feats)).square().sum()

        def made_inside(feats: Tensor, x: pc.SparseTensor = x, whole: nn.Module = whole) -> Tensor:
            coords = x.coords + torch.zeros(4, dtype=torch.int32)
            made = pc.SparseTensor(coords, feats, spatial_shape=x.spatial_shape, batch_size=3)
            return whole(made).square().sum()

        def of_dense(dense: Tensor, whole: nn.Module = whole) -> Tensor:
            return whole(pc.SparseTensor.from_dense(dense)).square().sum()

        feats = x.feats.clone().requires_grad_()
        (want,) = torch.autograd.grad(whole(x.replace_feats(feats)).square().sum(), feats)
        for function in (loss, loss, made_inside):
            torch.testing.assert_close(torch.func.grad(function)(x.feats), want)
        torch.testing.assert_close(torch.func.jacrev(loss)(x.feats), want)
        (want,) = torch.autograd.grad(of_dense(dense), dense)
        torch.testing.assert_close(torch.func.grad(of_dense)(dense.detach()), want)
        feats = fresh.feats.clone().requires_grad_()  # its maps serve later calls
        loss(feats).backward()


def test_inference_first_and_training_second() -> None:
    x = scene()
    net = nn.Sequential(pc.SubmanifoldConv3d(4, 6, 3), pc.Conv3d(6, 4, 3, 2, 1), pc.GlobalMaxPool())
    with torch.inference_mode():
        expected = net(x)
    y = net(x)
    assert torch.equal(y, expected)
    y.sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    with torch.inference_mode():  # which makes the voxels, too
        made = scene()
        net(made)
    net(made.replace_feats(made.feats.clone())).sum().backward()
