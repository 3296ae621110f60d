"""Every recipe reaches its sparsity, goes on to the bit after a resume, and does its equation."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gossamer.prune import magnitude_24
from gossamer.sparsify import (
    DRESS,
    DSTEE,
    GBLR,
    GMP,
    GSM,
    HESSO,
    LOBSTER,
    MIRL,
    NM,
    SET,
    SRSTE,
    SSTE,
    STE,
    WGSEF,
    AdaSAP,
    AutoSparse,
    Block,
    ConstantFanIn,
    ContinuousSparsification,
    FISHMask,
    MaskedDecay,
    MaskSparsity,
    RigL,
    RobustAtInitialization,
    SparseIFT,
    SparseMomentum,
    Sparsifier,
    Unstructured,
    wgsef_prox,
)
from small_nets import loss_of, net
from torch import Tensor, nn

STEPS = 12
Optimizer = torch.optim.Optimizer
Builder = Callable[[nn.Module, Optimizer], Sparsifier]


@pytest.fixture(autouse=True)
def _one_thread(threads: int) -> None:
    torch.set_num_threads(1)  # the products are too small for more


def sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)


def train(model: nn.Module, optimizer: Optimizer, made: Any, steps: range) -> None:
    for step in steps:
        loss_of(model, step).backward()
        optimizer.step()
        made.step()
        optimizer.zero_grad()


def falling(model: nn.Module) -> Callable[[], float]:
    return lambda: 1.0  # a plateau at each look, and pruning costs nothing


# The sparsity of the whole, or of each layer, and how it is made.
RECIPES: dict[str, tuple[float, Builder]] = {
    "GMP": (0.8, lambda m, o: GMP(m, 0.8, 2, 10, every=4, optimizer=o)),
    "GMP 2:4": (0.5, lambda m, o: GMP(m, 0.5, 2, 10, 4, "2:4", optimizer=o)),
    "GMP 4x4": (0.5, lambda m, o: GMP(m, 0.5, 2, 10, 4, Block(4, 4), optimizer=o)),
    "MIRL": (1 - 0.8**3, lambda m, o: MIRL(m, 4, 3, optimizer=o)),
    "SET": (0.8, lambda m, o: SET(m, 0.8, 11, 3, optimizer=o)),
    "SET fan-in": (0.75, lambda m, o: SET(m, 0.75, 11, 3, pattern=ConstantFanIn(), optimizer=o)),
    "RigL": (0.8, lambda m, o: RigL(m, 0.8, 9, 3, optimizer=o)),
    "RigL 2:4": (0.5, lambda m, o: RigL(m, 0.5, 9, 3, pattern=NM(2, 4), optimizer=o)),
    "RigL 4x4": (0.5, lambda m, o: RigL(m, 0.5, 9, 3, pattern=Block(4, 4), optimizer=o)),
    "DSTEE": (0.8, lambda m, o: DSTEE(m, 0.8, 9, 3, optimizer=o)),
    "SparseMomentum": (0.8, lambda m, o: SparseMomentum(m, 12, 3, 0.8, optimizer=o)),
    "GSM": (0.8, lambda m, o: GSM(m, o, 0.8, 10)),
    "LOBSTER": (0.8, lambda m, o: LOBSTER(m, 0.8, falling(m), every=4)),
    "WGSEF": (0.5, lambda m, o: WGSEF(m, o, 0.5, 10)),
    "HESSO": (0.5, lambda m, o: HESSO(m, 0.5, 1, 8, 2)),
    "STE 2:4": (0.5, lambda m, o: STE(m, o)),
    "STE 1:4": (0.75, lambda m, o: STE(m, o, pattern="1:4")),
    "SRSTE": (0.5, lambda m, o: SRSTE(m, o, decay=0.1, refresh=3)),
    "SSTE": (0.5, lambda m, o: SSTE(m, o, exclude="0")),
    "MaskedDecay": (0.5, lambda m, o: MaskedDecay(m, o, refresh=4, exclude="0")),
    "FISHMask": (0.8, lambda m, o: FISHMask(m, 0.2, 4)),
    "AdaSAP": (0.5, lambda m, o: AdaSAP(m, 0.5, 10)),
}
WHOLE = ("GMP", "MIRL", "SET", "RigL", "DSTEE", "SparseMomentum", "GSM", "LOBSTER", "FISHMask")


@pytest.mark.parametrize("name", RECIPES)
def test_the_sparsity_is_exact_and_a_resume_goes_on_to_the_bit(name: str) -> None:
    sparsity, build = RECIPES[name]
    model = net()
    optimizer = sgd(model)
    made = build(model, optimizer)
    train(model, optimizer, made, range(STEPS))

    entries = sum(mask.numel() for mask in made.masks.values())
    kept = sum(int(mask.sum()) for mask in made.masks.values())
    if name in WHOLE and name != "GMP":
        assert kept == math.floor(entries * (1 - sparsity) + 0.5)
    elif name != "GMP 4x4" and name != "RigL 4x4":  # blocks at the edge of 9 taps are smaller
        for layer in made.layers:
            assert layer.sparsity == pytest.approx(sparsity, abs=0.5 / layer.mask.numel())
    for layer in made.layers:
        soft = isinstance(made, (STE, FISHMask))
        assert soft or (layer.weight[~layer.mask] == 0).all(), layer.name

    other = net()
    its_optimizer = sgd(other)
    half = build(other, its_optimizer)
    train(other, its_optimizer, half, range(7))
    saved = io.BytesIO()
    torch.save([other.state_dict(), its_optimizer.state_dict(), half.state_dict()], saved)
    saved.seek(0)
    states = torch.load(saved, weights_only=True)
    resumed = net()
    its_optimizer = sgd(resumed)
    again = build(resumed, its_optimizer)
    resumed.load_state_dict(states[0])
    its_optimizer.load_state_dict(states[1])
    again.load_state_dict(states[2])
    train(resumed, its_optimizer, again, range(7, STEPS))
    for key, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    assert [c.state() for c in again.history] == [c.state() for c in made.history]


def one_layer(columns: int = 6, rows: int = 5) -> tuple[nn.Sequential, nn.Linear]:
    model = nn.Sequential(nn.Linear(columns, rows, bias=False))
    return model, model[0]  # type: ignore[return-value]


def test_rigl_drops_the_smallest_and_grows_the_largest_gradients() -> None:
    model, layer = one_layer(10, 10)
    made = RigL(model, 0.6, 100, every=1)
    before, w = made.masks["0"].clone(), layer.weight.detach().clone()
    layer.weight.grad = g = torch.randn(10, 10)
    made.step()
    count = int(0.15 * (1 + math.cos(math.pi * 1 / 100)) * 40)
    flat = w.abs().masked_fill(~before, math.inf).flatten()
    alive = before.flatten().clone()
    alive[flat.argsort()[:count]] = False
    candidates = g.abs().flatten().masked_fill(alive, -1)
    alive[candidates.argsort(descending=True)[:count]] = True
    assert torch.equal(made.masks["0"].flatten(), alive)
    grown = alive.view(10, 10) & ~before
    assert (layer.weight[grown] == 0).all()


def test_set_drops_of_either_sign_and_grows_normal_values() -> None:
    model, layer = one_layer(200, 100)
    made = SET(model, 0.5, 10, every=1)
    before, w = made.masks["0"].clone(), layer.weight.detach().clone()
    made.step()
    for side in (w > 0, w < 0):
        values = w[side & before].abs()
        cut = values.sort().values[int(0.3 * len(values))]
        large = side & before & (w.abs() > 1.001 * cut)
        assert torch.equal(layer.weight[large], w[large])
        assert (layer.weight != w)[side & before & (w.abs() < 0.999 * cut)].all()
    grown = layer.weight[made.masks["0"] & (layer.weight != w)]
    assert len(grown) == pytest.approx(3000, abs=2)
    assert grown.std().item() == pytest.approx(0.1, rel=0.05)


def test_dst_ee_tries_what_rarely_lived() -> None:
    model, layer = one_layer(10, 10)
    made = DSTEE(model, 0.5, 1000, every=1, c=1e6)
    layer.weight.grad = torch.rand(10, 10)
    seen = torch.zeros(10, 10)
    for _ in range(6):
        seen += made.masks["0"]
        made.step()
    expected = layer.weight.grad + 1e6 * math.log(6) / (seen + 1)
    torch.testing.assert_close(made._acquisition(made.layers[0]), expected)
    seen += made.masks["0"]
    assert (seen > 0).all()


def test_sparse_momentum_shares_growth_by_the_mean_momentum() -> None:
    model = nn.Sequential(nn.Linear(40, 40, False), nn.Linear(40, 40, False))
    made = SparseMomentum(model, 100, 1, 0.75, p=0.5)
    lives = [int(mask.sum()) for mask in made.masks.values()]
    for factor, layer in zip((3.0, 1.0), model, strict=True):
        layer.weight.grad = factor * torch.ones(40, 40)
    made.step()
    p = 0.005 + 0.495 * (1 + math.cos(math.pi / 100)) / 2
    dropped = int(p * lives[0])
    after = [int(mask.sum()) for mask in made.masks.values()]
    assert after == pytest.approx([lives[0] + dropped / 2, lives[1] - dropped / 2], abs=1)
    assert sum(after) == sum(lives)


def test_gsm_is_sgd_whose_gradient_only_the_salient_get() -> None:
    model, layer = one_layer()
    optimizer = torch.optim.SGD(model.parameters(), 5e-3, momentum=0.98, weight_decay=1e-4)
    made = GSM(model, optimizer, 0.7, 100)
    w, z = layer.weight.detach().clone(), torch.zeros_like(layer.weight)
    for _ in range(4):
        layer.weight.grad = g = torch.randn(5, 6)
        g = g.clone()
        b = torch.zeros(30)
        b[(w * g).abs().flatten().argsort(descending=True)[:9]] = 1
        z = 0.98 * z + 1e-4 * w + b.view(5, 6) * g
        w = w - 5e-3 * z
        optimizer.step()
        made.step()
    torch.testing.assert_close(layer.weight.detach(), w)


@pytest.mark.parametrize(
    "recipe",
    [
        lambda m, o: SRSTE(m, o, decay=0.1),
        lambda m, o: MaskedDecay(m, o, decay=0.1, refresh=1),
        lambda m, o: STE(m, o, "2:3", decay=0.1),
        lambda m, o: GSM(m, o, 0.5, 3),
        lambda m, o: MaskSparsity(m, o, 2, 0.5, strength=0.1),
    ],
)
def test_a_closure_s_gradients_are_changed_as_others_are(recipe: Any) -> None:
    found, x = [], torch.randn(8, 12)
    for way in ("none", "first", "named", "several times"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 9), nn.BatchNorm1d(9), nn.Linear(9, 9))
        optimizer: Optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        if way == "several times":
            optimizer = torch.optim.LBFGS(model.parameters(), 0.1, max_iter=3)
        made = recipe(model, optimizer)

        def closure(model: nn.Module = model) -> torch.Tensor:
            model.zero_grad()
            loss: torch.Tensor = model(x).square().mean()
            loss.backward()
            return loss

        for _ in range(4):
            if way == "none":
                closure()
                optimizer.step()  # type: ignore[call-arg]
            elif way == "named":
                optimizer.step(closure=closure)
            else:
                optimizer.step(closure)
            made.step()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert found[3].isfinite().all()


@pytest.mark.parametrize("fused", [False, True])
def test_a_decay_is_of_gradients_that_a_scaler_has_unscaled(fused: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    before = model[0].weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=fused)
    made = SRSTE(model, optimizer, decay=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(model(torch.randn(4, 8)).sum() * 0).backward()
    scaler.step(optimizer)
    scaler.update()
    made.step()
    kept = magnitude_24(before)
    torch.testing.assert_close(model[0].weight.detach(), before - 0.05 * (before - kept))


@pytest.mark.parametrize(
    "recipe",
    [
        lambda m: STE(m),
        lambda m: SSTE(m, include="linear*"),
        lambda m: STE(m, pattern=Block(4, 4), sparsity=0.5, include="linear*", kernels=True),
        lambda m: GBLR(m, 8, 0.5, 4, include="linear*"),
    ],
)
def test_inference_of_an_encoder_multiplies_what_training_does(recipe: Any) -> None:
    """Torch's fast path would multiply by the dense weights."""
    model = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    recipe(model)
    x = torch.randn(2, 5, 16)
    y = model(x)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), y.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by torch
