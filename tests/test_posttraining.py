"""Pruning after training: each method against plain torch, and against the simpler ones."""

from __future__ import annotations

import gc
import math

import pytest
import torch
import torch.distributed as dist
from gossamer import Block, sparsify
from gossamer.nn import SparseLinear
from gossamer.prune import magnitude_24
from gossamer.sparsify import (
    NM,
    ConstantFanIn,
    Pattern,
    Unstructured,
    channel_permutation,
    prune_after_training,
)
from gossamer.sparsify.layers import Layer
from gossamer.sparsify.obs import sparsegpt_weight
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

PATTERNS = [NM(2, 4), Unstructured(), ConstantFanIn(), Block(4, 4)]


@pytest.fixture(autouse=True)
def _one_thread(threads: int) -> None:
    torch.set_num_threads(1)  # the products are too small for more


def inputs(rows: int, columns: int) -> Tensor:
    """Correlated, of unlike sizes, and one that is always zero."""
    mix = torch.randn(columns, columns) / columns**0.5 + torch.eye(columns)
    x = torch.randn(rows, columns) @ mix * torch.logspace(-1, 1, columns)
    x[:, 3] = 0
    return x


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16))


def plain_sparsegpt(weight: Tensor, hessian: Tensor, damping: float) -> Tensor:
    """2:4, column by column, the inverse updated by elimination and no blocks."""
    w, h = weight.double().clone(), hessian.double().clone()
    h += torch.diag(damping * h.diagonal().mean() + (h.diagonal() == 0))
    w[:, hessian.diagonal() == 0] = 0
    inverse = h.inverse()
    for j in range(w.shape[1]):
        if j % 4 == 0:
            later, scales = inverse.clone(), []
            for k in range(j, j + 4):  # the diagonal that each column will meet
                scales.append(later[k, k].clone())
                later = later - torch.outer(later[:, k], later[k]) / later[k, k]
            worth = w[:, j : j + 4].square() / torch.stack(scales)
            mask = torch.zeros_like(worth, dtype=torch.bool)
            mask.scatter_(1, worth.argsort(dim=1, descending=True, stable=True)[:, :2], True)
        value = w[:, j] * mask[:, j % 4]
        error = (w[:, j] - value) / inverse[j, j]
        w = w - torch.outer(error, inverse[j])
        w[:, j] = value
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return w


@pytest.mark.parametrize("block", [4, 10, 128])
def test_sparsegpt_is_the_elimination_of_one_column_after_the_other(block: int) -> None:
    x, linear = inputs(200, 24), nn.Linear(24, 6)
    hessian = x.t() @ x / len(x)
    layer = Layer("", linear, NM(2, 4))
    weight, mask = sparsegpt_weight(linear.weight, hessian.double(), layer, 0.5, block=block)
    expected = plain_sparsegpt(linear.weight.detach(), hessian, 0.01)
    torch.testing.assert_close(weight.double(), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(weight != 0, mask & (hessian.diagonal() != 0))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_each_method_is_exact_and_the_better_ones_are_better(pattern: Pattern | Block) -> None:
    torch.manual_seed(3)
    model, x = net(), inputs(512, 24)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    expected, errors = model(x), {}
    batches = list(x.split(100))
    for method in ("magnitude", "wanda", "sparsegpt", "nettrim"):
        model.load_state_dict(state)
        made = prune_after_training(model, batches, pattern, method, sparsity=0.5, progress=False)
        errors[method] = (model(x) - expected).square().mean().item()
        for layer in made.layers:
            assert layer.sparsity == 0.5, (method, layer.name)
            assert (layer.weight[~layer.mask] == 0).all()
        if method == "wanda" and pattern == NM(2, 4):
            norms = x.square().sum(0).sqrt()
            kept = magnitude_24(state["0.weight"] * norms) != 0
            assert torch.equal(made.masks["0"] & (norms > 0), kept)
    assert errors["wanda"] < errors["magnitude"]
    assert errors["sparsegpt"] < errors["wanda"]
    assert errors["nettrim"] < errors["magnitude"]


def test_layers_are_calibrated_behind_pruned_ones_and_run_on_the_kernels() -> None:
    model = net()
    x = inputs(64, 24)
    made = prune_after_training(model, [{"input": x}], method="wanda", progress=False)
    hidden = torch.relu(model[0](x))
    fresh = sparsify.posttraining.input_products(model, made.layers[1], [(x,)])
    torch.testing.assert_close(fresh, (hidden.t() @ hidden / 64).double(), rtol=1e-4, atol=1e-5)
    before = model.eval()(x)
    assert "50.00%" in str(made.report())
    assert all(row.swapped for row in made.finalize(force=True))
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)


