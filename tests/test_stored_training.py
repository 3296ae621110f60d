"""Training of weights that are stored sparse, and the hand-over of masks to them."""

from __future__ import annotations

import copy
from typing import Any

import gossamer
import pytest
import torch
from gossamer import sparsify
from gossamer.nn import SparseLinear
from gossamer.sparsify import Magnitude, OneShot, Sparsifier
from torch import Tensor, nn


def net(density: float = 0.2) -> nn.Sequential:
    torch.manual_seed(5)
    pattern = gossamer.Unstructured(density)
    return nn.Sequential(
        SparseLinear(20, 40, pattern=pattern), nn.ReLU(), SparseLinear(40, 5, pattern=pattern)
    )


def train(model: nn.Module, optimizer: Any, made: Any, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        x = torch.randn(16, 20)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), x[:, :5].argmax(1)).backward()
        optimizer.step()
        made.step()


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), 0.01)


def test_set_drops_the_least_of_either_sign_and_moves_the_optimizer() -> None:
    model = net()
    optimizer = adam(model)
    made = sparsify.SET.stored(model, optimizer, end=10, every=4)
    train(model, optimizer, made, range(3))
    layer = model[0]
    before, moments = copy.deepcopy(layer.weight), optimizer.state[layer.values]["exp_avg"].clone()
    parameter = layer.values
    made.drop_and_grow(0.3)
    after = layer.weight.validate()
    assert layer.values is parameter
    assert after.values.shape == before.values.shape
    worth = torch.zeros(160, dtype=torch.float64)
    for sign in (1, -1):
        (side,) = (before.values * sign > 0).nonzero(as_tuple=True)
        order = (before.values[side] * sign).argsort()
        worth[side[order]] = torch.arange(1, len(side) + 1).double() / len(side)
    survivors = worth.argsort(descending=True, stable=True)[: 160 - 48]
    keys, old = before.keys(), after.keys()
    assert torch.isin(keys[survivors], old).all()
    place = {int(key): i for i, key in enumerate(old)}
    moved = torch.tensor([place[int(key)] for key in keys[survivors]])
    now = optimizer.state[layer.values]["exp_avg"]
    assert torch.equal(after.values[moved], before.values[survivors])
    assert torch.equal(now[moved], moments[survivors])
    grown = torch.ones(160, dtype=torch.bool)
    grown[moved] = False
    assert not now[grown].any()
    assert 0.05 < float(after.values.detach()[grown].std()) < 0.15
    assert made.sparsity == pytest.approx(0.8)


def test_rigl_grows_where_the_dense_gradient_is_largest() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    made = sparsify.RigL.stored(model, optimizer, end=100, every=50)
    dense = nn.Sequential(model[0].to_dense(), nn.ReLU(), model[2].to_dense())
    x = torch.randn(16, 20)
    for each in (model, dense):
        each(x).square().sum().backward()
    before = model[2].weight.keys()
    worth = model[2].values.detach().abs()
    made.drop_and_grow(0.25)
    dropped = before[worth.argsort()[:10]]
    gradient = dense[2].weight.grad.abs().flatten()
    gradient[before[~torch.isin(before, dropped)]] = -1
    after = model[2].weight
    grown = after.keys()[(after.values == 0).nonzero()[:, 0]]
    assert set(grown.tolist()) == set(gradient.topk(10).indices.tolist())
    made.detach()
    assert not model[2]._forward_hooks


@pytest.mark.parametrize("recipe", [sparsify.SET, sparsify.RigL])
def test_training_learns_and_resumes_to_the_bit(recipe: Any) -> None:
    model = net()
    optimizer = adam(model)
    made = recipe.stored(model, optimizer, end=40, every=5)
    pattern = model[0].col_indices.clone()
    train(model, optimizer, made, range(20))
    saved = [copy.deepcopy(each.state_dict()) for each in (model, optimizer, made)]
    train(model, optimizer, made, range(20, 60))
    assert not torch.equal(pattern, model[0].col_indices)
    again = net()
    other = adam(again)
    resumed = recipe.stored(again, other, end=40, every=5)
    for each, state in zip((again, other, resumed), saved, strict=True):
        each.load_state_dict(state)
    train(again, other, resumed, range(20, 60))
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    x = torch.randn(500, 20)
    right = (model(x).argmax(1) == x[:, :5].argmax(1)).float().mean()
    assert float(right) > 0.3  # 0.2 by chance


