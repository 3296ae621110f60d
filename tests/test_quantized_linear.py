"""sparse24_linear_quantized against its plain-torch meaning: every value type, dtype and shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import (
    DTYPES,
    SHAPES,
    VALUE_TYPES,
    QuantizedOracle,
    integers,
    quantized_24,
)
from gossamer import reference, sparse24_linear_quantized
from gossamer.formats import Sparse24, Sparse24Quantized, Sparse24QuantizedPanels
from gossamer.ops import quantize_rows

ACTIVATIONS = (None, "relu", "gelu", "silu")
EIGHT_BITS = ("int8", "float8_e4m3fn")
KINDS = [(value_type, None) for value_type in VALUE_TYPES] + [("int4", 4), ("int4", 32)]


def both_forms(
    weight: Sparse24Quantized,
) -> tuple[Sparse24Quantized, Sparse24QuantizedPanels]:
    return weight, Sparse24QuantizedPanels.from_quantized(weight)


# Around the tiles of every kernel: 1, 2, 3, 4, 6, 8, 12 and 16 rows, many from 15, 29, 33 or 57
# rows on, and of AMX 16 to 64.
ROWS = (*range(1, 18), 24, 28, 29, 33, 56, 57, 64, 65, 81)


@pytest.mark.parametrize(
    ("value_type", "group"), [*KINDS, ("int4", 12), ("int4", 64), ("int4", 96)]
)
def test_any_number_of_rows(cpu_target: str, value_type: str, group: int | None) -> None:
    weight, bias = quantized_24(37, 203, value_type, group), torch.randn(37)
    for number, m in enumerate(ROWS):
        dtype = DTYPES[number % 3]
        x = torch.randn(m, 203).to(dtype)
        oracle = QuantizedOracle(x, weight, bias.to(dtype), "silu")
        for form in both_forms(weight):
            oracle.check(sparse24_linear_quantized(x, form, bias.to(dtype), "silu"))


def test_int8_sums_are_exact_at_the_ends_of_the_range(cpu_target: str) -> None:
    n, k = 33, 4100
    values = torch.tensor([-128, 127])[torch.randint(0, 2, (n, k // 2))].to(torch.int8)
    weight = quantized_24(n, k, "int8")
    weight = Sparse24Quantized(values, weight.indices, torch.ones(n, 1), weight.shape, weight.group)
    for m in (1, 7, 40):
        x = torch.tensor([-128, -128, 127])[torch.randint(0, 3, (m, k))].to(torch.int8)
        sums = x.double() @ weight.to_dense(torch.float64).t()
        for form in both_forms(weight):
            y = sparse24_linear_quantized(x, form, x_scale=torch.ones(m), out_dtype=torch.float32)
            assert torch.equal(y, sums.float())


def test_panels_of_a_wide_layer_with_threads_to_spare(threads: int) -> None:
    # Fewer blocks of outputs than threads: rows are shared out; and a weight in several chunks.
    torch.set_num_threads(5)
    for value_type in VALUE_TYPES:
        for m, n, k in ((70, 20, 64), (3, 300, 12_000)):
            weight, x = quantized_24(n, k, value_type), torch.randn(m, k)
            oracle = QuantizedOracle(x, weight)
            for form in both_forms(weight):
                oracle.check(sparse24_linear_quantized(x, form))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("value_type", "group"), KINDS)
def test_matches_reference(
    value_type: str, group: int | None, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    m, n, k = shape
    x, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
    weight = quantized_24(n, k, value_type, group)
    QuantizedOracle(x, weight, bias).check(sparse24_linear_quantized(x, weight, bias))
    QuantizedOracle(x, weight).check(sparse24_linear_quantized(x, weight))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_sums_are_exact(cpu_target: str, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    weight = quantized_24(n, k, "int8")
    x, ones = torch.randint(-127, 128, (m, k)).to(torch.int8), torch.ones(n, 1)
    weight = Sparse24Quantized(weight.values, weight.indices, ones, weight.shape, weight.group)
    y = sparse24_linear_quantized(x, weight, x_scale=torch.ones(m), out_dtype=torch.float32)
    sums = x.long() @ weight.to_dense(torch.float64).long().t()
    # One rounding to float32, of a number below 2^53.
    assert torch.equal(y, sums.double().float())


def test_int8_sums_may_pass_32_bits(cpu_target: str) -> None:
    k = 300_000
    values = torch.full((1, k // 2), 127, dtype=torch.int8)
    indices = torch.full((1, k // 8), 0x44, dtype=torch.uint8)
    weight = Sparse24Quantized(values, indices, torch.ones(1, 1), (1, k), k)
    x = torch.full((1, k), -127, dtype=torch.int8)
    for form in both_forms(weight):
        y = sparse24_linear_quantized(x, form, x_scale=torch.ones(1), out_dtype=torch.float32)
        assert y.item() == torch.tensor(-(127.0**2) * k / 2).item()
    for k in (2**18 - 4, 2**18 - 2):  # the last one that has 32 bits, and the first that has not
        slots = 2 * ((k + 3) // 4)
        values = torch.full((1, slots), -128, dtype=torch.int8)
        indices = torch.full((1, (slots + 3) // 4), 0x44, dtype=torch.uint8)
        weight = Sparse24Quantized(values, indices, torch.ones(1, 1), (1, k), k)
        x = torch.full((1, k), -128, dtype=torch.int8)
        y = sparse24_linear_quantized(x, weight, x_scale=torch.ones(1), out_dtype=torch.float32)
        assert y.item() == 2.0**14 * slots


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int4_whole_numbers_are_exact(
    cpu_target: str, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    m, n, k = shape
    weight = quantized_24(n, k, "int4", 8)
    scales = 2.0 ** torch.randint(-1, 2, weight.scales.shape)
    weight = Sparse24Quantized(weight.values, weight.indices, scales, weight.shape, weight.group)
    x, bias = integers(m, k, limit=3, dtype=dtype), integers(n, limit=9, dtype=dtype)
    expected = (x.double() @ weight.to_dense(torch.float64).t() + bias.double()).to(dtype)
    assert torch.equal(sparse24_linear_quantized(x, weight, bias), expected)


def test_every_float8_number_is_read_right(cpu_target: str) -> None:
    codes = torch.arange(256).to(torch.uint8)
    numbers = codes.view(torch.float8_e4m3fn)
    one = Sparse24Quantized.from_sparse24(
        Sparse24.from_dense(torch.tensor([[448.0]])), "float8_e4m3fn"
    )
    y = sparse24_linear_quantized(
        numbers[:, None], one, x_scale=torch.full((256,), 1 / 448), out_dtype=torch.float32
    )
    expected = numbers.float() * 448 * (1 / 448)
    torch.testing.assert_close(y[:, 0], expected, rtol=1e-6, atol=0, equal_nan=True)
    # The same numbers as weights.
    finite = codes[(codes & 0x7F) != 0x7F]
    values = torch.stack([finite, torch.zeros_like(finite)], dim=1).view(torch.float8_e4m3fn)
    indices, scales = torch.full((len(finite), 1), 0x04, dtype=torch.uint8), torch.ones(254, 1)
    weight = Sparse24Quantized(values, indices, scales, (254, 4), 4)
    x = torch.ones(1, 4).to(torch.float8_e4m3fn)
    y = sparse24_linear_quantized(x, weight, x_scale=torch.ones(1), out_dtype=torch.float32)
    assert torch.equal(y[0], finite.view(torch.float8_e4m3fn).float())
    for rows in (1, 70):
        x = torch.ones(rows, 4).to(torch.float8_e4m3fn)
        values[7] = torch.tensor([torch.nan]).to(torch.float8_e4m3fn)
        y = sparse24_linear_quantized(x, weight, x_scale=torch.ones(rows), out_dtype=torch.float32)
        assert torch.equal(y.isnan().sum(1), torch.ones(rows).long())


def test_every_4_bit_number_is_read_right(cpu_target: str) -> None:
    pairs = torch.arange(256).to(torch.uint8)[:, None]
    indices = torch.full((256, 1), 0x08, dtype=torch.uint8)  # columns 0 and 2
    weight = Sparse24Quantized(pairs, indices, torch.ones(256, 1), (256, 3), 3)
    y = sparse24_linear_quantized(torch.tensor([[1.0, torch.nan, 16.0]]), weight)
    low, high = reference.unpack_int4(pairs).float().unbind(1)
    assert torch.equal(y[0], low + 16 * high)


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value_type", EIGHT_BITS)
def test_quantised_x_is_used_as_it_is(value_type: str, out_dtype: torch.dtype) -> None:
    weight = quantized_24(20, 45, value_type)
    x, bias = torch.randn(2, 3, 45), torch.randn(20).to(out_dtype)
    q, scale = quantize_rows(x, weight.values.dtype)
    y = sparse24_linear_quantized(q, weight, bias, "relu", x_scale=scale, out_dtype=out_dtype)
    assert y.dtype == out_dtype
    assert torch.equal(y, sparse24_linear_quantized(x, weight, bias, "relu", out_dtype=out_dtype))
    QuantizedOracle(q, weight, bias, "relu", scale, out_dtype).check(y)


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value_type", VALUE_TYPES)
def test_any_dtype_comes_out(value_type: str, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    weight = quantized_24(20, 45, value_type)
    x, bias = torch.randn(3, 45).to(dtype), torch.randn(20).to(out_dtype)
    y = sparse24_linear_quantized(x, weight, bias, out_dtype=out_dtype)
    QuantizedOracle(x, weight, bias, out_dtype=out_dtype).check(y)


@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value_type", VALUE_TYPES)
def test_activation_matches_reference(value_type: str, dtype: torch.dtype, activation: str) -> None:
    weight = quantized_24(37, 70, value_type)
    x, bias = torch.randn(5, 70).to(dtype), torch.linspace(-40, 40, 37).to(dtype)
    y = sparse24_linear_quantized(x, weight, bias, activation)
    QuantizedOracle(x, weight, bias, activation).check(y)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("value_type", EIGHT_BITS)
def test_rows_that_are_not_finite_give_nan(
    cpu_target: str, value_type: str, bad: float, activation: str | None
) -> None:
    weight, x, bias = quantized_24(19, 30, value_type), torch.randn(4, 30), torch.randn(19)
    expected = sparse24_linear_quantized(x, weight, bias, activation)
    x[2, 29] = bad
    y = sparse24_linear_quantized(x, weight, bias, activation)
    assert y[2].isnan().all()
    rest = [0, 1, 3]
    assert torch.equal(y[rest], expected[rest])


@pytest.mark.parametrize("in_features", [1, 2, 3, 5, 30, 37])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_x_goes_through_stored_int4_positions_only(
    cpu_target: str, dtype: torch.dtype, in_features: int, bad: float
) -> None:
    weight = quantized_24(19, in_features, "int4", 8)
    for column in range(0, in_features, max(1, in_features // 7)):
        x = torch.randn(3, in_features).to(dtype)
        x[1, column] = bad
        QuantizedOracle(x, weight).check(sparse24_linear_quantized(x, weight))


@pytest.mark.parametrize("value_type", VALUE_TYPES)
def test_non_finite_x_in_many_rows(cpu_target: str, value_type: str) -> None:
    weight = quantized_24(19, 96, value_type, 32 if value_type == "int4" else None)
    for bad in (torch.nan, torch.inf):
        x = torch.randn(40, 96).bfloat16()
        x[torch.arange(0, 40, 3), torch.randint(0, 96, (14,))] = bad
        QuantizedOracle(x, weight).check(sparse24_linear_quantized(x, weight))


@pytest.mark.parametrize("in_features", [1, 3, 5, 31, 33])
@pytest.mark.parametrize("value_type", VALUE_TYPES)
def test_hostile_indices_lead_nowhere(cpu_target: str, value_type: str, in_features: int) -> None:
    weight = quantized_24(18, in_features, value_type)
    indices = torch.randint(0, 256, weight.indices.shape, dtype=torch.uint8)
    values = torch.randint(0, 256, weight.values.shape, dtype=torch.uint8)
    if value_type == "float8_e4m3fn":
        values[(values & 0x7F) == 0x7F] = 0
    tensors = (values.view(weight.values.dtype), indices, weight.scales)
    hostile = Sparse24Quantized(*tensors, weight.shape, weight.group)
    if value_type == "int4":
        around = torch.full((6, in_features + 70), torch.nan)
        x = around[1:-1, 35:-35]
        x.copy_(torch.randn(4, in_features))
        QuantizedOracle(x, hostile).check(sparse24_linear_quantized(x, hostile))
        return
    around = torch.full((6, in_features + 70), 127.0).to(weight.values.dtype)
    x = around[1:-1, 35:-35]
    x.copy_(quantize_rows(torch.randn(4, in_features), x.dtype)[0])
    scale = torch.rand(4) + 0.1
    y = sparse24_linear_quantized(x, hostile, x_scale=scale, out_dtype=torch.float32)
    oracle = QuantizedOracle(x, hostile, x_scale=scale, out_dtype=torch.float32)
    oracle.check(y)


@pytest.mark.parametrize("leading", [(), (0,), (1,), (2, 0), (2, 3), (2, 1, 3, 1, 2, 1, 2, 1)])
@pytest.mark.parametrize("value_type", VALUE_TYPES)
def test_any_leading_shape(value_type: str, leading: tuple[int, ...]) -> None:
    weight = quantized_24(7, 10, value_type)
    x, bias = torch.randn(*leading, 10), torch.randn(7)
    results = [sparse24_linear_quantized(x, weight, bias)]
    if value_type != "int4":
        q, scale = quantize_rows(x, weight.values.dtype)
        kwargs: dict[str, Any] = {"x_scale": scale, "out_dtype": torch.float32}
        results.append(sparse24_linear_quantized(q, weight, bias, **kwargs))
    for y in results:
        assert y.shape == (*leading, 7)
        assert y.is_contiguous()
        QuantizedOracle(x, weight, bias).check(y)


STRIDED = {
    "transposed": lambda m, k: torch.randn(k, m).t(),
    "every other column": lambda m, k: torch.randn(m, 2 * k)[:, ::2],
    "every other row": lambda m, k: torch.randn(2 * m, k)[::2],
    "one row repeated": lambda m, k: torch.randn(1, k).expand(m, k),
    "one number repeated": lambda m, k: torch.randn(m, 1).expand(m, k),
    "overlapping windows": lambda m, k: torch.randn(m + k).as_strided((m, k), (1, 1)),
    "batch not foldable": lambda m, k: torch.randn(3, m, k).transpose(0, 1),
    "negated view": lambda m, k: torch._neg_view(torch.randn(m, k)),
    "off alignment": lambda m, k: torch.randn(m * k + 1)[1:].view(m, k),
}


@pytest.mark.parametrize("kind", STRIDED)
@pytest.mark.parametrize("value_type", VALUE_TYPES)
def test_any_strides(value_type: str, kind: str) -> None:
    weight, x = quantized_24(20, 45, value_type), STRIDED[kind](5, 45)
    y = sparse24_linear_quantized(x, weight)
    assert y.is_contiguous()
    QuantizedOracle(x, weight).check(y)
    assert sparse24_linear_quantized(x[:0], weight).shape == (0, *x.shape[1:-1], 20)


@pytest.mark.parametrize("value_type", EIGHT_BITS)
def test_any_strides_of_a_quantised_x(value_type: str) -> None:
    weight, scale = quantized_24(20, 45, value_type), torch.rand(5) + 0.1
    wide = quantize_rows(torch.randn(90, 90), weight.values.dtype)[0]
    for q in (wide.t()[:5, :45], wide[:10:2, :45], wide[:5, ::2], wide[:1, :45].expand(5, 45)):
        y = sparse24_linear_quantized(q, weight, x_scale=scale, out_dtype=torch.float32)
        QuantizedOracle(q, weight, x_scale=scale, out_dtype=torch.float32).check(y)
        every_other = torch.stack([scale, scale], dim=1).view(-1)[::2]
        again = sparse24_linear_quantized(q, weight, x_scale=every_other, out_dtype=torch.float32)
        assert torch.equal(again, y)


def test_operands_need_not_be_contiguous() -> None:
    for value_type in VALUE_TYPES:
        weight = quantized_24(6, 140, value_type)
        x, bias = torch.randn(4, 140), torch.randn(12)[::2]
        values = weight.values.t().contiguous().t()
        indices = weight.indices.repeat(1, 2)[:, : weight.indices.shape[1]]
        scales = weight.scales.t().contiguous().t()
        other = Sparse24Quantized(values, indices, scales, weight.shape, weight.group)
        y = sparse24_linear_quantized(x, other, bias)
        assert torch.equal(y, sparse24_linear_quantized(x, weight, bias.contiguous()))


@pytest.mark.parametrize("value_type", VALUE_TYPES)
def test_same_result_for_any_thread_count(threads: int, value_type: str) -> None:
    weight, x = quantized_24(200, 300, value_type), torch.randn(9, 300)
    torch.set_num_threads(1)
    expected = sparse24_linear_quantized(x, weight)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert torch.equal(sparse24_linear_quantized(x, weight), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("value_type", VALUE_TYPES)
def test_autocast_casts_x_and_bias(value_type: str, dtype: torch.dtype) -> None:
    weight, x, bias = quantized_24(7, 10, value_type), torch.randn(3, 10), torch.randn(7)
    with torch.autocast("cpu", dtype):
        y = sparse24_linear_quantized(x, weight, bias)
        wide = sparse24_linear_quantized(x, weight, bias, out_dtype=torch.float32)
    assert y.dtype == dtype
    assert torch.equal(y, sparse24_linear_quantized(x.to(dtype), weight, bias.to(dtype)))
    assert wide.dtype == torch.float32
    if value_type == "int4":
        return
    q, scale = quantize_rows(x, weight.values.dtype)
    with torch.autocast("cpu", dtype):
        y = sparse24_linear_quantized(q, weight, bias, x_scale=scale, out_dtype=torch.float32)
    QuantizedOracle(q, weight, bias, None, scale, torch.float32).check(y)
