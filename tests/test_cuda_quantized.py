"""Quantised products and layers on a GPU: each against float64, packed and portable, in graphs."""

from __future__ import annotations

import copy
import pickle

import gossamer
import pytest
import torch
from cases import DTYPES, VALUE_TYPES, QuantizedOracle, bits, quantized_24, same_state
from gossamer import _C, sparse24_linear_quantized
from gossamer.formats import Sparse24Quantized, Sparse24QuantizedPanels
from gossamer.nn import SparseLinear, SparseLinearQuantized
from gossamer.ops import quantize_rows
from torch import Tensor

pytestmark = pytest.mark.cuda


@pytest.fixture(params=VALUE_TYPES)
def value_type(request: pytest.FixtureRequest) -> str:
    """Each type that this GPU has a product of."""
    if request.param == "float8_e4m3fn":
        try:
            _C.sparse24_choose_cuda(1, 16, 256, request.param, torch.cuda.current_device())
        except ValueError as error:
            pytest.skip(str(error))
    return request.param


def float_dtypes(value_type: str) -> tuple[torch.dtype, ...]:
    """Of x: int4 weights take 16-bit types only."""
    return DTYPES[1:] if value_type == "int4" else DTYPES


def quantized(
    n: int, k: int, value_type: str, group: int | None = None
) -> tuple[Sparse24Quantized, Sparse24QuantizedPanels]:
    weight = quantized_24(n, k, value_type, group).to("cuda")
    return weight, Sparse24QuantizedPanels.from_quantized(weight)


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


@pytest.mark.parametrize("m", [1, 3, 8, 9, 16, 33, 64, 65, 128, 257, 1000])
def test_any_number_of_rows(value_type: str, m: int) -> None:
    weight, packed = quantized(272, 1028, value_type)
    for dtype in float_dtypes(value_type):
        x, bias = randn(m, 1028, dtype=dtype), randn(272, dtype=dtype)
        oracle = QuantizedOracle(x, weight, bias, "gelu")
        for layout in (weight, packed):
            oracle.check(sparse24_linear_quantized(x, layout, bias, "gelu"))


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
def test_any_dtype_comes_out(value_type: str, out_dtype: torch.dtype) -> None:
    weight, packed = quantized(70, 300, value_type)
    bias = randn(70, dtype=out_dtype)
    for m in (5, 100):
        x = randn(m, 300)
        y = sparse24_linear_quantized(x, packed, bias, out_dtype=out_dtype)
        QuantizedOracle(x, weight, bias, out_dtype=out_dtype).check(y)
        if value_type == "int4":
            continue
        q, scale = quantize_rows(x, weight.values.dtype)
        again = sparse24_linear_quantized(q, packed, bias, x_scale=scale, out_dtype=out_dtype)
        assert torch.equal(again, y)


@pytest.mark.parametrize("group", [32, 64, 96, 256, 1000])
def test_groups_of_int4(group: int) -> None:
    weight, packed = quantized(80, 1000, "int4", group)
    for m in (1, 30, 200):
        x = randn(m, 1000)
        QuantizedOracle(x, weight).check(sparse24_linear_quantized(x, packed))


