"""The GPU's bench of blocks on a CPU: the same code with a stopwatch that needs no GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import bench_blocksparse_cuda
import pytest
import run
import run_cuda
import torch
import tune_blocks_cuda
from bench_blocksparse_cuda import CUDNN_LAST, CudaBlockPlan
from cuda_block_case import CudaBlockCase, block_summary, block_table
from cuda_rivals import DENSE, WRONG
from gossamer import Block, blocksparse_conv
from gossamer.formats import BlockSparse, Sparse24ConvPanels
from gossamer.ops import sparse24_conv
from gossamer.ops.blocksparse_choice import Way, blocksparse_choice, blocksparse_ways
from gossamer.ops.sparse24_conv import sparse24_conv_choice, sparse24_conv_ways
from record import OURS, Check
from shapes import ConvShape, LinearShape
from test_bench_cuda import HASTE, LIMITS, bench

CONV = ConvShape("tiny.3x3.5.16", 32, 16, 3, 5, stride=2)
LINEAR = LinearShape("tiny.up", 32, 48)
PLAN = CudaBlockPlan([("bf16", CONV, 3)], [(16, 16)], [0.5], HASTE)
PLAN_24 = replace(PLAN, blocks=["2:4"], densities=[0.25])
H200 = {"capability": 90, "multiprocessors": 132, "shared_bytes": 227 << 10, "l2_bytes": 0}


def only(plan: CudaBlockPlan, costs: dict[str, float] | None = None) -> CudaBlockCase:
    (case,) = bench_blocksparse_cuda.run(plan, bench(costs))
    return case


def test_a_convolution_is_checked_and_compared() -> None:
    case = only(PLAN, {OURS: 1e-5, CUDNN_LAST: 3e-5, "cuDNN NCHW": 4e-5})
    assert case.passed
    assert case.best(DENSE) == CUDNN_LAST
    assert case.against(DENSE).median == pytest.approx(3.0)  # type: ignore[union-attr]
    pixels, weights = 3 * 3 * 3, 32 * 16 * 9
    assert case.flops == 2 * pixels * weights
    assert case.kept_flops == 2 * pixels * weights // 2
    assert case.goal == pytest.approx(0.6 * min(2.0, 3e-5 / case.limit))
    assert "no block-sparse convolutions" in case.missing["torch BSR"]
    assert case.params["block"] == "16x16"


def test_a_linear_layer_has_blas_as_its_rival() -> None:
    case = only(replace(PLAN, problems=[("fp32", LINEAR, 7)], blocks=[(8, 16)]))
    assert case.passed
    assert case.best(DENSE) == "F.linear"
    assert case.name == "blocksparse/fp32/tiny.up/m7/8x16/50%"


@pytest.fixture
def choice_of_h200(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = partial(sparse24_conv_choice, device=H200)
    monkeypatch.setattr(bench_blocksparse_cuda, "sparse24_conv_choice", choice)


@pytest.mark.usefixtures("choice_of_h200")
def test_a_24_convolution_has_half_of_the_operations() -> None:
    case = only(PLAN_24, {OURS: 1e-5, CUDNN_LAST: 3e-5, "cuDNN NCHW": 4e-5})
    assert case.passed
    assert case.name == "blocksparse/bf16/tiny.3x3.5.16/m3/2:4/50%"
    assert (case.params["block"], case.params["density"]) == ("2:4", 0.5)
    pixels, weights = 3 * 3 * 3, 32 * 16 * 9
    assert (case.flops, case.kept_flops) == (2 * pixels * weights, pixels * weights)
    assert case.goal == pytest.approx(0.6 * min(2.0, 3e-5 / case.limit))
    assert case.chosen["kernel"] == "prefill"
    assert case.tile == f"{case.chosen['tile_m']}x{case.chosen['tile_n']}"
    assert "2:4" in block_table([case])
    assert "| bf16 | 2:4 | 50% | 1 | 3.00x |" in block_summary([case])


@pytest.mark.usefixtures("choice_of_h200")
def test_24_without_a_kernel_says_why() -> None:
    depthwise = ConvShape("tiny.depthwise", 16, 16, 3, 5, groups=16)
    for problem, why in (
        (("fp32", CONV, 3), "no exact sparse product"),
        (("bf16", depthwise, 3), "no multiple of 8"),
    ):
        case = only(replace(PLAN_24, problems=[problem]))
        assert why in case.unavailable
        assert case.passed
        assert not case.timings
    linear = replace(PLAN_24, problems=[("bf16", LINEAR, 7)])
    assert list(bench_blocksparse_cuda.run(linear, bench())) == []


@pytest.mark.usefixtures("choice_of_h200")
def test_a_wrong_24_convolution_fails_the_case(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = partial(torch.full, (3, 32, 3, 3), 1.0)
    monkeypatch.setattr(bench_blocksparse_cuda, "sparse24_conv", lambda x, w, **more: wrong())
    assert not only(PLAN_24).passed


def test_a_wrong_answer_fails_the_case_and_drops_a_rival(monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench_blocksparse_cuda.Problem.dense
    wrong = monkeypatch.setattr
    wrong(bench_blocksparse_cuda, "blocksparse_conv", lambda x, w, **more: torch.ones(3, 32, 3, 3))
    assert not only(PLAN).passed
    monkeypatch.undo()

    def wrong_if_last(
        self: bench_blocksparse_cuda.Problem, x: torch.Tensor, w: torch.Tensor
    ) -> torch.Tensor:
        return right(self, x, w) * (1 if x.is_contiguous() else 2)

    monkeypatch.setattr(bench_blocksparse_cuda.Problem, "dense", wrong_if_last)
    case = only(PLAN)
    assert case.passed
    assert case.missing[CUDNN_LAST] == WRONG
    assert case.best(DENSE) == "cuDNN NCHW"


def test_a_fault_is_kept_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **more: object) -> CudaBlockCase:
        raise RuntimeError("broken")

    monkeypatch.setattr(bench_blocksparse_cuda, "run_case", broken)
    case = only(PLAN)
    assert not case.passed
    assert case.unavailable == "RuntimeError: broken"
    now = iter([0.0, 1.0, 3.0])
    plan = replace(PLAN, densities=[0.5, 0.25], most_seconds=2.0)
    _, late = bench_blocksparse_cuda.run(plan, bench(), lambda: next(now))
    assert late.unavailable == "left out: no time"
    assert late.passed


def test_tables_and_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = list(bench_blocksparse_cuda.run(replace(PLAN, densities=[0.5, 0.25]), bench()))
    absent = replace(cases[0], timings={}, unavailable="left out: no time", check=None)
    assert run_cuda.print_tables([*cases, absent], block_table) == [*cases, absent]
    printed = capsys.readouterr().out
    assert "16x16" in printed
    assert "left out: no time" in printed
    summary = block_summary([*cases, absent, replace(cases[0], check=Check(1.0, 9.0))])
    assert "| bf16 | 16x16 | 25% | 1 |" in summary
    assert "Not timed, 1 cases" in summary
    assert "Answers wrong: blocksparse/bf16" in summary
    assert "none" in block_summary([])
    arguments = ["--device", "cuda", "--commit", "abcdef0123", "--json", str(tmp_path / "r.json")]
    run_cuda.keep(run.parse(arguments), arguments, {"name": "NVIDIA H200"}, LIMITS, [], cases)
    found = json.loads((tmp_path / "r.json").read_text(), parse_constant=pytest.fail)
    mine = [entry for entry in found["benchmarks"] if entry["name"].endswith(OURS)]
    assert [entry["params"]["density"] for entry in mine] == [0.5, 0.25]
    assert mine[0]["extra_info"]["chosen"]["target"]


def test_command_line() -> None:
    every = run_cuda.block_plan_of(run.parse(["--device", "cuda", "--feature", "blocksparse"]))
    assert {dtype for dtype, *_ in every.problems} == {"bf16", "fp16"}
    assert every.blocks == ((16, 16), (32, 32), (64, 64), "2:4")
    of_24 = [case for case in every.cases() if case.block == "2:4"]
    assert {case.density for case in of_24} == {0.5}
    assert all(isinstance(case.shape, ConvShape) for case in of_24)
    quick = run_cuda.block_plan_of(run.parse(["--device", "cuda", "--quick"]))
    assert {dtype for dtype, *_ in quick.problems} == {"bf16"}
    assert {(32, 32), "2:4"} <= set(quick.blocks)
    assert quick.densities == (0.25,)
    few = ["--device", "cuda", "--shapes", "64x128", "--m", "5", "--block", "8x8"]
    plan = run_cuda.block_plan_of(run.parse(few))
    assert [(str(shape), count) for _, shape, count in plan.problems[:1]] == [("64x128", 5)]
    assert plan.blocks == ((8, 8),)
    given = ["--device", "cuda", "--feature", "blocksparse", "--block", "2:4", "--m", "1,8"]
    plan = run_cuda.block_plan_of(run.parse(given))
    assert plan.blocks == ("2:4",)
    assert {case.rows for case in plan.cases()} == {1, 8}


def seconds(calls: list[Callable[[], torch.Tensor]]) -> float:
    calls[0]()
    return 1e-5


def test_tuner_times_every_way_that_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_way(way: Way, x: torch.Tensor, weight: BlockSparse, **more: int) -> torch.Tensor:
        if way[0] == "mma" and way[1] == 16:
            raise ValueError("refused")
        y = blocksparse_conv(x, weight, **more)
        return y + 1 if way == ("wgmma", 128, 64, 1) else y

    monkeypatch.setattr(tune_blocks_cuda, "blocksparse_by_way", by_way)
    for name, of in (("choice", blocksparse_choice), ("ways", blocksparse_ways)):
        monkeypatch.setattr(tune_blocks_cuda, f"blocksparse_{name}", partial(of, device=H200))
    case = (CONV, 3, (16, 16), 0.5)
    found = tune_blocks_cuda.tune_block_case(case, "bf16", torch.device("cpu"), 20_000, seconds)
    kernels = [way[0] for *way, us in found["us"] if us == pytest.approx(10)]
    assert (kernels.count("mma"), kernels.count("wgmma")) == (4, 2)
    assert found["failed"]["('mma', 16, 64, 1)"] == "ValueError: refused"
    assert "differs by" in found["failed"]["('wgmma', 128, 64, 1)"]
    assert tuple(found["chosen"]) in blocksparse_ways(
        (3, 16, 5, 5), of_size((32, 16, 3, 3)), stride=2, padding=1, channels_last=True, device=H200
    )
    line = tune_blocks_cuda.block_line(tune_blocks_cuda.name_of(case, "bf16"), found)
    assert "best mma 128 256 1 10.0 us, wgmma 128 256 1 10.0 us" in line
    assert line.endswith("2 failed")
    assert len(list(tune_blocks_cuda.block_cases([""]))) > len(tune_blocks_cuda.BLOCKS)


def test_tuner_times_every_way_of_24_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_way(way: Way, x: torch.Tensor, w: Sparse24ConvPanels, **more: int) -> torch.Tensor:
        if way[0] == "wgmma":
            raise ValueError("refused")
        return sparse24_conv(x, w, **more)

    monkeypatch.setattr(tune_blocks_cuda, "sparse24_conv_by_way", by_way)
    for name, of in (("choice", sparse24_conv_choice), ("ways", sparse24_conv_ways)):
        monkeypatch.setattr(tune_blocks_cuda, f"sparse24_conv_{name}", partial(of, device=H200))
    wide = ConvShape("tiny.3x3.5.64", 32, 64, 3, 5)
    case = (wide, 3, "2:4", 0.5)
    found = tune_blocks_cuda.tune_block_case(case, "bf16", torch.device("cpu"), 20_000, seconds)
    assert {entry[0] for entry in found["us"]} == {"prefill", "stream"}
    assert found["chosen_us"] == pytest.approx(10)
    assert found["chosen"][:3] == ["stream", 128, 16]
    assert set(found["failed"].values()) == {"ValueError: refused"}
    assert found["kept_flops"] == 3 * 25 * 32 * 64 * 9
    line = tune_blocks_cuda.block_line(tune_blocks_cuda.name_of(case, "bf16"), found)
    assert line.startswith("bf16 tiny.3x3.5.64 64 -> 32 channels on 5x5 x 3, 2:4, 50%: stream 128")
    cases = list(tune_blocks_cuda.conv24_cases(["resnet50.3x3"]))
    assert len(cases) == 4 * len(tune_blocks_cuda.IMAGES_24)
    assert {block for *_, block, _ in cases} == {"2:4"}


def of_size(size: tuple[int, ...]) -> BlockSparse:
    return BlockSparse.from_dense(torch.ones(size).bfloat16(), Block(16, 16))