def test_a_layer_that_is_compiled_alone_is_masked_where_it_is() -> None:
    model = nn.Sequential(torch.compile(nn.Linear(16, 8), backend="eager"))
    x = torch.randn(4, 16)
    dense = model(x).detach()
    with pytest.raises(ValueError, match="a plain Linear inside a model is expected"):
        SSTE(model)
    with pytest.raises(ValueError, match="the model holds no"):
        GBLR(model, 4, 0.5, 4)
    assert torch.equal(model(x), dense)
    (layer,) = STE(model).layers
    expected = nn.functional.linear(x, magnitude_24(layer.weight), layer.module.bias)
    torch.testing.assert_close(model(x), expected)


def test_lobster_decays_by_insensitivity() -> None:
    model, layer = one_layer()
    made = LOBSTER(model, 0.5, lambda: 1.0, decay=0.01, every=100)
    w = layer.weight.detach().clone()
    layer.weight.grad = g = 2 * torch.randn(5, 6)
    made.step()
    torch.testing.assert_close(layer.weight.detach(), w - 0.01 * w * torch.relu(1 - g.abs()))


@pytest.mark.parametrize("pattern", ["2:4", "2:3"])  # by the kernels, and by a mask
def test_sr_ste_adds_the_decay_of_what_is_masked(pattern: str) -> None:
    model, layer = one_layer(12, 5)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    w, x = layer.weight.detach().clone(), torch.randn(7, 12)
    SRSTE(model, optimizer, pattern, decay=0.3)
    effective = magnitude_24(w)
    if pattern == "2:3":
        order = w.abs().view(5, 4, 3).argsort(-1)
        effective = w.view(5, 4, 3).scatter(-1, order[..., :1], 0).view(5, 12)
    y = model(x)
    torch.testing.assert_close(y, x @ effective.t())
    (y.square().sum() / 2).backward()
    optimizer.step()
    gradient = (x @ effective.t()).t() @ x + 0.3 * (w - effective)
    torch.testing.assert_close(dict(model.named_parameters()).popitem()[1], w - gradient)


