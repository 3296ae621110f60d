"""Binary inputs: packing, sums of rows against the dense product, gradients, mistakes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import DTYPES, SumOracle
from gossamer import pack_spikes, spike_linear
from gossamer.ops import actsparse_cuda, unpack_spikes
from gossamer.ops.spikes import _linear_cuda
from torch import Tensor

ops = torch.ops.gossamer
SHAPES = ((1, 1, 1), (0, 9, 5), (3, 7, 17), (5, 8, 40), (2, 130, 300), (40, 65, 129))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bool, torch.uint8, torch.float64], ids=str)
def test_packing(dtype: torch.dtype) -> None:
    for shape in ((3, 1), (2, 5, 8), (9,), (4, 129), (0, 5), (2, 0)):
        x = (torch.rand(shape) < 0.4).to(dtype)
        if dtype.is_floating_point:
            x[x == 0] *= -1  # -0.0 is no spike
        bits = pack_spikes(x)
        assert bits.shape == (*shape[:-1], (shape[-1] + 7) // 8)
        assert torch.equal(unpack_spikes(bits, shape[-1], dtype), x)
    for k in range(10):
        x = torch.zeros(1, 10, dtype=dtype)
        x[0, k] = 1
        assert pack_spikes(x).tolist() == [[1 << k, 0] if k < 8 else [0, 1 << k - 8]]
    strided = (torch.rand(7, 20) < 0.4).to(dtype).t()
    assert torch.equal(pack_spikes(strided), pack_spikes(strided.contiguous()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_are_the_dense_product(target: str, threads: int, dtype: torch.dtype) -> None:
    for tokens, k, n in (*SHAPES, (300, 2000, 600)) if target != "serial" else SHAPES:
        spikes, weight = (torch.rand(tokens, k) < 0.3).to(dtype), torch.randn(k, n).to(dtype)
        bias = torch.randn(n).to(dtype) if n % 2 else None
        added = torch.zeros(n).double() if bias is None else bias.double()
        y = spike_linear(spikes, weight, bias)
        x, w = spikes.double(), weight.double()
        SumOracle(x @ w + added, x @ w.abs() + added.abs(), k + 1, dtype).check(y)
        assert torch.equal(spike_linear(pack_spikes(spikes), weight, bias), y)
        torch.set_num_threads(5)
        assert torch.equal(spike_linear(spikes.bool(), weight, bias), y)
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_product_that_a_gpu_without_kernels_runs(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actsparse_cuda, "has_kernels", lambda device: False)
    for tokens, k, n in SHAPES:
        spikes, weight = (torch.rand(tokens, k) < 0.3).double(), torch.randn(k, n).to(dtype)
        bias, w = torch.randn(n).to(dtype), weight.double()
        y = _linear_cuda(pack_spikes(spikes), weight, bias)
        size = spikes @ w.abs() + bias.double().abs()
        SumOracle(spikes @ w + bias.double(), size, k + 1, dtype).check(y)


def test_float64_and_leading_dimensions(serial_target: str) -> None:
    spikes, weight = (torch.rand(2, 3, 11) < 0.5).double(), torch.randn(11, 4).double()
    torch.testing.assert_close(spike_linear(spikes, weight), spikes @ weight)
    torch.testing.assert_close(spike_linear(spikes[0, 0], weight), spikes[0, 0] @ weight)


def test_gradients_are_those_of_the_dense_product() -> None:
    spikes = (torch.rand(6, 11) < 0.5).float().requires_grad_()
    weight, bias = torch.randn(11, 4, requires_grad=True), torch.randn(4, requires_grad=True)
    dy = torch.randn(6, 4)
    wanted = torch.autograd.grad(spikes @ weight + bias, (spikes, weight, bias), dy)
    got = torch.autograd.grad(spike_linear(spikes, weight, bias), (spikes, weight, bias), dy)
    torch.testing.assert_close(got, wanted)
    packed = spike_linear(pack_spikes(spikes), weight, bias)
    torch.testing.assert_close(torch.autograd.grad(packed, (weight, bias), dy), wanted[1:])


def test_the_gradient_keeps_the_bits_alone() -> None:
    spikes = (torch.rand(16, 1024) < 0.5).float().requires_grad_()
    kept: list[Tensor] = []
    weight = torch.randn(1024, 4)
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t):
        spike_linear(spikes, weight)
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    assert sum(held.values()) == 16 * 1024 // 8 + weight.nbytes + 4


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("packed", [False, True])
def test_per_sample_gradients(packed: bool) -> None:
    spikes, weight = (torch.rand(3, 4, 11) < 0.5).float(), torch.randn(11, 5)
    given = pack_spikes(spikes) if packed else spikes

    def loss(weight: Tensor, spikes: Tensor) -> Tensor:
        return spike_linear(spikes, weight).square().sum()

    got = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weight, given)
    torch.testing.assert_close(got, 2 * spikes.mT @ (spikes @ weight))


@pytest.mark.parametrize(
    ("bits", "features", "error", "text"),
    [
        (torch.zeros(2, dtype=torch.int32), 16, TypeError, "bits are torch.int32"),
        (torch.zeros(3, 2).byte(), 17, ValueError, r"shape \[3, 2\] and features are 17"),
        (torch.zeros(2).byte(), 8, ValueError, r"shape \[2\] and features are 8"),
        (torch.zeros(2).byte(), -1, ValueError, "features are -1"),
        (torch.zeros(0).byte(), -1, ValueError, "features are -1"),
        (torch.zeros(()).byte(), 8, ValueError, r"shape \[\]"),
    ],
)
def test_mistakes_of_unpacking(
    bits: Tensor, features: int, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        unpack_spikes(bits, features)


def test_compilers() -> None:
    spikes, weight = torch.rand(4, 11) < 0.5, torch.randn(11, 5, requires_grad=True)
    bits, bias = pack_spikes(spikes), torch.randn(5, requires_grad=True)
    torch.library.opcheck(ops.pack_spikes, (spikes.float(),))
    torch.library.opcheck(ops.spike_linear, (bits, weight, bias))
    floats = spikes.float().requires_grad_()
    torch.library.opcheck(ops.spike_linear_unpacked, (floats, weight, bias))
    torch._dynamo.reset()
    compiled = torch.compile(spike_linear, fullgraph=True, backend="aot_eager")
    for given in (spikes, floats):
        y, wanted = compiled(given, weight, bias), spike_linear(given, weight, bias)
        assert torch.equal(y, wanted)
        (got,) = torch.autograd.grad(y.square().sum(), weight)
        torch.testing.assert_close(got, torch.autograd.grad(wanted.square().sum(), weight)[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert spike_linear(spikes.float(), weight).dtype == torch.bfloat16


WEIGHT = torch.randn(11, 4)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"spikes": torch.full((2, 11), 0.5)}, ValueError, r"x\[0, 0\] is neither 0 nor 1"),
        ({"spikes": torch.full((2, 11), float("nan"))}, ValueError, "neither 0 nor 1"),
        ({"spikes": torch.zeros(2, 11).int()}, TypeError, "int32, expected bool, uint8 or"),
        ({"spikes": torch.zeros(2, 11).double()}, TypeError, "float64"),
        ({"spikes": torch.zeros(2, 10)}, ValueError, "10 features, the weight expects 11"),
        ({"spikes": torch.zeros(2, 3).byte()}, ValueError, "3 bytes of spikes.* expects 2"),
        ({"spikes": torch.full((2, 2), 8).byte()}, ValueError, "bit set past its last feature, 10"),
        ({"weight_kn": WEIGHT[0]}, ValueError, r"weight_kn \[4\]"),
        ({"weight_kn": WEIGHT.int()}, TypeError, "int32"),
        ({"bias": torch.zeros(5)}, ValueError, r"shape \[5\], expected \[4\]"),
        ({"bias": torch.zeros(4).half()}, TypeError, "bias is torch.float16"),
    ],
)
def test_mistakes(change: dict[str, Any], error: type[Exception], text: str) -> None:
    given: dict[str, Tensor] = {"spikes": torch.zeros(2, 2).byte(), "weight_kn": WEIGHT}
    with pytest.raises(error, match=text):
        spike_linear(**(given | change))
