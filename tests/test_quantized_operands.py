"""What sparse24_linear_quantized refuses, and what torch's compilers see of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import (
    VALUE_TYPES,
    quantized_24,
    sparse_24,
)
from gossamer import _C, sparse24_linear_quantized
from gossamer.formats import Sparse24Quantized, Sparse24QuantizedPanels
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

KINDS = [(value_type, None) for value_type in VALUE_TYPES] + [("int4", 4), ("int4", 32)]
op = torch.ops.gossamer.sparse24_linear_quantized
INT8, FLOAT8, INT4 = (quantized_24(6, 12, value_type) for value_type in VALUE_TYPES)
PACKED = Sparse24QuantizedPanels.from_quantized(INT8)
X, Q, ONES = torch.ones(3, 12), torch.ones(3, 12).to(torch.int8), torch.ones(3)
F32 = torch.float32


def run(*args: Any, **kwargs: Any) -> Any:
    return lambda: sparse24_linear_quantized(*args, **kwargs)


ERRORS: dict[str, tuple[type[Exception], str, Any]] = {
    "0-d x": (ValueError, "0-d", run(torch.tensor(1.0), INT8)),
    "features": (ValueError, "x has 11 features, the weight expects 12", run(X[:, 1:], INT8)),
    "float64": (TypeError, "x is torch.float64", run(X.double(), INT8)),
    "whole numbers": (TypeError, "x is torch.int64", run(X.long(), INT4)),
    "another 8-bit type": (TypeError, "int8.*float8", run(Q, FLOAT8, x_scale=ONES, out_dtype=F32)),
    "8-bit x for 4 bits": (TypeError, "x is torch.int8", run(Q, INT4, x_scale=ONES, out_dtype=F32)),
    "bytes for 4 bits": (TypeError, "x is torch.uint8", run(X.byte(), INT4)),
    "no out_dtype": (TypeError, "out_dtype has to say", run(Q, INT8, x_scale=ONES)),
    "no x_scale": (ValueError, "int8 with no x_scale", run(Q, INT8, out_dtype=F32)),
    "needless x_scale": (ValueError, "float32 with an x_scale", run(X, INT8, x_scale=ONES)),
    "dtype of x_scale": (
        TypeError,
        "x_scale is torch.float64",
        run(Q, INT8, x_scale=ONES.double(), out_dtype=F32),
    ),
    "shape of x_scale": (
        ValueError,
        r"x_scale has shape \[3, 1\], expected \[3\]",
        run(Q, INT8, x_scale=ONES[:, None], out_dtype=F32),
    ),
    "out_dtype": (TypeError, "out_dtype is torch.int32", run(X, INT8, out_dtype=torch.int32)),
    "dtype of bias": (
        TypeError,
        "bias is torch.float64, the result torch.float32",
        run(X, INT8, torch.ones(6).double()),
    ),
    "bias as x and not as the result": (
        TypeError,
        "bias is torch.float32, the result torch.bfloat16",
        run(X, INT8, torch.ones(6), out_dtype=torch.bfloat16),
    ),
    "length of bias": (ValueError, r"\[5\].*\[6\]", run(X, INT4, torch.ones(5))),
    "activation": (ValueError, "tanh", run(X, INT8, activation="tanh")),
    "dense weight": (TypeError, "Tensor.*Sparse24Quantized", run(X, torch.ones(6, 12))),
    "panels of another device": (ValueError, "meta.*cpu", run(X.to("meta"), PACKED)),
    "unquantised weight": (TypeError, "Sparse24,.*from_sparse24", run(X, sparse_24(6, 12))),
    "device of x": (ValueError, "meta.*cpu", run(X.to("meta"), INT8)),
    "device of the weight": (ValueError, "cpu.*meta", run(X, INT8.to("meta"))),
    "device of bias": (ValueError, "cpu.*meta", run(X, INT8, torch.ones(6, device="meta"))),
    "device of x_scale": (
        ValueError,
        "cpu.*meta",
        run(Q, INT8, x_scale=ONES.to("meta"), out_dtype=F32),
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_mistakes_are_errors_with_values(case: str) -> None:
    error, text, call = ERRORS[case]
    with pytest.raises(error, match=text):
        call()


def border(**changes: Any) -> None:
    """The native function with operands that fit each other, but for ``changes``."""
    operands: dict[str, Any] = {
        "out": torch.zeros(3, 6),
        "x": Q,
        "x_scale": ONES,
        "weight": INT8.values,
        "indices": INT8.indices,
        "value_dtype": "int8",
        "scales": INT8.scales,
        "bias": None,
        "group": 12,
        "activation": "none",
        "threads": 1,
    }
    out = changes.get("out", operands["out"])
    try:
        _C.sparse24_linear_quantized(**{**operands, **changes})
    finally:
        assert not out.any()  # untouched


HALF = {"weight": INT4.values, "value_dtype": "uint8", "x": X, "x_scale": None}
BORDER: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "values of another type": (TypeError, "int32", {"weight": INT8.values.int()}),
    "few values": (ValueError, r"values.*\[6, 6\]", {"weight": INT8.values[:, :5].contiguous()}),
    "few indices": (
        ValueError,
        r"indices.*\[6, 2\]",
        {"indices": INT8.indices[:, :1].contiguous()},
    ),
    "panels of another shape": (
        ValueError,
        r"panels have shape \[1, 1, 4, 16\], expected \[1, 1, 5, 16\]",
        {"weight": PACKED.panels[:, :, :4].contiguous(), "indices": None},
    ),
    "panels of another type": (
        ValueError,
        r"\[1, 1, 5, 16\], expected \[1, 1, 3, 16\]",
        {"weight": PACKED.panels, "indices": None, "value_dtype": "uint8", "x_scale": None},
    ),
    "few scales": (ValueError, r"scales.*\[6, 1\]", {"scales": INT8.scales[:4]}),
    "wide scales": (TypeError, "float64", {"scales": INT8.scales.double()}),
    "scales in groups": (ValueError, r"scales.*\[6, 3\]", {**HALF, "group": 4}),
    "group of 8 bits": (ValueError, "group is 4 of 12", {"group": 4}),
    "group 0": (ValueError, "group is 0", {**HALF, "group": 0}),
    "odd group": (ValueError, "group is 6", {**HALF, "group": 6}),
    "large group": (ValueError, "group is 16", {**HALF, "group": 16}),
    "x of another type": (TypeError, "float64, expected float32.* or int8", {"x": X.double()}),
    "quantised x": (TypeError, "int8, expected float32, bfloat16, float16$", {**HALF, "x": Q}),
    "x_scale of a float": (ValueError, "float32 with an x_scale", {"x": X}),
    "strided x": (
        ValueError,
        "columns must be contiguous",
        {"x": torch.ones(3, 24).to(torch.int8)[:, ::2]},
    ),
    "other columns": (ValueError, "group is 12 of 11", {"x": Q[:, :11]}),
    "no x_scale": (ValueError, "x_scale", {"x_scale": None}),
    "x_scale": (ValueError, "x_scale", {**HALF, "x_scale": ONES}),
    "short x_scale": (ValueError, r"\[2\], expected \[3\]", {"x_scale": ONES[:2]}),
    "rows of out": (ValueError, r"\[2, 6\], expected \[3, 6\]", {"out": torch.zeros(2, 6)}),
    "out of another type": (TypeError, "float64", {"out": torch.zeros(3, 6).double()}),
    "strided out": (ValueError, "contiguous", {"out": torch.zeros(6, 3).t()}),
    "bias": (TypeError, "bfloat16", {"bias": torch.ones(6).bfloat16()}),
    "short bias": (ValueError, r"\[5\]", {"bias": torch.ones(5)}),
    "activation": (ValueError, "tanh", {"activation": "tanh"}),
}


@pytest.mark.parametrize("case", BORDER)
def test_the_border_refuses_what_does_not_fit(case: str) -> None:
    error, text, changes = BORDER[case]
    with pytest.raises(error, match=text):
        border(**changes)


def test_gradients_are_refused_and_not_dropped() -> None:
    x, bias = torch.randn(3, 12, requires_grad=True), torch.randn(6)
    trained = Sparse24Quantized(
        INT8.values, INT8.indices, INT8.scales.clone().requires_grad_(), (6, 12), 12
    )
    for value_type, weight in zip(VALUE_TYPES, (INT8, FLOAT8, INT4), strict=True):
        with pytest.raises(RuntimeError, match=r"gradient is wanted of x.*no_grad"):
            sparse24_linear_quantized(x, weight)
        with pytest.raises(RuntimeError, match="gradient is wanted of bias"):
            sparse24_linear_quantized(x.detach(), weight, bias.clone().requires_grad_())
        with torch.no_grad():
            y = sparse24_linear_quantized(x, weight, bias)
        assert not y.requires_grad
        with torch.inference_mode():
            assert torch.equal(sparse24_linear_quantized(x, weight, bias), y)
        with pytest.raises(RuntimeError, match="gradient is wanted of x"):
            torch.func.grad(lambda x, w=weight: sparse24_linear_quantized(x, w).sum())(x.detach())
        assert value_type == weight.value_type
    with pytest.raises(RuntimeError, match="gradient is wanted of scales"):
        sparse24_linear_quantized(x.detach(), trained)


def test_forward_derivatives_are_refused_and_not_dropped() -> None:
    x = torch.randn(4, 12)
    with forward_ad.dual_level(), torch.no_grad():
        sparse24_linear_quantized(x, INT8)
        with pytest.raises(RuntimeError, match="gradient is wanted of x"):
            sparse24_linear_quantized(forward_ad.make_dual(x, x), INT8)


def parts(weight: Sparse24Quantized) -> tuple[Tensor, Tensor, Tensor, torch.dtype]:
    return weight.values, weight.indices, weight.scales, weight.values.dtype


OPCHECKS = {
    "int8": (torch.randn(2, 3, 12), None, *parts(INT8), torch.randn(6), 12, 6, 12, "gelu", F32),
    "int8 of int8": (Q, ONES, *parts(INT8), None, 12, 6, 12, "none", torch.bfloat16),
    "float8": (X.bfloat16(), None, *parts(FLOAT8), None, 12, 6, 12, "relu", torch.bfloat16),
    "int4": (X.t().contiguous().t(), None, *parts(INT4), torch.randn(6), 12, 6, 12, "none", F32),
}


@pytest.mark.parametrize("case", OPCHECKS)
def test_opcheck(case: str) -> None:
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    checks.append("test_aot_dispatch_dynamic")
    if case == "float8":  # torch's own comparison of operands multiplies them, in their type
        checks.remove("test_schema")
    torch.library.opcheck(op, OPCHECKS[case], test_utils=checks)


@pytest.mark.parametrize("value_type", VALUE_TYPES)
def test_meta_gives_the_shape(value_type: str) -> None:
    weight, x = quantized_24(6, 12, value_type).to("meta"), torch.ones(2, 3, 12, device="meta")
    y = sparse24_linear_quantized(x, weight, activation="gelu", out_dtype=torch.bfloat16)
    assert y.is_meta
    assert (y.shape, y.dtype) == ((2, 3, 6), torch.bfloat16)


@pytest.mark.parametrize("value_type", VALUE_TYPES)
def test_compilers_see_the_layouts_of_a_gpu(value_type: str) -> None:
    kind = quantized_24(50, 300, value_type)
    with FakeTensorMode():  # tensors of a GPU that nobody has to have
        tensors = [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in parts(kind)[:3]]
        weight = Sparse24Quantized(*tensors, kind.shape, kind.group)
        packed = Sparse24QuantizedPanels.from_quantized(weight)
        assert packed.panels.shape == (4, 2, 384 if value_type == "int4" else 640)
        assert packed.to_quantized().values.shape == weight.values.shape
        x = torch.empty(2, 3, 300, dtype=torch.bfloat16, device="cuda")
        for layout in (weight, packed):
            y = sparse24_linear_quantized(x, layout)
            assert (y.shape, y.dtype, y.device) == ((2, 3, 50), x.dtype, x.device)


@pytest.mark.filterwarnings("ignore:.*LeafSpec")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize(("value_type", "group"), KINDS)
def test_compiled_matches_eager(value_type: str, group: int | None, backend: str) -> None:
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True, backend=backend)
    def function(x: Tensor, weight: Sparse24Quantized, bias: Tensor) -> Tensor:
        return sparse24_linear_quantized(x * 2, weight, bias, "silu") + 1

    bias = torch.randn(6)
    weight = quantized_24(6, 44, value_type, group)
    for batch in ((3,), (5,), (2, 4)):
        x = torch.randn(*batch, 44)
        expected = sparse24_linear_quantized(x * 2, weight, bias, "silu") + 1
        torch.testing.assert_close(function(x, weight, bias), expected)
    with pytest.raises(Exception, match=r"x has \w+ features, the weight expects"):
        function(torch.randn(3, 9), weight, bias)
    with pytest.raises(Exception, match="gradient is wanted of x"):
        function(torch.randn(3, 44, requires_grad=True), weight, bias)
