"""From gossamer.sparse24_linear_quantized and its layer down to emulated kernels, as on a GPU."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import gossamer
import pytest
import torch
from cases import DTYPES, VALUE_TYPES, QuantizedOracle, bits, quantized_24, same_state
from emulated_gpu import DECODE, PREFILL, STREAM, Gpu
from gossamer import _C, sparse24_linear_quantized
from gossamer.formats import Sparse24Quantized, Sparse24QuantizedPanels
from gossamer.nn import SparseLinear, SparseLinearQuantized
from gossamer.ops import cuda_workspace, quantize_rows, sparse24_quantized
from torch import Tensor, nn

# A capability on which each type has a product by portable instructions.
CAPABILITY = {"int8": 80, "float8_e4m3fn": 89, "int4": 80}
EIGHT_BITS = ("int8", "float8_e4m3fn")


def float_of(value_type: str) -> torch.dtype:
    """Of x: int4 weights take 16-bit types only."""
    return torch.bfloat16 if value_type == "int4" else torch.float32


def check(
    x: Tensor,
    weight: Sparse24Quantized,
    bias: Tensor | None = None,
    activation: str | None = None,
    **kwargs: Any,
) -> Tensor:
    """The product by the portable and by the packed weight, against float64."""
    y = sparse24_linear_quantized(x, weight, bias, activation, **kwargs)
    packed = Sparse24QuantizedPanels.from_quantized(weight)
    assert torch.equal(sparse24_linear_quantized(x, packed, bias, activation, **kwargs), y)
    QuantizedOracle(x, weight, bias, activation, **kwargs).check(y)
    assert y.is_contiguous()
    return y


@pytest.mark.parametrize(
    ("value_type", "capability", "m", "kernel"),
    [
        ("int8", 80, 1, DECODE),
        ("int8", 90, 20, STREAM),
        ("int8", 86, 70, PREFILL),
        ("float8_e4m3fn", 89, 5, DECODE),
        ("float8_e4m3fn", 120, 70, PREFILL),
        ("float8_e4m3fn", 90, 1, STREAM),
        ("float8_e4m3fn", 90, 3, STREAM),
        ("float8_e4m3fn", 90, 70, STREAM),
        ("int4", 80, 3, DECODE),
        ("int4", 80, 70, DECODE),
        ("int4", 90, 5, DECODE),
        ("int4", 90, 17, STREAM),
        ("int4", 90, 150, STREAM),
    ],
    ids=str,
)
def test_matches_reference(gpu: Gpu, value_type: str, capability: int, m: int, kernel: int) -> None:
    gpu.describe(capability)
    for dtype in DTYPES if value_type != "int4" else DTYPES[1:]:
        x, bias = torch.randn(m, 300).to(dtype), torch.randn(50).to(dtype)
        check(x, quantized_24(50, 300, value_type), bias, "silu")
        assert gpu.kernel == kernel


@pytest.mark.parametrize("value_type", EIGHT_BITS)
def test_many_rows_of_few_tiles(gpu: Gpu, value_type: str) -> None:
    for multiprocessors in (4, 40):
        gpu.describe(CAPABILITY[value_type], multiprocessors)
        check(torch.randn(130, 1030), quantized_24(50, 1030, value_type), torch.randn(50))
        assert gpu.kernel == DECODE


@pytest.mark.parametrize("group", [32, 64, 96, 128, 300])
def test_groups_of_int4(gpu: Gpu, group: int) -> None:
    for capability, rows in ((80, (5,)), (90, (17, 50, 100))):
        for m in rows:  # a tile of each size
            gpu.describe(capability, multiprocessors=2)
            check(torch.randn(m, 300).bfloat16(), quantized_24(20, 300, "int4", group))


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
def test_any_result_of_int4(gpu: Gpu, out_dtype: torch.dtype) -> None:
    gpu.describe(90, multiprocessors=8)
    for m in (5, 20, 130):
        weight, bias = quantized_24(50, 1300, "int4", 128), torch.randn(50).to(out_dtype)
        for activation in ("relu", "gelu"):
            check(torch.randn(m, 1300).bfloat16(), weight, bias, activation, out_dtype=out_dtype)
        assert gpu.kernel == (DECODE if m == 5 else STREAM)


@pytest.mark.parametrize("group", [32, 256])
def test_blocks_that_share_tiles_of_int4(gpu: Gpu, group: int) -> None:
    for multiprocessors in (3, 7, 132):
        gpu.describe(90, multiprocessors)
        for m in (17, 70):
            check(torch.randn(m, 2100).half(), quantized_24(300, 2100, "int4", group))
            assert gpu.kernel == STREAM


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [7, 70])
def test_int8_gives_the_bits_of_the_cpu(
    gpu: Gpu, m: int, out_dtype: torch.dtype, activation: str | None
) -> None:
    weight = quantized_24(50, 300, "int8")
    x, bias = torch.randn(m, 300).bfloat16(), torch.randn(50).to(out_dtype)
    y = check(x, weight, bias, activation, out_dtype=out_dtype)
    stored = (weight.values, weight.indices, weight.scales, torch.int8)
    sizes = (300, 50, 300)
    operands = (x, None, *stored, bias, *sizes, activation or "none", out_dtype)
    assert torch.equal(y, sparse24_quantized._native(*operands))


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value_type", EIGHT_BITS)
def test_quantised_x_is_used_as_it_is(gpu: Gpu, value_type: str, out_dtype: torch.dtype) -> None:
    gpu.describe(CAPABILITY[value_type])
    weight = quantized_24(20, 45, value_type)
    x, bias = torch.randn(2, 3, 45), torch.randn(20).to(out_dtype)
    q, scale = quantize_rows(x, weight.values.dtype)
    y = check(q, weight, bias, x_scale=scale, out_dtype=out_dtype)
    assert torch.equal(y, sparse24_linear_quantized(x, weight, bias, out_dtype=out_dtype))


@pytest.mark.parametrize("leading", [(), (0,), (1,), (2, 0), (2, 3)])
@pytest.mark.parametrize("value_type", VALUE_TYPES)
def test_any_leading_shape(gpu: Gpu, value_type: str, leading: tuple[int, ...]) -> None:
    gpu.describe(CAPABILITY[value_type])
    x = torch.randn(*leading, 10).to(float_of(value_type))
    assert check(x, quantized_24(7, 10, value_type)).shape == (*leading, 7)


@pytest.mark.parametrize("k", [1, 5, 63, 300])
@pytest.mark.parametrize("value_type", VALUE_TYPES)
def test_rows_of_any_stride(gpu: Gpu, value_type: str, k: int) -> None:
    gpu.describe(CAPABILITY[value_type])
    weight = quantized_24(33, k, value_type)
    wide, scale = torch.randn(9, k + 5).to(float_of(value_type)), torch.rand(9) + 0.1
    kwargs: dict[str, Any] = {}
    if value_type != "int4":  # so that the kernel meets these strides and not a copy
        wide = quantize_rows(wide, weight.values.dtype)[0]
        kwargs = {"out_dtype": torch.float32}
    for x in (
        wide[:, 1 : k + 1],
        wide[:, :k],
        wide.t()[:k].t(),
        wide[::2, :k],
        wide[:1, 3 : k + 3],
        wide[0, :k].expand(4, k),
    ):
        scales = {} if value_type == "int4" else {"x_scale": scale[: len(x)]}
        check(x, weight, **kwargs, **scales)


@pytest.mark.parametrize("value_type", VALUE_TYPES)
def test_blocks_that_share_a_tile_leave_their_counters_as_zeros(gpu: Gpu, value_type: str) -> None:
    gpu.describe(CAPABILITY[value_type], multiprocessors=64)
    k = 20_000 if value_type == "int4" else 8000  # more of a warp's are on their way
    weight = quantized_24(16, k, value_type)
    chosen = _C.sparse24_choose_cuda(3, 16, k, str(weight.values.dtype), 0)
    assert chosen["split_k"] > 1
    check(torch.randn(3, k).to(float_of(value_type)), weight)
    (counters,) = cuda_workspace._counters.values()
    assert not counters.any()


@pytest.mark.parametrize("shape", [(1, 1), (17, 33), (40, 300), (16, 256)], ids=str)
@pytest.mark.parametrize("value_type", VALUE_TYPES)
def test_packed_and_back(gpu: Gpu, value_type: str, shape: tuple[int, int]) -> None:
    weight = quantized_24(*shape, value_type)
    packed = Sparse24QuantizedPanels.from_quantized(weight)
    words = 384 if value_type == "int4" else 640
    assert packed.panels.shape == (-(-shape[0] // 16), -(-shape[1] // 256), words)
    assert list(packed.panels.shape) == _C.sparse24_panels_shape(
        *shape, str(weight.values.dtype), True
    )
    assert (packed.out_features, packed.in_features) == shape
    assert packed.nbytes == packed.panels.nbytes + weight.scales.nbytes
    assert f"value_type={value_type}" in repr(packed)
    back = packed.to_quantized()
    assert torch.equal(bits(back.values), bits(weight.values))
    assert torch.equal(back.indices, weight.indices)
    assert torch.equal(back.scales, weight.scales)
    assert torch.equal(packed.to_dense(), weight.to_dense())


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("capability", [80, 86, 100, 103])
def test_gpu_without_float8_is_named(gpu: Gpu, capability: int) -> None:
    gpu.describe(capability)
    has = rf"capability {capability // 10}\.{capability % 10} has no .*float8.*has those of int8"
    with pytest.raises(ValueError, match=has):
        sparse24_linear_quantized(torch.randn(2, 12), quantized_24(6, 12, "float8_e4m3fn"))


def test_gpu_too_old_is_named(gpu: Gpu) -> None:
    gpu.describe(75)
    with pytest.raises(ValueError, match=r"compute capability 7\.5, the kernels need 8\.0"):
        sparse24_linear_quantized(torch.randn(2, 12), quantized_24(6, 12, "int8"))


def test_what_the_cpu_has_and_a_gpu_has_not(gpu: Gpu) -> None:
    four = quantized_24(6, 70, "int4")
    with pytest.raises(TypeError, match=r"x is float32, int4 weights on a GPU.*bfloat16 and"):
        sparse24_linear_quantized(torch.randn(2, 70), four)
    with pytest.raises(ValueError, match="group is 4 of 70 columns, on a GPU expected 70 or a mul"):
        sparse24_linear_quantized(torch.randn(2, 70).half(), quantized_24(6, 70, "int4", 4))
    k = (1 << 18) + 4
    values, indices = torch.ones(1, k // 2).to(torch.int8), torch.full((1, k // 8 + 1), 0x44)
    wide = Sparse24Quantized(values, indices.to(torch.uint8), torch.ones(1, 1), (1, k), k)
    with pytest.raises(ValueError, match=r"262148 columns of int8.*32 bits above 262140"):
        sparse24_linear_quantized(torch.ones(1, k), wide)


def test_mistakes_are_those_of_the_cpu(gpu: Gpu) -> None:
    weight = Sparse24QuantizedPanels.from_quantized(quantized_24(6, 12, "int8"))
    with pytest.raises(ValueError, match="x has 11 features, the weight expects 12"):
        sparse24_linear_quantized(torch.ones(2, 11), weight)
    with pytest.raises(TypeError, match="out_dtype has to say"):
        sparse24_linear_quantized(torch.ones(2, 12).to(torch.int8), weight, x_scale=torch.ones(2))
    with pytest.raises(ValueError, match="float32 with an x_scale"):
        sparse24_linear_quantized(torch.ones(2, 12), weight, x_scale=torch.ones(2))
    with pytest.raises(TypeError, match=r"bias is torch.float64"):
        sparse24_linear_quantized(torch.ones(2, 12), weight, torch.ones(6).double())


def operands(value_type: str) -> dict[str, Any]:
    weight = Sparse24QuantizedPanels.from_quantized(quantized_24(6, 64, value_type))
    four_bit = value_type == "int4"
    return {
        "out": torch.zeros(3, 6),
        "x": torch.ones(3, 64).to(torch.float16 if four_bit else weight.storage),
        "x_scale": None if four_bit else torch.ones(3),
        "panels": weight.panels,
        "value_dtype": str(weight.storage),
        "scales": weight.scales,
        "bias": None,
        "group": 64,
        "activation": "none",
        "workspace": None,
        "counters": None,
    }


BORDER: dict[str, tuple[str, type[Exception], str, dict[str, Any]]] = {
    "panels of another type": (
        "int8",
        TypeError,
        "int64",
        {"panels": torch.zeros(1, 1, 640).long()},
    ),
    "panels of int4": (
        "int8",
        ValueError,
        r"\[1, 1, 384\], expected \[1, 1, 640\]",
        {"panels": torch.zeros(1, 1, 384).int()},
    ),
    "values of another type": ("int8", TypeError, "values are float16", {"value_dtype": "float16"}),
    "values without panels": ("int8", TypeError, "int32", {"value_dtype": "int32"}),
    "few scales": ("int8", ValueError, r"scales.*\[6, 1\]", {"scales": torch.ones(4, 1)}),
    "scales in groups": ("int4", ValueError, r"scales.*\[6, 2\]", {"group": 32}),
    "wide scales": ("int8", TypeError, "float64", {"scales": torch.ones(6, 1).double()}),
    "group of 8 bits": ("int8", ValueError, "group is 32 of 64", {"group": 32}),
    "small group": (
        "int4",
        ValueError,
        "multiple of 32",
        {"group": 16, "scales": torch.ones(6, 4)},
    ),
    "x of another type": ("int8", TypeError, "float32, expected int8", {"x": torch.ones(3, 64)}),
    "wide x": ("int4", TypeError, "x is float32", {"x": torch.ones(3, 64)}),
    "x off alignment": (
        "int8",
        ValueError,
        "multiple of 16 bytes",
        {"x": torch.ones(3, 65).to(torch.int8)[:, 1:]},
    ),
    "no x_scale": ("int8", ValueError, "x_scale", {"x_scale": None}),
    "x_scale": ("int4", ValueError, "x_scale", {"x_scale": torch.ones(3)}),
    "short x_scale": ("int8", ValueError, r"\[2\], expected \[3\]", {"x_scale": torch.ones(2)}),
    "rows of out": ("int8", ValueError, r"\[2, 6\], exp", {"out": torch.zeros(2, 6)}),
    "out of another type": ("int8", TypeError, "int8", {"out": torch.zeros(3, 6).to(torch.int8)}),
    "bias": ("int8", TypeError, "bfloat16", {"bias": torch.ones(6).bfloat16()}),
    "activation": ("int8", ValueError, "tanh", {"activation": "tanh"}),
}


@pytest.mark.parametrize("case", BORDER)
def test_the_border_refuses_what_does_not_fit(gpu: Gpu, case: str) -> None:
    value_type, error, text, changes = BORDER[case]
    given = {**operands(value_type), **changes}
    with pytest.raises(error, match=text):
        _C.sparse24_linear_quantized_cuda(**given)
    assert not given["out"].any()  # untouched


def test_a_missing_workspace_is_named(gpu: Gpu) -> None:
    gpu.describe(multiprocessors=64)
    weight = Sparse24QuantizedPanels.from_quantized(quantized_24(6, 8000, "int8"))
    x = torch.ones(3, 8000).to(torch.int8)
    changes = {"x": x, "panels": weight.panels, "group": 8000}
    with pytest.raises(ValueError, match="bytes of workspace are needed"):
        _C.sparse24_linear_quantized_cuda(**{**operands("int8"), **changes})


# ---- the layer ----------------------------------------------------------------------------------


@pytest.fixture
def on_gpu(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """Layers of host tensors pack as on a GPU."""
    monkeypatch.setattr(SparseLinearQuantized, "_can_pack", lambda layer: not layer.scales.is_meta)
    gpu.describe(89)
    return gpu


def layers(value_type: str) -> tuple[SparseLinear, SparseLinearQuantized]:
    source = SparseLinear(140, 6, dtype=float_of(value_type)).eval()
    layer = gossamer.quantize(source, value_type)
    assert isinstance(layer, SparseLinearQuantized)
    return source, layer


@pytest.mark.parametrize("value_type", VALUE_TYPES)
def test_layer_holds_panels_and_saves_the_portable_form(on_gpu: Gpu, value_type: str) -> None:
    source, layer = layers(value_type)
    expected = Sparse24Quantized.from_sparse24(source.weight, value_type)
    assert layer.packed
    assert (layer.values, layer.indices) == (None, None)
    assert "packed=True" in repr(layer)
    assert isinstance(layer.weight, Sparse24QuantizedPanels)
    state = layer.state_dict()
    assert list(state) == ["values", "indices", "scales", "format", "bias"]
    for key, tensor in expected.state().items():
        assert torch.equal(bits(state[key]), bits(tensor)), key
    x = torch.randn(3, 140).to(source.bias.dtype)
    QuantizedOracle(x, expected, source.bias.detach()).check(layer(x))
    assert torch.equal(layer.dequantize().to_dense().weight, expected.to_dense(layer.dtype))
    fresh = SparseLinearQuantized(140, 6, value_type=value_type, dtype=layer.dtype)
    assert fresh.packed
    assert not fresh(x).any()
    fresh.load_state_dict(state)
    assert fresh.packed
    assert torch.equal(fresh(x), layer(x))


@pytest.mark.parametrize("value_type", VALUE_TYPES)
def test_layer_unpacks_until_it_is_packed(on_gpu: Gpu, value_type: str) -> None:
    _, layer = layers(value_type)
    x, state = torch.randn(3, 140).to(layer.dtype), layer.state_dict()
    expected = layer(x)
    assert layer.unpack() is layer
    for other in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        other.half().to(expected.dtype).load_state_dict(state)
        assert not other.packed
        assert isinstance(other.weight, Sparse24Quantized)
        assert same_state(other, layer)
    assert torch.equal(layer(x), expected)
    assert layer.pack() is layer
    assert layer.packed
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("value_type", VALUE_TYPES)
def test_copies_pickles_and_moves_of_a_packed_layer(on_gpu: Gpu, value_type: str) -> None:
    _, layer = layers(value_type)
    x = torch.randn(3, 140).to(layer.dtype)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(buffer, weights_only=False),
        copy.deepcopy(layer).to("meta").to_empty(device="cpu"),
    ):
        assert other.packed
        other.load_state_dict(layer.state_dict())
        assert same_state(other, layer)
        assert torch.equal(other(x), layer(x))
        panels = other.panels
        assert other.half().type(torch.bfloat16).packed
        assert other.panels.dtype == torch.int32
        assert torch.equal(other.panels, panels)
        assert other(x.bfloat16()).dtype == torch.bfloat16
    assert not copy.deepcopy(layer).to("meta").packed
    # From a GPU to where there are no panels.
    SparseLinearQuantized._can_pack = lambda _: False  # type: ignore[method-assign]
    assert not pickle.loads(pickle.dumps(layer)).packed


def test_quantize_packs_the_layers_of_a_model(on_gpu: Gpu) -> None:
    model = nn.Sequential(SparseLinear(140, 60), nn.ReLU(), SparseLinear(60, 8)).eval()
    x = torch.randn(5, 140)
    with torch.inference_mode():
        expected = model(x)
        gossamer.quantize(model)
        assert all(layer.packed for layer in (model[0], model[2]))
        assert (model(x) - expected).norm() < 0.05 * expected.norm()
    assert not any(t.is_inference() for t in model.buffers())
