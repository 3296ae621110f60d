"""Plain calls skip torch's dispatcher; what torch or a user puts in between still sees the op."""

from __future__ import annotations

from typing import Any

import gossamer
import pytest
import torch
from cases import sparse_24
from gossamer import sparse24_linear
from gossamer._library import calls_cpu_kernel
from gossamer.formats import Sparse24
from gossamer.nn import SparseLinear
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

OP = torch.ops.gossamer.sparse24_linear.default


@pytest.fixture
def weight() -> Sparse24:
    return sparse_24(16, 32)


def test_plain_tensors_skip_the_dispatcher() -> None:
    x = torch.ones(4, 4)
    assert calls_cpu_kernel(x, x[:, ::2], None, torch.nn.Parameter(x))
    with torch.no_grad():
        assert calls_cpu_kernel(x)
    with torch.inference_mode():
        assert calls_cpu_kernel(x, torch.ones(4))


def test_a_dispatch_mode_sees_the_op(weight: Sparse24) -> None:
    seen = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Record():
        sparse24_linear(torch.ones(2, 32), weight)
    assert OP in seen


def test_a_function_mode_sees_the_op(weight: Sparse24) -> None:
    seen = []

    class Record(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Record():
        sparse24_linear(torch.ones(2, 32), weight)
    assert OP in seen


def test_a_subclass_sees_the_op(weight: Sparse24) -> None:
    seen = []

    class Recorded(Tensor):
        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    y = sparse24_linear(torch.ones(2, 32).as_subclass(Recorded), weight)
    assert OP in seen
    assert type(y) is Recorded


def test_a_profiler_sees_the_op(weight: Sparse24) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        sparse24_linear(torch.ones(2, 32), weight)
    assert any(event.key == "gossamer::sparse24_linear" for event in profile.key_averages())


def test_a_trace_holds_the_op(weight: Sparse24) -> None:
    def layer(x: Tensor) -> Tensor:
        return sparse24_linear(x, weight)

    for x in (torch.ones(2, 32), torch.ones(2, 32, requires_grad=True)):
        traced = torch.jit.trace(layer, x)
        assert "gossamer::sparse24_linear" in str(traced.graph)
        assert traced(x).requires_grad == x.requires_grad


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # sizes become constants
@pytest.mark.parametrize(
    ("pattern", "op"),
    [(gossamer.Unstructured(0.5), "csr_linear"), (gossamer.Block(4, 4), "blocksparse_product")],
)
def test_a_trace_of_a_layer_that_trains_holds_the_op(pattern: Any, op: str) -> None:
    density = 0.5 if isinstance(pattern, gossamer.Block) else None
    layer, x = SparseLinear(32, 8, pattern=pattern, density=density), torch.randn(2, 32)
    traced = torch.jit.trace(layer, x)
    assert f"gossamer::{op}" in str(traced.graph)
    assert torch.equal(traced(x), layer(x))


def test_tensors_without_memory_are_not_for_the_kernel() -> None:
    with torch._subclasses.FakeTensorMode():
        assert not calls_cpu_kernel(torch.ones(2, 32))
    assert not calls_cpu_kernel(torch.ones(2, 32, device="meta"))


def test_a_negated_view_is_read_negated(weight: Sparse24) -> None:
    x = torch.randn(2, 32)
    negated = torch.complex(torch.zeros_like(x), x).conj().imag
    assert negated.is_neg()
    with torch.no_grad():
        assert torch.equal(sparse24_linear(negated, weight), sparse24_linear(-x, weight))


@pytest.mark.parametrize(
    "make",
    [
        SparseLinear,
        lambda k, n: SparseLinear(k, n, pattern=gossamer.Block(2, 2), density=0.5),
        lambda k, n: SparseLinear(k, n, pattern=gossamer.Unstructured(0.5)),
        lambda k, n: gossamer.quantize(SparseLinear(k, n), "int8"),
        gossamer.nn.ActSparseLinear,
        gossamer.nn.SparseTrainingLinear,
    ],
    ids=["2:4", "blocks", "places", "int8", "zeros of x", "training"],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_x_that_is_not_dense_is_refused_by_name(make: Any) -> None:
    layer, rows = make(8, 4), [torch.randn(3, 8), torch.randn(2, 8)]
    jagged = torch.nested.nested_tensor(rows, layout=torch.jagged)
    for x in (jagged, torch.nested.nested_tensor(rows)):
        with pytest.raises(TypeError, match=r"a nested tensor \(its values\(\) are dense\)"):
            layer(x)
    with pytest.raises(TypeError, match=r"a tensor of layout torch\.sparse_coo"):
        layer(rows[0].to_sparse())
    assert layer(jagged.values()).shape == (5, 4)
