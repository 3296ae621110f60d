"""The GPU's bench of zero inputs on a CPU: the same code with a stopwatch that needs no GPU."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import bench_actsparse_cuda
import pytest
import run
import run_cuda
import torch
from bench_actsparse_cuda import INPUT_MAJOR, NOTHING_ZERO, CudaActiveCase, CudaActivePlan
from cuda_rivals import DENSE
from record import OURS
from shapes import LinearShape
from test_bench_cuda import HASTE, LIMITS, bench

PLAN = CudaActivePlan(["bf16"], [LinearShape("tiny", 24, 40)], (1, 3), (0.0, 0.5), HASTE)
COSTS = {OURS: 1e-5, NOTHING_ZERO: 2e-5, INPUT_MAJOR: 3e-5, "F.linear": 4e-5}


def cases_of(plan: CudaActivePlan, costs: dict[str, float] | None = None) -> list[CudaActiveCase]:
    return list(bench_actsparse_cuda.run(plan, bench(costs)))


def test_layers_are_checked_compared_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = cases_of(PLAN, COSTS)
    assert len({case.name for case in cases}) == len(cases) == 4
    for case in cases:
        assert case.passed, case.name
        assert case.best(DENSE) == INPUT_MAJOR
        assert case.against(DENSE).median == pytest.approx(3.0)  # type: ignore[union-attr]
        assert case.against_full.median == pytest.approx(2.0)  # type: ignore[union-attr]
        assert (case.read == 1) == (case.sparsity == 0)
        assert case.nbytes < case.dense_bytes or case.sparsity == 0
    absent = replace(cases[0], timings={}, unavailable="left out: no time", check=None)
    table = partial(bench_actsparse_cuda.active_table, dram=LIMITS.dram)
    run_cuda.print_tables([*cases, absent], table)
    assert "left out: no time" in capsys.readouterr().out
    arguments = ["--device", "cuda", "--commit", "abcdef0123", "--json", str(tmp_path / "r.json")]
    run_cuda.keep(run.parse(arguments), arguments, {"name": "NVIDIA H200"}, LIMITS, [], cases)
    found = json.loads((tmp_path / "r.json").read_text(), parse_constant=pytest.fail)
    mine = [entry for entry in found["benchmarks"] if entry["name"].endswith(f"/{OURS}")]
    assert mine[0]["extra_info"]["against_nothing_zero"]["median"] == pytest.approx(2.0)
    assert [entry["params"]["sparsity"] for entry in mine] == [case.sparsity for case in cases]


def test_wrong_answers_and_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    one = replace(PLAN, rows=(1,), sparsities=(0.5,))

    def wrong(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(x @ weight)

    monkeypatch.setattr(bench_actsparse_cuda, "actsparse_linear", wrong)
    assert not cases_of(one)[0].passed

    def broken(*args: object) -> torch.Tensor:
        raise RuntimeError("broken")

    monkeypatch.setattr(bench_actsparse_cuda, "actsparse_linear", broken)
    (case,) = cases_of(one)
    assert not case.passed
    assert case.unavailable == "RuntimeError: broken"
    now = iter([0.0, 3.0])
    late = next(
        bench_actsparse_cuda.run(replace(one, most_seconds=2.0), bench(), lambda: next(now))
    )
    assert late.unavailable == "left out: no time"


def test_command_line() -> None:
    arguments = ["--device", "cuda", "--feature", "actsparse"]
    every = run_cuda.active_plan_of(run.parse(arguments))
    assert every.shapes[0].name == "llama8b.down"
    assert (len(every.shapes), every.dtypes[0], every.rows[-1]) == (4, "bf16", 32)
    quick = run_cuda.active_plan_of(run.parse([*arguments, "--quick", "--seconds", "60"]))
    assert (quick.dtypes, quick.rows, quick.most_seconds) == (["bf16"], (1, 4, 8, 16), 60)
