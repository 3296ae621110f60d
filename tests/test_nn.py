"""SparseLinear as a module: construction, the two states, training, moves, copies."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import pickle
from typing import Any

import gossamer
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import dense_24
from gossamer import pointcloud as pc
from gossamer.formats import Sparse24, Sparse24Panels
from gossamer.nn import SparseConv2d, SparseLinear, SparseLinearQuantized
from gossamer.prune import magnitude_24
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize, prune


def dense_layer(in_features: int = 10, out_features: int = 6, **kwargs: Any) -> nn.Linear:
    linear = nn.Linear(in_features, out_features, **kwargs)
    with torch.no_grad():
        linear.weight.copy_(dense_24(out_features, in_features))
    return linear


@pytest.fixture(params=["trainable", "packed"])
def layer(request: pytest.FixtureRequest) -> SparseLinear:
    layer = SparseLinear.from_dense(dense_layer()).eval()
    return layer.pack() if request.param == "packed" else layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(1, 1), (3, 7), (5, 2), (64, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_matches_its_dense_twin(sizes: tuple[int, int], bias: bool, dtype: torch.dtype) -> None:
    linear = dense_layer(*sizes, bias=bias, dtype=dtype).eval()
    layer = SparseLinear.from_dense(linear)
    x = torch.randn(2, 3, sizes[0]).to(dtype)
    torch.testing.assert_close(layer(x), linear(x))
    if dtype != torch.float64:
        torch.testing.assert_close(layer.pack()(x), linear(x))
    back = layer.to_dense()
    assert torch.equal(back.weight, linear.weight)
    assert (back.bias is None) == (not bias)
    assert back.training is layer.training is False


@pytest.mark.parametrize(
    "kind",
    [
        *("SparseLinear", "SparseConv", "SparseLinearQuantized", "SparseTrainingLinear"),
        *("ActSparseLinear", "DeltaLinear"),
    ],
)
def test_x_is_named_as_in_torch(kind: str) -> None:
    ours = inspect.signature(getattr(gossamer.nn, kind).forward).parameters
    needed = [name for name, given in ours.items() if given.default is inspect.Parameter.empty]
    assert needed == list(inspect.signature(nn.Linear.forward).parameters)


def test_fresh_layer_is_drawn_as_a_dense_one_and_pruned() -> None:
    torch.manual_seed(7)
    layer = SparseLinear(10, 6)
    torch.manual_seed(7)
    linear = nn.Linear(10, 6)
    assert layer.bias is not None
    assert torch.equal(layer.to_dense().weight, magnitude_24(linear.weight))
    assert torch.equal(layer.bias, linear.bias)
    layer.weight.to_dense()
    assert [name for name, _ in layer.named_parameters()] == ["values", "bias"]
    assert SparseLinear(10, 6, bias=False).bias is None
    assert SparseLinear(10, 6, dtype=torch.bfloat16).values.dtype == torch.bfloat16


def test_magnitude_pruning_only_on_request() -> None:
    linear = nn.Linear(10, 6)
    with pytest.raises(ValueError, match="of 18 groups"):
        SparseLinear.from_dense(linear)
    layer = SparseLinear.from_dense(linear, prune="magnitude")
    assert torch.equal(layer.to_dense().weight, magnitude_24(linear.weight))


def test_from_dense_keeps_flags_and_copies_the_bias() -> None:
    linear = dense_layer().eval()
    linear.weight.requires_grad_(False)
    layer = SparseLinear.from_dense(linear)
    assert not layer.training
    assert not layer.values.requires_grad
    assert layer.bias.requires_grad
    assert layer.bias is not linear.bias
    assert not layer.to_dense().weight.requires_grad
    assert not layer.pack().unpack().values.requires_grad
    assert layer.pack().requires_grad_().unpack().values.requires_grad
    assert not layer.pack().requires_grad_(False).unpack().values.requires_grad


MISTAKES = {
    "in_features": (ValueError, "in_features 0", lambda: SparseLinear(0, 4)),
    "out_features": (ValueError, "out_features -1", lambda: SparseLinear(4, -1)),
    "pattern": (ValueError, "'1:2'", lambda: SparseLinear(4, 4, pattern="1:2")),
    "dtype": (TypeError, "int8", lambda: SparseLinear(4, 4, dtype=torch.int8)),
    "prune": (
        ValueError,
        "'random'",
        lambda: SparseLinear.from_dense(nn.Linear(4, 4), prune="random"),
    ),
    "from pattern": (ValueError, "'4:8'", lambda: SparseLinear.from_dense(dense_layer(), "4:8")),
    "no linear": (TypeError, "Conv2d", lambda: SparseLinear.from_dense(nn.Conv2d(1, 1, 1))),
    "pack float64": (TypeError, "float64", lambda: SparseLinear(4, 4, dtype=torch.float64).pack()),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_errors_with_values(case: str) -> None:
    error, text, call = MISTAKES[case]
    with pytest.raises(error, match=text):
        call()


def test_packing_keeps_one_copy_and_the_answers() -> None:
    layer = SparseLinear.from_dense(dense_layer(64, 32)).eval()
    x = torch.randn(3, 64)
    expected = layer(x)
    values, indices = layer.values.detach().clone(), layer.indices.clone()
    assert not layer.packed
    assert isinstance(layer.weight, Sparse24)
    assert layer.pack() is layer
    assert layer.packed
    assert isinstance(layer.weight, Sparse24Panels)
    assert (layer.values, layer.indices) == (None, None)
    torch.testing.assert_close(layer(x), expected)
    panels = layer.panels
    assert layer.pack().panels is panels
    assert "packed=True" in repr(layer)
    assert layer.unpack() is layer
    assert layer.panels is None
    assert torch.equal(layer.values, values)
    assert torch.equal(layer.indices, indices)
    assert layer.unpack().values is layer.values
    assert repr(layer) == (
        "SparseLinear(in_features=64, out_features=32, bias=True, pattern=2:4, packed=False)"
    )


def test_packing_frees_the_portable_tensors() -> None:
    layer = SparseLinear(256, 256)
    layer.pack()
    gc.collect()
    held = sum(t.nbytes for t in (*layer.parameters(), *layer.buffers()))
    assert held == layer.weight.nbytes + layer.bias.nbytes + layer.format.nbytes
    assert layer.weight.nbytes == 256 * 256 * 4 * 17 // 32


def test_a_packed_layer_is_not_trained() -> None:
    layer = SparseLinear(10, 6).pack()
    x = torch.randn(2, 10)
    with pytest.raises(RuntimeError, match=r"unpack\(\).*eval\(\)"):
        layer(x)
    with torch.no_grad():
        layer(x)
    x.requires_grad_()
    layer.eval()(x).sum().backward()
    assert x.grad is not None
    assert layer.bias.grad is not None
    layer.unpack().train()(x).sum().backward()
    assert layer.values.grad is not None


def test_values_given_to_a_packed_layer_are_not_ignored() -> None:
    layer = SparseLinear(10, 6).eval().pack()
    x = torch.randn(2, 10)
    with pytest.raises(RuntimeError, match=r"unpack\(\)"):
        functional_call(layer, {"values": torch.ones(6, 6)}, (x,))
    layer(x)


def test_packing_in_inference_mode_leaves_ordinary_tensors() -> None:
    layer = SparseLinear(10, 6).eval()
    x = torch.randn(2, 10, requires_grad=True)
    with torch.inference_mode():
        expected = layer(x)
        assert expected.is_inference()
        layer.pack()
        torch.testing.assert_close(layer(x), expected)
    layer(x).sum().backward()
    with torch.inference_mode():
        layer.unpack()
    layer.train()(x).sum().backward()
    assert layer.values.grad is not None


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_training_follows_the_masked_dense_layer(optimizer: type[torch.optim.Optimizer]) -> None:
    linear = dense_layer(16, 8)
    layer = SparseLinear.from_dense(linear)
    stored = torch.zeros(8, 16).scatter_(1, _columns(layer), torch.ones_like(layer.values.detach()))
    ours, theirs = optimizer(layer.parameters(), lr=0.1), optimizer(linear.parameters(), lr=0.1)
    for _ in range(4):
        x, target = torch.randn(5, 16), torch.randn(5, 8)
        for step, module in ((ours, layer), (theirs, linear)):
            step.zero_grad()
            F.mse_loss(module(x), target).backward()
            if module is linear:
                linear.weight.grad.mul_(stored)
            step.step()
        torch.testing.assert_close(layer.to_dense().weight, linear.weight * stored)
        torch.testing.assert_close(layer(x), linear(x))


def _columns(layer: SparseLinear) -> Tensor:
    from gossamer.reference import sparse24_columns

    return sparse24_columns(layer.indices, layer.in_features)


def test_writes_behind_the_version_counter_are_seen() -> None:
    layer = SparseLinear(10, 6)
    x = torch.randn(3, 10)
    layer(x)
    layer.values.data.mul_(2)
    layer.bias.data.zero_()
    torch.testing.assert_close(layer(x), F.linear(x, layer.to_dense().weight))
    layer.values.data = torch.ones_like(layer.values)
    torch.testing.assert_close(layer(x), F.linear(x, layer.to_dense().weight))


def test_functional_call_swaps_the_values() -> None:
    layer = SparseLinear(10, 6)
    x = torch.randn(3, 10)
    other = {name: torch.ones_like(p) for name, p in layer.named_parameters()}
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        for p in twin.parameters():
            p.fill_(1)
    torch.testing.assert_close(functional_call(layer, other, (x,)), twin(x))
    torch.testing.assert_close(functional_call(layer, twin.state_dict(), (x,)), twin(x))


def test_torch_pruning_and_parametrisation_are_seen() -> None:
    layer = SparseLinear(10, 6)
    x = torch.randn(3, 10)
    mask = (torch.rand(6, 6) < 0.5).float()
    expected = copy.deepcopy(layer)
    with torch.no_grad():
        expected.values.mul_(mask)
        expected.bias.mul_(2)
    prune.custom_from_mask(layer, "values", mask)
    parametrize.register_parametrization(layer, "bias", Doubled())
    assert torch.equal(layer(x), expected(x))
    before = copy.deepcopy(expected.state_dict())
    with pytest.raises(ValueError, match="parametrize cannot hold a tensor named 'values'"):
        parametrize.register_parametrization(expected, "values", Doubled())
    assert all(torch.equal(t, before[name]) for name, t in expected.state_dict().items())


def test_torch_pruning_is_saved_loaded_and_removed_before_packing() -> None:
    layer, other = (SparseLinear(10, 6).eval() for _ in range(2))
    mask, x = (torch.rand(6, 6) < 0.5).float(), torch.randn(3, 10)
    expected = copy.deepcopy(layer)
    with torch.no_grad():
        expected.values.mul_(mask)
    y = expected.to_dense().double()(x.double()).float()
    prune.custom_from_mask(layer, "values", mask)
    prune.custom_from_mask(other, "values", torch.ones(6, 6))
    state = copy.deepcopy(layer.state_dict())
    assert sorted(state) == ["bias", "format", "indices", "values_mask", "values_orig"]
    for given in (layer, other):
        given.load_state_dict(state)
        torch.testing.assert_close(given(x), y)
        given.load_state_dict(copy.deepcopy(state), assign=True)
        torch.testing.assert_close(given(x), y)
    with pytest.raises(RuntimeError, match=r"prune\.remove\(layer, 'values'\)"):
        layer.pack()
    torch.testing.assert_close(layer(x), y)
    prune.remove(layer, "values")
    torch.testing.assert_close(layer.pack()(x), y)


class Doubled(nn.Module):
    def forward(self, t: Tensor) -> Tensor:
        return 2 * t


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_moves(layer: SparseLinear, dtype: torch.dtype) -> None:
    packed, weight = layer.packed, layer.to_dense().weight
    assert layer.to(dtype) is layer
    # float64 has no panels.
    assert layer.packed == (packed and dtype != torch.float64)
    assert layer.weight.dtype == layer.bias.dtype == dtype
    assert torch.equal(layer.weight.to_dense(), weight.to(dtype))
    x = torch.randn(3, 10, dtype=dtype)
    torch.testing.assert_close(layer(x), layer.to_dense()(x))
    assert layer.format.tolist() == [1, 6, 10]


@pytest.mark.filterwarnings("ignore:Complex modules")
@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e5m2], ids=str)
def test_moves_to_what_has_no_kernel_change_nothing(
    layer: SparseLinear, dtype: torch.dtype
) -> None:
    packed, x = layer.packed, torch.randn(2, 10)
    expected = layer(x)
    with pytest.raises(TypeError, match=str(dtype)):
        layer.to(dtype)
    assert layer.packed == packed
    assert torch.equal(layer(x), expected)


def test_moves_that_change_nothing_keep_the_tensors(layer: SparseLinear) -> None:
    before = [t.data_ptr() for t in (*layer.parameters(), *layer.buffers())]
    layer.float().cpu().to("cpu").type(torch.float32)
    assert [t.data_ptr() for t in (*layer.parameters(), *layer.buffers())] == before
    layer.share_memory()
    assert all(t.is_shared() for t in (*layer.parameters(), *layer.buffers()))
    layer(torch.randn(2, 10))


def test_type_casts_the_values_alone(layer: SparseLinear) -> None:
    weight = layer.to_dense().weight
    layer.type(torch.bfloat16)
    assert torch.equal(layer.to_dense().weight, weight.bfloat16())
    assert layer.format.dtype == torch.int64


def test_meta_moves_and_construction(layer: SparseLinear) -> None:
    layer.to("meta")
    assert not layer.packed
    assert layer.weight.device.type == "meta"
    with torch.device("meta"):
        made = SparseLinear(10, 6)
    assert all(t.is_meta for t in (*made.parameters(), *made.buffers()))
    assert made(torch.randn(3, 10, device="meta")).shape == (3, 6)
    assert SparseLinear.from_dense(nn.Linear(10, 6, device="meta")).values.is_meta
    made.to_empty(device="cpu").format.fill_(-1)  # what empty memory may hold
    assert made.state_dict()["format"].tolist() == [1, 6, 10]
    made.reset_parameters()
    made.weight.validate()
    x = torch.randn(3, 10)
    torch.testing.assert_close(made(x), made.to_dense()(x))
    assert made.format.tolist() == [1, 6, 10]
    skipped = nn.utils.skip_init(SparseLinear, 10, 6)
    assert skipped.values.shape == (6, 6)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SparseLinear(64, 32),
        lambda: SparseLinear(64, 32, pattern=gossamer.Block(8, 8), density=0.5),
        lambda: SparseConv2d(64, 64, 3),
        lambda: SparseLinearQuantized(64, 32),
    ],
)
def test_memory_formats_leave_panels_alone(make: Any) -> None:
    layer = make().eval().pack()
    packed, x = layer.packed, torch.randn(*(1, 64, 4, 4)[: 4 if hasattr(layer, "stride") else 2])
    expected = layer(x)
    for memory_format in (torch.channels_last_3d, torch.channels_last, torch.contiguous_format):
        layer.to(memory_format=memory_format)
        assert layer.packed == packed
        assert torch.equal(layer(x), expected)


def test_sizes_of_numpy() -> None:
    three, eight, one = np.int64(3), np.int32(8), np.int64(1)
    layer = SparseLinear(eight, three)
    assert repr(layer) == repr(SparseLinear(8, 3))
    x = torch.randn(2, 8)
    torch.testing.assert_close(layer(x), layer.to_dense().double()(x.double()).float())
    conv = SparseConv2d(eight, eight, three, (one, 2), np.array(1)[()], one, np.int64(2))
    assert repr(conv) == repr(SparseConv2d(8, 8, 3, (1, 2), 1, 1, 2))
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(conv(x), conv.to_dense().double()(x.double()).float())
    assert gossamer.Block(np.int64(4), 2) == gossamer.Block(4, 2)
    blocks = SparseLinear(8, 3, pattern=gossamer.Block(np.int64(4), 4), density=0.5)
    assert type(blocks.pattern.rows) is int
    assert type(pc.Conv2d(3, 4, np.int64(2)).kernel_size[0]) is int
    assert repr(SparseLinearQuantized(eight, three)) == repr(SparseLinearQuantized(8, 3))
    for mistake in (lambda: SparseLinear(4.0, 4), lambda: SparseConv2d(4, 4, np.float64(3))):
        with pytest.raises(TypeError, match=r"[34]\.0\)?, expected (a )?whole number"):
            mistake()


@pytest.mark.parametrize("requires_grad", [True, False])
def test_deep_copies_and_pickles(layer: SparseLinear, requires_grad: bool) -> None:
    if not layer.packed:
        layer.values.requires_grad_(requires_grad)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    x = torch.randn(3, 10)
    for other in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(buffer, weights_only=False),
    ):
        assert other.packed == layer.packed
        assert other.training == layer.training
        assert torch.equal(other(x), layer(x))
        assert other.weight_requires_grad == layer.weight_requires_grad
        own = {t.data_ptr() for t in (*layer.parameters(), *layer.buffers())}
        assert not own & {t.data_ptr() for t in (*other.parameters(), *other.buffers())}


def test_pickles_hold_the_portable_form_and_are_validated() -> None:
    layer = SparseLinear(10, 6).pack()
    state = layer.__getstate__()
    assert state["_buffers"]["panels"] is None
    state["_buffers"]["indices"][3, 0] = 0
    with pytest.raises(ValueError, match="row 3, group 0"):
        SparseLinear.__new__(SparseLinear).__setstate__(state)


def test_deep_copy_keeps_tied_layers_tied() -> None:
    model = nn.ModuleList([layer := SparseLinear(4, 4), layer])
    twin = copy.deepcopy(model)
    assert twin[0] is twin[1]
    tied = SparseLinear(4, 4)
    tied.values = layer.values
    pair = copy.deepcopy(nn.ModuleList([layer, tied]))
    assert pair[0].values is pair[1].values


def test_double_gradient_through_the_layer(serial_target: str) -> None:
    layer = SparseLinear(5, 3, dtype=torch.float64)
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(layer, (x,))
