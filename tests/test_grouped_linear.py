"""Grouped linear layers: every kernel against plain torch, the borders of groups, mistakes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import DTYPES
from gossamer import _C, grouped_linear
from gossamer.nn import GroupedLinear
from gossamer.ops import grouped_cuda
from gossamer.ops.grouped import _native_cuda
from grouped_cases import CASES, GroupedCase, GroupedOracle
from torch import Tensor, nn

TYPICAL = GroupedCase((4, 0, 9, 1), 37, 50)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_a_loop_of_dense_layers(target: str, case: GroupedCase, dtype: torch.dtype) -> None:
    x, weights, bias = case.operands(dtype)
    index = torch.int32 if case.n % 2 else torch.int64
    offsets = case.offsets.to(index)
    given = bias if case.k % 2 else None
    activation = (None, "relu", "gelu", "silu")[(case.n + case.k) % 4]
    y = grouped_linear(x, weights, offsets, given, activation)
    GroupedOracle(x, weights, offsets, given, activation).check(y)


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "silu"])
def test_bias_and_activation(target: str, activation: str | None) -> None:
    for dtype in DTYPES:
        x, weights, bias = TYPICAL.operands(dtype)
        operands = (x, weights, TYPICAL.offsets, bias, activation)
        GroupedOracle(*operands).check(grouped_linear(*operands))


def test_float64(serial_target: str) -> None:
    operands = (*TYPICAL.operands(torch.float64)[:2], TYPICAL.offsets)
    GroupedOracle(*operands).check(grouped_linear(*operands))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES[4:], ids=str)
def test_same_bits_for_any_threads_and_neighbours(
    cpu_target: str, threads: int, case: GroupedCase, dtype: torch.dtype
) -> None:
    """A token's result depends on nothing but the token."""
    x, weights, bias = case.operands(dtype)
    y = grouped_linear(x, weights, case.offsets, bias, "silu")
    for team in (1, 3, 7):
        torch.set_num_threads(team)
        assert torch.equal(grouped_linear(x, weights, case.offsets, bias, "silu"), y)
    # A third of the tokens, in other company and at other places.
    expert = torch.repeat_interleave(torch.arange(len(case.counts)), torch.tensor(case.counts))
    kept = torch.arange(1, len(x), 3)
    fewer = torch.bincount(expert[kept], minlength=len(case.counts)).cumsum(0)
    assert torch.equal(grouped_linear(x[kept], weights, fewer, bias, "silu"), y[kept])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_stays_where_it_is(target: str, bad: float, dtype: torch.dtype) -> None:
    x, weights, bias = TYPICAL.operands(dtype)
    clean = grouped_linear(x, weights, TYPICAL.offsets, bias)
    spoiled = x.clone()
    spoiled[6, -1] = bad
    y = grouped_linear(spoiled, weights, TYPICAL.offsets, bias)
    others = torch.arange(len(x)) != 6
    assert torch.equal(y[others], clean[others])
    assert not y[6].isfinite().any()
    # Of the weights: the row after a tail, and an expert without tokens.
    spoiled = weights.clone()
    spoiled[0, 1, 0] = spoiled[2, -1, -1] = bad
    spoiled[1] = bad
    y = grouped_linear(x, spoiled, TYPICAL.offsets, bias)
    GroupedOracle(x, spoiled, TYPICAL.offsets, bias).check(y)


def test_any_strides(target: str) -> None:
    for dtype in DTYPES:
        x, weights, bias = TYPICAL.operands(dtype)
        offsets = TYPICAL.offsets
        y = grouped_linear(x, weights, offsets, bias)
        wide = torch.empty(len(x), 2 * x.shape[1], dtype=dtype).fill_(float("nan"))
        wide[:, 3 : 3 + x.shape[1]] = x
        strided = (
            (wide[:, 3 : 3 + x.shape[1]], weights),
            (x.t().contiguous().t(), weights.mT.contiguous().mT),
        )
        for each_x, each_weights in strided:
            twice = offsets.repeat_interleave(2)[::2]
            columns = bias.t().contiguous().t()
            assert torch.equal(grouped_linear(each_x, each_weights, twice, columns), y)
        row = x[:1].expand(len(x), -1)
        GroupedOracle(row, weights, offsets).check(grouped_linear(row, weights, offsets))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES[:5], ids=str)
