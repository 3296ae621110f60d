"""The GPU's bench of k-sparse codes on a CPU: the same code with a stopwatch that needs no GPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import bench_codes_cuda
import pytest
import run
import run_cuda
import torch
from bench_codes_cuda import BAG, SCATTERED, TOPK, CudaCodeCase, CudaCodePlan
from cuda_rivals import DENSE
from record import OURS
from shapes import CodeShape
from test_bench_cuda import HASTE, LIMITS, bench

PLAN = CudaCodePlan(["bf16"], [CodeShape("tiny", 90, 24)], (70,), (5,), rounds=HASTE)


def cases_of(plan: CudaCodePlan, costs: dict[str, float] | None = None) -> list[CudaCodeCase]:
    return list(bench_codes_cuda.run(plan, bench(costs)))


def test_jobs_are_checked_compared_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    costs = {OURS: 1e-5, BAG: 3e-5, SCATTERED: 4e-5, TOPK: 5e-5}
    cases = cases_of(PLAN, costs)
    assert [case.job for case in cases] == list(bench_codes_cuda.JOBS)
    assert [case.best(DENSE) for case in cases] == [BAG, SCATTERED, TOPK]
    for case, ratio in zip(cases, (3.0, 4.0, 5.0), strict=True):
        assert case.passed, case
        assert case.against(DENSE).median == pytest.approx(ratio)  # type: ignore[union-attr]
    absent = replace(cases[0], timings={}, unavailable="left out: no time", check=None)
    run_cuda.print_tables([*cases, absent], bench_codes_cuda.code_table)
    printed = capsys.readouterr().out
    assert "codes bf16 tiny 90x24" in printed
    assert "left out: no time" in printed
    arguments = ["--device", "cuda", "--commit", "abcdef0123", "--json", str(tmp_path / "r.json")]
    run_cuda.keep(run.parse(arguments), arguments, {"name": "NVIDIA H200"}, LIMITS, [], cases)
    found = json.loads((tmp_path / "r.json").read_text(), parse_constant=pytest.fail)
    mine = [entry for entry in found["benchmarks"] if entry["name"].endswith(OURS)]
    assert [entry["params"]["job"] for entry in mine] == [case.job for case in cases]


def test_wrong_answers_faults_and_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    one = replace(PLAN, jobs=("decode",))

    def wrong(values: torch.Tensor, indices: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return weight.new_ones(len(values), weight.shape[1])

    monkeypatch.setattr(bench_codes_cuda, "topk_decode", wrong)
    assert not cases_of(one)[0].passed

    def broken(*args: object) -> torch.Tensor:
        raise RuntimeError("broken")

    monkeypatch.setattr(bench_codes_cuda, "topk_decode", broken)
    assert cases_of(one)[0].unavailable == "RuntimeError: broken"
    now = iter([0.0, 3.0])
    late = next(bench_codes_cuda.run(replace(one, most_seconds=2.0), bench(), lambda: next(now)))
    assert late.unavailable == "left out: no time"


def test_command_line() -> None:
    every = run_cuda.code_plan_of(run.parse(["--device", "cuda", "--feature", "codes"]))
    assert set(every.dtypes) == {"bf16", "fp16"}
    options = ["--device", "cuda", "--quick", "--feature", "codes", "--seconds", "60"]
    quick = run_cuda.code_plan_of(run.parse(options))
    assert (quick.dtypes, quick.most_seconds) == (["bf16"], 60)