@pytest.mark.parametrize("pattern", [Unstructured(), Block(2, 2), "1:4", "2:4"], ids=str)
def test_what_is_logged_and_finished_is_what_is_multiplied(pattern: Any) -> None:
    sparsity = None if isinstance(pattern, str) else 0.5

    def trained(log_every: int) -> tuple[nn.Module, STE]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        made = STE(model, optimizer, pattern, sparsity, refresh=4, log_every=log_every)
        for _ in range(6):
            model(torch.randn(8, 16)).sub(1).square().mean().backward()
            optimizer.step()
            made.step()
            optimizer.zero_grad()
        return model, made

    x = torch.randn(8, 16)
    (model, made), (other, noted) = trained(100), trained(3)
    y = model(x)
    assert torch.equal(y, other(x))
    assert len(noted.history) == len(made.history) + 2
    if pattern == "1:4":
        made.to_dense(project=True)
    else:
        made.finalize(force=True)
    torch.testing.assert_close(model.eval()(x), y)


def test_s_ste_freezes_its_scale() -> None:
    model, layer = one_layer(256, 64)
    with torch.no_grad():
        layer.weight.normal_()
    made = SSTE(model)
    assert float(model[0].scale) == pytest.approx(1.483, abs=0.04)
    scale = model[0].scale.clone()
    with torch.no_grad():
        layer.weight.mul_(2).pow_(3)
    model(torch.randn(1, 256))
    assert torch.equal(model[0].scale, scale)
    expected = model.eval()(torch.ones(2, 256))
    assert made.finalize(force=True).layers[0].swapped
    torch.testing.assert_close(model(torch.ones(2, 256)), expected)


