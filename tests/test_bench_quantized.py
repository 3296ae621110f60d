"""The bench of 8-bit and 4-bit 2:4 layers: its cases and its command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import bench_quantized
import pytest
import run
from bench_quantized import UNQUANTISED, QuantizedPlan
from machine import Limits
from record import OURS
from rivals import DEFAULT
from shapes import DTYPES
from tiny_bench import HASTE, LIMITS, TINY


def test_cases_are_right_and_complete() -> None:
    plan = QuantizedPlan([TINY], [1, 40], list(DTYPES), HASTE)
    cases = list(bench_quantized.run(plan, LIMITS))
    assert len(cases) == len(plan) == len({case.name for case in cases})
    for case in cases:
        assert case.check.passed
        assert {OURS, DEFAULT, UNQUANTISED, case.best_dense} <= set(case.timings)
        values = 32 * 64 // 2 // (2 if case.value_type == "int4" else 1)
        scales = 32 * 4
        activations = DTYPES[case.dtype].itemsize * case.rows * (32 + 64)
        assert case.nbytes == values + 32 * 64 // 8 + scales + activations


def test_command(
    monkeypatch: pytest.MonkeyPatch,
    threads: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("rich")
    monkeypatch.setattr(run, "QUICK_EFFORT", HASTE)
    monkeypatch.setattr(Limits, "measure", lambda dtypes, threads: replace(LIMITS, threads=threads))
    record = tmp_path / "record.json"
    what = ["--feature", "quantized", "--dtype", "bfloat16", "--shapes", "32x64", "--m", "2"]
    assert run.main(["--quick", *what, "--json", str(record)]) == 0
    found = json.loads(record.read_text(), parse_constant=pytest.fail)
    groups = {entry["group"] for entry in found["benchmarks"]}
    assert groups == {f"quantized/bfloat16/32x64/m2/{kind}" for kind in bench_quantized.VALUE_TYPES}
    assert "8-bit and 4-bit 2:4" in capsys.readouterr().out
