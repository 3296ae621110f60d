"""Sparsifier: exact sparsity, masks as a plain sort makes them, and training that goes on."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gossamer
import pytest
import torch
from gossamer import Block, sparsify
from gossamer.prune import magnitude_24, magnitude_blocks
from gossamer.sparsify import (
    NM,
    Blocks,
    ConstantFanIn,
    Cubic,
    DropAndGrow,
    DropGrow,
    Filters,
    LotteryRounds,
    Magnitude,
    OneShot,
    Pattern,
    PlateauBisection,
    RowBalanced,
    Score,
    Sparsifier,
    Unstructured,
)
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from two_ranks import on_two_ranks


@pytest.fixture(autouse=True)
def _one_thread(threads: int) -> None:
    torch.set_num_threads(1)  # the products are too small for more


PATTERNS: list[Pattern] = [
    Unstructured(),
    NM(2, 4),
    NM(1, 8),
    RowBalanced(3),
    ConstantFanIn(),
    Blocks(Block(4, 3)),
    Filters(0),
    Filters(1),
]


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(9, 12, 3), nn.Flatten(), nn.Linear(12, 21), nn.ReLU(), nn.Linear(21, 12)
    )


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, sparsifier: Sparsifier, steps: range
) -> None:
    for step in steps:
        g = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 9, 3, 3, generator=g), torch.randn(8, 12, generator=g)
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        sparsifier.step()
        optimizer.zero_grad()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)


def expected_keep(pattern: Pattern, shape: torch.Size, sparsity: float) -> int:
    """Entries that live, counted by hand."""
    rows, rest = shape[0], math.prod(shape[1:])

    def half_up(x: float) -> int:
        return max(1, math.floor(x + 0.5))

    if isinstance(pattern, NM):
        whole, tail = divmod(shape[1], pattern.m)
        return rows * math.prod(shape[2:]) * (whole * pattern.n + min(tail, pattern.n))
    if isinstance(pattern, RowBalanced):
        bank = rest // pattern.banks
        return rows * pattern.banks * half_up(bank * (1 - sparsity))
    if isinstance(pattern, Filters):
        kept = half_up(shape[pattern.dim] * (1 - sparsity))
        return kept * rows * rest // shape[pattern.dim]
    return half_up(rows * rest * (1 - sparsity))


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_sparsity_is_exact_and_the_best_are_kept(pattern: Pattern) -> None:
    model = net()
    dense = copy.deepcopy(model)
    sparsity = 1 - pattern.n / pattern.m if isinstance(pattern, NM) else 0.62
    sparsifier = Sparsifier(model, pattern, Magnitude(), OneShot(sparsity))
    for layer in sparsifier.layers:
        before = dense.get_submodule(layer.name).weight.detach()
        assert torch.equal(layer.weight, before * layer.mask), layer.name
        if isinstance(pattern, Blocks):  # kept blocks are those of magnitude_blocks
            kept = magnitude_blocks(before, pattern.block, 1 - sparsity)
            assert torch.equal(kept, layer.weight), layer.name
            continue
        assert int(layer.mask.sum()) == expected_keep(pattern, before.shape, sparsity), layer.name
        if pattern == NM(2, 4):
            assert torch.equal(magnitude_24(before, dim=1), layer.weight)


def test_ties_keep_the_lower_index_and_nan_is_the_largest() -> None:
    layer = nn.Linear(8, 2, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1)
        layer.weight[1, 7] = torch.nan
    Sparsifier(nn.Sequential(layer), Unstructured(), Magnitude(), OneShot(0.75))
    assert layer.weight.isnan().nonzero().tolist() == [[1, 7]]
    assert layer.weight[0].nonzero().flatten().tolist() == [0, 1, 2]


@pytest.mark.parametrize("distribution", ["erk", "global"])
def test_the_whole_is_exact_however_it_is_shared_out(distribution: str) -> None:
    for sparsity in (0.0, 0.31, 0.9, 0.999):
        model = net()
        entries = sum(m.weight.numel() for m in model if hasattr(m, "weight"))
        made = Sparsifier(
            model, Unstructured(), Magnitude(), OneShot(sparsity), distribution=distribution
        )
        kept = sum(int(mask.sum()) for mask in made.masks.values())
        assert kept == max(3, math.floor(entries * (1 - sparsity) + 0.5))
        assert all(mask.any() for mask in made.masks.values())
    if distribution == "erk":
        dense = {layer.name: 1 - layer.sparsity for layer in made.layers}
        assert dense["0"] < dense["4"]


def test_the_cubic_schedule_has_the_values_of_the_paper() -> None:
    cubic = Cubic(0.9, 100, 1100)
    values = [cubic.at(100 + round(1000 * part)) for part in (0, 0.1, 0.25, 0.5, 0.75, 1)]
    assert values == pytest.approx([0, 0.244, 0.520, 0.788, 0.886, 0.900], abs=6e-4)
    for schedule, first in ((Cubic(0.9, 0, 0), 0.9), (Cubic(0.9, 0, 9, initial=0.5), 0.5)):
        made = Sparsifier(nn.Linear(20, 20), Unstructured(), Magnitude(), schedule)
        assert made.sparsity == pytest.approx(first)  # before the first step
    grow = DropAndGrow(0.9, 1000)
    assert [grow.at(t) for t in (0, 500, 1000)] == pytest.approx([0.3, 0.15, 0])


SCORES: dict[str, Callable[[], Score]] = {
    name: getattr(sparsify, name)
    for name in (
        "SNIP",
        "Fisher",
        "FisherPruning",
        "Momentum",
        "Taylor",
        "WandaScore",
        "SecondOrder",
        "WeightGradient",
        "Gradient",
    )
}


@pytest.mark.parametrize("name", SCORES)
def test_scores_are_those_of_their_papers(name: str) -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    (layer,) = model
    score = SCORES[name]()
    made = Sparsifier(model, Unstructured(), score, OneShot(0.5, at=99))
    inputs, grads = [], []
    for _ in range(3):
        x = torch.randn(7, 6)
        model(x).square().sum().backward()
        inputs.append(x)
        grads.append(layer.weight.grad.clone())
        made.step()
        last = layer.weight.grad.clone()
        layer.zero_grad()
    layer.weight.grad = last
    w, g, x = layer.weight.detach(), torch.stack(grads), torch.cat(inputs)
    hessian = (x.t() @ x / len(x)).double()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(6)
    smooth = torch.zeros_like(w)
    for each in grads:
        smooth = 0.9 * smooth + 0.1 * each
    expected = {
        "SNIP": (w * g.mean(0)).abs(),
        "Fisher": g.square().mean(0),
        "FisherPruning": w.square() * g.square().mean(0),
        "Momentum": smooth.abs(),
        "Taylor": (w * g).mean(0),
        "WandaScore": w.abs() * (x.square().sum(0) / len(x)).sqrt(),
        "SecondOrder": (w.double().square() / hessian.inverse().diagonal()).float(),
        "WeightGradient": (w * g[-1]).abs(),
        "Gradient": g[-1].abs(),
    }[name]
    torch.testing.assert_close(score(made.layers[0]), expected)
    assert len(layer._forward_hooks) == (name in ("WandaScore", "SecondOrder"))
    made.detach()
    assert not layer._forward_hooks


def test_a_copy_of_the_model_has_a_score_of_its_own() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    made = Sparsifier(model, "2:4", sparsify.WandaScore(), OneShot(0.5, at=1))
    model(torch.randn(5, 8))
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for other in (copy.deepcopy(model), torch.load(saved, weights_only=False)):
        other(torch.randn(7, 8))
    assert made.score.rows == {"0": 5}


def test_lottery_rounds_prune_a_fifth_and_rewind() -> None:
    model = net()
    begin = copy.deepcopy(model.state_dict())
    optimizer = sgd(model)
    schedule = LotteryRounds(3, every=4)
    made = Sparsifier(
        model, Unstructured(), Magnitude(), schedule, optimizer=optimizer, distribution="global"
    )
    train(model, optimizer, made, range(12))
    assert made.sparsity == pytest.approx(1 - 0.8**3, abs=1e-3)
    for layer in made.layers:
        assert torch.equal(layer.weight, begin[f"{layer.name}.weight"] * layer.mask)
    assert torch.equal(model[2].bias, begin["2.bias"])


def test_a_plateau_prunes_what_the_tolerance_allows() -> None:
    model = nn.Sequential(nn.Linear(10, 10, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(100).view(10, 10))

    def loss() -> float:  # 1 until half of the entries are gone, then 2
        return 1.0 if int((model[0].weight == 0).sum()) <= 50 else 2.0

    schedule = PlateauBisection(0.9, loss, every=1, tolerance=0.1)
    made = Sparsifier(model, Unstructured(), Magnitude(), schedule)
    made.step()
    assert 49 <= int((model[0].weight == 0).sum()) <= 50
    assert torch.equal(model[0].weight.flatten()[50:], torch.arange(50.0, 100.0))


def test_accumulation_and_a_scaler_see_what_one_large_batch_sees() -> None:
    x, y = torch.randn(8, 9, 3, 3), torch.randn(8, 12)
    masks = []
    for way in ("whole", "accumulated", "scaled"):
        model = net()
        optimizer = sgd(model)
        made = Sparsifier(model, Unstructured(), sparsify.SNIP(), OneShot(0.5, at=1))
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=way == "scaled")
        for part in (slice(0, 4), slice(4, 8)) if way == "accumulated" else (slice(0, 8),):
            loss = nn.functional.mse_loss(model(x[part]), y[part], reduction="sum") / 8
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        made.step()
        masks.append(made.masks)
    for name, mask in masks[0].items():
        assert all(torch.equal(mask, other[name]) for other in masks[1:]), name
    # A step that overflowed is none.
    model[0].weight.grad.fill_(torch.inf)
    made.step()
    assert made.steps == 1


def _masks_and_weights(rank: int, path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model = nn.parallel.DistributedDataParallel(net())
    optimizer = sgd(model)
    made = DropGrow(  # the score is of local inputs, so that it differs between the ranks
        model,
        Unstructured(),
        sparsify.WandaScore(),
        None,
        DropAndGrow(0.7, 20, every=3),
        deviation=0.1,
        optimizer=optimizer,
        distribution="erk",
    )
    for step in range(8):
        g = torch.Generator().manual_seed(10 * step + rank)
        model(torch.randn(4, 9, 3, 3, generator=g)).square().mean().backward()
        optimizer.step()
        made.step()
        optimizer.zero_grad()
    return made.masks, model.module.state_dict()


def test_all_ranks_have_the_same_masks(tmp_path: Path) -> None:
    (masks, weights), (others, other_weights) = on_two_ranks(_masks_and_weights, tmp_path)
    for name, mask in masks.items():
        assert torch.equal(mask, others[name])
        assert not mask.all()
    for name, weight in weights.items():
        assert torch.equal(weight, other_weights[name]), name


def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    made = Sparsifier(net(), "2:4", Magnitude(), OneShot(0.5))
    state = made.state_dict()
    other = nn.Sequential(nn.Linear(12, 8))
    with pytest.raises(ValueError, match="masks of another model: 0 has units"):
        Sparsifier(other, "2:4", Magnitude(), OneShot(0.5)).load_state_dict(state)
    with pytest.raises(ValueError, match=r"pattern of the state is 'NM\(n=2, m=4\)'"):
        Sparsifier(net(), Unstructured(), Magnitude(), OneShot(0.5)).load_state_dict(state)
    with pytest.raises(ValueError, match=r"score of the state is \['Magnitude'\]"):
        Sparsifier(net(), "2:4", sparsify.SNIP(), OneShot(0.5, at=1)).load_state_dict(state)
    with pytest.raises(ValueError, match="recipe"):
        made.load_state_dict({**state, "recipe": "Other"})
    masks = {name: mask.to(torch.uint8) for name, mask in state["masks"].items()}
    for change, text in (
        ({"masks": masks}, r"the mask of 0 is torch.uint8, expected torch.bool"),
        ({"masks": list(masks)}, "masks are a list, expected a dict"),
        ({"steps": -1}, "the state is of -1 steps"),
    ):
        with pytest.raises(ValueError, match=text):
            made.load_state_dict({**state, **change})
    with pytest.raises(ValueError, match="the state has no 'history'"):
        made.load_state_dict({k: v for k, v in state.items() if k != "history"})
    saved = io.BytesIO()
    torch.save(state, saved)
    saved.seek(0)
    made.load_state_dict(torch.load(saved, weights_only=True))


KERNELS: dict[str, Callable[[nn.Module, torch.optim.Optimizer, bool], Sparsifier]] = {
    "GMP": lambda m, o, k: sparsify.GMP(m, 0.7, 2, 8, 3, Block(4, 4), optimizer=o, kernels=k),
    "GMP 2:4": lambda m, o, k: sparsify.GMP(
        m, 0.5, 2, 8, 3, "2:4", optimizer=o, exclude="0", kernels=k
    ),
    "GMP unstructured": lambda m, o, k: sparsify.GMP(
        m, 0.7, 2, 8, 3, optimizer=o, exclude="0", kernels=k
    ),
    "SET": lambda m, o, k: sparsify.SET(m, 0.7, 10, 3, pattern=Block(4, 3), optimizer=o, kernels=k),
    "RigL": lambda m, o, k: sparsify.RigL(
        m, 0.7, 10, 3, pattern=Block(2, 5), optimizer=o, kernels=k
    ),
    "SparseMomentum": lambda m, o, k: sparsify.SparseMomentum(
        m, 10, 3, 0.7, pattern=Block(4, 4), optimizer=o, kernels=k
    ),
    "SRSTE": lambda m, o, k: sparsify.SRSTE(
        m, o, Block(4, 3), sparsity=0.7, decay=0.1, refresh=2, kernels=k
    ),
    "LOBSTER": lambda m, o, k: sparsify.LOBSTER(
        m, 0.7, lambda: 1.0, every=4, pattern=Block(4, 4), optimizer=o, kernels=k
    ),
}


@pytest.mark.parametrize("name", KERNELS)
def test_training_through_kernels_is_training_under_masks(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    for op in ("blocksparse_linear", "blocksparse_conv", "sparse24_linear", "csr_linear"):
        inner = getattr(sparsify.kernels, op)
        counted = lambda *args, inner=inner, op=op: (calls.append(op), inner(*args))[1]  # noqa: E731
        monkeypatch.setattr(sparsify.kernels, op, counted)
    weights, masks = [], []
    for kernels in (False, True):
        model = net().double()
        optimizer = sgd(model)
        made = KERNELS[name](model, optimizer, kernels)
        for step in range(10):
            g = torch.Generator().manual_seed(step)
            x = torch.randn(8, 9, 3, 3, generator=g, dtype=torch.float64)
            (model(x) - 1).square().mean().backward()
            optimizer.step()
            made.step()
            optimizer.zero_grad()
        weights.append({n.name: (n.weight.detach(), n.module.bias.detach()) for n in made.layers})
        masks.append(made.masks)
        assert (len(calls) > 0) == (kernels and name != "SparseMomentum")
    for key, mask in masks[0].items():
        assert torch.equal(mask, masks[1][key]), key
    for key, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][key])
    if name == "RigL":  # dense where the gradient of all is read: of the steps 2, 5 and 8
        assert len(calls) == 7 * 3
    model.float()
    assert made.finalize(force=True).layers[-1].swapped
    with pytest.raises(ValueError, match="0: no kernels to train Unstructured"):
        sparsify.GMP(net(), 0.5, 1, 2, kernels=True)


@pytest.mark.parametrize("pattern", ["2:4", Unstructured(), Block(4, 4)], ids=str)
def test_kernels_read_the_mask_whatever_the_weight_has(pattern: Any) -> None:
    model, dense, x = nn.Sequential(nn.Linear(11, 8)), nn.Linear(11, 8), torch.randn(11)
    made = Sparsifier(model, pattern, Magnitude(), OneShot(0.5), kernels=True)
    model[0].load_state_dict(dense.state_dict())
    y = model[0](input=x)
    torch.testing.assert_close(y, x @ (dense.weight * made.layers[0].mask).t() + dense.bias)
    y.sum().backward()
    assert (model[0].weight.grad != 0).equal(made.layers[0].mask & (x != 0))


def test_a_group_of_three_columns_on_its_way_to_2_of_4_is_dense() -> None:
    model, x = nn.Sequential(nn.Linear(11, 8)), torch.randn(2, 11)
    with torch.no_grad():
        model[0].weight[:, 8:] *= 100
    made = Sparsifier(model, "2:4", Magnitude(), OneShot(0.41), kernels=True)
    assert made.layers[0].mask[:, 8:].all(1).any()
    torch.testing.assert_close(model(x), nn.functional.linear(x, model[0].weight, model[0].bias))


@pytest.mark.parametrize("layer", [nn.Linear(8, 8), nn.Conv2d(8, 8, 3, padding=1)], ids=str)
def test_straight_through_blocks_take_what_has_no_batch(layer: Any) -> None:
    x = torch.randn(8, 5, 5)[(...,) if isinstance(layer, nn.Conv2d) else (slice(None), 0, 0)]
    model = nn.Sequential(layer)
    sparsify.SRSTE(model, sgd(model), Block(4, 4), sparsity=0.5, kernels=True)
    model(x).sum().backward()
    alone = model[0].weight.grad.clone()
    model[0].weight.grad = None
    model(x[None]).sum().backward()
    torch.testing.assert_close(alone, model[0].weight.grad)


COPIED: dict[str, Callable[[nn.Module, Any], Sparsifier]] = {
    "SET": lambda m, o: sparsify.SET(m, 0.7, 20, 2, pattern=Block(2, 5), optimizer=o, kernels=True),
    "RigL": lambda m, o: sparsify.RigL(
        m, 0.7, 20, 2, pattern=Block(2, 5), optimizer=o, kernels=True
    ),
    "STE": lambda m, o: sparsify.STE(m, o, Block(4, 3), sparsity=0.5),
    "STE, kernels": lambda m, o: sparsify.STE(m, o, Block(4, 3), sparsity=0.5, kernels=True),
    "SRSTE": lambda m, o: sparsify.SRSTE(m, o, "1:4"),
    "DASS": lambda m, o: sparsify.DASS(m, 0.5),
}


@pytest.mark.parametrize("name", COPIED)
def test_copies_of_a_model_follow_its_weights_and_have_no_sparsifier(name: str) -> None:
    model = net().double()
    keys = list(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    made = COPIED[name](model, optimizer)
    if name == "DASS":
        made.train_scores()
        optimizer = torch.optim.SGD(made.parameters(), 0.5)
    elif name != "STE" and name != "SRSTE":  # those are parametrised
        assert list(model.state_dict()) == keys
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.0))
    later, masks = copy.deepcopy(model), made.masks
    x = torch.randn(8, 9, 3, 3, dtype=torch.float64)
    for _ in range(6):
        (model(x) - 1).square().mean().backward()
        optimizer.step()
        made.step()
        optimizer.zero_grad()
        average.update_parameters(model)
    assert any(not mask.equal(masks[key]) for key, mask in made.masks.items())
    later.load_state_dict(model.state_dict())
    copies = [average.module, later, copy.deepcopy(later)]
    if not hasattr(model[0], "parametrizations"):  # or torch would refuse
        held = pickle.dumps(model)
        assert b"optim" not in held
        assert b"Layer" not in held
        copies.append(pickle.loads(held))
    y = model(x)
    for other in copies:
        torch.testing.assert_close(other(x), y, atol=1e-12, rtol=0)
    if name in ("SET", "RigL"):
        later.float().eval()
        report = gossamer.convert(later, Block(2, 5), force=True)
        assert all(row.swapped for row in report)
        torch.testing.assert_close(later(x.float()), y.float(), atol=1e-5, rtol=1e-5)
        assert later[2].weight.density <= made.layers[1].kept.double().mean() < 0.6


def test_a_copy_under_straight_through_is_trained_straight_through() -> None:
    x = torch.randn(5, 8, dtype=torch.float64)
    for kernels in (False, True):
        model = nn.Sequential(nn.Linear(8, 8)).double()
        made = sparsify.STE(model, pattern=Block(4, 4), sparsity=0.5, kernels=kernels)
        other = copy.deepcopy(model)
        for each in (model, other):
            each(x).sum().backward()
        grads = [{n: p.grad for n, p in each.named_parameters()} for each in (model, other)]
        torch.testing.assert_close(*grads)
        assert (grads[0][next(k for k in grads[0] if "bias" not in k)] != 0).all()
        assert made.layers[0].mask.float().mean() == 0.5


@pytest.mark.parametrize("columns", [8, 10, 11])  # a last group of two, of three
def test_a_copy_under_1_of_4_is_recorded_whole(columns: int) -> None:
    model, x = nn.Sequential(nn.Linear(columns, 6)), torch.randn(3, columns)
    sparsify.STE(model, pattern="1:4")
    other = copy.deepcopy(model)
    torch.testing.assert_close(torch.export.export(other, (x,)).module()(x), model(x))


def test_a_report_is_a_table_and_a_picture(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib.image")
    model = net()
    optimizer = sgd(model)
    made = Sparsifier(model, Unstructured(), Magnitude(), Cubic(0.8, 2, 8, every=2))
    train(model, optimizer, made, range(10))
    report = made.report()
    assert [change.step for change in report.history] == [2, 4, 6, 8]
    for change in report.history[1:]:
        assert all(0 < share < 1 for share in change.energy.values())
        assert all(0 < share < 1 for share in change.changed.values())
    assert [row["sparsity"] for row in report.rows()] == pytest.approx([0.8] * 3, abs=2e-3)
    assert str(report).splitlines()[1].split()[:2] == ["0", "80.04%"]
    report.plot(tmp_path / "masks.png")
    picture = matplotlib.imread(tmp_path / "masks.png")
    assert picture.shape[1] == 1440  # and something is drawn in each of the three parts
    for part in (picture[:, 480 * i : 480 * (i + 1), :3] for i in range(3)):
        assert (part.max(-1) - part.min(-1) > 0.3).sum() > 100


def test_bad_use_is_told_early() -> None:
    def make(model: nn.Module | None = None, pattern: object = "2:4", **more: object) -> None:
        schedule = more.pop("schedule", None) or OneShot(0.5)
        Sparsifier(model or net(), pattern, Magnitude(), schedule, **more)  # type: ignore[arg-type]

    for sparsity in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="at least 0 and below 1"):
            OneShot(sparsity)
    frozen = net()
    frozen[2].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"2: frozen.*exclude='2'"):
        make(frozen)
    tied = net()
    tied.append(nn.Linear(21, 12))
    tied[5].weight = tied[4].weight
    with pytest.raises(ValueError, match=r"4: weight is tied: 4.weight = 5.weight"):
        make(tied)
    with pytest.raises(ValueError, match="0: 1:16 needs at least 16 inputs, there are 9"):
        make(pattern="1:16")
    with pytest.raises(ValueError, match="0: rows of 81 entries in 5 equal banks"):
        make(pattern=RowBalanced(5))
    with pytest.raises(ValueError, match=r"0: sparsity 0.9: 2:4 has 0.5"):
        make(schedule=OneShot(0.9))
    with pytest.raises(ValueError, match="Sparsifier: include names 'nope'"):
        make(include="nope")
    with pytest.raises(ValueError, match="'uniform' only"):
        make(distribution="erk")
    with pytest.raises(TypeError, match="a schedule that grows"):
        make(schedule=DropAndGrow(0.5, 10))
    with pytest.raises(RuntimeError, match="no gradient; call step"):
        Sparsifier(net(), "2:4", sparsify.Gradient(), OneShot(0.5, at=1)).step()
    with pytest.raises(ValueError, match="no kernel runs"):
        Sparsifier(net(), Filters(), Magnitude(), OneShot(0.5)).finalize()


@pytest.mark.parametrize("recipe", [sparsify.SSTE, sparsify.MaskedDecay])
def test_a_refused_model_is_left_as_it_was(recipe: Callable[..., Sparsifier]) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Conv1d(8, 8, 1))
    with pytest.raises(ValueError, match="1: a plain Linear inside a model"):
        recipe(model, torch.optim.SGD(model.parameters(), 0.1))
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("pattern", ["2:4", Block(4, 4)], ids=str)
def test_finalize_makes_layers_that_answer_alike(pattern: str | Block) -> None:
    model = net()
    made = Sparsifier(model, pattern, sparsify.WandaScore(), OneShot(0.5, at=1))
    x: Tensor = torch.randn(4, 9, 3, 3)
    model(x)
    made.step()
    expected = model.eval()(x)
    report = made.finalize(force=True)
    assert all(layer.swapped for layer in report)
    torch.testing.assert_close(report.model(x), expected, rtol=1e-4, atol=1e-5)


def test_the_report_counts_and_draws(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model = net()
    made = Sparsifier(model, Unstructured(), Magnitude(), Cubic(0.9, 0, 6, every=2))
    train(model, sgd(model), made, range(6))
    report = made.report()
    assert [change.step for change in report.history] == [2, 4, 6]
    last = report.history[-1]
    before = report.history[-2]
    assert last.changed["2"] == pytest.approx(last.sparsity["2"] - before.sparsity["2"])
    assert 0 < last.energy["2"] < 1
    report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 10_000
