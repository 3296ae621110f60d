"""Unstructured sparse linear layers: every kernel against plain torch, and mistakes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import DTYPES, SumOracle
from csr_cases import CASES, CsrCase, CsrOracle
from gossamer import _C, csr_linear, reference
from gossamer.formats import SparseCsr
from gossamer.ops.csr import _native_cuda, csr_linear_tensors
from gossamer.ops.csr_gradient import _input_cuda, _values_cuda
from torch import Tensor

ops = torch.ops.gossamer
TYPICAL = CsrCase(5, 37, 50, 0.3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_reference(csr_target: str, case: CsrCase, dtype: torch.dtype) -> None:
    x, weight, bias = case.operands(dtype)
    given = bias if case.n % 2 else None
    activation = (None, "relu", "gelu", "silu")[(case.n + case.k) % 4]
    CsrOracle(x, weight, given, activation).check(csr_linear(x, weight, given, activation))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_match_the_dense_ones(csr_target: str, case: CsrCase, dtype: torch.dtype) -> None:
    x, weight, _ = case.operands(dtype)
    dy = torch.randn(case.m, case.n).to(dtype)
    indices = (weight.crow_indices, weight.col_indices)
    dx = ops.csr_input(dy, weight.values, *indices, case.k)
    dvalues = ops.csr_values(dy, x, *indices)
    exact_x, exact_dy, dense = (t.double() for t in (x, dy, weight.to_dense()))
    SumOracle(exact_dy @ dense, exact_dy.abs() @ dense.abs(), case.n, dtype).check(dx)
    places = (weight.rows(), weight.col_indices.long())
    wanted, size = exact_dy.t() @ exact_x, exact_dy.abs().t() @ exact_x.abs()
    SumOracle(wanted[places], size[places], case.m, dtype).check(dvalues)


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "silu"])
def test_bias_and_activation(csr_target: str, activation: str | None) -> None:
    for dtype in DTYPES:
        for m in (2, 9):
            x, weight, bias = CsrCase(m, 37, 50, 0.3).operands(dtype)
            y = csr_linear(x, weight, bias, activation)
            CsrOracle(x, weight, bias, activation).check(y)


def test_float64(serial_target: str) -> None:
    x, weight, bias = TYPICAL.operands(torch.float64)
    CsrOracle(x, weight, bias).check(csr_linear(x, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_any_threads(csr_target: str, threads: int, dtype: torch.dtype) -> None:
    for case in (CsrCase(2, 900, 300, 0.4), CsrCase(140, 700, 500, 0.2)):
        x, weight, bias = case.operands(dtype)
        dy = torch.randn(case.m, case.n).to(dtype)
        indices = (weight.crow_indices, weight.col_indices)

        def results() -> list[Tensor]:
            return [
                csr_linear(x, weight, bias, "silu"),  # noqa: B023 (called in the same round)
                ops.csr_input(dy, weight.values, *indices, case.k),  # noqa: B023
                ops.csr_values(dy, x, *indices),  # noqa: B023
            ]

        wanted = results()
        for team in (1, 3, 7):
            torch.set_num_threads(team)
            assert all(map(torch.equal, results(), wanted))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [2, 7])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_goes_through_live_places_only(
    csr_target: str, bad: float, m: int, dtype: torch.dtype
) -> None:
    x, weight, bias = CsrCase(m, 37, 50, 0.3).operands(dtype)
    live = torch.zeros(37, 50, dtype=torch.bool)
    live[weight.rows(), weight.col_indices.long()] = True
    clean = csr_linear(x, weight, bias)
    for column in (0, 49):
        spoiled = x.clone()
        spoiled[1, column] = bad
        y = csr_linear(spoiled, weight, bias)
        assert not y[1, live[:, column]].isfinite().any()
        clean_ones = torch.ones_like(live[:, 0]).expand(m, -1).clone()
        clean_ones[1] = ~live[:, column]
        assert torch.equal(y[clean_ones], clean[clean_ones])


def test_any_strides_and_dimensions(csr_target: str) -> None:
    for dtype in DTYPES:
        for m in (2, 20):
            x, weight, bias = CsrCase(m, 37, 50, 0.3).operands(dtype)
            y = csr_linear(x, weight, bias)
            wide = torch.full((m, 100), float("nan"), dtype=dtype)
            wide[:, 3:53] = x
            for same in (wide[:, 3:53], x.t().contiguous().t()):
                assert torch.equal(csr_linear(same, weight, bias), y)
            assert torch.equal(csr_linear(x.view(m // 2, 2, 50), weight, bias).view(m, 37), y)
            one = csr_linear(x[0], weight, bias)
            assert one.shape == (37,)
            CsrOracle(x[:1], weight, bias).check(one[None])
            CsrOracle(x[:1].expand(m, -1), weight).check(csr_linear(x[:1].expand(m, -1), weight))
    assert csr_linear(x[None, :0], weight).shape == (1, 0, 37)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_a_gpu_runs(dtype: torch.dtype) -> None:
    x, weight, bias = TYPICAL.operands(dtype)
    tensors = (weight.values, weight.crow_indices, weight.col_indices)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
        y = _native_cuda(x, *tensors, bias, 37, "gelu")
    CsrOracle(x, weight, bias, "gelu").check(y)
    dy = torch.randn(5, 37).to(dtype)
    for got, wanted in (
        (_input_cuda(dy, *tensors, 50), ops.csr_input(dy, *tensors, 50)),
        (_values_cuda(dy, x, *tensors[1:]), ops.csr_values(dy, x, *tensors[1:])),
    ):
        torch.testing.assert_close(got, wanted)


def test_the_reference_is_a_dense_layer() -> None:
    x, weight, bias = TYPICAL.operands(torch.float64)
    y = reference.csr_linear(
        x, weight.values, weight.crow_indices, weight.col_indices, bias, "relu"
    )
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weight.to_dense(), bias).relu())


WEIGHT = SparseCsr.from_dense(torch.tensor([[1.0, 0, 2, 0], [0, 0, 0, 0], [0, 3, 0, 4]]))
X = torch.randn(5, 4)
GIVEN: dict[str, Any] = {
    "x": X,
    "values": WEIGHT.values,
    "crow_indices": WEIGHT.crow_indices,
    "col_indices": WEIGHT.col_indices,
    "bias": None,
    "shape": (3, 4),
}


def columns(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int16)


def rows(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": X[:, :3]}, ValueError, "3 features, the weight expects 4"),
        ({"x": X.double()}, TypeError, "float64"),
        ({"x": torch.tensor(1.0)}, ValueError, "0-d"),
        ({"values": WEIGHT.values[:3]}, ValueError, r"\[3\] and col_indices \[4\]"),
        ({"col_indices": WEIGHT.col_indices.int()}, TypeError, "int32, expected int16"),
        ({"crow_indices": WEIGHT.crow_indices.long()}, TypeError, "int64, expected int32"),
        ({"crow_indices": rows(0, 2, 4)}, ValueError, r"\[3\], expected \[4\]"),
        ({"crow_indices": rows(0, 3, 2, 4)}, ValueError, r"crow_indices\[2\] is 2, below .* 3"),
        ({"crow_indices": rows(1, 2, 2, 4)}, ValueError, r"crow_indices\[0\] is 1"),
        ({"crow_indices": rows(0, 2, 2, 5)}, ValueError, "last of crow_indices is 5.* 4 values"),
        ({"col_indices": columns(0, 2, 1, 4)}, ValueError, r"col_indices\[3\] is 4, outside of"),
        ({"col_indices": columns(-1, 2, 1, 3)}, ValueError, r"col_indices\[0\] is -1, outside of"),
        ({"col_indices": columns(2, 2, 1, 3)}, ValueError, r"\[1\] is 2 after 2 in row 0"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias has shape \[4\], expected \[3\]"),
        ({"bias": torch.zeros(3).half()}, TypeError, "bias is torch.float16"),
        ({"activation": "tanh"}, ValueError, "tanh"),
    ],
)
@pytest.mark.parametrize("gradient", [False, True])
def test_mistakes(change: dict[str, Any], error: type, text: str, gradient: bool) -> None:
    given = GIVEN | change
    if gradient:
        given["values"] = given["values"].clone().requires_grad_()
    with pytest.raises(error, match=text):
        csr_linear_tensors(**given)


def test_a_weight_of_another_format() -> None:
    with pytest.raises(TypeError, match="weight is Tensor, expected SparseCsr"):
        csr_linear(X, torch.zeros(3, 4))  # type: ignore[arg-type]


def test_indices_are_looked_at_again_after_a_change() -> None:
    col = WEIGHT.col_indices.clone()
    given = GIVEN | {"col_indices": col}
    y = csr_linear_tensors(**given)
    col[0] = 1
    assert not torch.equal(csr_linear_tensors(**given), y)
    col[0] = 9
    with pytest.raises(ValueError, match="outside of"):
        csr_linear_tensors(**given)
    with torch.inference_mode():  # where tensors do not count their changes
        given = GIVEN | {"col_indices": WEIGHT.col_indices.clone()}
        csr_linear_tensors(**given)
        given["col_indices"][0] = 9
        with pytest.raises(ValueError, match="outside of"):
            csr_linear_tensors(**given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("k", [70, 40_000])
@pytest.mark.parametrize("m", [1, 3, 4, 40])
def test_changes_that_torch_does_not_count(
    csr_target: str, m: int, k: int, dtype: torch.dtype
) -> None:
    # Columns are not checked again: they must not lead out of x. Rows are.
    x, weight, _ = CsrCase(m, 33, k, 0.05).operands(dtype)
    csr_linear(x, weight)
    crow, col = weight.crow_indices.numpy(), weight.col_indices.numpy()
    col[::3] = np.iinfo(col.dtype).max
    col[1::3] = np.iinfo(col.dtype).min
    y = csr_linear(x, weight)
    _C.csr_dvalues(weight.values.detach().clone(), y, x, weight.crow_indices, weight.col_indices, 2)
    crow[5] = 2**31 - 1
    with pytest.raises(ValueError, match=r"crow_indices\[6\] is .*, below .* 2147483647"):
        csr_linear(x, weight)
    crow[5] = crow[4]
    crow[-1] += 1
    with pytest.raises(ValueError, match="the last of crow_indices is"):
        csr_linear(x, weight)


def test_targets_say_what_runs(cpu_target: str) -> None:
    for dtype in ("float32", "bfloat16", "float16", "float64"):
        kernels = [_C.csr_choose(rows, dtype)["kernel"] for rows in (1, 128)]
        serial = _C.target() == "serial" or dtype == "float64"
        assert kernels == (["serial"] * 2 if serial else ["gather", "tokens"])
        assert _C.csr_choose(1, dtype)["target"] in _C.targets_built()
    with pytest.raises(TypeError, match="int8"):
        _C.csr_choose(1, "int8")
