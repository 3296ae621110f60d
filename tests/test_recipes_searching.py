"""Recipes that learn where weights are: search, copies, clients, blocks, gates, experts."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gossamer import Block, sparsify
from gossamer.nn import GroupedLinear
from gossamer.sparsify import (
    DASS,
    GBLR,
    GMP,
    MAD,
    TSCNC,
    ContinuousSparsification,
    EauDeQN,
    FedTiny,
    GBLRLinear,
    MixedOp,
    RobustAtInitialization,
    SparseNeuralDynamics,
    candidate_masks,
    pgd_attack,
    select_mask,
    sparse_upcycling,
)
from gossamer.sparsify.recipes.gblr import soft_boxcar
from gossamer.sparsify.recipes.tscnc import log_condition_number, transformed_l1
from small_nets import loss_of, net
from torch import Tensor, nn

STEPS = 12
Optimizer = torch.optim.Optimizer


@pytest.fixture(autouse=True)
def _one_thread(threads: int) -> None:
    torch.set_num_threads(1)  # the products are too small for more


def some_masks() -> dict[str, Tensor]:
    return candidate_masks(net(), 0.6, 1)[0]


def search(model: nn.Module) -> DASS:
    return DASS(model, 0.7)


# How it is made, and the sparsity: of the whole, or where it is negative of each layer.
RECIPES: dict[str, tuple[float, Callable[[nn.Module], Any]]] = {
    "DASS": (-0.7, search),
    "FedTiny": (0.6, lambda m: FedTiny(m, some_masks(), 12, 3)),
    "TSCNC": (-0.8, lambda m: TSCNC(m, 0.8, 2, 10, 4)),
    "TSCNC 4x4": (-0.4, lambda m: TSCNC(m, 0.4, 2, 10, 4, Block(4, 4), include="2")),
    "MAD": (-0.6, lambda m: MAD(m, 0.6, 4, block=5)),
    "growing": (-0.5, lambda m: ContinuousSparsification(m, 0.5, 10)),
    "at initialization": (0.8, lambda m: RobustAtInitialization(m, 0.8, 2)),
    "GMP for agents": (-0.95, lambda m: GMP.for_agents(m, STEPS, every=2)),
    "GBLR": (0.0, lambda m: GBLR(m, 6, 0.5, 10, shrink=0.02)),
}


def optimizer_of(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)


def train(model: nn.Module, optimizer: Optimizer, made: Any, steps: range) -> None:
    for step in steps:
        if isinstance(made, DASS):
            made.train_scores() if 4 <= step < 8 else made.train_weights()
        (loss_of(model, step) + (made.penalty() if hasattr(made, "penalty") else 0)).backward()
        if not isinstance(made, (MAD, RobustAtInitialization)) or step >= 4:
            optimizer.step()
        made.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", RECIPES)
def test_the_sparsity_is_exact_and_a_resume_goes_on_to_the_bit(name: str) -> None:
    sparsity, build = RECIPES[name]
    model = net()
    made = build(model)
    optimizer = optimizer_of(model)
    first = loss_of(model, 0).item()
    train(model, optimizer, made, range(STEPS))
    if isinstance(made, GBLR):
        for density, layer in zip(made.density.values(), made.layers.values(), strict=True):
            size = math.prod(layer.sizes)
            assert density * size == pytest.approx(size // 2)
    elif sparsity < 0:
        for layer in made.layers:
            short = isinstance(made, MAD) and len(layer.shape) == 2  # exact in each row
            room = 0.5 * len(layer.mask) if short else 0.5
            assert layer.sparsity == pytest.approx(-sparsity, abs=room / layer.mask.numel())
    else:
        assert made.sparsity == pytest.approx(sparsity, abs=0.5 / 1344)
    if isinstance(made, (DASS, ContinuousSparsification)):
        y = loss_of(model.eval(), 5)
        exact = made.finalize_at()
        assert {n: (m == 0).sum() for n, m in exact.masks.items()} == {
            layer.name: (layer.module.weight == 0).sum() for layer in exact.layers
        }
        assert torch.equal(loss_of(model, 5), y)
    assert loss_of(model, 0).item() < max(2.0, 1.5 * first)

    model = net()
    made = build(model)
    optimizer = optimizer_of(model)
    train(model, optimizer, made, range(STEPS))
    other = net()
    half = build(other)
    its_optimizer = optimizer_of(other)
    train(other, its_optimizer, half, range(7))
    saved = io.BytesIO()
    torch.save([other.state_dict(), its_optimizer.state_dict(), half.state_dict()], saved)
    saved.seek(0)
    states = torch.load(saved, weights_only=True)
    resumed = net()
    again = build(resumed)
    its_optimizer = optimizer_of(resumed)
    resumed.load_state_dict(states[0])
    its_optimizer.load_state_dict(states[1])
    again.load_state_dict(states[2])
    train(resumed, its_optimizer, again, range(7, STEPS))
    for key, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_dass_trains_scores_straight_through_the_mask() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=False))
    w = model[0].weight.detach().clone()
    made = DASS(model, 0.7)
    (scores,) = made.parameters()
    torch.testing.assert_close(scores.detach(), w / w.abs().max())
    x = torch.randn(3, 6)
    mask = made.masks["0"]
    assert torch.equal(mask.flatten().nonzero().flatten(), w.abs().flatten().topk(9)[1].sort()[0])
    made.train_scores()
    model(x).square().sum().backward()
    slope = 2 * (x @ (w * mask).t()).t() @ x
    torch.testing.assert_close(scores.grad, slope * w)
    assert made.layers[0].weight.grad is None
    with torch.no_grad():
        scores.copy_(torch.randn(5, 6))
    made.step()
    mask = made.masks["0"]
    assert torch.equal(
        mask.flatten(), scores.abs().flatten() >= scores.abs().flatten().topk(9)[0][-1]
    )
    made.train_weights()
    model(x).square().sum().backward()
    slope = 2 * (x @ (w * mask).t()).t() @ x
    torch.testing.assert_close(made.layers[0].weight.grad, slope * mask)
    assert scores.grad is None


def test_a_search_finds_the_operation_that_fits() -> None:
    torch.manual_seed(0)
    cell = MixedOp([nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Identity()])
    made = DASS(cell, 0.5)
    shares = cell.a.detach().softmax(0)
    x = torch.randn(64, 8)
    expected = sum(s * op(x) for s, op in zip(shares, cell.ops, strict=True))
    torch.testing.assert_close(cell(x), expected)
    target = torch.tanh(x @ torch.randn(8, 8))
    inner, outer = torch.optim.Adam(cell.ops.parameters(), 0.02), torch.optim.Adam([cell.a], 0.1)
    for _ in range(150):
        for optimizer in (inner, outer):
            nn.functional.mse_loss(cell(x), target).backward()
            optimizer.step()
            cell.zero_grad()
        made.step()
    assert cell.best() is cell.ops[1]


def test_eau_de_qn_follows_the_best_copy_and_prunes_the_others() -> None:
    def make() -> EauDeQN:
        network = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
        with torch.no_grad():
            for i, p in enumerate(network.parameters()):
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
        return EauDeQN(network, lambda p: torch.optim.Adam(p, 1e-2), 3, 0.8, 0.5)

    def train(made: EauDeQN, steps: range) -> list[int]:
        chosen = []
        for step in steps:
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
            losses = []
            for network, optimizer in made.copies():
                loss = (network(x) - 0.5 * made.target(x).detach() - 1).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss)
            made.step(losses)
            if step % 4 == 3:
                sums = list(made.losses)
                chosen.append(made.update_target())
                assert chosen[-1] == sums.index(min(sums))
        return chosen

    made = make()
    chosen = train(made, range(24))
    best = chosen[-1]
    weights = made.networks[best].state_dict()
    for key, value in made.target.state_dict().items():
        assert torch.equal(value, weights[key])
    held = [
        {t.data_ptr() for state in o.state.values() for t in state.values() if t.dim() > 0}
        for o in made.optimizers
    ]
    assert len(set().union(*held)) == sum(map(len, held))  # no moments are shared
    level = made.levels[best]
    for i, (its, sparsifier) in enumerate(zip(made.levels, made.sparsifiers, strict=True)):
        assert i == best or level < its <= 0.8
        for layer in sparsifier.layers:
            assert layer.sparsity == pytest.approx(its, abs=0.5 / layer.mask.numel())
            assert (layer.weight[~layer.mask] == 0).all()
            kept = layer.weight[layer.mask]
            assert torch.equal(kept, weights[layer.name + ".weight"][layer.mask]) or i == best
    half = make()
    train(half, range(11))
    saved = io.BytesIO()
    torch.save(half.state_dict(), saved)
    saved.seek(0)
    resumed = make()
    resumed.load_state_dict(torch.load(saved, weights_only=True))
    assert train(resumed, range(11, 24)) == chosen[2:]
    for network, same in zip(made.networks, resumed.networks, strict=True):
        assert torch.equal(network[0].weight, same[0].weight)
    with pytest.raises(ValueError, match="2 losses of 3 copies"):
        made.step([1.0, 2.0])


def test_fed_tiny_chooses_by_the_clients_batch_norms() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    clients = [[(torch.randn(9, 8) + i, torch.randn(9, 3)) for _ in range(2)] for i in range(2)]
    candidates = candidate_masks(model, 0.5, 4)
    counts = [[int(mask.sum()) for mask in masks.values()] for masks in candidates]
    assert {sum(each) for each in counts} == {88}
    assert len({tuple(each) for each in counts}) == 4
    (alone,) = candidate_masks(model, 0.5, 1, exclude="3")
    assert {name: int(mask.sum()) for name, mask in alone.items()} == {"0": 64}
    with pytest.raises(TypeError, match="distribution"):
        candidate_masks(model, 0.5, 1, distribution="erk")
    expected = []
    for masks in candidates:
        mean, var = torch.zeros(16), torch.zeros(16)
        for batches in clients:
            for x, _ in batches:
                z = nn.functional.linear(x, model[0].weight * masks["0"], model[0].bias)
                mean, var = mean + z.mean(0) / 4, var + z.var(0) / 4
        losses = []
        for x, y in clients[0] + clients[1]:
            z = nn.functional.linear(x, model[0].weight * masks["0"], model[0].bias)
            z = ((z - mean) / (var + 1e-5).sqrt()).relu()
            losses.append(nn.functional.mse_loss(
                nn.functional.linear(z, model[3].weight * masks["3"], model[3].bias), y
            ).item())  # fmt: skip
        expected.append(sum(losses) / 4)
    before = copy.deepcopy(model.state_dict())
    chosen = select_mask(model, candidates, clients, nn.functional.mse_loss)
    assert chosen == expected.index(min(expected))

    def no_number_at_first(y: Tensor, wanted: Tensor, calls: list[int] = []) -> Tensor:  # noqa: B006
        calls.append(1)
        return nn.functional.mse_loss(y, wanted) * (math.nan if len(calls) == 1 else 1.0)

    assert select_mask(model, candidates, clients, no_number_at_first) != 0
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_fed_tiny_grows_the_mean_of_the_largest_gradients_of_one_block() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 10, False), nn.Linear(10, 10, False))
    masks = {name: torch.rand(10, 10) < 0.5 for name in ("0", "1")}
    made = FedTiny(model, masks, end=100, every=1)
    w, live = model[1].weight.detach().clone(), masks["1"].flatten()
    reports, total = [], torch.zeros(100)
    count = int(0.15 * (1 + math.cos(math.pi / 100)) * int(live.sum()))
    for _ in range(2):
        for layer in model:
            layer.weight.grad = torch.randn(10, 10)
        reports.append(made.reported())
        assert list(reports[-1]) == ["1"]
        g = model[1].weight.grad.flatten()
        where = g.abs().masked_fill(live, -1).topk(count).indices
        assert sorted(where.tolist()) == reports[-1]["1"][0].tolist()
        total[where] += g[where] / 2
    made.receive(reports)
    made.step()
    alive = live.clone()
    alive[w.abs().flatten().masked_fill(~live, math.inf).argsort()[:count]] = False
    alive[total.abs().masked_fill(alive, -1).topk(count).indices] = True
    assert torch.equal(made.masks["1"].flatten(), alive)
    assert torch.equal(made.masks["0"], masks["0"])
    made.step()  # the other block's turn, by the gradients at hand
    assert not torch.equal(made.masks["0"], masks["0"])
    assert torch.equal(made.masks["1"].flatten(), alive)


def test_tscnc_s_penalties_are_their_formulas() -> None:
    w = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(transformed_l1(w, 1e6), w.abs().sum(), rtol=1e-4, atol=0)
    assert transformed_l1(w, 1e-6).item() == pytest.approx(35, rel=1e-4)
    torch.testing.assert_close(log_condition_number(w).exp(), torch.linalg.cond(w))
    assert torch.autograd.gradcheck(log_condition_number, w)
    rank_one = torch.outer(torch.randn(4), torch.randn(6))
    assert log_condition_number(rank_one).item() == pytest.approx(0)
    assert log_condition_number(torch.zeros(3, 4)).item() == 0
    model = net()
    made = TSCNC(model, 0.8, 2, 10, 4, sparse_strength=0.2, condition_strength=0.3)
    weights = [layer.weight.detach() for layer in made.layers]
    expected = sum(
        0.2 * (2 * v.abs() / (1 + v.abs())).sum() + 0.3 * torch.linalg.cond(v.flatten(1)).log()
        for v in weights
    )
    torch.testing.assert_close(made.penalty(), expected)


def test_mad_sees_on_where_an_earlier_state_is_loaded() -> None:
    with pytest.raises(ValueError, match=r"not of Conv2d.*reflect"):
        MAD(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")), 0.5)

    def train(model: nn.Module, made: MAD, steps: range) -> None:
        for step in steps:
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
            model.zero_grad()
            model(x).square().mean().backward()
            made.step()

    model, copied = (nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4)) for _ in range(2))
    copied.load_state_dict(model.state_dict())
    made, other = MAD(model, 0.5, samples=3), MAD(copied, 0.2, samples=3)
    train(model, made, range(1))
    weights, state = copy.deepcopy(model.state_dict()), made.state_dict()
    train(copied, other, range(5))  # beyond what it looks at
    copied.load_state_dict(weights)
    other.load_state_dict(state)
    other.schedule.sparsity = 0.5
    train(model, made, range(1, 4))
    train(copied, other, range(1, 4))
    assert made.sparsity == pytest.approx(0.5, abs=0.06)
    for name, mask in made.masks.items():
        assert torch.equal(mask, other.masks[name])


def test_mad_s_saliency_is_the_curvature_of_blocks() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.rand(9, 6), torch.randn(9, 3)
    made = MAD(model, 0.5, samples=3, block=4)
    a, g = [], []
    for _ in range(2):
        attacked = pgd_attack(model, nn.functional.mse_loss, x, y, eps=0.1)
        assert (attacked - x).abs().max() <= 0.1 + 1e-6
        loss = nn.functional.mse_loss(model(attacked), y)
        assert loss > nn.functional.mse_loss(model(x), y)
        hidden = model[0](attacked)
        hidden.retain_grad()
        nn.functional.mse_loss(model[1:](hidden), y).backward()
        made.step()
        a.append(attacked)
        g.append(hidden.grad)
    a, g, w = torch.cat(a), torch.cat(g), model[0].weight.detach()
    second, expected = a.t() @ a / 18, torch.zeros(5, 6)
    for columns in (slice(0, 4), slice(4, 6)):
        rise = w[:, columns] * (w[:, columns] @ second[columns, columns])
        expected[:, columns] = 0.5 * g.square().mean(0)[:, None] * rise
    torch.testing.assert_close(made.score(made.layers[0]), expected.clamp(min=0))
    nn.functional.mse_loss(model(x), y).backward()
    made.step()
    assert made.masks["0"].sum(1).tolist() == [3] * 5
    assert not any(m._forward_hooks or m._backward_hooks for m in model)


@pytest.mark.parametrize("n", [9, 12])
def test_the_boxcars_are_exact_for_whole_numbers_and_smooth_in_both(n: int) -> None:
    start, width = torch.tensor([0.0, 2.0, 5.0, n - 3]), torch.tensor([n, 4.0, 0.0, 5.0])
    exact = torch.zeros(4, n)
    for row, (s, w) in enumerate(zip(start.int().tolist(), width.int().tolist(), strict=True)):
        exact[row, [(s + i) % n for i in range(w)]] = 1
    torch.testing.assert_close(soft_boxcar(start, width, n, math.inf), exact, atol=1e-5, rtol=0)
    start = torch.tensor([1.3, 4.1], dtype=torch.float64, requires_grad=True)
    width = torch.tensor([3.2, 0.7], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s, w: soft_boxcar(s, w, n, 3.0), (start, width))
    soft = soft_boxcar(start, width, n, 3.0)
    torch.testing.assert_close(soft.sum(1), width)  # frequency 0 is the width


def test_gblr_is_the_dense_layer_at_full_rank_and_ends_in_two_linears() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 8))
    x = torch.randn(5, 12)
    y = model(x)
    made = GBLR(model, 10, 0.6, 4, shrink=0.1)
    made.layers["0"].sigma = made.layers["2"].sigma = math.inf
    torch.testing.assert_close(model(x), y, atol=1e-5, rtol=1e-5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(5):
        before = [w.detach().clone() for w in made.layers["0"].widths]
        model(x).square().mean().backward()
        stepped = [w - 0.1 * w.grad if w.grad is not None else w for w in made.layers["0"].widths]
        optimizer.step()
        made.step()
        optimizer.zero_grad()
        if made.steps < 4:
            for after, moved, n in zip(made.layers["0"].widths, stepped, (10, 12), strict=True):
                torch.testing.assert_close(after.detach(), (moved.detach() - 0.1 * n).clamp(0, n))
    assert before[0].tolist() == made.layers["0"].widths[0].tolist()
    assert made.density == pytest.approx({"0": 48 / 120, "2": 32 / 80})
    layer: GBLRLinear = made.layers["0"]
    u, v = layer.factors()
    torch.testing.assert_close(layer(x), x @ v.t() @ u + layer.bias)
    y = model(x)
    assert made.finalize() == ["0.0", "0.1", "2.0", "2.1"]
    torch.testing.assert_close(model(x), y, atol=1e-5, rtol=1e-5)
    live = sum(int((part.weight != 0).sum()) for part in model[0])
    assert live <= 48


def test_growing_samples_filters_by_gates_that_close() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8, bias=False))
    w = model[0].weight.detach().clone()
    made = ContinuousSparsification(model, 0.5, end=4, grown=0.25, beta=16.0, initial=0.3)
    (s,) = made.parameters()
    assert (s > 0).sum() == 2
    assert [made.beta(t) for t in (0, 1, 2, 4)] == pytest.approx([1, 2, 4, 16])
    share = s.detach().sigmoid().mean()
    assert made.penalty().item() == pytest.approx((share - 0.5).square().item(), abs=1e-7)
    sampled = made.layers[0].kept.view(-1, 1)
    torch.testing.assert_close(model[0].weight, w * sampled * s.detach().sigmoid().view(-1, 1))
    model[0].weight.square().sum().backward()
    q = sampled.float().flatten()
    slope = s.detach().sigmoid() * (1 - s.detach().sigmoid()) * 2 * s.detach().sigmoid()
    torch.testing.assert_close(s.grad.flatten(), (q * w.square().sum(1) * slope).flatten())
    alive = torch.zeros(8)
    many = ContinuousSparsification(nn.Sequential(nn.Linear(6, 8)), 0.5, end=9000, beta=1.0)
    for _ in range(2000):
        many.step()
        alive += many.layers[0].kept.flatten()
    (gates,) = many.parameters()
    expected = gates.detach().sigmoid().flatten()
    expected[gates.argmax()] = 1  # no layer is empty
    torch.testing.assert_close(alive / 2000, expected, atol=0.05, rtol=0)
    with torch.no_grad():
        s.copy_(torch.randn(1, 8))
    for _ in range(4):
        made.step()
    best = torch.zeros(8).scatter(0, s.flatten().topk(4).indices, 1.0)
    assert torch.equal(model[0].weight, w * best[:, None])


@pytest.mark.parametrize("choose", ["experts", "tokens"])
def test_upcycled_experts_begin_as_the_mlp_and_run_on_grouped(choose: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 6)), nn.Linear(6, 3)
    )
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    x = torch.randn(2, 5, 6)
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    moment = optimizer.state[model[0][0].weight]["exp_avg"].clone()
    y = model(x)
    # Every token has some expert where each takes as many as there are.
    capacity = 4 if choose == "experts" else 2
    (mlp,) = sparse_upcycling(
        model, "0", optimizer, experts=4, capacity=capacity, choose=choose
    ).values()
    assert isinstance(mlp.first[0], GroupedLinear)
    torch.testing.assert_close(model(x), y)
    state = optimizer.state[mlp.first[0].weight]["exp_avg"]
    torch.testing.assert_close(state, moment.expand(4, 16, 6))
    assert {id(p) for p in model.parameters()} == {
        id(p) for group in optimizer.param_groups for p in group["params"]
    }
    for _ in range(3):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    mlp.capacity, mlp.normalize = 2, False
    tokens = x.reshape(-1, 6)
    share = mlp.router(tokens).softmax(-1)
    every = torch.stack(
        [
            mlp.last.to_linears()[e](nn.functional.gelu(mlp.first[0].to_linears()[e](tokens)))
            for e in range(4)
        ],
        1,
    )
    if choose == "experts":
        chosen = torch.zeros_like(share).scatter(0, share.topk(5, dim=0).indices, 1.0)
    else:
        chosen = torch.zeros_like(share).scatter(1, share.topk(2).indices, 1.0)
    expected = (share * chosen)[..., None] * every
    torch.testing.assert_close(model[0](x).flatten(0, 1), expected.sum(1))
    with pytest.raises(ValueError, match="'mlp' names no module"):
        sparse_upcycling(model, "mlp")
    with pytest.raises(TypeError, match="Linear is neither a Sequential"):
        sparse_upcycling(model, "1")


def test_pruning_at_initialization_is_rescaled_to_the_edge_of_chaos() -> None:
    model = net()
    made = RobustAtInitialization(model, 0.8, samples=2)
    w = {layer.name: layer.weight.detach().clone() for layer in made.layers}
    g = {layer.name: torch.zeros_like(layer.weight) for layer in made.layers}
    for step in range(2):
        loss_of(model, step).backward()
        for layer in made.layers:
            g[layer.name] += layer.weight.grad / 2
        made.step()
        model.zero_grad()
    scores = torch.cat([(w[k] * g[k]).abs().flatten() for k in w])
    least = scores.topk(round(0.2 * len(scores))).values[-1]
    for layer in made.layers:
        mask = (w[layer.name] * g[layer.name]).abs() >= least
        assert torch.equal(layer.mask, mask)
        pruned = w[layer.name] * mask
        factor = 1 / (w[layer.name][0].numel() * pruned.square().mean() / 2).sqrt()
        torch.testing.assert_close(layer.weight.detach(), pruned * factor)


def test_neurons_become_linear_or_go_until_the_budget_of_relus() -> None:
    def make() -> tuple[nn.Sequential, SparseNeuralDynamics, Optimizer]:
        torch.manual_seed(0)
        layers = [nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)]
        model = nn.Sequential(*layers)
        made = SparseNeuralDynamics(model, 5, 2, 10, every=2)
        return model, made, torch.optim.Adam(model.parameters(), 0.03)

    def train(model: nn.Module, made: SparseNeuralDynamics, its: Optimizer, steps: range) -> None:
        for step in steps:
            x = torch.randn(9, 6, generator=torch.Generator().manual_seed(step))
            ((model(x) - x[:, :3]).square().mean() + made.penalty()).backward()
            its.step()
            its.zero_grad()
            made.step()

    model, made, optimizer = make()
    gate, x = made.gates[0], torch.randn(4, 16)
    p = ((gate.logits + gate.noise) / 1.0).softmax(-1).detach()
    torch.testing.assert_close(gate(x), p[:, 0] * x.relu() + p[:, 1] * x)
    expected = sum(g.logits.softmax(-1)[:, 0].sum() for g in made.gates)
    torch.testing.assert_close(made.penalty(), (expected - 5) / 32)
    assert [made.budget(t) for t in (0, 2, 6, 10)] == [32, 32, round(5 + 27 / 8), 5]
    train(model, made, optimizer, range(7))
    assert sum(int((g.decided < 0).sum()) for g in made.gates) == made.budget(6)
    states = copy.deepcopy([model.state_dict(), optimizer.state_dict(), made.state_dict()])
    train(model, made, optimizer, range(7, 12))
    resumed, again, its = make()
    for part, state in zip((resumed, its, again), states, strict=True):
        part.load_state_dict(state)
    train(resumed, again, its, range(7, 12))
    for key, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    kinds = torch.cat([g.decided for g in made.gates])
    assert int((kinds == 0).sum()) == 5
    with torch.no_grad():  # some neurons of each kind
        made.gates[0].decided[:6] = 2
        made.gates[1].decided[:] = 2
    alive = int((made.gates[0].decided != 2).sum())
    x = torch.randn(7, 6)
    y = model(x)
    made.finalize()
    assert (model[0].out_features, model[2].out_features) == (alive, 1)
    torch.testing.assert_close(model(x), y)
    with pytest.raises(ValueError, match="4 of the 0 ReLUs"):
        SparseNeuralDynamics(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), 4, 0, 1)


def test_penalties_of_activations_are_their_formulas() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.Sigmoid())
    x = torch.randn(5, 2, 6, 6)
    first, last = model[:2](x).detach(), model(x).detach()
    for kind, expected in (
        ("l1", first.abs().mean()),
        ("positions", first.abs().mean(1).view(5, -1).max(1).values.mean()),
    ):
        made = sparsify.ActivationPenalty(model, "1", kind, 0.5)
        model(x)
        torch.testing.assert_close(made.penalty(), 0.5 * expected)
        assert made.zeros["1"] == pytest.approx((first == 0).float().mean().item())
        made.detach()
    made = sparsify.ActivationPenalty(model, "3", "kl", 1.0, target=0.2)
    model(x)
    mean = last.mean((0, 2, 3))
    own, others = torch.distributions.Bernoulli(0.2), torch.distributions.Bernoulli(mean)
    torch.testing.assert_close(
        made.penalty(), torch.distributions.kl_divergence(own, others).mean()
    )
    with pytest.raises(RuntimeError, match="no pass with gradients"):
        made.penalty()
    made.detach()
    made = sparsify.ActivationPenalty(model, "1", strength=3.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    before = (first == 0).float().mean().item()
    for _ in range(20):
        model(x)
        made.penalty().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert made.zeros["1"] > before + 0.2
    with pytest.raises(ValueError, match="'x' names no module"):
        sparsify.ActivationPenalty(model, "x")