@pytest.mark.parametrize("m", [1, 60, 300])
def test_int8_sums_are_those_of_the_cpu(m: int) -> None:
    weight, packed = quantized(200, 1028, "int8")
    x = torch.randn(m, 1028)
    on_cpu = sparse24_linear_quantized(x, weight.to("cpu"))
    assert torch.equal(sparse24_linear_quantized(x.cuda(), packed).cpu(), on_cpu)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("to", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_rows_are_rounded_as_on_the_cpu(to: torch.dtype, dtype: torch.dtype) -> None:
    x = (torch.randn(300, 515) * torch.logspace(-30, 3, 300).unsqueeze(1)).to(dtype)
    x[3], x[5, 7], x[6, 8] = 0, torch.nan, torch.inf
    q, scale = quantize_rows(x, to)
    on_gpu, gpu_scale = quantize_rows(x.cuda(), to)
    assert torch.equal(bits(gpu_scale.cpu()), bits(scale))
    assert torch.equal(bits(on_gpu.cpu()), bits(q))


@pytest.mark.parametrize("shape", [(1, 1), (17, 33), (130, 1030), (4096, 4097)], ids=str)
@pytest.mark.parametrize("kind", VALUE_TYPES)
def test_packed_and_back(kind: str, shape: tuple[int, int]) -> None:
    weight, packed = quantized(*shape, kind)
    back = packed.to_quantized()
    assert torch.equal(bits(back.values), bits(weight.values))
    assert torch.equal(back.indices, weight.indices)
    assert torch.equal(packed.to_dense(), weight.to_dense())


@pytest.mark.parametrize("columns", [1, 5, 257, 1025])
def test_rows_that_do_not_begin_at_16_bytes(value_type: str, columns: int) -> None:
    weight, packed = quantized(40, columns, value_type)
    wide = randn(9, columns + 3)
    for x in (wide[:, 1 : columns + 1], wide[:, :columns], wide.t()[:columns].t()):
        QuantizedOracle(x, weight).check(sparse24_linear_quantized(x, packed))


@pytest.mark.parametrize("shape", [(1, 300, 520), (8, 64, 8200), (300, 200, 516)], ids=str)
def test_graph_replays_beside_eager_calls(value_type: str, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    weight, packed = quantized(n, k, value_type)
    x = randn(m, k)
    sparse24_linear_quantized(x, packed)  # torch's own kernels are loaded at their first call
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = sparse24_linear_quantized(x, packed)
        z = sparse24_linear_quantized(x, weight)
    for _ in range(5):
        x.copy_(randn(m, k))
        expected = sparse24_linear_quantized(x, packed)
        graph.replay()
        again = sparse24_linear_quantized(x, packed)
        torch.cuda.synchronize()
        assert torch.equal(y, expected)
        assert torch.equal(z, expected)
        assert torch.equal(again, expected)


def test_products_do_not_wait_for_the_gpu(value_type: str) -> None:
    weight, packed = quantized(64, 520, value_type)
    x = randn(4, 520)
    sparse24_linear_quantized(x, packed)
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = sparse24_linear_quantized(x, packed)
        z = sparse24_linear_quantized(x, weight)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(y, z)


def test_layer_moves_between_cpu_and_gpu(value_type: str) -> None:
    dtype = float_dtypes(value_type)[0]
    layer = SparseLinearQuantized.from_sparse(SparseLinear(300, 70, dtype=dtype).eval(), value_type)
    assert not layer.packed
    x = torch.randn(5, 300).to(dtype)
    expected, saved = layer(x), copy.deepcopy(layer)
    assert layer.cuda().packed
    assert layer.values is None
    torch.testing.assert_close(layer(x.cuda()).cpu(), expected, atol=2e-2, rtol=2e-2)
    assert all(
        torch.equal(bits(t.cpu()), bits(saved.state_dict()[key]))
        for key, t in layer.state_dict().items()
    )
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.packed
        assert same_state(other, layer)
        assert torch.equal(other(x.cuda()), layer(x.cuda()))
    y = layer(x.cuda())
    assert not layer.unpack().packed
    assert torch.equal(layer(x.cuda()), y)
    assert not layer.cpu().pack().packed
    assert torch.equal(layer(x), expected)
    assert layer.to("cuda", torch.bfloat16).packed
    assert layer(x.cuda().bfloat16()).dtype == torch.bfloat16


def test_state_dict_goes_from_gpu_to_cpu_and_back(value_type: str) -> None:
    dtype = float_dtypes(value_type)[0]
    source = SparseLinear(300, 70, dtype=dtype, device="cuda").eval()
    layer = gossamer.quantize(source, value_type)
    assert isinstance(layer, SparseLinearQuantized)
    assert layer.packed
    x = randn(5, 300, dtype=dtype)
    on_cpu = SparseLinearQuantized(300, 70, value_type=value_type, dtype=dtype)
    on_cpu.load_state_dict(layer.state_dict())
    torch.testing.assert_close(on_cpu(x.cpu()), layer(x).cpu(), atol=2e-2, rtol=2e-2)
    on_gpu = SparseLinearQuantized(300, 70, value_type=value_type, dtype=dtype, device="cuda")
    assert on_gpu.packed
    on_gpu.load_state_dict(on_cpu.state_dict())
    assert on_gpu.packed
    assert torch.equal(on_gpu(x), layer(x))
    with torch.device("meta"):
        assigned = SparseLinearQuantized(300, 70, value_type=value_type, dtype=dtype)
    assigned.load_state_dict(layer.state_dict(), assign=True)
    assert assigned.packed
    assert torch.equal(assigned(x), layer(x))


def test_compile_and_autocast(value_type: str) -> None:
    layer = gossamer.quantize(SparseLinear(256, 128, device="cuda").eval(), value_type)
    x = randn(33, 256, dtype=torch.float32)
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        y = layer(x)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, compiled)


def test_mistakes_are_named() -> None:
    weight, packed = quantized(40, 64, "int8")
    x = randn(3, 64)
    with pytest.raises((ValueError, RuntimeError), match="cpu"):
        sparse24_linear_quantized(x.cpu(), packed)
    with pytest.raises((ValueError, RuntimeError), match="cpu"):
        sparse24_linear_quantized(x, weight, torch.zeros(40, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match=r"int4 weights on a GPU.*bfloat16 and float16"):
        sparse24_linear_quantized(x.float(), quantized(40, 64, "int4")[1])
    with pytest.raises(ValueError, match="group is 4 of 64"):
        sparse24_linear_quantized(x, quantized(40, 64, "int4", 4)[1])
    assert torch.equal(sparse24_linear_quantized(x, packed), sparse24_linear_quantized(x, weight))


def test_empty_batch(value_type: str) -> None:
    _, packed = quantized(40, 64, value_type)
    assert sparse24_linear_quantized(randn(0, 64), packed).shape == (0, 40)
    assert sparse24_linear_quantized(randn(2, 0, 64), packed).shape == (2, 0, 40)