def test_loop_that_a_gpu_without_kernels_runs(
    monkeypatch: pytest.MonkeyPatch, case: GroupedCase, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(grouped_cuda, "has_kernels", lambda device: False)
    x, weights, bias = case.operands(dtype)
    operands = (x, weights, case.offsets, bias)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
        y = _native_cuda(*operands, "gelu")
    GroupedOracle(*operands, "gelu").check(y)
    with pytest.raises(ValueError, match="the last of the offsets"):
        _native_cuda(x[:0].new_ones(len(x) + 1, case.k), weights, case.offsets, bias, "none")


X, WEIGHTS = torch.randn(5, 8), torch.randn(3, 4, 8)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"offsets": torch.tensor([3, 2, 5])}, ValueError, r"offsets\[1\] is 2, below .* 3"),
        ({"offsets": torch.tensor([-1, 2, 5])}, ValueError, r"offsets\[0\] is -1, below 0"),
        ({"offsets": torch.tensor([1, 2, 4])}, ValueError, "last of the offsets is 4.*5 tokens"),
        ({"offsets": torch.tensor([1, 9, 5])}, ValueError, r"offsets\[1\] is 9.*5 tokens"),
        ({"offsets": torch.tensor([0, 1, 2, 5])}, ValueError, r"shape \[4\], expected \[3\]"),
        ({"offsets": torch.tensor([1.0, 2, 5])}, TypeError, "float32, expected int32 or int64"),
        ({"offsets": torch.tensor([[1, 2, 5]])}, ValueError, r"shape \[1, 3\]"),
        ({"offsets": [1, 2, 5]}, TypeError, "offsets are list, expected a torch.Tensor"),
        ({"x": X[:, :7]}, ValueError, "7 features, the weights expect 8"),
        ({"x": X[0]}, ValueError, r"shape \[8\]"),
        ({"x": X.double()}, TypeError, "float64, the weight torch.float32"),
        ({"weights": WEIGHTS[0]}, ValueError, r"weights \[4, 8\]"),
        ({"weights": WEIGHTS.int(), "x": X.int()}, TypeError, "x is int32"),
        ({"weights": WEIGHTS[:, :0]}, ValueError, r"\[3, 0, 8\]"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias has shape \[4\], expected \[3, 4\]"),
        ({"bias": torch.zeros(3, 4).half()}, TypeError, "bias is torch.float16"),
        ({"activation": "tanh"}, ValueError, "tanh"),
        ({"offsets": torch.empty(3, dtype=torch.int64, device="meta")}, ValueError, "meta"),
    ],
)
@pytest.mark.parametrize("gradient", [False, True])
def test_mistakes(change: dict[str, Any], error: type, text: str, gradient: bool) -> None:
    given = {"x": X, "weights": WEIGHTS, "offsets": torch.tensor([1, 2, 5])} | change
    if gradient and given["weights"].is_floating_point():
        given["weights"] = given["weights"].clone().requires_grad_()
    with pytest.raises((error, NotImplementedError) if text == "meta" else error, match=text):
        grouped_linear(**given)


def test_targets_say_what_runs(cpu_target: str) -> None:
    below = _C.targets_built()[: _C.targets_built().index(_C.target()) + 1]
    for dtype in ("float32", "bfloat16", "float16", "float64"):
        chosen = _C.grouped_choose(dtype)
        assert chosen["target"] in below
        assert (chosen["kernel"] == "serial") == (_C.target() == "serial" or dtype == "float64")
    if _C.target() == "amx_bf16":
        assert _C.grouped_choose("bfloat16")["kernel"] == "tiles"
    with pytest.raises(TypeError, match="int8"):
        _C.grouped_choose("int8")


def linears(bias: bool = True, **rest: Any) -> list[nn.Linear]:
    return [nn.Linear(8, 4, bias, **rest) for _ in range(3)]


@pytest.mark.parametrize("bias", [False, True])
def test_layer_is_the_dense_layers(bias: bool) -> None:
    dense = linears(bias)
    layer = GroupedLinear.from_linears(dense)
    y = layer(X, torch.tensor([2, 2, 5]))
    torch.testing.assert_close(y, torch.cat([dense[0](X[:2]), dense[2](X[2:])]))
    for got, want in zip(layer.to_linears(), dense, strict=True):
        assert repr(got) == repr(want)
        for name, value in want.state_dict().items():
            assert torch.equal(got.state_dict()[name], value)
    twin = GroupedLinear(3, 8, 4, bias)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(X, torch.tensor([2, 2, 5])), y)
    assert "num_experts=3, in_features=8, out_features=4" in repr(layer)
    assert all(p.requires_grad for p in layer.parameters())
    fresh = GroupedLinear(3, 8, 4).weight.detach()
    assert 0.3 < float(fresh.abs().max()) <= 8**-0.5


def test_layer_mistakes() -> None:
    with pytest.raises(ValueError, match="num_experts 0"):
        GroupedLinear(0, 8, 4)
    with pytest.raises(ValueError, match="at least one"):
        GroupedLinear.from_linears([])
    with pytest.raises(TypeError, match="ReLU"):
        GroupedLinear.from_linears([nn.ReLU()])  # type: ignore[list-item]
    for other in (nn.Linear(8, 5), nn.Linear(8, 4, False), nn.Linear(8, 4).bfloat16()):
        with pytest.raises(ValueError, match="layer 3"):
            GroupedLinear.from_linears([*linears(), other])


def moe(x: Tensor, expert: Tensor, weights: Tensor) -> Tensor:
    order = expert.argsort(stable=True)
    offsets = torch.bincount(expert, minlength=len(weights)).cumsum(0)
    return torch.empty(len(x), weights.shape[1]).index_copy(
        0, order, grouped_linear(x[order], weights, offsets)
    )


def test_routing_as_in_the_example() -> None:
    expert = torch.tensor([2, 0, 2, 2, 0])
    each = torch.einsum("tk,tnk->tn", X, WEIGHTS[expert])
    torch.testing.assert_close(moe(X, expert, WEIGHTS), each)
