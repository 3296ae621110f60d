"""Layers that skip zero activations, thresholds for them, and models converted to them."""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Callable
from typing import Any

import gossamer
import pytest
import torch
import torch.nn.functional as F
from convert_models import MLP, fix_speedup, small_mlp, small_sample
from gossamer.nn import ActSparseLinear, SparseMLP
from torch import Tensor, nn


def linear(bias: bool = True) -> nn.Linear:
    return nn.Linear(24, 17, bias)


@pytest.mark.parametrize("bias", [False, True])
def test_layer_is_the_dense_layer(bias: bool) -> None:
    dense, x = linear(bias), torch.randn(2, 3, 24).relu().requires_grad_()
    dense.weight.requires_grad_(False)
    layer = ActSparseLinear.from_dense(dense)
    assert layer.weight_kn.is_contiguous()
    assert not layer.weight_kn.requires_grad
    dense.requires_grad_()
    layer.requires_grad_()
    assert layer.bias is dense.bias
    y, want = layer(x), dense(x)
    torch.testing.assert_close(y, want)
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, (x, layer.weight_kn), dy)
    dx, dweight = torch.autograd.grad(want, (x, dense.weight), dy)
    torch.testing.assert_close(got, (dx, dweight.t()))
    for name, value in layer.to_dense().state_dict().items():
        assert torch.equal(value, dense.state_dict()[name])
    assert "in_features=24, out_features=17" in repr(layer)


def test_threshold_counts_small_inputs_as_zero() -> None:
    dense, x = linear(), torch.randn(5, 24)
    layer = ActSparseLinear.from_dense(dense, threshold=0.5)
    torch.testing.assert_close(layer(x), dense(torch.where(x.abs() <= 0.5, 0, x)))
    assert "threshold=0.5" in repr(layer)


