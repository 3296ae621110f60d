"""The GPU's bench of experts on a CPU: the same code with a stopwatch that needs no GPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import bench_grouped_cuda
import pytest
import run
import run_cuda
import torch
from bench_grouped import GROUPED_MM, LOOP
from bench_grouped_cuda import OUR_KERNEL, CudaGroupedCase, CudaGroupedPlan
from cuda_rivals import DENSE
from record import OURS
from shapes import ExpertShape
from test_bench_cuda import HASTE, LIMITS, bench

PLAN = CudaGroupedPlan([ExpertShape("tiny.up", 4, 24, 32)], (1, 5), ["bf16"], rounds=HASTE)


@pytest.fixture(autouse=True)
def one_thread(threads: int) -> None:
    torch.set_num_threads(1)


def cases_of(plan: CudaGroupedPlan, costs: dict[str, float]) -> list[CudaGroupedCase]:
    return list(bench_grouped_cuda.run(plan, bench(costs)))


def test_cases_are_checked_compared_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    costs = {OURS: 1e-5, OUR_KERNEL: 2e-5, LOOP: 3e-5, GROUPED_MM: 4e-5}
    cases = cases_of(PLAN, costs)
    assert len({case.name for case in cases}) == len(cases) == 8
    for case in cases:
        assert case.passed, case.name
        assert case.best(DENSE) == LOOP
        assert case.against(DENSE).median == pytest.approx(3.0)  # type: ignore[union-attr]
        assert case.timings[OUR_KERNEL].median == pytest.approx(2e-5)
        assert case.flops == (3 if "back" in case.job else 1) * 2 * case.rows * 24 * 32
        assert case.active == 4 or case.load == "zipf"
    absent = replace(cases[0], timings={}, unavailable="left out: no time", check=None)
    run_cuda.print_tables([*cases, absent], bench_grouped_cuda.grouped_table)
    printed = capsys.readouterr().out
    assert "forward+backward" in printed
    assert "left out: no time" in printed
    arguments = ["--device", "cuda", "--commit", "abcdef0123", "--json", str(tmp_path / "r.json")]
    run_cuda.keep(run.parse(arguments), arguments, {"name": "NVIDIA H200"}, LIMITS, [], cases)
    found = json.loads((tmp_path / "r.json").read_text(), parse_constant=pytest.fail)
    mine = [entry for entry in found["benchmarks"] if entry["name"].endswith(f"/{OURS}")]
    assert [entry["params"]["load"] for entry in mine] == [case.load for case in cases]


def test_wrong_answers_and_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    one = replace(PLAN, tokens=(5,), loads=("even",), jobs=("forward",))

    def wrong(x: torch.Tensor, weights: torch.Tensor, *rest: object) -> torch.Tensor:
        return torch.ones(len(x), weights.shape[1])

    monkeypatch.setattr(bench_grouped_cuda, "grouped_linear", wrong)
    assert not cases_of(one, {})[0].passed

    def broken(*args: object) -> torch.Tensor:
        raise RuntimeError("broken")

    monkeypatch.setattr(bench_grouped_cuda, "grouped_linear", broken)
    (case,) = cases_of(one, {})
    assert not case.passed
    assert case.unavailable == "RuntimeError: broken"
    now = iter([0.0, 3.0])
    late = next(bench_grouped_cuda.run(replace(one, most_seconds=2.0), bench(), lambda: next(now)))
    assert late.unavailable == "left out: no time"


def test_command_line() -> None:
    every = run_cuda.grouped_plan_of(run.parse(["--device", "cuda", "--feature", "grouped"]))
    assert set(every.dtypes) == {"bf16", "fp16"}
    assert every.tokens == (1, 8, 64, 256, 1024)
    assert len(list(every.cases())) == 2 * 4 * 2 * 2 * 5
    arguments = ["--device", "cuda", "--quick", "--feature", "grouped", "--seconds", "60"]
    quick = run_cuda.grouped_plan_of(run.parse([*arguments, "--m", "8", "--shapes", "olmoe.up"]))
    assert (quick.dtypes, quick.most_seconds, quick.tokens) == (["bf16"], 60, (8,))
    assert [shape.name for shape in quick.shapes] == ["olmoe.up"]