def test_masked_decay_ends_dense_with_the_same_parameters() -> None:
    model, layer = one_layer(8, 8)
    optimizer = sgd(model)
    made = MaskedDecay(model, optimizer)
    weight = layer.weight
    made.to_dense()
    assert type(model[0]) is nn.Linear
    assert model[0].weight is weight
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize(
    ("pattern", "units", "kept"),
    [(Unstructured(), 240, 672), (Block(4, 4), 15, 42), (None, 240, 672)],
)
def test_weights_of_any_one_lane_compete_over_all_layers(
    pattern: Any, units: int, kept: int
) -> None:
    model = net()
    with torch.no_grad():
        model[2].weight.fill_(10)
    made = MIRL(model, 1, 1, 0.5, pattern)
    made.step()
    live = {layer.name: int(layer.kept.sum()) for layer in made.layers}
    assert live["2"] == units
    assert sum(live.values()) == kept


@pytest.mark.parametrize(
    "recipe",
    [
        lambda pattern: MIRL(net(), 1, 1, 0.5, pattern),
        lambda pattern: LOBSTER(net(), 0.5, lambda: 1.0, pattern=pattern),
        lambda pattern: FISHMask(net(), 0.5, pattern=pattern),
        lambda pattern: RobustAtInitialization(net(), 0.5, pattern=pattern),
    ],
)
def test_patterns_of_many_lanes_are_uniform(recipe: Callable[[Any], Sparsifier]) -> None:
    assert recipe(Block(4, 4)).distribution == recipe(None).distribution == "global"
    assert recipe("2:4").distribution == "uniform"