def test_a_convolution_is_pruned_by_what_it_sees() -> None:
    conv = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, stride=2))
    x = torch.randn(2, 4, 9, 9)
    expected = conv(x)
    state = {k: v.clone() for k, v in conv.state_dict().items()}
    errors = []
    for method in ("magnitude", "sparsegpt"):
        conv.load_state_dict(state)
        prune_after_training(conv, [x], Unstructured(), method, 0.6, progress=False)
        errors.append((conv(x) - expected).square().mean().item())
    assert errors[1] < errors[0]


def test_a_permutation_keeps_more() -> None:
    weight = torch.randn(16, 32) * torch.logspace(0, 2, 32)
    order = channel_permutation(weight)
    assert torch.equal(order.sort().values, torch.arange(32))
    before, after = magnitude_24(weight).abs().sum(), magnitude_24(weight[:, order]).abs().sum()
    assert float(after) > 1.2 * float(before)
    with pytest.raises(ValueError, match="multiple of 4"):
        channel_permutation(torch.randn(4, 6))


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "nettrim"])
@pytest.mark.parametrize("value", [math.nan, 1e30])
def test_inputs_that_say_nothing_prune_nothing(method: str, value: float) -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    weight = model[0].weight.detach().clone()
    x = torch.ones(5, 8)
    x[3, 2] = value
    with pytest.raises(ValueError, match="0: its inputs, or their squares, are not finite"):
        prune_after_training(model, [x], "2:4", method, progress=False)
    assert torch.equal(model[0].weight, weight)


def test_a_distributed_model_goes_to_the_kernels_too() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        inner = net()
        model = DistributedDataParallel(inner)
        pruned = prune_after_training(model, method="magnitude", progress=False)
        report = pruned.finalize(force=True)
        assert [layer.swapped for layer in report.layers] == [True, True]
        assert isinstance(inner[0], SparseLinear)
        # Before the group: gloo's threads are joined with it.
        del model, pruned, report
        gc.collect()
    finally:
        dist.destroy_process_group()


def test_bad_use() -> None:
    with pytest.raises(ValueError, match="'wanda' needs calibration"):
        prune_after_training(net(), method="wanda")
    with pytest.raises(ValueError, match="method 'obc'"):
        prune_after_training(net(), method="obc")
    with pytest.raises(ValueError, match="sparsity None"):
        prune_after_training(net(), pattern=Unstructured(), method="magnitude")
    unused = nn.Sequential(nn.Linear(4, 4))
    unused[0].spare = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="spare: no calibration batch reaches it"):
        prune_after_training(unused, [torch.randn(2, 4)], method="wanda", progress=False)


class ByKeyword(nn.Module):
    """Calls its layer by a keyword, and has a part that stays in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.frozen = nn.Linear(24, 8), nn.BatchNorm1d(24).eval()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(input=self.frozen(x))
        return y


def test_layers_called_by_keyword_and_modes_of_parts() -> None:
    model = ByKeyword()
    pruned = prune_after_training(model, [inputs(16, 24)], "2:4", "wanda", progress=False)
    assert pruned.layers[0].sparsity == 0.5
    assert model.training
    assert model.layer.training
    assert not model.frozen.training
    score = sparsify.WandaScore()
    score.attach(pruned.layers)
    model(inputs(4, 24))
    assert score.rows == {"layer": 4}