def test_state_travels() -> None:
    layer, x = ActSparseLinear.from_dense(linear(), threshold=0.25), torch.randn(3, 24)
    y = layer(x)
    state = layer.state_dict()
    assert all(isinstance(t, Tensor) and t.is_contiguous() for t in state.values())
    fresh = ActSparseLinear(24, 17)
    fresh.load_state_dict(state)
    for twin in (fresh, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.threshold == 0.25
        assert torch.equal(twin(x), y)
    double = copy.deepcopy(layer).to(torch.float64)
    assert (double.weight_kn.dtype, double.threshold) == (torch.float64, 0.25)
    # As part of a model, of which the checkpoint has dense layers.
    dense = nn.Sequential(linear())
    model = nn.Sequential(ActSparseLinear(24, 17, threshold=0.125))
    checkpoint = dense.state_dict()
    model.load_state_dict(checkpoint)
    assert "0.weight" in checkpoint
    assert model[0].threshold == 0.125
    assert torch.equal(model[0].weight, dense[0].weight)
    bound = 24**-0.5
    assert 0.5 * bound < float(ActSparseLinear(24, 17).weight.detach().abs().max()) <= bound


@pytest.mark.parametrize("activation", ["relu", "relu2", "silu", "gelu", nn.Tanh()])
@pytest.mark.parametrize("gated", [False, True])
def test_mlp_is_the_dense_block(activation: Any, gated: bool) -> None:
    up, gate, down = nn.Linear(12, 40), nn.Linear(12, 40, False), nn.Linear(40, 9)
    act = {"relu": F.relu, "relu2": lambda h: F.relu(h).square(), "silu": F.silu, "gelu": F.gelu}
    function = act.get(activation, activation) if isinstance(activation, str) else activation
    block = SparseMLP(up, down, gate if gated else None, activation)
    x = torch.randn(2, 3, 12, requires_grad=True)
    want = down(function(gate(x)) * up(x) if gated else function(up(x)))
    y = block(x)
    torch.testing.assert_close(y, want)
    dy, parameters = torch.randn_like(y), [up.weight, up.bias, *([gate.weight] if gated else [])]
    got = torch.autograd.grad(y, (x, *parameters), dy)
    torch.testing.assert_close(got, torch.autograd.grad(want, (x, *parameters), dy))
    block.down.threshold = 0.3
    h = function((gate if gated else up)(x))
    h = torch.where(h.abs() <= 0.3, 0, h)
    torch.testing.assert_close(block(x), down(h * up(x) if gated else h))
    assert "activation=" in repr(block)


def test_mlp_computes_only_what_the_gate_lets_through() -> None:
    up, gate, down = nn.Linear(12, 40), nn.Linear(12, 40), nn.Linear(40, 9)
    block, x = SparseMLP(up, down, gate), torch.randn(1, 12)
    y = block(x)
    closed = gate(x)[0] <= 0
    assert 0 < int(closed.sum()) < 40
    with torch.no_grad():  # what is not read may be anything
        up.weight[closed] = float("nan")
        block.down.weight_kn[closed] = float("nan")
    assert torch.equal(block(x), y)


def test_layer_mistakes() -> None:
    up, down = nn.Linear(12, 40), nn.Linear(40, 9)
    for threshold in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"threshold is {threshold}"):
            ActSparseLinear(4, 4, threshold=threshold)
    with pytest.raises(TypeError, match="ReLU"):
        ActSparseLinear.from_dense(nn.ReLU())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="gate is Conv1d"):
        SparseMLP(up, down, nn.Conv1d(1, 1, 1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="up has 9 outputs, down 12 inputs"):
        SparseMLP(down, up)
    with pytest.raises(ValueError, match="gate maps 40 features to 9"):
        SparseMLP(up, down, down)
    with pytest.raises(ValueError, match="'tanh', expected one of relu"):
        SparseMLP(up, down, activation="tanh")
    with pytest.raises(TypeError, match="activation is NoneType"):
        SparseMLP(up, down, activation=None)  # type: ignore[arg-type]


def test_convert_swaps_what_is_measured_to_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_mlp()
    want = model(small_sample())
    fix_speedup(monkeypatch, 1.04)
    report = gossamer.convert(model, "activation", sample_input=small_sample())
    assert not report.swapped
    assert "measured 1.04x, below 1.05x; 100% of its inputs active" in report["up"].reason
    fix_speedup(monkeypatch, 1.5)
    bias = model.up.bias
    report = gossamer.convert(model, "activation", include="down", sample_input=small_sample())
    assert isinstance(model.down, ActSparseLinear)
    assert report["up"].reason == "not included"
    assert report["down"].kernel.endswith("/rows")
    share = int(report["down"].reason.split("; ")[1].partition("%")[0])
    assert 30 < share < 70
    gossamer.convert(model, "activation", sample_input=small_sample())
    assert model.up.bias is bias
    torch.testing.assert_close(model(small_sample()), want)
    again = gossamer.convert(model, "activation", sample_input=small_sample())
    assert all(layer.reason == "already a ActSparseLinear" for layer in again)
    json.dumps(report.rows())
    # Nobody knows what is zero without a sample; a convolution has no such kernel.
    assert "zeros that nobody" in gossamer.convert(small_mlp(), "activation")["down"].reason
    conv = nn.Sequential(nn.Conv1d(3, 3, 1))
    assert "linear layers only" in gossamer.convert(conv, "activation", force=True)["0"].reason


def test_convert_mistakes() -> None:
    for change, text in (
        ({"prune": "magnitude"}, "prunes no weight, got prune 'magnitude'"),
        ({"density": 0.5}, "density 0.5"),
        ({"thresholds": -1.0}, "threshold -1.0"),
        ({"thresholds": {"up": float("nan")}}, "threshold nan of 'up'"),
        ({"thresholds": {"upp": 0.5}}, "'upp', no such module"),
        ({"pattern": "2:4", "thresholds": 0.5}, "thresholds are for pattern 'activation'"),
    ):
        with pytest.raises(ValueError, match=text):
            gossamer.convert(small_mlp(), **{"pattern": "activation", **change})  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["uniform", "greedy"])
def test_calibrated_thresholds_skip_what_was_asked(method: str) -> None:
    model = small_mlp().train()
    batches = [small_sample(), (small_sample(),), {"x": 2 * small_sample()}]
    before = copy.deepcopy(model.state_dict())
    report = gossamer.calibrate_thresholds(model, batches, 0.6, method)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [layer.name for layer in report] == ["up", "down"]
    assert report.sparsity == pytest.approx(0.6, abs=0.03)
    if method == "uniform":
        assert all(layer.sparsity == pytest.approx(0.6, abs=0.01) for layer in report)
    assert all(0 <= layer.error < 1 for layer in report)
    assert "of all weights skipped" in str(report)
    json.dumps(report.rows())
    gossamer.convert(
        model, "activation", sample_input=small_sample(), force=True, thresholds=report.thresholds
    )
    assert model.up.threshold == report.thresholds["up"] > 0
    again = gossamer.calibrate_thresholds(model, batches, 0.6, method)
    assert again.thresholds.keys() == report.thresholds.keys()