@pytest.mark.parametrize(
    "recipe",
    [
        lambda m: WGSEF(m, sgd(m), 0.5, 10, pattern="2:4"),
        lambda m: HESSO(m, 0.5, 1, 8, 2, pattern="2:4"),
        lambda m: ContinuousSparsification(m, 0.5, 4, pattern="2:4"),
        lambda m: SparseMomentum(m, 12, 3, 0.5, pattern="2:4"),
    ],
)
def test_recipes_whose_units_compete_refuse_many_lanes(recipe: Callable[[nn.Module], Any]) -> None:
    with pytest.raises(ValueError, match=r"2:4 has as much in each part of a layer$"):
        recipe(net())


def test_fish_mask_trains_the_most_informative_and_makes_a_delta() -> None:
    model = net()
    original = copy.deepcopy(model)
    optimizer = sgd(model)
    made = FISHMask(model, 0.1, samples=3)
    fisher = torch.zeros_like(model[2].weight)
    for step in range(6):
        loss_of(model, step).backward()
        if step < 3:
            fisher += model[2].weight.grad.square() / 3
        else:
            optimizer.step()
        made.step()
        optimizer.zero_grad()
    torch.testing.assert_close(made.score(made.layers[1]), fisher)
    same = model[2].weight == original[2].weight
    assert torch.equal(same, ~made.masks["2"])
    FISHMask.merge(original, made.delta())
    torch.testing.assert_close(original[2].weight, model[2].weight)


