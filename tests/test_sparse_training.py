"""2:4 training: the projections and their constants, and the layer against plain torch."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from gossamer import _wide, reference
from gossamer.formats import Sparse24Panels
from gossamer.nn import SparseLinear, SparseTrainingLinear
from gossamer.projection24 import (
    add_dropped_24,
    hard_threshold_24,
    mvue_24,
    scale_24,
    soft_threshold_24,
    transposable_mask_24,
)
from gossamer.prune import magnitude_24
from torch import Tensor, nn

ODD = [(8, 16), (5, 10), (7, 3), (16, 33), (1, 1)]


@pytest.fixture(autouse=True)
def _one_thread(threads: int) -> None:
    torch.set_num_threads(1)  # the products are too small for more


def plain_soft(weight: Tensor) -> Tensor:
    padded = nn.functional.pad(weight, (0, -weight.shape[1] % 4)).unflatten(-1, (-1, 4))
    least = padded.abs().sort(-1).values[..., 1:2]
    soft = padded.sign() * (padded.abs() - least).clamp(min=0)
    return soft.flatten(1)[:, : weight.shape[1]]


@pytest.mark.parametrize("shape", ODD, ids=str)
def test_projections_are_what_they_are_called(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    dense, sparse = hard_threshold_24(weight)
    assert torch.equal(dense + 0.0, magnitude_24(weight) + 0.0)
    assert torch.equal(sparse.to_dense() + 0.0, dense + 0.0)
    torch.testing.assert_close(soft_threshold_24(weight)[0], plain_soft(weight))
    mask = transposable_mask_24(weight)
    for direction in (mask, mask.t()):
        padded = nn.functional.pad(direction, (0, -direction.shape[1] % 4))
        assert int(padded.unflatten(-1, (-1, 4)).sum(-1).max()) <= 2


def plain_soft_in_its_dtype(weight: Tensor, scale: float) -> Tensor:
    magnitude = nn.functional.pad(weight.abs(), (0, -weight.shape[1] % 4)).unflatten(-1, (-1, 4))
    left = (magnitude - magnitude.sort(-1).values[..., 1:2]).relu() * scale
    return torch.copysign(left.flatten(1)[:, : weight.shape[1]], weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_projections_are_those_of_plain_torch_to_the_bit(
    dtype: torch.dtype, cpu_target: str
) -> None:
    for shape in ((33, 136), (20, 37), (16, 64), (3, 1), (1, 8)):
        weight = torch.randn(shape).to(dtype)
        weight[::3] = (3 * weight[::3]).round() / 3  # many ties and zeros
        not_finite = weight.clone()
        not_finite[torch.rand(shape) < 0.2] = torch.nan
        not_finite[torch.rand(shape) < 0.2] = -torch.inf
        for given in (weight, not_finite):
            wanted = magnitude_24(given)
            for threads in (1, 3):
                torch.set_num_threads(threads)
                dense, sparse = hard_threshold_24(given)
                torch.testing.assert_close(dense, wanted, rtol=0, atol=0, equal_nan=True)
                values, indices = reference.sparse24_from_dense(wanted)
                assert torch.equal(sparse.indices, indices), (shape, threads)
                torch.testing.assert_close(sparse.values, values, rtol=0, atol=0, equal_nan=True)
        wanted = plain_soft_in_its_dtype(weight, 1.4827)
        dense, sparse = soft_threshold_24(weight, 1.4827)
        assert torch.equal(dense, wanted), shape
        for given, plain in zip(
            (sparse.values, sparse.indices), reference.sparse24_from_dense(wanted), strict=True
        ):
            assert torch.equal(given, plain), shape
        gathered = torch.ops.gossamer.sparse24_gather(weight, sparse.indices)
        assert torch.equal(gathered, reference.sparse24_gather(weight, sparse.indices)), shape
        sparse24 = soft_threshold_24(not_finite)[1].validate()  # two of four, whatever they are
        if shape[0] > 0 and dtype != torch.float64:
            panels = Sparse24Panels.from_sparse24(sparse24).to_sparse24()
            assert torch.equal(panels.indices, sparse24.indices)


def test_what_is_dropped_decays() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        weight, gradient = torch.randn(2, 5, 12).to(dtype)
        kept = magnitude_24(weight)
        for given in (gradient.clone(), gradient.t().contiguous().t()):
            add_dropped_24(given, weight, kept, 0.25)
            wanted = gradient.double() + 0.25 * torch.where(kept == 0, weight, 0).double()
            torch.testing.assert_close(given, wanted.to(dtype))
            assert torch.equal(given[kept != 0], gradient[kept != 0])


def test_ties_and_what_is_no_number_are_pruned_as_magnitude_24_does() -> None:
    weight = torch.ones(4, 16)
    weight[1, :4] = torch.tensor([torch.nan, torch.inf, torch.inf, 1])
    for given in (weight, torch.zeros(4, 16)):
        torch.testing.assert_close(
            hard_threshold_24(given)[0], magnitude_24(given), equal_nan=True, rtol=0, atol=0
        )


def test_a_transposable_mask_is_the_best_of_all() -> None:
    weight = torch.randn(4, 4).abs()
    pairs = list(itertools.combinations(range(4), 2))
    best = max(
        sum(float(weight[row, column]) for row, pair in enumerate(rows) for column in pair)
        for rows in itertools.product(pairs, repeat=4)
        if all(sum(column in pair for pair in rows) == 2 for column in range(4))
    )
    assert float(weight[transposable_mask_24(weight)].sum()) == pytest.approx(best)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_transposable_mask_of_any_numbers(dtype: torch.dtype) -> None:
    weight = torch.randn(8, 12, dtype=dtype)
    wanted = transposable_mask_24(weight)
    for exponent in (-120, 126) if dtype == torch.float32 else (-1000, 1000):
        scaled = weight * torch.tensor(2.0, dtype=dtype) ** exponent
        assert torch.equal(transposable_mask_24(scaled), wanted)
    weight = torch.arange(1.0, 17, dtype=dtype).view(4, 4)
    for places in ([(0, 0)], [(0, 0), (0, 1)], [(1, 2), (2, 2), (2, 3)]):
        given = weight.clone()
        for row, column in places:
            given[row, column] = torch.nan if row == 2 else -torch.inf
        large = given.where(given.isfinite(), 1000)
        mask = transposable_mask_24(given)
        assert all(mask[place] for place in places)
        assert torch.equal(mask, transposable_mask_24(large))
    assert torch.equal(
        transposable_mask_24(torch.full((4, 4), torch.inf, dtype=dtype)),
        transposable_mask_24(torch.zeros(4, 4)),
    )


def test_constants_of_large_weights() -> None:
    normal, uniform = torch.randn(1000, 1000), torch.rand(1000, 1000) - 0.5
    assert scale_24(normal) == pytest.approx(1.483, abs=0.004)
    assert scale_24(uniform) == pytest.approx(1.751, abs=0.004)
    kept = hard_threshold_24(normal)[0].square().sum() / normal.square().sum()
    assert float(kept) == pytest.approx(0.868, abs=0.002)
    assert scale_24(torch.zeros(4, 4)) == 1


def test_the_estimate_is_unbiased_and_of_least_variance() -> None:
    groups = torch.tensor(
        [[1.0, -2, 3, 4], [0, 0, 0, 5], [0, 0, 0, 0], [1, 1, -1, 10], [2, 2, 2, 2], [0, 3, 0, -4]]
    )
    generator = torch.Generator().manual_seed(0)
    draws = 40_000
    drawn = mvue_24(groups.repeat(draws, 1), generator).view(draws, *groups.shape)
    assert int((drawn != 0).sum(-1).max()) <= 2
    p = torch.tensor(
        [
            *([0.2, 0.4, 0.6, 0.8], [0, 0, 0, 1], [0, 0, 0, 0], [1 / 3, 1 / 3, 1 / 3, 1]),
            *([0.5, 0.5, 0.5, 0.5], [0, 1, 0, 1]),
        ]
    )
    variance = torch.where(p > 0, groups.square() * (1 / p.clamp(min=1e-9) - 1), 0)
    error = drawn.double().mean(0) - groups
    assert (error.abs() <= 4.5 * (variance / draws).sqrt() + 1e-5).all()  # of 24, 1 in 6000 seeds
    torch.testing.assert_close(drawn.var(0), variance, rtol=0.05, atol=1e-4)
    # In each dtype near both ends of its range, and a p that float16 would round to 0.
    for dtype, size in ((torch.float64, 1e300), (torch.float64, 1e-300), (torch.float32, 3e37)):
        drawn = mvue_24((size * groups.to(dtype)).repeat(8000, 1), generator).view(-1, 6, 4)
        mean = (drawn / size).mean(0)
        torch.testing.assert_close(mean, groups.to(dtype), rtol=0.1, atol=0.1)
    tiny = torch.tensor([[6e4, 1e4, 1e-4, 6e-8]], dtype=torch.float16).repeat(1000, 1)
    assert mvue_24(tiny, generator).isfinite().all()


def test_an_estimate_beside_a_dominant_entry_is_two_of_four() -> None:
    small = torch.tensor([1.0, 1.7e-7, 1.7e-7, 5e-8]).repeat(4000, 1)
    uneven = torch.randn(20_000, 4) * (6 * torch.randn(20_000, 4)).exp()
    for gradient in (small, uneven, uneven.bfloat16()):
        drawn = mvue_24(gradient)
        assert int((drawn != 0).sum(-1).max()) <= 2
        assert bool(drawn.isfinite().all())
    assert bool((mvue_24(small) != 0).any(0).all())  # what is small is drawn, too


@pytest.mark.parametrize("projection", ["hard", "soft", "transposable"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_layer_multiplies_the_projection_and_trains_the_weight(
    projection: str, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    if dtype == torch.float64:
        request.getfixturevalue("serial_target")
    tolerance = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {}
    for rows, inputs, outputs in ((3, 10, 7), (300, 32, 20), (0, 8, 8)):
        layer = SparseTrainingLinear(inputs, outputs, projection=projection, dtype=dtype)
        dense = layer.weight.detach()
        if projection == "hard":
            expected = magnitude_24(dense)
        elif projection == "soft":
            expected = plain_soft(dense) * layer.scale.to(dtype)
        else:
            expected = dense * transposable_mask_24(dense)
        torch.testing.assert_close(layer.projected(), expected)
        x = torch.randn(2, rows, inputs, dtype=dtype, requires_grad=True)
        twin = x.detach().clone().requires_grad_()
        effective = expected.clone().requires_grad_()
        y = layer(x)
        dy = torch.randn_like(y)
        other = nn.functional.linear(twin, effective, layer.bias)
        y.backward(dy)
        other.backward(dy)
        torch.testing.assert_close(y, other, **tolerance)
        torch.testing.assert_close(x.grad, twin.grad, **tolerance)
        torch.testing.assert_close(layer.weight.grad, effective.grad, **tolerance)


def test_the_estimated_gradient_has_the_mean_of_the_exact_one() -> None:
    exact = SparseTrainingLinear(8, 8, bias=False)
    estimated = SparseTrainingLinear.from_dense(copy.deepcopy(exact), mvue=True)
    x, draws = torch.randn(16, 8), 100
    (exact(x).square().sum() * draws).backward()
    samples = []
    for _ in range(draws):
        estimated.weight.grad = None
        estimated(x).square().sum().backward()
        samples.append(estimated.weight.grad)
    mean, spread = torch.stack(samples).mean(0), torch.stack(samples).std(0) / draws**0.5
    assert ((mean - exact.weight.grad / draws).abs() <= 5 * spread + 1e-4).all()


def test_autocast_multiplies_in_its_dtype_and_keeps_the_master() -> None:
    layer = SparseTrainingLinear(64, 32)
    x = torch.randn(5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert (y.dtype, layer.weight.dtype, layer.weight.grad.dtype) == (
        torch.bfloat16,
        torch.float32,
        torch.float32,
    )
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("projection", ["hard", "soft", "transposable"])
def test_training_goes_on_to_the_bit(projection: str) -> None:
    refresh = 1 if projection == "soft" else 3

    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        layer = SparseTrainingLinear(12, 8, projection=projection, refresh=refresh)
        return layer, torch.optim.SGD(layer.parameters(), 0.05, momentum=0.9)

    def train(layer: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            x = torch.randn(6, 12, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            layer(x).square().sum().backward()
            optimizer.step()

    layer, optimizer = make()
    train(layer, optimizer, range(10))
    other, its_optimizer = make()
    train(other, its_optimizer, range(5))
    state = copy.deepcopy((other.state_dict(), its_optimizer.state_dict()))
    resumed, its_optimizer = make()
    resumed.load_state_dict(state[0])
    its_optimizer.load_state_dict(state[1])
    train(resumed, its_optimizer, range(5, 10))
    assert torch.equal(resumed.weight, layer.weight)
    assert torch.equal(resumed.mask, layer.mask)
    assert torch.equal(copy.deepcopy(resumed).mask, layer.mask)


def test_the_mask_is_searched_every_so_many_steps() -> None:
    layer = SparseTrainingLinear(8, 4, refresh=3)
    x, masks = torch.randn(2, 8), []
    for _ in range(7):
        layer(x)
        layer(x)  # a second batch of the same step
        masks.append(layer.mask)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(4, 8))
    same = [torch.equal(a, b) for a, b in itertools.pairwise(masks)]
    assert same == [True, True, False, True, True, False]


@pytest.mark.parametrize("shape", [(8,), (2, 8), (3, 2, 8)], ids=str)
def test_results_may_be_written_to(shape: tuple[int, ...]) -> None:
    for layer in (SparseTrainingLinear(8, 4), SparseLinear(8, 4)):
        x = torch.randn(shape)
        (wanted,) = torch.autograd.grad(layer(x).relu().sum(), layer.bias)
        (given,) = torch.autograd.grad(layer(x).relu_().sum(), layer.bias)
        assert torch.equal(given, wanted)


def test_a_bad_mask_is_not_loaded() -> None:
    layer, other = (SparseTrainingLinear(7, 4, refresh=9) for _ in range(2))
    other(torch.ones(2, 7))
    state = other.state_dict()
    bad = {**state, "indices": torch.full_like(layer.indices, 0xFF)}
    before = layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"indices: .*invalid"):
        layer.load_state_dict(bad)
    assert torch.equal(layer.weight, before)
    layer.load_state_dict(state)
    assert torch.equal(layer(torch.ones(2, 7)), other(torch.ones(2, 7)))


def test_a_layer_made_in_inference_mode_follows_its_weight() -> None:
    with torch.inference_mode():
        for projection in ("hard", "soft"):
            layer, x = SparseTrainingLinear(8, 4, projection=projection), torch.randn(2, 8)
            for _ in range(2):
                wanted = hard_threshold_24(layer.weight)[0]
                if projection == "soft":
                    wanted = soft_threshold_24(layer.weight, float(layer.scale))[0]
                torch.testing.assert_close(layer(x), nn.functional.linear(x, wanted, layer.bias))
                layer.weight.copy_(torch.randn(4, 8))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by torch
@pytest.mark.parametrize("loops", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("projection", ["hard", "soft"])
def test_a_compiled_step_is_the_eager_one(
    projection: str, dtype: torch.dtype, loops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_wide, "_LOOPS", frozenset([torch.bfloat16] if loops else []))
    torch._dynamo.reset()  # each case compiles the same code anew, and there is a limit
    layers = [SparseTrainingLinear(18, 8, projection=projection).to(dtype) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    run = torch.compile(layers[0], fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 300, 7):  # by panels and without
        x = torch.randn(rows, 18).to(dtype)
        for layer, call in zip(layers, (run, layers[1]), strict=True):
            layer.zero_grad()
            call(x).square().mean().backward()
            with torch.no_grad():
                layer.weight.sub_(layer.weight.grad)
        with torch.no_grad():
            assert torch.equal(run(x), layers[1](x))
    for held, same in zip(*(layer.state_dict().values() for layer in layers), strict=True):
        assert torch.equal(held, same)


def test_a_frozen_scale_stays_what_it_is() -> None:
    layer = SparseTrainingLinear(16, 8, projection="soft")
    state, scale = copy.deepcopy(layer.state_dict()), float(layer.scale)
    assert float(layer.bfloat16().float().half().scale) == scale
    assert layer.float().scale.dtype == torch.float64
    for change, text in (
        ({"scale": torch.tensor(math.nan)}, "scale: nan is not finite"),
        ({"age": torch.tensor(-3)}, "age: -3 steps"),
    ):
        with pytest.raises(RuntimeError, match=text):
            layer.load_state_dict({**state, **change})
        assert float(layer.scale) == scale


def test_bad_use_of_the_layer() -> None:
    with pytest.raises(ValueError, match="projection 'nope'"):
        SparseTrainingLinear(4, 4, projection="nope")
    with pytest.raises(ValueError, match="refresh 0"):
        SparseTrainingLinear(4, 4, refresh=0)
    with pytest.raises(ValueError, match="soft threshold moves"):
        SparseTrainingLinear(4, 4, projection="soft", refresh=2)
    with pytest.raises(TypeError, match=r"x is torch\.float64"):
        SparseTrainingLinear(4, 4)(torch.randn(2, 4, dtype=torch.float64))


@pytest.mark.parametrize("projection", ["hard", "soft", "transposable"])
def test_validation_in_inference_mode_between_steps(projection: str) -> None:
    layer = SparseTrainingLinear(16, 8, projection=projection)
    x = torch.randn(4, 16, requires_grad=True)
    for _ in range(2):
        with torch.inference_mode():
            expected = layer(x)
        y = layer(x)
        assert torch.equal(y, expected)
        y.sum().backward()
        with torch.no_grad():
            layer.weight -= 0.1 * layer.weight.grad


@pytest.mark.parametrize("in_features", [36, 37])
def test_transposable_masks_last_where_weights_are_zero_or_groups_short(in_features: int) -> None:
    layer = SparseTrainingLinear(in_features, 8, projection="transposable", refresh=4)
    with torch.no_grad():
        layer.weight[:, ::3] = 0
    x = torch.randn(4, in_features, requires_grad=True)
    for _ in range(6):
        y = layer(x)
        assert torch.equal(y, copy.deepcopy(layer)(x))
        y.square().mean().backward()
        with torch.no_grad():
            layer.weight -= 0.1 * layer.weight.grad
        layer.weight.grad = None


@pytest.mark.parametrize("kind", ["Adam", "AdamW", "SGD", "Adagrad"])
def test_fused_optimizers_change_the_weight_as_others_do(kind: str) -> None:
    def trained(fused: bool) -> list[Tensor]:
        torch.manual_seed(0)
        layer, other, x = (
            SparseTrainingLinear(16, 8, refresh=2),
            nn.Linear(16, 8),
            torch.randn(4, 16),
        )
        optimizer = getattr(torch.optim, kind)(layer.parameters(), 0.1, fused=fused)
        another = torch.optim.SGD(other.parameters(), 0.1, fused=True)
        found = []
        for _ in range(5):
            y = layer(x)
            found += [y.detach(), layer.age.clone(), layer.mask]
            y.square().sum().backward()
            other(x).sum().backward()
            optimizer.step()
            layer(x)
            another.step()  # of weights that are none of the layer's
        return found

    for fused, plain in zip(trained(True), trained(False), strict=True):
        torch.testing.assert_close(fused, plain)


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_clear_gradients_or_change_nothing(fused: bool) -> None:
    layer, x = SparseTrainingLinear(16, 8, refresh=3), torch.randn(4, 16)
    optimizer = torch.optim.SGD(layer.parameters(), 0.5, fused=fused)
    optimizer.register_step_post_hook(lambda *_: optimizer.zero_grad())
    y = layer(x)
    y.square().sum().backward()
    optimizer.step()
    assert not torch.equal(layer(x), y)
    assert int(layer.age) == 1
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale((layer(x) * torch.inf).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    layer(x)
    assert int(layer.age) == 1


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_weights_that_are_made_for_each_pass() -> None:
    layer, x = SparseTrainingLinear(64, 8, bias=False), torch.randn(5, 64)
    plain = SparseTrainingLinear(64, 8, bias=False)
    for _ in range(20):
        weight = torch.randn(8, 64)
        y = torch.func.functional_call(plain, {"weight": weight * 2}, (x,))
        torch.testing.assert_close(y, x @ magnitude_24(2 * weight).t())
        del y
    nn.utils.parametrize.register_parametrization(layer, "weight", Twice())
    with torch.no_grad():
        for _ in range(20):
            weight = layer.parametrizations.weight.original.normal_()
            torch.testing.assert_close(layer(x), x @ magnitude_24(2 * weight).t())


@pytest.mark.parametrize("projection", ["hard", "transposable"])
def test_what_was_dropped_may_be_what_changes(projection: str) -> None:
    layer, eye = SparseTrainingLinear(4, 4, False, projection), torch.eye(4)
    weight = torch.eye(4) + torch.eye(4).roll(1, 0) + torch.rand(4, 4) / 8
    layer.weight = nn.Parameter(weight.clone())
    layer(eye)
    weight[0, 2] = 100
    layer.weight = nn.Parameter(weight.clone())
    assert layer(eye)[2, 0] == 100
    optimizer = torch.optim.SGD(layer.parameters(), 10, fused=True)
    layer(torch.eye(4)[3:])[:, 0].sum().backward()
    optimizer.step()
    assert layer(eye)[3, 0] == layer.weight[0, 3] < -8


def test_the_mask_of_short_groups_is_what_is_multiplied() -> None:
    for in_features in (5, 13, 14, 15):
        layer = SparseTrainingLinear(in_features, 8, projection="transposable")
        assert torch.equal(layer.mask, layer.projected() != 0)


def test_parameters_may_be_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
    layer, x = SparseTrainingLinear(16, 8), torch.randn(4, 16)
    layer(x).sum().backward()
    layer.load_state_dict(SparseTrainingLinear(16, 8).state_dict())
    assert layer.double()(x.double()).dtype == torch.float64


def test_transforms_are_refused_by_name() -> None:
    layer, x = SparseTrainingLinear(16, 8), torch.randn(4, 16)
    weights = dict(layer.named_parameters())

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(layer, weights, (x,)).square().sum()

    for call in (
        lambda: torch.func.grad(loss)(weights),
        lambda: torch.func.vmap(layer)(x),
        lambda: torch.func.jvp(layer, (x,), (x,)),
    ):
        with pytest.raises(RuntimeError, match=r"Linear: no transform of torch\.func"):
            call()


def test_loading_to_and_from_meta() -> None:
    trained, x = SparseTrainingLinear(18, 8, refresh=3), torch.randn(4, 18)
    trained(x)
    state = trained.state_dict()
    empty = SparseTrainingLinear(18, 8, refresh=3, device="meta")
    with pytest.warns(UserWarning, match="no-op"):
        empty.load_state_dict(state)
    layer = SparseTrainingLinear(18, 8, refresh=3)
    layer.load_state_dict(empty.state_dict(), assign=True)
    assert layer.weight.is_meta
    for assign in (True, False):
        layer = SparseTrainingLinear(18, 8, refresh=3, device="meta")
        if not assign:
            layer.to_empty(device="cpu")
        layer.load_state_dict(state, assign=assign)
        assert torch.equal(layer(x), trained(x))
        with torch.no_grad():  # the mask is the loaded one, until it is searched for again
            layer.weight.copy_(layer.weight.flip(1))
            trained.weight.copy_(trained.weight.flip(1))
        assert torch.equal(layer(x), trained(x))
        trained.load_state_dict(state)


@pytest.mark.parametrize("mvue", [False, True])
@pytest.mark.parametrize(
    ("projection", "refresh"),
    [("hard", 1), ("hard", 2), ("soft", 1), ("transposable", 1), ("transposable", 2)],
)
def test_on_meta_there_are_shapes(projection: str, refresh: int, mvue: bool) -> None:
    layer = SparseTrainingLinear(18, 8, True, projection, refresh, mvue, device="meta")
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    for rows in (4, 300, 4):
        x = torch.empty(rows, 18, device="meta", requires_grad=True)
        y = layer(x)
        y.sum().backward()
        optimizer.step()
        assert y.shape == (rows, 8)
        assert x.grad.shape == x.shape
        assert [p.grad.shape for p in layer.parameters()] == [(8, 18), (8,)]
