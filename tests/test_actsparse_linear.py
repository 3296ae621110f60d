"""Products that skip zero activations: every kernel against plain torch, borders, mistakes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from actsparse_cases import CASES, ActiveCase, LinearOracle, OutputsOracle, draw_cases
from cases import ACTSPARSE_TARGETS, DTYPES
from gossamer import _C, actsparse_linear, actsparse_outputs, topk_decode, topk_encode
from gossamer.ops import actsparse, actsparse_cuda
from gossamer.ops.actsparse_outputs import _native_cuda as outputs_native_cuda
from torch import Tensor

ACTIVATIONS = (None, "relu", "gelu", "silu")


def kernel(
    x: Tensor, weight: Tensor, threshold: float = 0.0, threads: int = 2
) -> tuple[Tensor, bool]:
    """What the kernels make of it, and whether they think a dense product faster."""
    y = torch.zeros(len(x), weight.shape[1], dtype=x.dtype)
    return y, _C.actsparse_linear(y, x, weight, None, threshold, "none", threads)


def outputs_kernel(x: Tensor, weight: Tensor, wanted: Tensor) -> tuple[Tensor, bool]:
    y = torch.zeros(len(x), len(weight), dtype=x.dtype)
    bits = wanted.view(torch.uint8)
    return y, _C.actsparse_outputs(y, x, weight, bits, None, "none", torch.get_num_threads())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_dense_on_the_masked_input(actsparse_target: str, dtype: torch.dtype) -> None:
    for i, case in enumerate(CASES):
        x, weight, bias = case.operands(dtype)
        given = bias if case.k % 2 else None
        threshold = (0.0, 0.1, 0.7)[i % 3]
        # A dense product is rounded before the activation, as torch's own layers are.
        activation = ACTIVATIONS[i % 4] if kernel(x, weight, threshold)[1] else None
        y = actsparse_linear(x, weight, given, threshold, activation)
        try:
            LinearOracle(x, weight, given, threshold, activation).check(y)
        except AssertionError as error:
            raise AssertionError(f"{case}, threshold {threshold}, {activation}") from error


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_match_dense_where_wanted(actsparse_target: str, dtype: torch.dtype) -> None:
    for i, case in enumerate(CASES):
        gate, _, _ = ActiveCase(case.m, 1, case.n, case.active).operands(dtype)
        x = torch.randn(case.m, case.k).to(dtype)
        weight, bias = torch.randn(case.n, case.k).to(dtype), torch.randn(case.n).to(dtype)
        given = bias if case.k % 2 else None
        activation = ACTIVATIONS[i % 4] if outputs_kernel(x, weight, gate != 0)[1] else None
        operands = (x, weight, gate != 0, given, activation)
        y = actsparse_outputs(x, weight, gate, given, activation=activation)
        assert torch.equal(y, actsparse_outputs(*operands[:4], activation=activation))
        try:
            OutputsOracle(*operands).check(y)
        except AssertionError as error:
            raise AssertionError(str(case)) from error


def test_float64(serial_target: str) -> None:
    for case in draw_cases(8):
        x, weight, bias = case.operands(torch.float64)
        LinearOracle(x, weight, bias, 0.2).check(actsparse_linear(x, weight, bias, 0.2))
        gate = torch.rand(case.m, case.n, dtype=torch.float64).round()
        y = actsparse_outputs(x, weight.t(), gate, bias)
        OutputsOracle(x, weight.t(), gate != 0, bias).check(y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_any_threads_and_neighbours(
    actsparse_target: str, threads: int, dtype: torch.dtype
) -> None:
    """A token's result depends on nothing but the token."""
    for m, active in ((1, "all"), (9, "few"), (40, "whole columns")):
        x, weight, _ = ActiveCase(m, 667, 1301, active).operands(dtype)
        y, computed = kernel(x, weight)
        if not computed:
            x = x[:4]
            y, computed = kernel(x, weight)
        assert computed
        for team in (1, 3, 16):
            assert torch.equal(kernel(x, weight, threads=team)[0], y)
        for token in range(0, len(x), 3):
            assert torch.equal(kernel(x[token : token + 1], weight)[0][0], y[token])
        wanted = torch.rand(len(x), 1301) < 0.01
        outputs, computed = outputs_kernel(y, weight, wanted)
        assert computed
        for team in (1, 3):
            torch.set_num_threads(team)
            one, _ = outputs_kernel(y[-1:], weight, torch.ones_like(wanted[-1:]))
            assert torch.equal(outputs[-1], torch.where(wanted[-1], one[0], 0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_no_number_is_active(actsparse_target: str, dtype: torch.dtype) -> None:
    nan, inf = float("nan"), float("inf")
    for m in (1, 5):
        x, weight, _ = ActiveCase(m, 70, 33, "few").operands(dtype)
        clean = actsparse_linear(x, weight, threshold=0.5)
        for bad in (nan, inf, -inf):
            spoiled = x.clone()
            spoiled[-1, 7] = bad
            y = actsparse_linear(spoiled, weight, threshold=0.5)
            LinearOracle(spoiled, weight, threshold=0.5).check(y)
            assert torch.equal(y[:-1], clean[:-1])
            assert not y[-1].isfinite().any()
    # A skipped row is not read, nor multiplied by zero.
    x, weight, _ = ActiveCase(1, 70, 33, "few").operands(dtype)
    weight[x[0] == 0] = nan
    LinearOracle(x, weight).check(actsparse_linear(x, weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_threshold_of_minus_zero_is_zero(actsparse_target: str, dtype: torch.dtype) -> None:
    for rows in (1, 3):
        x, weight = torch.randn(rows, 33).relu().to(dtype), torch.randn(33, 23).to(dtype)
        expected = actsparse_linear(x, weight)
        assert torch.equal(actsparse_linear(x, weight, threshold=-0.0), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threshold_is_rounded_as_torch_does(actsparse_target: str, dtype: torch.dtype) -> None:
    """Of inputs around 0.1 those are active that torch says are above it."""
    around = torch.tensor([0.1], dtype=dtype)
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    x = (around.view(bits) + torch.arange(-2, 3, dtype=bits)).view(dtype)
    x = torch.cat([x, -x])
    y, fraction = actsparse_linear(
        x, torch.eye(10, dtype=dtype), threshold=0.1, return_fraction=True
    )
    assert torch.equal(y, torch.where(x.abs() <= 0.1, 0, x))
    assert float(fraction) == pytest.approx(0.4)
    smallest = torch.tensor([1, 0], dtype=bits).view(dtype)  # a subnormal is no zero
    assert _C.actsparse_linear(torch.empty(1, 1, dtype=dtype), smallest[None], smallest[:, None],
                               None, 0.0, "none", 1)  # fmt: skip
    _, fraction = actsparse_linear(smallest, smallest[:, None], return_fraction=True)
    assert float(fraction) == 0.5


def test_many_tokens_are_multiplied_densely_where_that_is_faster(actsparse_target: str) -> None:
    dense, _, _ = ActiveCase(70, 1, 300, "all").operands(torch.float32)
    sparse, weight, _ = ActiveCase(70, 90, 300, "one").operands(torch.float32)
    serial = actsparse_target == "serial"
    for x, computed in ((dense, serial), (sparse, True), (dense[:1], True)):
        assert kernel(x, weight, 0.1)[1] == computed
        LinearOracle(x, weight, threshold=0.1).check(actsparse_linear(x, weight, threshold=0.1))
    some = torch.randn(64, 300) * (torch.rand(64, 300) < 0.3)
    for dtype in DTYPES:
        assert kernel(some.to(dtype), weight.to(dtype))[1]
    # Without AVX-512's float16 a dense product of it makes a weight in float32 first.
    half, of_inputs, of_outputs = dense.half(), weight.half(), weight.t().contiguous().half()
    wanted = torch.ones(70, 90) > 0
    assert kernel(half, of_inputs)[1]
    assert outputs_kernel(half, of_outputs, wanted)[1]
    half, wanted = half.repeat(6, 1), wanted.repeat(6, 1)
    assert kernel(half, of_inputs)[1] == serial
    assert outputs_kernel(half, of_outputs, wanted)[1] == serial
    assert kernel(some.half().repeat(6, 1), of_inputs)[1]
    LinearOracle(half, of_inputs, threshold=0.1).check(
        actsparse_linear(half, of_inputs, threshold=0.1)
    )


def test_beside_tiles_16_bits_have_to_skip_more() -> None:
    if "amx_bf16" not in _C.machine_targets():
        pytest.skip("no tiles")
    _C.force_target("amx_bf16")
    try:
        x, weight = torch.randn(64, 300), torch.randn(300, 90)
        some = x * (torch.rand(64, 300) < 0.3)
        assert not kernel(some.bfloat16(), weight.bfloat16())[1]
        assert kernel(some.half(), weight.half())[1]
        assert not kernel(x.half(), weight.half())[1]
    finally:
        _C.force_target("")


def test_what_lies_between_rows_stays_out(cpu_target: str) -> None:
    for dtype in DTYPES:
        wide = torch.full((70, 131), float("nan"), dtype=dtype)
        x, weight = wide[:, 2:129], torch.randn(127, 40).to(dtype)
        x.copy_(torch.randn(70, 127))
        assert actsparse_linear(x, weight).isfinite().all()
        assert actsparse_outputs(x, weight.t(), torch.ones(70, 40, dtype=dtype)).isfinite().all()
        assert topk_encode(x, weight.t().contiguous(), k=3)[0].isfinite().all()
        values = torch.zeros(70, 30, dtype=dtype, requires_grad=True)
        indices = torch.arange(30).expand(70, 30)
        y = topk_decode(values, indices, weight.t().contiguous())
        (gradient,) = torch.autograd.grad(y, values, x)
        assert gradient.isfinite().all()


def test_any_strides_and_dimensions(actsparse_target: str) -> None:
    for dtype in DTYPES:
        x, weight, bias = ActiveCase(6, 45, 37, "some").operands(dtype)
        y = actsparse_linear(x, weight, bias)
        wide = torch.full((37, 99), float("nan"), dtype=dtype)
        wide[:, 3:48] = weight
        for strided in (wide[:, 3:48], weight.t().contiguous().t()):
            assert torch.equal(actsparse_linear(x.t().contiguous().t(), strided, bias), y)
        assert torch.equal(actsparse_linear(x.view(2, 3, 37), weight, bias), y.view(2, 3, 45))
        assert torch.equal(actsparse_linear(x[0], weight, bias), y[0])
        row = x[:1].expand(6, -1)
        assert torch.equal(actsparse_linear(row, weight, bias), y[:1].expand(6, -1))
        assert actsparse_linear(x.view(2, 3, 37)[:, :0], weight).shape == (2, 0, 45)
        assert torch.equal(actsparse_linear(x[:, :0], weight[:0], bias), bias.expand(6, -1))
        assert actsparse_linear(x, weight[:, :0]).shape == (6, 0)
        gate = torch.rand(6, 37) < 0.5
        z = actsparse_outputs(y, weight, gate)
        for strided in (wide[:, 3:48], weight.t().contiguous().t()):
            wanted = gate.t().contiguous().t()
            assert torch.equal(actsparse_outputs(y.t().contiguous().t(), strided, wanted), z)
        assert torch.equal(actsparse_outputs(y[2], weight, gate[2]), z[2])


def test_outputs_of_indices() -> None:
    x, weight, bias = torch.randn(2, 3, 11), torch.randn(20, 11), torch.randn(20)
    y = torch.nn.functional.linear(x, weight, bias)
    shared = torch.tensor([7, 0, 19, 7], dtype=torch.int32)
    torch.testing.assert_close(actsparse_outputs(x, weight, shared, bias), y[..., shared.long()])
    each = torch.randint(20, (2, 3, 5))
    torch.testing.assert_close(actsparse_outputs(x, weight, each, bias), y.gather(-1, each))
    assert actsparse_outputs(x, weight, shared[:0]).shape == (2, 3, 0)
    gate = y.clone()
    gate[0, 0, 3] = float("nan")
    z = actsparse_outputs(x, weight, gate, bias, threshold=0.5)
    torch.testing.assert_close(z, torch.where(gate.abs() <= 0.5, 0, y))
    assert z[0, 0, 3] == y[0, 0, 3]


def test_outputs_lie_as_x_whatever_the_mask(actsparse_target: str) -> None:
    x, weight = torch.randn(64, 16), torch.randn(8, 16)
    for wanted in (torch.rand(8, 64).t() < 0.5, torch.ones(8, 64, dtype=torch.bool).t()):
        y = actsparse_outputs(x, weight, wanted)
        assert y.is_contiguous()
        dense = (x.double() @ weight.double().t()) * wanted
        torch.testing.assert_close(y, dense.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_product_that_a_gpu_without_kernels_runs(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actsparse_cuda, "has_kernels", lambda device: False)
    x, weight, bias = ActiveCase(5, 21, 33, "some").operands(dtype)
    y = actsparse._native_cuda(x, weight, bias, 0.3, "relu")
    LinearOracle(x, weight, bias, 0.3, "relu").check(y)
    wanted = torch.rand(5, 33) < 0.4
    z = outputs_native_cuda(y, weight, wanted, None, "relu")
    OutputsOracle(y, weight, wanted, None, "relu").check(z)


X, WEIGHT, GATE = torch.randn(5, 8), torch.randn(8, 4), torch.rand(5, 4) < 0.5


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": X[:, :7]}, ValueError, "7 features, the weight expects 8"),
        ({"x": X.sum()}, ValueError, "0-d"),
        ({"x": X.double()}, TypeError, "float64, the weight torch.float32"),
        ({"weight_kn": WEIGHT[0]}, ValueError, r"weight_kn has shape \[4\]"),
        ({"weight_kn": WEIGHT.int(), "x": X.int()}, TypeError, "x is int32"),
        ({"bias": torch.zeros(8)}, ValueError, r"bias has shape \[8\], expected \[4\]"),
        ({"bias": torch.zeros(4).half()}, TypeError, "bias is torch.float16"),
        ({"activation": "tanh"}, ValueError, "tanh"),
        ({"threshold": -0.5}, ValueError, "threshold is -0.5"),
        ({"threshold": None}, TypeError, "threshold is None, expected a number"),
        ({"threshold": float("nan")}, ValueError, "threshold is nan"),
        ({"threshold": 1e39}, ValueError, r"threshold is 1e\+39.*finite in float32"),
    ],
)
@pytest.mark.parametrize("gradient", [False, True])
def test_mistakes(change: dict[str, Any], error: type, text: str, gradient: bool) -> None:
    given = {"x": X, "weight_kn": WEIGHT} | change
    if gradient and given["weight_kn"].is_floating_point():
        given["weight_kn"] = given["weight_kn"].clone().requires_grad_()
    with pytest.raises(error, match=text):
        actsparse_linear(**given)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": X[:, :7]}, ValueError, "7 features, the weight expects 8"),
        ({"weight": WEIGHT.t()[0]}, ValueError, r"weight has shape \[8\]"),
        ({"wanted": GATE[:4]}, ValueError, r"shape \[4, 4\], expected outputs of.*\[5, 4\]"),
        ({"wanted": torch.tensor([1, 4])}, ValueError, "outputs 1 to 4, the weight has 4"),
        ({"wanted": torch.tensor([-1])}, ValueError, "outputs -1 to -1"),
        ({"wanted": torch.zeros(2, 1).long()}, ValueError, r"wanted has shape \[2, 1\]"),
        ({"wanted": GATE.byte()}, TypeError, "wanted is torch.uint8"),
        ({"wanted": GATE.float(), "threshold": -0.5}, ValueError, "threshold is -0.5"),
        ({"threshold": 0.5}, ValueError, "threshold is 0.5, which is for a gate; .*torch.bool"),
        ({"wanted": GATE.float()[:4]}, ValueError, r"wanted has shape \[4, 4\]"),
        ({"wanted": GATE.float(), "threshold": None}, TypeError, "threshold is None"),
        ({"bias": torch.zeros(8)}, ValueError, r"bias has shape \[8\], expected \[4\]"),
        ({"activation": "tanh"}, ValueError, "tanh"),
    ],
)
def test_mistakes_of_outputs(change: dict[str, Any], error: type, text: str) -> None:
    given = {"x": X, "weight": WEIGHT.t().contiguous(), "wanted": GATE} | change
    with pytest.raises(error, match=text):
        actsparse_outputs(**given)


def test_targets_say_what_runs(cpu_target: str) -> None:
    before = _C.target()
    for dtype in ("float32", "bfloat16", "float16", "float64"):
        chosen = _C.actsparse_target(dtype)
        assert chosen in ACTSPARSE_TARGETS
        assert (chosen == "serial") == (before == "serial" or dtype == "float64")
    with pytest.raises(TypeError, match="int8"):
        _C.actsparse_target("int8")