def test_autosparse_has_the_gradient_of_its_equation() -> None:
    model, layer = one_layer()
    w = layer.weight.detach().clone()
    made = AutoSparse(model, steps=10, threshold=-2.0)
    t = torch.full((5, 1), -2.0, requires_grad=True)
    x = torch.randn(3, 6)
    model(x).sum().backward()
    over = w.abs() - t.sigmoid()
    torch.testing.assert_close(layer.weight, w.sign() * over.clamp(min=0))
    slope = torch.where(over > 0, 1.0, 0.5).detach()
    sums = x.sum(0).expand(5, 6)
    torch.testing.assert_close(layer.parametrizations.weight.original.grad, sums * slope)
    (sums * w.sign() * slope * over).sum().backward()
    (threshold,) = made.parameters()
    torch.testing.assert_close(threshold.grad, t.grad)
    assert [made.alpha(i) for i in (0, 5, 10)] == pytest.approx([0.49876, 0.25, 0], abs=2e-3)
    made.step()
    exact = made.finalize_at(0.5)
    assert int(exact.masks["0"].sum()) == 15


def test_dress_has_nested_rows_and_trains_them_together() -> None:
    model, layer = one_layer(10, 4)
    made = DRESS(model, (0.8, 0.5, 0.2))
    w, x = layer.parametrizations.weight.original, torch.randn(3, 10)
    expected, masks = torch.zeros_like(w), []
    for i, share in enumerate((0.5, 0.3, 0.2)):
        with made.subnet(i):
            mask = layer.weight != 0
            (share * model(x).square().sum() / 2).backward()
        assert mask.sum(1).tolist() == [(2, 5, 8)[i]] * 4
        masks.append(mask)
        expected += share * ((x @ (w * mask).t()).t() @ x * mask).detach()
    assert (masks[0] <= masks[1]).all()
    assert (masks[1] <= masks[2]).all()
    torch.testing.assert_close(w.grad, expected)
    exact = made.finalize_at(0)
    assert torch.equal(layer.weight != 0, masks[0])
    assert exact.sparsity == pytest.approx(0.8)


def test_sparse_ift_has_the_sizes_of_the_paper() -> None:
    made = [SparseIFT(s) for s in (0.5, 0.75, 0.9)]
    assert [m.width for m in made] == pytest.approx([1.414, 2, 3.162], abs=1e-3)
    assert [m.branches for m in made] == [2, 4, 10]
    for ift in made:
        dense = 64 * 32
        live = 1 - ift.sparsity
        factorized = sum(p.numel() for p in ift.factorized(64, 32, False).parameters())
        assert factorized * live == pytest.approx(dense, rel=0.03)
        doped = ift.doped(64, 32, False)
        low = sum(p.numel() for p in doped.low_rank.parameters())
        assert dense * live + low == pytest.approx(dense, rel=0.05)
        assert ift.parallel(64, 32)(torch.randn(3, 64)).shape == (3, 32)
        assert sum(p.numel() for p in ift.parallel(64, 32, False).parameters()) == round(
            dense / live
        )
        x = torch.randn(2, 16, 6, 6)
        dense = 9 * 16 * 24
        for build in (ift.parallel, ift.factorized, ift.doped):
            conv = build(16, 24, False, kernel=3, padding=1, stride=2)
            assert conv(x).shape == (2, 24, 3, 3)
            low = getattr(conv, "low_rank", None)
            spare = 0 if low is None else sum(p.numel() for p in low.parameters())
            whole = sum(p.numel() for p in conv.parameters()) - spare
            assert whole * live + spare == pytest.approx(dense, rel=0.05)
        wide = ift.wide(16, 24, kernel=3)
        assert (wide.in_channels, wide.out_channels) == (
            round(16 * ift.width),
            round(24 * ift.width),
        )


