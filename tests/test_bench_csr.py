"""The bench of unstructured layers: cases, break-even, its commands, and that of the wide net."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import bench_csr
import pytest
import wide_set
from bench_csr import CsrCase, CsrPlan, break_even
from record import OURS
from rivals import CSR, DEFAULT
from shapes import DTYPES
from timing import Timing
from tiny_bench import HASTE, LIMITS, TINY, quick_groups


@pytest.fixture(scope="module")
def cases() -> list[CsrCase]:
    plan = CsrPlan([TINY], [1, 7], list(DTYPES), HASTE, most_csr_rows=1)
    found = list(bench_csr.run(plan, LIMITS))
    assert len(found) == len(plan)
    return found


def test_cases_are_right_and_complete(cases: list[CsrCase]) -> None:
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        assert case.check.passed
        assert case.best_dense in case.timings
        assert {OURS, DEFAULT} <= set(case.timings)
        assert (CSR in case.timings) == (case.rows == 1 and case.dtype == "float32")
        kept = max(1, math.floor(case.density * 32 * 64 + 0.5))
        size = DTYPES[case.dtype].itemsize
        assert case.real_flops == 2 * case.rows * kept
        assert case.nbytes == kept * (size + 2) + 33 * 4 + size * case.rows * (32 + 64)


def test_break_even(cases: list[CsrCase]) -> None:
    mine = [case for case in cases if case.dtype == "float32" and case.rows == 1]

    def at(*seconds: float) -> float:
        timed = [
            replace(case, timings=case.timings | {OURS: Timing((s,), 1)}, best_dense=DEFAULT)
            for case, s in zip(mine, seconds, strict=True)
        ]
        dense = {DEFAULT: Timing((1.0,), 1)}
        return break_even([replace(case, timings=case.timings | dense) for case in timed])

    # Densities of 0.5, 0.2, 0.1, 0.05 and 0.01.
    assert at(2, 1, 0.5, 0.25, 0.1) == pytest.approx(0.2)
    assert at(2.5, 0.4, 0.2, 0.1, 0.1) == pytest.approx((0.2 * 0.5) ** 0.5)
    assert at(0.9, 0.4, 0.2, 0.1, 0.1) == math.inf
    assert at(9, 9, 9, 9, 9) == 0


def test_command(
    monkeypatch: pytest.MonkeyPatch,
    threads: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("rich")
    what = ["--feature", "csr", "--dtype", "float32", "--shapes", "32x64", "--m", "2"]
    groups = quick_groups(monkeypatch, tmp_path, *what)
    assert groups == {f"csr/float32/32x64/m2/d{d:g}" for d in bench_csr.DENSITIES}
    assert "As fast as the best dense way" in capsys.readouterr().out


def test_wide_network(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--width", "200", "--density", "0.1", "--samples", "1500", "--budget", "0.02"]
    assert wide_set.main([*small, "--gigabytes", "3e-4"]) == 0
    out = capsys.readouterr().out
    assert "15 steps and a change of the pattern" in out
    assert "steps of 115 rows" in out  # of the 200 that do not fit
    assert float(out.rpartition("accuracy after it")[2].strip(" %\n")) > 25  # by chance 10
