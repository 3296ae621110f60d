"""Activations that make zeros: thresholds, initialisation, squared ReLUs as the 2:4 operand."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, SumOracle
from gossamer import relu2_24_linear
from gossamer.nn import ClippedShiftedReLU, ClippedSoftThreshold, edge_of_chaos, edge_of_chaos_
from gossamer.prune import magnitude_24
from torch import Tensor, nn


@pytest.mark.parametrize(
    ("sparsity", "relu", "soft"), [(0.7, 0.524, 1.036), (0.85, 1.036, 1.440), (0.9, 1.282, 1.645)]
)
def test_threshold_of_a_sparsity(sparsity: float, relu: float, soft: float) -> None:
    x = torch.randn(100_000) * 1.5
    for kind, tau in ((ClippedShiftedReLU, relu), (ClippedSoftThreshold, soft)):
        assert round(kind.for_sparsity(sparsity, 1.0).tau, 3) == tau
        activation = kind.for_sparsity(sparsity, 1.0, q=2.25)
        assert abs(float((activation(x) == 0).float().mean()) - sparsity) < 0.01


def test_formulas() -> None:
    x = torch.tensor([-9.0, -2.0, -1.0, 0.5, 1.0, 1.5, 2.5, 9.0, math.inf, -math.inf, math.nan])
    got = ClippedShiftedReLU(1.0, 2.0)(x)
    assert got.tolist()[:-1] == [0, 0, 0, 0, 0, 0.5, 1.5, 2, 2, 0]
    soft = ClippedSoftThreshold(1.0, 2.0)(x)
    assert soft.tolist()[:-1] == [-2, -1, 0, 0, 0, 0.5, 1.5, 2, 2, -2]
    assert got[-1].isnan()
    assert soft[-1].isnan()
    assert ClippedSoftThreshold(0.5)(x)[-4] == 8.5
    x = torch.tensor([0.9, 1.1, 3.5, -1.5], requires_grad=True)
    for kind, slopes in ((ClippedShiftedReLU, [0, 1, 0, 0]), (ClippedSoftThreshold, [0, 1, 0, 1])):
        (grad,) = torch.autograd.grad(kind(1.0, 2.0)(x).sum(), x)
        assert grad.tolist() == slopes
    assert "tau=1, m=2" in repr(ClippedShiftedReLU(1.0, 2.0))


@pytest.mark.parametrize(
    ("sparsity", "m", "weight", "bias", "slope"),
    [(0.7, 1.0, 4.232, 0.478, 0.47), (0.85, 1.2, 7.281, 0.591, 0.72)],
)
def test_edge_of_chaos(sparsity: float, m: float, weight: float, bias: float, slope: float) -> None:
    found = edge_of_chaos(ClippedShiftedReLU.for_sparsity(sparsity, m))
    assert found.weight == pytest.approx(weight, abs=1e-3)
    assert found.bias == pytest.approx(bias, abs=1e-3)
    assert found.slope == pytest.approx(slope, abs=1e-2)


def test_without_clipping_stability_is_marginal() -> None:
    assert edge_of_chaos(ClippedShiftedReLU(0.524)).slope == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("kind", [ClippedShiftedReLU, ClippedSoftThreshold])
@pytest.mark.parametrize(("m", "q"), [(math.inf, 1.0), (0.8, 1.0), (1.5, 2.5)])
def test_moments_are_the_integrals(kind: type[ClippedShiftedReLU], m: float, q: float) -> None:
    activation = kind.for_sparsity(0.8, m, q)

    def square(q: float) -> float:
        z = torch.linspace(-12, 12, 400_001, dtype=torch.float64)
        density = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
        return float((activation(math.sqrt(q) * z) ** 2 * density).sum() * (z[1] - z[0]))

    gain, mean_square, slope = activation.moments(q)
    assert mean_square == pytest.approx(square(q), rel=1e-7)
    assert slope == pytest.approx((square(q + 1e-4) - square(q - 1e-4)) / 2e-4, rel=1e-4)
    high = ((activation.tau + m) / math.sqrt(q)) if math.isfinite(m) else 40.0
    outside = torch.special.ndtr(torch.tensor([activation.tau / math.sqrt(q), high]).double())
    assert gain == pytest.approx(activation.sides * float(outside[1] - outside[0]), rel=1e-6)


def test_depth_keeps_variance_and_sparsity() -> None:
    activation = ClippedShiftedReLU.for_sparsity(0.85, 1.2)
    model = nn.Sequential(*(nn.Linear(600, 600) for _ in range(30)))
    edge_of_chaos_(model, activation)
    x = torch.randn(20, 600)  # as if they were pre-activations
    with torch.no_grad():
        for layer in model:
            x = layer(activation(x))
    assert 0.7 < float(x.var()) < 1.3
    assert 0.8 < float((activation(x) == 0).float().mean()) < 0.9
    conv = nn.Conv2d(8, 64, 3, bias=False)
    found = edge_of_chaos_(conv, activation)
    assert float(conv.weight.detach().var()) == pytest.approx(found.weight / 72, rel=0.1)


def test_activation_mistakes() -> None:
    for sparsity in (0.0, 1.0, -1.0):
        with pytest.raises(ValueError, match=f"sparsity is {sparsity}"):
            ClippedShiftedReLU.for_sparsity(sparsity)
    with pytest.raises(ValueError, match="tau is -1"):
        ClippedSoftThreshold(-1)
    with pytest.raises(ValueError, match="m is 0"):
        ClippedShiftedReLU(1, 0)
    with pytest.raises(ValueError, match="q is 0"):
        edge_of_chaos(ClippedShiftedReLU(1), 0)
    with pytest.raises(TypeError, match="ReLU"):
        edge_of_chaos(nn.ReLU())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a larger tau or a smaller m"):
        edge_of_chaos(ClippedShiftedReLU(-3.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "n", "k"), [(1, 1, 1), (7, 5, 6), (33, 70, 131), (0, 4, 8)])
def test_squared_relu_is_the_sparse_operand(
    target: str, tokens: int, n: int, k: int, dtype: torch.dtype
) -> None:
    x, weight = (torch.randn(tokens, k) - 0.5).to(dtype), torch.randn(n, k).to(dtype)
    bias = torch.randn(n).to(dtype) if k % 2 else None
    y, dropped = relu2_24_linear(x, weight, bias, return_dropped=True)
    activations = x.relu().square()
    kept = magnitude_24(activations)
    assert int(dropped) == int((activations != 0).sum() - (kept != 0).sum())
    added = 0.0 if bias is None else bias.double()
    wanted = kept.double() @ weight.double().t()
    size = kept.double() @ weight.double().abs().t()
    # The bias meets a sum that is rounded already.
    rounding = torch.finfo(dtype).eps * wanted.abs() if bias is not None else 0.0
    oracle = SumOracle(wanted + added, size, k, dtype)
    oracle.limit = oracle.limit + rounding
    oracle.check(y)


@pytest.mark.cuda
def test_squared_relu_on_cuda() -> None:
    x, weight = (
        torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in ((70, 132), (48, 132))
    )
    y, dropped = relu2_24_linear(x.requires_grad_(), weight, return_dropped=True)
    kept = magnitude_24(x.relu().square())
    SumOracle(
        kept.double() @ weight.double().t(), kept.double() @ weight.double().abs().t(), 132, x.dtype
    ).check(y)
    assert int(dropped) == int(x.relu().count_nonzero() - kept.count_nonzero())
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx != 0, kept != 0)


def test_squared_relu_is_where_its_operands_are_and_traced() -> None:
    x, weight = torch.randn(9, 16), torch.randn(6, 16)
    wanted = relu2_24_linear(x, weight)
    with torch.device("meta"):
        assert torch.equal(relu2_24_linear(x, weight), wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sizes that become constants
        traced = torch.jit.trace(lambda x: relu2_24_linear(x, weight), (x,))
    assert torch.equal(traced(2 * x), relu2_24_linear(2 * x, weight))
    with pytest.raises(TypeError, match=r"relu2_24_linear: weight is torch\.int32"):
        relu2_24_linear(x.int(), weight.int())


def test_squared_relu_gradients_and_shapes() -> None:
    x, weight = torch.randn(2, 3, 12), torch.randn(5, 12)
    bias = torch.randn(5)
    operands = [t.requires_grad_() for t in (x, weight, bias)]

    def dense(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(magnitude_24(x.relu().square()), weight, bias)

    y, wanted = relu2_24_linear(*operands), dense(*operands)
    torch.testing.assert_close(y, wanted)
    dy = torch.randn_like(wanted)
    torch.testing.assert_close(
        torch.autograd.grad(y, operands, dy), torch.autograd.grad(wanted, operands, dy)
    )
    torch._dynamo.reset()
    compiled = torch.compile(relu2_24_linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*operands), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        assert relu2_24_linear(*operands).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="12 features, the weight expects 11"):
        relu2_24_linear(x, weight[:, :11])
    with pytest.raises(TypeError, match="float16"):
        relu2_24_linear(x.half(), weight)
    with pytest.raises(ValueError, match=r"shape \[4\], expected \[5\]"):
        relu2_24_linear(x, weight, bias[:4])