def test_the_envelope_s_step_is_the_minimum_it_claims_to_be() -> None:
    z, d, c, k = torch.randn(7, dtype=torch.float64), torch.rand(7).double() + 0.5, 0.3, 3
    factor = wgsef_prox(z.abs(), k, c, d)

    def envelope(x: Tensor) -> float:
        """Of the penalty: min over theta, by a fine search of the multiplier."""
        slope = d.sqrt() * x.abs()
        low, high = 1e-9, 1e9
        for _ in range(200):
            mu = (low * high) ** 0.5
            low, high = (mu, high) if float((mu * slope).clamp(max=1).sum()) < k else (low, mu)
        theta = (high * slope).clamp(1e-300, 1)
        return float(0.5 * (d * x.square() / theta)[x != 0].sum())

    def objective(x: Tensor) -> float:
        return float(0.5 * (x - z).square().sum()) + c * envelope(x)

    best = objective(factor * z)
    for _ in range(300):
        nearby = factor * z + 10 ** (-4 * torch.rand(1).double()) * torch.randn(7).double()
        assert objective(nearby) >= best - 1e-9
    assert torch.equal(wgsef_prox(z.abs(), 3, 0.0), torch.ones(7).double())


def test_hesso_shrinks_a_part_in_each_period() -> None:
    model, layer = one_layer(6, 8)
    made = HESSO(model, 0.5, start=0, steps=6, periods=2)
    norms = []
    for _ in range(6):
        layer.weight.grad = torch.zeros(8, 6)
        layer.weight.grad[:, 0] = 0.1
        norms.append(layer.weight.detach().norm(dim=1))
        made.step()
    norms.append(layer.weight.detach().norm(dim=1))
    first = norms[3] == 0
    assert (int(first.sum()), int((norms[6] == 0).sum())) == (2, 4)
    for t, factor in enumerate((2 / 3, 1 / 2, 0)):
        torch.testing.assert_close(norms[t + 1][first], factor * norms[t][first])
    torch.testing.assert_close(norms[6][norms[6] > 0], norms[0][norms[6] > 0])
    made = HESSO(one_layer(6, 24)[0], 0.6, divisible=8)
    assert made.kept_of(made.layers[0]) == 8


def test_adasap_perturbs_the_least_neurons_most() -> None:
    model, layer = one_layer(6, 3)
    made = AdaSAP(model, 0.4, 10, 0.1, 0.5)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[2.0], [1.0], [3.0]]).expand(3, 6))
    w = layer.weight.detach().clone()
    layer.weight.grad = g = torch.randn(3, 6)
    unit = g / g.norm(dim=1, keepdim=True)
    with made.perturbed():
        rho = torch.tensor([[0.3], [0.5], [0.1]])
        torch.testing.assert_close(layer.weight.detach(), w + rho * unit)
        assert layer.weight.grad is None
    assert torch.equal(layer.weight, w)


def test_mask_sparsity_drives_the_masked_scales_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 10), nn.BatchNorm1d(10), nn.BatchNorm1d(10))
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    made = MaskSparsity(model, optimizer, select=2, sparsity=0.35, strength=0.1)
    with torch.no_grad():
        for norm in model[1:]:
            norm.weight.copy_(torch.randn(10))
    for step in range(4):
        before = [norm.weight.detach().clone() for norm in model[1:]]
        for norm in model[1:]:
            norm.weight.grad = torch.zeros(10)
        optimizer.step()
        for old, norm, mask in zip(before, model[1:], made.masks.values(), strict=True):
            chosen = torch.ones(10) if step < 2 else mask.float()
            torch.testing.assert_close(norm.weight.detach(), old - 0.1 * old.sign() * chosen)
        made.step()
    assert sum(int(mask.sum()) for mask in made.masks.values()) == 7
    other = MaskSparsity(copy.deepcopy(model), optimizer, select=2, sparsity=0.35)
    other.load_state_dict(made.state_dict())
    masks = made.finalize()
    assert (model[1].weight[masks["1"]] == 0).all()
    with pytest.raises(ValueError, match="no batch norm"):
        MaskSparsity(net(), optimizer, select=2)
