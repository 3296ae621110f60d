"""SparseLinearQuantized and quantize: what a layer holds, its checkpoints, and whole models."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import gossamer
import pytest
import torch
from cases import VALUE_TYPES, bits, dense_24, same_state
from gossamer.formats import Sparse24Quantized
from gossamer.nn import SparseLinear, SparseLinearQuantized
from torch import Tensor, nn

N, K = 6, 140


def sparse_layer(dtype: torch.dtype = torch.float32, **kwargs: Any) -> SparseLinear:
    return SparseLinear(K, N, dtype=dtype, **kwargs).eval()


@pytest.fixture(params=VALUE_TYPES)
def layer(request: pytest.FixtureRequest) -> SparseLinearQuantized:
    return SparseLinearQuantized.from_sparse(sparse_layer(), request.param)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("value_type", VALUE_TYPES)
def test_stands_for_the_layer_it_was_made_of(
    value_type: str, dtype: torch.dtype, bias: bool, packed: bool
) -> None:
    source = sparse_layer(dtype, bias=bias)
    expected = Sparse24Quantized.from_sparse24(source.weight, value_type)
    if packed:
        source.pack()
    layer = SparseLinearQuantized.from_sparse(source, value_type)
    assert source.packed == packed
    assert layer.packed
    layer.unpack()
    assert torch.equal(bits(layer.values), bits(expected.values))
    assert torch.equal(layer.scales, expected.scales)
    assert (layer.dtype, layer.value_type, layer.group) == (dtype, value_type, expected.group)
    assert layer.training is source.training is False
    x = torch.randn(2, 3, K).to(dtype)
    y = layer(x)
    assert torch.equal(
        y, gossamer.sparse24_linear_quantized(x, expected, source.bias.detach() if bias else None)
    )
    # int8 of x and of W are off by a percent each, int4 by ten.
    error = (y - source(x)).float().norm() / source(x).float().norm()
    assert error < {"int8": 0.03, "float8_e4m3fn": 0.08, "int4": 0.2}[value_type]
    assert list(layer.parameters()) == []
    assert not any(t.requires_grad for t in layer.buffers())
    own = {t.data_ptr() for t in layer.buffers()}
    assert not own & {t.data_ptr() for t in (*source.parameters(), *source.buffers())}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value_type", VALUE_TYPES)
def test_dequantize_gives_a_trainable_layer(
    value_type: str, dtype: torch.dtype, bias: bool
) -> None:
    source = sparse_layer(dtype, bias=bias)
    layer = SparseLinearQuantized.from_sparse(source, value_type)
    back = layer.dequantize()
    assert isinstance(back, SparseLinear)
    back.weight.validate()
    assert torch.equal(back.to_dense().weight, layer.weight.to_dense(dtype))
    assert (back.bias is None) == (not bias)
    if bias:
        assert torch.equal(back.bias, source.bias)
    assert not back.training
    back.train()(torch.randn(2, K).to(dtype)).sum().backward()
    assert back.values.grad is not None
    if value_type == "int4":  # x is not rounded: the same layer, to rounding
        x = torch.randn(3, K).to(dtype)
        # Its weights are rounded to the dtype, which the layer's are not.
        rounding = {"rtol": 0.02, "atol": 2e-3} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(layer(x), back(x), **rounding)


def test_fresh_layers_are_valid_and_zero() -> None:
    for value_type in VALUE_TYPES:
        for in_features in (1, 3, 4, 7, 8, 9, K):
            layer = SparseLinearQuantized(in_features, N, value_type=value_type)
            assert not layer.weight.to_dense().any()
            layer.unpack().weight.validate()
            assert not layer(torch.randn(2, in_features)).any()
            assert layer.format.tolist() == layer.state_dict()["format"].tolist()
    assert SparseLinearQuantized(K, N).value_type == "int8"
    assert SparseLinearQuantized(K, N, value_type="int4").scales.shape == (N, 2)
    assert SparseLinearQuantized(K, N, value_type="int4", group=8).scales.shape == (N, 18)
    assert SparseLinearQuantized(K, N, bias=False).bias is None


MISTAKES: dict[str, tuple[type[Exception], str, Any]] = {
    "in_features": (ValueError, "in_features 0", lambda: SparseLinearQuantized(0, 4)),
    "out_features": (ValueError, "out_features -1", lambda: SparseLinearQuantized(4, -1)),
    "value type": (ValueError, "'int2'", lambda: SparseLinearQuantized(4, 4, value_type="int2")),
    "group": (ValueError, "groups of 4 of 8", lambda: SparseLinearQuantized(8, 4, group=4)),
    "dtype": (TypeError, "float64", lambda: SparseLinearQuantized(4, 4, dtype=torch.float64)),
    "dense": (TypeError, "Linear", lambda: SparseLinearQuantized.from_sparse(nn.Linear(4, 4))),
    "float64 layer": (
        TypeError,
        "float64",
        lambda: SparseLinearQuantized.from_sparse(SparseLinear(4, 4, dtype=torch.float64)),
    ),
    "gradient": (
        RuntimeError,
        "gradient is wanted of x",
        lambda: SparseLinearQuantized(4, 4)(torch.ones(4, requires_grad=True)),
    ),
    "dtype of x": (
        TypeError,
        "bias is torch.float32, the result torch.bfloat16",
        lambda: SparseLinearQuantized(4, 4)(torch.ones(4).bfloat16()),
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_errors_with_values(case: str) -> None:
    error, text, call = MISTAKES[case]
    with pytest.raises(error, match=text):
        call()


def test_repr() -> None:
    assert repr(SparseLinearQuantized(64, 32).unpack()) == (
        "SparseLinearQuantized(in_features=64, out_features=32, bias=True, value_type=int8, "
        "group=64)"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_dtype_moves_change_the_bias_alone(dtype: torch.dtype, bias: bool) -> None:
    for value_type in VALUE_TYPES:
        layer = SparseLinearQuantized.from_sparse(sparse_layer(bias=bias), value_type)
        before = {k: t for k, t in layer.state_dict().items() if k not in ("bias", "format")}
        assert layer.to(dtype) is layer
        after = layer.state_dict()
        assert all(after[key] is not None for key in before)
        assert all(torch.equal(bits(after[key]), bits(t)) for key, t in before.items())
        assert [after[key].dtype for key in before] == [t.dtype for t in before.values()]
        assert layer.dtype == dtype
        assert layer.dequantize().values.dtype == dtype
        assert layer(torch.randn(3, K).to(dtype)).dtype == dtype
        layer.float().type(dtype)
        assert layer.dtype == dtype
        assert layer.format.dtype == torch.int64
        layer.unpack().weight.validate()


def test_moves_that_change_nothing_keep_the_tensors(layer: SparseLinearQuantized) -> None:
    before = [t.data_ptr() for t in layer.buffers()]
    layer.float().cpu().to("cpu").type(torch.float32)
    assert [t.data_ptr() for t in layer.buffers()] == before
    layer.share_memory()
    assert all(t.is_shared() for t in layer.buffers())
    layer(torch.randn(2, K))


def test_meta_moves_and_construction(layer: SparseLinearQuantized) -> None:
    state = layer.state_dict()
    with torch.device("meta"):
        made = SparseLinearQuantized(K, N, value_type=layer.value_type)
    assert all(t.is_meta for t in made.buffers())
    assert made(torch.randn(3, K, device="meta")).shape == (3, N)
    made.load_state_dict(state, assign=True)
    assert same_state(made, layer)
    x = torch.randn(3, K)
    assert torch.equal(made(x), layer(x))
    empty = copy.deepcopy(layer).to("meta").to_empty(device="cpu")
    empty.format.fill_(-1)  # what empty memory may hold
    assert empty.state_dict()["format"].tolist() == state["format"].tolist()
    empty.load_state_dict(state)
    assert same_state(empty, layer)
    meta = SparseLinearQuantized.from_sparse(SparseLinear(K, N, device="meta"), layer.value_type)
    assert all(t.is_meta for t in meta.buffers())


def test_layers_are_packed_unless_told_otherwise(layer: SparseLinearQuantized) -> None:
    x = torch.randn(2, K)
    expected, state = layer(x), layer.state_dict()
    assert layer.packed
    assert (layer.values, layer.indices) == (None, None)
    assert layer.unpack() is layer
    assert not layer.packed
    assert layer.panels is None
    assert torch.equal(layer(x), expected)
    assert all(torch.equal(bits(layer.state_dict()[key]), bits(t)) for key, t in state.items())
    layer.bfloat16().float().load_state_dict(state)  # what was asked for lasts
    assert not layer.packed
    assert layer.pack() is layer
    assert layer.packed
    assert torch.equal(layer(x), expected)


def test_the_serial_kernel_reads_the_portable_form(serial_target: str) -> None:
    layer = gossamer.quantize(sparse_layer())
    assert not layer.packed
    assert layer(torch.randn(2, K)).isfinite().all()


def test_deep_copies_and_pickles(layer: SparseLinearQuantized) -> None:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    x = torch.randn(3, K)
    for other in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(buffer, weights_only=False),
    ):
        assert same_state(other, layer)
        assert torch.equal(other(x), layer(x))
        assert (other.training, other.dtype) == (False, torch.float32)
        assert not {t.data_ptr() for t in layer.buffers()} & {t.data_ptr() for t in other.buffers()}


def test_pickles_are_validated(layer: SparseLinearQuantized) -> None:
    layer.unpack()
    layer.indices[3, 0] = 0
    with pytest.raises(ValueError, match="row 3, group 0"):
        pickle.loads(pickle.dumps(layer))


def test_compiled_and_traced_layers(layer: SparseLinearQuantized) -> None:
    torch._dynamo.reset()
    model = nn.Sequential(layer, nn.ReLU()).eval()
    x = torch.randn(3, K)
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(x).dtype == torch.bfloat16
    assert torch.equal(torch.fx.symbolic_trace(model)(x), expected)
    program = torch.export.export(
        model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},)
    )
    x = torch.randn(7, K)
    assert torch.equal(program.module()(x), model(x))
    for alone in (layer, copy.deepcopy(layer).unpack()):
        program = torch.export.export(alone, (x,), strict=False)
        assert torch.equal(program.module()(x), layer(x))
    targets = {str(node.target) for node in program.graph.nodes}
    assert "gossamer.sparse24_linear_quantized.default" in targets


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = SparseLinear(K, N, bias=False), nn.LayerNorm(N)
        self.down = nn.ModuleList([SparseLinear(N, K), nn.Linear(K, 3)])
        self.again = self.up

    def forward(self, x: Tensor) -> Tensor:
        return self.down[1](self.down[0](self.norm(self.up(x))))


@pytest.mark.parametrize("value_type", VALUE_TYPES)
def test_quantize_swaps_the_sparse_layers_of_a_model(value_type: str) -> None:
    model = Block().eval()
    model.up.pack()
    kept = (model.norm, model.down[1])
    x = torch.randn(4, K)
    expected = model(x)
    assert gossamer.quantize(model, value_type) is model
    assert isinstance(model.up, SparseLinearQuantized)
    assert isinstance(model.down[0], SparseLinearQuantized)
    assert model.again is model.up
    assert (model.norm, model.down[1]) == kept
    assert not model.up.training
    with torch.no_grad():
        assert (model(x) - expected).norm() < 0.2 * expected.norm()
    twin = gossamer.quantize(Block(), value_type)
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(twin(x), model(x))


def test_quantize_of_a_layer_leaves_it_as_it_was() -> None:
    source = sparse_layer()
    before = source.values.detach().clone()
    layer = gossamer.quantize(source, "int4", group=16)
    assert isinstance(layer, SparseLinearQuantized)
    assert (layer.group, layer.scales.shape) == (16, (N, 9))
    assert torch.equal(source.values, before)
    with torch.inference_mode():
        made = gossamer.quantize(source)
    assert not any(t.is_inference() for t in made.buffers())
    made.load_state_dict(gossamer.quantize(sparse_layer()).state_dict())


def with_a_nan() -> Block:
    model = Block()
    with torch.no_grad():
        model.down[0].values[3, 0] = torch.nan
    return model


def with_a_hook() -> Block:
    model = Block()
    model.down[0].register_forward_hook(lambda *_: None)
    return model


class Doubled(SparseLinear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def with_more() -> nn.Module:
    layer = SparseLinear(4, 4)
    layer.lora = nn.Linear(3, 3)
    layer.register_buffer("extra", torch.ones(2))
    return nn.Sequential(layer)


QUANTIZE_ERRORS: dict[str, tuple[type[Exception], str, Any, dict[str, Any]]] = {
    "no module": (TypeError, "Tensor", lambda: torch.ones(3), {}),
    "nothing sparse": (
        ValueError,
        "Sequential holds no 2:4 SparseLinear, but 2 Linear, 1 ReLU",
        lambda: nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)),
        {},
    ),
    "a dense layer": (ValueError, "Linear holds no", lambda: nn.Linear(3, 3), {}),
    "not finite": (ValueError, r"'down.0': .*row 3, column \d is nan", with_a_nan, {}),
    "hook": (ValueError, "'down.0' has forward hooks", with_a_hook, {}),
    "more than a weight": (ValueError, "'0' also holds extra, lora", with_more, {}),
    "compiled alone": (
        ValueError,
        "compile.* holds on to the layer in 'down'",
        lambda: nn.ModuleDict({"down": torch.compile(SparseLinear(4, 4), backend="eager")}),
        {},
    ),
    "own forward": (ValueError, "Doubled.* forward of its own", lambda: Doubled(4, 4), {}),
    "float64": (TypeError, "'up': .*float64", lambda: Block().double(), {}),
    "type": (ValueError, "'up': .*'int16'", Block, {"dtype": "int16"}),
    "group": (ValueError, "'up': .*groups of 16 of 140", Block, {"group": 16}),
}


@pytest.mark.parametrize("case", QUANTIZE_ERRORS)
def test_what_cannot_be_quantised_is_left_as_it_was(case: str) -> None:
    error, text, make, kwargs = QUANTIZE_ERRORS[case]
    model = make()
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    with pytest.raises(error, match=text):
        gossamer.quantize(model, **kwargs)
    if modules:
        assert list(model.modules()) == modules


def test_quantised_layers_follow_convert() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    with torch.no_grad():
        for linear in (model[0], model[2]):
            linear.weight.copy_(dense_24(linear.out_features, linear.in_features))
    x = torch.randn(5, 64)
    expected = model(x)
    gossamer.convert(model, force=True)
    gossamer.quantize(model)
    assert [type(m).__name__ for m in model] == [
        "SparseLinearQuantized",
        "ReLU",
        "SparseLinearQuantized",
    ]
    assert (model(x) - expected).norm() < 0.05 * expected.norm()


def test_move_under_another_default_device_stays_where_it_is() -> None:
    layer = gossamer.quantize(SparseLinear(8, 8))
    with torch.device("meta"):
        layer.to("cpu")
    assert layer(torch.randn(2, 8)).isfinite().all()


def test_assigned_parameters_are_not_trained() -> None:
    layer = gossamer.quantize(SparseLinear(16, 6))
    state = {**layer.state_dict(), "bias": nn.Linear(16, 6).bias}
    layer.load_state_dict(state, assign=True)
    assert list(layer.parameters()) == []
    assert torch.equal(layer.bias, state["bias"])
    assert not layer(torch.randn(3, 16)).requires_grad
