"""The bench of 8-bit and 4-bit 2:4 layers: its cases and its command."""

from __future__ import annotations

from pathlib import Path

import bench_quantized
import pytest
from bench_quantized import UNQUANTISED, QuantizedPlan
from record import OURS
from rivals import DEFAULT
from shapes import DTYPES
from tiny_bench import HASTE, LIMITS, TINY, quick_groups


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
    what = ["--feature", "quantized", "--dtype", "bfloat16", "--shapes", "32x64", "--m", "2"]
    groups = quick_groups(monkeypatch, tmp_path, *what)
    assert groups == {f"quantized/bfloat16/32x64/m2/{kind}" for kind in bench_quantized.VALUE_TYPES}
    assert "8-bit and 4-bit 2:4" in capsys.readouterr().out
