"""quantize_rows: bounded rounding of x, defined values for rows that have none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import DTYPES, bits
from gossamer import reference
from gossamer.ops import quantize_rows
from torch.autograd import forward_ad

ROW_DTYPES = (torch.int8, torch.float8_e4m3fn)
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


@pytest.mark.parametrize("shape", [(1,), (3, 1), (0, 5), (2, 3, 70), (40, 300)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("to", ROW_DTYPES, ids=str)
def test_every_entry_is_as_near_as_the_scale_allows(
    to: torch.dtype, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x = (torch.randn(shape) * torch.logspace(-3, 3, shape[-1])).to(dtype)
    q, scale = quantize_rows(x, to)
    assert (q.dtype, q.shape) == (to, x.shape)
    assert (scale.dtype, scale.shape) == (torch.float32, x.shape[:-1])
    assert torch.equal(scale, x.float().abs().amax(-1) / LARGEST[to])
    error = (x.double() - q.double() * scale.double().unsqueeze(-1)).abs()
    limit = scale.double().unsqueeze(-1).expand(x.shape) / 2
    if to == torch.float8_e4m3fn:
        limit = torch.maximum(x.double().abs() * 2**-4, limit * 2**-9)
    assert bool((error <= limit + limit.new_tensor(2.0**-15) * scale.double().unsqueeze(-1)).all())
    assert bool((q.float().abs().amax(-1) == LARGEST[to]).all())


def test_known_rows() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5, -0.25], [0, 0, -0.0, 0, 0]])
    q, scale = quantize_rows(x)
    assert q.tolist() == [[127, 0, 2, -2, 0], [0] * 5]
    assert scale.tolist() == [1, 1]
    x = torch.tensor([448.0, 17, 19, -0.0029296875, 0.0009765625])
    q, scale = quantize_rows(x, torch.float8_e4m3fn)
    assert q.float().tolist() == [448, 16, 20, -0.00390625, 0]  # ties, to even mantissas
    assert float(scale) == 1


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("to", ROW_DTYPES, ids=str)
def test_rows_that_are_not_finite(to: torch.dtype, dtype: torch.dtype, bad: float) -> None:
    x = torch.randn(3, 9).to(dtype)
    expected, expected_scale = quantize_rows(x, to)
    x[1, 4] = bad
    q, scale = quantize_rows(x, to)
    assert q[1].float().tolist() == [0] * 9
    assert scale[1].isnan()
    for row in (0, 2):  # the others do not notice
        assert torch.equal(q[row].view(torch.uint8), expected[row].view(torch.uint8))
        assert scale[row] == expected_scale[row]


@pytest.mark.parametrize("to", ROW_DTYPES, ids=str)
def test_extreme_magnitudes(to: torch.dtype) -> None:
    largest = torch.finfo(torch.float32).max
    x = torch.tensor([[2.0**-149, 0], [largest, -largest], [2.0**-120, 2.0**-126]])
    q, scale = quantize_rows(x, to)
    assert bool((scale >= torch.finfo(torch.float32).tiny).all())
    error = (x.double() - q.double() * scale.double().unsqueeze(-1)).abs()
    assert bool((error <= scale.double().unsqueeze(-1) * (0.5 + 2**-15)).all())
    assert q[1].float().tolist() == [LARGEST[to], -LARGEST[to]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("to", ROW_DTYPES, ids=str)
def test_bits_are_those_of_plain_torch(to: torch.dtype, dtype: torch.dtype) -> None:
    kind, rows = (torch.int32, 40) if dtype == torch.float32 else (torch.int16, 40)
    limit = 2 ** (8 * kind.itemsize - 1)
    x = torch.randint(-limit, limit, (rows, 501)).to(kind).view(dtype)  # any exponents, and NaN
    near = torch.randn(rows, 501).to(dtype) * torch.logspace(-12, 0, 501).to(dtype)
    for given in (x.where(x.abs() < 1e30, 1.0), x, near, torch.zeros(2, 3).to(dtype)):
        q, scale = quantize_rows(given, to)
        expected, expected_scale = reference.quantize_rows(given, to)
        assert torch.equal(bits(q), bits(expected))
        assert torch.equal(scale.nan_to_num(nan=-1.0), expected_scale.nan_to_num(nan=-1.0))


def test_any_strides() -> None:
    x = torch.randn(6, 5, 4)
    for view in (x.transpose(0, 2), x[::2, :, 1:3], x[:1].expand(3, 5, 4), torch._neg_view(x)):
        for got, want in zip(quantize_rows(view), quantize_rows(view.clone()), strict=True):
            assert torch.equal(got, want)


ERRORS: dict[str, tuple[type[Exception], str, Any]] = {
    "to another dtype": (TypeError, "uint8", lambda: quantize_rows(torch.ones(3), torch.uint8)),
    "of another dtype": (TypeError, "float64", lambda: quantize_rows(torch.ones(3).double())),
    "0-d": (ValueError, r"\[\]", lambda: quantize_rows(torch.tensor(1.0))),
    "no columns": (ValueError, r"\[3, 0\]", lambda: quantize_rows(torch.ones(3, 0))),
    "gradient": (
        RuntimeError,
        "gradient is wanted of x",
        lambda: quantize_rows(torch.ones(3, requires_grad=True)),
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_mistakes_are_errors_with_values(case: str) -> None:
    error, text, call = ERRORS[case]
    with pytest.raises(error, match=text):
        call()


def test_forward_derivatives_are_refused_and_not_dropped() -> None:
    x = torch.randn(4, 10)
    with forward_ad.dual_level(), torch.no_grad():
        quantize_rows(x)
        with pytest.raises(RuntimeError, match="gradient is wanted of x"):
            quantize_rows(forward_ad.make_dual(x, x))


@pytest.mark.parametrize("to", ROW_DTYPES, ids=str)
def test_compilers_see_the_op(to: torch.dtype) -> None:
    x = torch.randn(2, 3, 10)
    torch.library.opcheck(torch.ops.gossamer.quantize_rows, (x, to))
    meta_q, meta_scale = quantize_rows(x.to("meta"), to)
    assert (meta_q.shape, meta_scale.shape) == (x.shape, x.shape[:-1])
    q, scale = torch.compile(quantize_rows, fullgraph=True, backend="aot_eager")(x, to)
    assert torch.equal(q.view(torch.uint8), quantize_rows(x, to)[0].view(torch.uint8))
    assert torch.equal(scale, quantize_rows(x, to)[1])