def test_greedy_costs_less_than_uniform() -> None:
    """Of two layers alike, one has inputs of which most hardly matter."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 32), nn.Linear(64, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x.pow(5))

    torch.manual_seed(0)
    model, batches = Two(), [torch.randn(32, 64) for _ in range(4)]
    uniform, greedy = (
        gossamer.calibrate_thresholds(model, batches, 0.5, m) for m in ("uniform", "greedy")
    )
    # What greedy steps cost in all: squared errors, which each step counts.
    assert sum(r.error**2 for r in greedy) < sum(r.error**2 for r in uniform)
    assert greedy.sparsity == pytest.approx(0.5, abs=0.02)
    assert greedy.layers[1].sparsity > greedy.layers[0].sparsity


@pytest.mark.parametrize("wanted", [0.5, 0.8, 0.99])
def test_greedy_reaches_the_share_and_no_more(wanted: float) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x * (x.abs() > 2.6)), self.b(x)  # 99 % zeros, and none

    torch.manual_seed(0)
    report = gossamer.calibrate_thresholds(Two(), [torch.randn(2000, 64)], wanted, "greedy")
    assert report.sparsity == pytest.approx(wanted, abs=0.002)
    assert report.layers[0].threshold == 0


def test_zeros_of_the_model_need_no_threshold() -> None:
    model = MLP().eval()
    report = gossamer.calibrate_thresholds(model, [small_sample()], 0.2)
    assert report.layers[1].threshold == 0
    assert report.layers[1].sparsity > 0.3
    assert report.layers[1].error == 0


def test_calibration_draws_from_many_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gossamer.calibrate._MAGNITUDES", 2000)
    model = nn.Sequential(nn.Linear(64, 8))
    report = gossamer.calibrate_thresholds(model, [torch.randn(50, 64) for _ in range(9)], 0.5)
    assert report.layers[0].threshold == pytest.approx(0.674, abs=0.08)  # the normal quartile


def test_calibration_mistakes() -> None:
    with pytest.raises(ValueError, match=r"sparsity is 1\.0"):
        gossamer.calibrate_thresholds(small_mlp(), [], 1.0)
    with pytest.raises(ValueError, match="'best', expected 'uniform' or 'greedy'"):
        gossamer.calibrate_thresholds(small_mlp(), [], 0.5, "best")
    with pytest.raises(ValueError, match="no linear layer was reached"):
        gossamer.calibrate_thresholds(small_mlp(), [], 0.5)
    with pytest.raises(TypeError, match=r"a batch is a tensor.*got str"):
        gossamer.calibrate_thresholds(small_mlp(), ["text"], 0.5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: gossamer.nn.ActSparseLinear(6, 5, threshold=0.1),
        lambda: gossamer.nn.DeltaLinear(6, 5),
        lambda: gossamer.nn.DeltaConv2d(6, 5, 3),
        lambda: gossamer.nn.PositionMaskedConv2d(6, 5, 3),
        lambda: gossamer.nn.TopKAutoencoder(6, 20, 4),
    ],
    ids=["ActSparseLinear", "DeltaLinear", "DeltaConv2d", "PositionMaskedConv2d", "Autoencoder"],
)
def test_a_load_that_fails_leaves_the_layer_as_it_was(make: Callable[[], nn.Module]) -> None:
    layer = make()
    if isinstance(layer, gossamer.nn.PositionMaskedConv2d):
        layer.set_mask(torch.rand(4, 4) < 0.5)
    before = {key: t.clone() for key, t in layer.state_dict().items()}
    good = {key: t ^ True if t.dtype == torch.bool else t + 1 for key, t in before.items()}
    bad = {"words": "words", "numbers": [1.0], "complex": torch.zeros(5, dtype=torch.complex64)}
    for key, held in before.items():
        wrong = {**bad, "shape": held.new_zeros((1, 2, 3)), "integers": held.to(torch.int8)}
        for given in wrong.values():
            for assign in (False, True):
                with pytest.raises(RuntimeError, match=key):
                    layer.load_state_dict({**good, key: given}, assign=assign)
        for number in (float("nan"), -1.0):
            if key == "_extra_state":
                with pytest.raises(RuntimeError, match="threshold"):
                    layer.load_state_dict({**good, key: torch.tensor(number)})
        if key != "mask":
            with pytest.raises(RuntimeError, match=key):
                layer.load_state_dict({k: t for k, t in good.items() if k != key})
    assert all(torch.equal(t, before[key]) for key, t in layer.state_dict().items())
    layer.load_state_dict(good)
    assert all(torch.equal(t, good[key]) for key, t in layer.state_dict().items())


def test_a_threshold_of_minus_zero_is_zero() -> None:
    layer = ActSparseLinear(4, 4, threshold=-0.0)
    assert math.copysign(1, layer.threshold) == 1
    state = {**layer.state_dict(), "_extra_state": torch.tensor(-0.0, dtype=torch.float64)}
    layer.load_state_dict(state)
    assert math.copysign(1, layer.threshold) == 1