def test_rigl_pairs_what_belongs_to_one_call() -> None:
    model = net()
    made = sparsify.RigL.stored(model, adam(model), end=100, every=1)
    x = torch.randn(20)  # of no batch
    model(input=x).sum().backward()
    model(torch.randn(9, 20))  # whose gradient nobody wants
    seen = made._seen["0"]
    assert torch.equal(seen.x, x[None])
    assert seen.dy.shape == (1, 40)
    made.step()
    before = [layer.weight.keys() for layer in made.layers.values()]
    model(torch.full((2, 20), torch.nan)).sum().backward()
    made.step()
    assert made.steps == 1
    for keys, layer in zip(before, made.layers.values(), strict=True):
        assert torch.equal(keys, layer.weight.keys())
    made.schedule.every = 2
    made.steps = 2
    made.step()  # no change is due
    assert made.steps == 3
    made.step()
    assert made.steps == 3
    with pytest.raises(ValueError, match="by gradient of the state is False"):
        made.load_state_dict(sparsify.SET.stored(model, adam(model), end=9, every=1).state_dict())


def test_a_change_takes_no_memory_of_the_dense_weight() -> None:
    layer = SparseLinear(200_000, 200_000, pattern=gossamer.Unstructured(2e-7))  # dense: 160 GB
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9)
    made = sparsify.SET.stored(nn.Sequential(layer), optimizer, end=9, every=1)
    layer(torch.ones(2, 200_000)).sum().backward()
    optimizer.step()
    made.step()
    assert layer.weight.validate().values.shape == (8000,)


def test_mistakes() -> None:
    model = net()
    with pytest.raises(ValueError, match="no SparseLinear of pattern Unstructured"):
        sparsify.SET.stored(nn.Sequential(nn.Linear(4, 4)), None, 10, 5)
    with pytest.raises(ValueError, match="include names 'nope'"):
        sparsify.SET.stored(model, None, 10, 5, include="nope")
    model[0].activation = "relu"
    with pytest.raises(ValueError, match="0 applies 'relu'"):
        sparsify.RigL.stored(model, None, 10, 5)
    with pytest.raises(RuntimeError, match="2: no gradient"):
        sparsify.RigL.stored(model, None, 10, 5, exclude="0").drop_and_grow(0.5)
    model[0].values.requires_grad_(False)
    with pytest.raises(ValueError, match="0 is frozen"):
        sparsify.SET.stored(model, None, 10, 5)
    made = sparsify.SET.stored(model, None, 10, 5, exclude="0")
    with pytest.raises(ValueError, match="layers of the state"):
        made.load_state_dict(made.state_dict() | {"layers": ["0", "2"]})


@pytest.mark.parametrize("steps", [None, "3", -1, float("nan")], ids=str)
def test_a_bad_state_changes_nothing(steps: Any) -> None:
    made = sparsify.SET.stored(net(), None, 10, 5)
    state = made.state_dict()
    made.step()
    torch.rand(3, generator=made.generator)
    before = made.state_dict()
    with pytest.raises(ValueError, match="steps, expected a number from 0 on"):
        made.load_state_dict({**state, "steps": steps})
    for key in state:
        with pytest.raises(ValueError, match=f"the state has no '{key}'"):
            made.load_state_dict({k: v for k, v in state.items() if k != key})
    with pytest.raises((TypeError, RuntimeError)):
        made.load_state_dict({**state, "generator": torch.zeros(3)})
    assert made.steps == before["steps"]
    assert torch.equal(made.generator.get_state(), before["generator"])
    made.load_state_dict(state)
    assert made.steps == 0
    assert torch.equal(made.generator.get_state(), state["generator"])


@pytest.mark.parametrize(
    "pattern",
    [sparsify.Unstructured(), sparsify.ConstantFanIn(), gossamer.Unstructured()],
    ids=repr,
)
def test_finalize_hands_masks_over(pattern: Any) -> None:
    model = nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 10))
    made = Sparsifier(model, pattern, Magnitude(), OneShot(0.9))
    x: Tensor = torch.randn(4, 30)
    expected = model(x)
    report = made.finalize(force=True)
    assert all(layer.swapped for layer in report)
    assert model[0].weight.density == pytest.approx(0.1)
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(ValueError, match="sparsity is the schedule's"):
        Sparsifier(net(), gossamer.Unstructured(0.1), Magnitude(), OneShot(0.9))
