"""The bench of block-sparse layers: cases, rivals, goals, break-even, record and picture."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import bench_blocksparse
import models
import pytest
import resnet
import rivals
import run
import torch
from bench_blocksparse import BlockPlan, Dense, run_problem
from block_case import GOAL, BlockCase, break_even
from conv_rivals import CONV_DEFAULT, dense_convs
from gossamer import Block
from machine import Limits
from record import OURS, Check
from shapes import CONV_SHAPES, DTYPES, ConvShape, LinearShape, Shape
from timing import Timing
from tiny_bench import HASTE, LIMITS
from torch import nn

CONV = ConvShape("resnet50.tiny", 16, 8, 3, 7, stride=2)
GROUPED = ConvShape("grouped.tiny", 8, 8, 3, 5, groups=4)
LINEAR = LinearShape("32x64", 32, 64)
BLOCK = Block(4, 4)


def cases_of(shape: Shape, dtype: str = "float32") -> list[BlockCase]:
    plan = BlockPlan([(shape, 3)], [dtype], [BLOCK], HASTE)
    with torch.no_grad():
        return run_problem(Dense(shape, dtype), 3, BLOCK, plan, LIMITS)


def at(density: float, ratio: float) -> BlockCase:
    timings = {OURS: Timing((1.0,) * 3, 1), CONV_DEFAULT: Timing((ratio,) * 3, 1)}
    return BlockCase(
        "blocksparse", CONV, "float32", 1, "serial/serial", Check(0.0, 0.5), timings, CONV_DEFAULT,
        1000, round(1000 * density), 10, 1e9, 1e-3, 1e-2, "4x4", density, 1e-3,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [CONV, GROUPED, LINEAR], ids=lambda shape: shape.name)
def test_cases_are_right_and_complete(shape: Shape, dtype: str) -> None:
    cases = cases_of(shape, dtype)
    assert [case.density for case in cases] == list(bench_blocksparse.DENSITIES)
    for case in cases:
        assert case.check.passed
        assert case.best_dense in case.timings
        assert case.best_dense not in (OURS, rivals.CSR, rivals.BSR)
        assert case.default in case.timings
        sparse = rivals.CSR in case.timings
        assert sparse == (shape is LINEAR and dtype == "float32")
        live = case.real_flops / case.dense_flops
        # Of the groups' blocks, which are padded, few are live at the least density.
        assert live == pytest.approx(case.density, abs=0.05 if shape is not GROUPED else 0.1)
    assert len({case.name for case in cases}) == len(cases)


def test_operations_and_bytes_of_a_convolution() -> None:
    case = cases_of(CONV)[1]
    assert CONV.out_extent == 4
    assert case.dense_flops == 2 * (3 * 4 * 4) * 16 * 8 * 9
    assert case.real_flops == case.dense_flops / 2
    activations = 4 * 3 * (8 * 7 * 7 + 16 * 4 * 4)
    weight = 4 * (16 * 8 * 9 / 2 + 4 + 1 + 36)
    assert case.nbytes == activations + weight
    assert case.bytes_seconds == pytest.approx(LIMITS.seconds("float32", 0, case.nbytes))


@pytest.mark.parametrize("shape", CONV_SHAPES, ids=lambda shape: shape.name)
def test_shapes_are_convolutions_of_torch(shape: ConvShape) -> None:
    layer = Dense(shape, "float32").layer.to("meta")
    y = layer(torch.empty(1, shape.in_channels, shape.extent, shape.extent, device="meta"))
    assert y.shape == (1, shape.out_channels, shape.out_extent, shape.out_extent)


def test_named_shapes_are_distinct() -> None:
    assert len({shape.name for shape in CONV_SHAPES}) == len(CONV_SHAPES)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_dense_rivals_compute_the_same(dtype: torch.dtype) -> None:
    conv = nn.Conv2d(6, 8, 3, 2, 1, groups=2).to(dtype)
    x = torch.randn(2, 6, 9, 9).to(dtype)
    with torch.no_grad():
        contenders = dense_convs(conv, x)
        for contender in contenders:
            y = contender.run()
            y = y.to_dense(dtype) if y.layout == torch._mkldnn else y
            torch.testing.assert_close(y, conv(x), rtol=2e-2, atol=2e-2)
    assert contenders[0].name == CONV_DEFAULT
    assert len({contender.name for contender in contenders}) == len(contenders) >= 2


def test_sparse_rivals_compute_the_same() -> None:
    weight, x = torch.randn(8, 12), torch.randn(3, 12)
    contender = rivals.sparse_bsr(weight, 4, 4, x)
    if contender is not None:
        torch.testing.assert_close(contender.run(), x @ weight.t())
    assert rivals.sparse_bsr(weight, 3, 4, x) is None


def test_goal_is_bound_by_arithmetic_or_by_bytes() -> None:
    case = at(0.25, 2.0)
    assert case.goal == pytest.approx(GOAL * 4)
    assert replace(case, bytes_seconds=1.0).goal == pytest.approx(GOAL * 2)


def test_break_even_is_interpolated_on_times() -> None:
    # Dense takes 1: blocks take 0.5 at 10 % and 1.5 at 50 %.
    relation, density = break_even([at(0.5, 1 / 1.5), at(0.1, 2.0)])
    assert (relation, density) == ("", pytest.approx(0.3))
    assert break_even([at(0.5, 2.0), at(0.1, 3.0)]) == (">", 0.5)
    assert break_even([at(0.5, 0.2), at(0.1, 0.3)]) == ("<", 0.1)


def test_wrong_kernel_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        bench_blocksparse.SparseConv2d, "forward", lambda layer, x: layer.to_dense()(x) * 1.01
    )
    assert not any(case.check.passed for case in cases_of(CONV))


def test_run_leaves_record_picture_and_summary(
    monkeypatch: pytest.MonkeyPatch,
    threads: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(run, "QUICK_EFFORT", HASTE)
    monkeypatch.setattr(Limits, "measure", lambda dtypes, threads: replace(LIMITS, threads=threads))
    record, picture = tmp_path / "record.json", tmp_path / "picture.png"
    what = ["--quick", "--feature", "blocksparse", "--dtype", "float32", "--block", "16x16,4x4,2:4"]
    shapes = ["--shapes", "resnet50.1x1.7.512,32x64", "--m", "1"]
    kept = ["--json", str(record), "--plot", str(picture)]
    assert run.main([*what, *shapes, *kept]) == 0
    assert (tmp_path / "picture-blocks.png").read_bytes().startswith(b"\x89PNG")
    assert not picture.exists()
    out = capsys.readouterr().out
    assert "Answers equal to dense: 21 of 21 cases" in out
    assert "As fast as dense at so many live blocks" in out

    found = json.loads(record.read_text(), parse_constant=pytest.fail)
    ours = [entry for entry in found["benchmarks"] if entry["name"].endswith(f"/{OURS}")]
    assert len(ours) == len({entry["group"] for entry in ours}) == 21
    for entry in ours:
        assert entry["params"]["block"] in ("16x16", "4x4", "2:4")
        assert entry["params"]["density"] in bench_blocksparse.DENSITIES
        assert entry["extra_info"]["goal"] > 0


def test_resnet_has_the_layers_of_the_paper() -> None:
    with torch.device("meta"):
        model = resnet.ResNet50()
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == 53
    assert sum(p.numel() for p in model.parameters()) == 25_557_032


def test_resnet_is_pruned_and_answers_as_its_dense_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resnet, "STAGES", ((16, 1), (32, 1)))
    monkeypatch.setattr(resnet, "EXTENT", 32)
    monkeypatch.setattr(resnet, "IMAGES", (1, 2))
    monkeypatch.setattr(
        resnet.gossamer, "convert", lambda *args, **more: convert(*args, **more, force=True)
    )
    result = resnet.run("float32", HASTE)
    assert result.swapped == len(result.layers) == 9
    assert result.answers.max_difference < 1e-4
    assert result.answers.cosine_mean is None
    found = result.as_dict()
    assert [speed["images"] for speed in found["speeds"]] == [1, 2]
    assert set(found["speeds"][0]["images_per_second"]) == set(result.speeds[0].timings)


convert = resnet.gossamer.convert


def test_speed_counts_what_it_is_told() -> None:
    timings = {OURS: Timing((0.5,), 1), "other": Timing((1.0,), 1)}
    speed = models.Speed(8, 24, timings, default="other")
    assert speed.per_second(OURS) == 48
    assert speed.against_default.median == 2
    assert not math.isnan(speed.against_best.median)
