"""The bench of k-sparse codes: cases, rivals, and the command that runs it."""

from __future__ import annotations

from pathlib import Path

import bench_codes
import pytest
import run
from bench_codes import BAG, DENSE, CodePlan
from record import OURS
from shapes import DTYPES, CodeShape
from tiny_bench import HASTE, LIMITS, quick_groups

SHAPE = CodeShape("tiny.sae", 50, 24)


def test_cases_are_right_and_complete() -> None:
    plan = CodePlan([SHAPE], [1, 70], [3], list(DTYPES), HASTE)
    cases = list(bench_codes.run(plan, LIMITS))
    assert len(cases) == len(plan) == len({case.name for case in cases})
    for case in cases:
        assert case.check.passed
        assert set(case.timings) == {OURS, BAG, DENSE}
        assert case.best_dense in (BAG, DENSE)
        size, rows = DTYPES[case.dtype].itemsize, min(3 * case.rows, 50)
        assert case.nbytes == 24 * size * (rows + case.rows) + 3 * case.rows * (size + 8)
        assert case.real_flops == 2 * case.rows * 3 * 24
        assert case.uses == case.rows * 3 / 50


def test_command(
    monkeypatch: pytest.MonkeyPatch,
    threads: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("rich")
    monkeypatch.setattr(run, "CODE_KS", (2,))
    monkeypatch.setattr("command_line.CODE_SHAPES", (SHAPE,))
    what = ["--feature", "codes", "--dtype", "float32", "--shapes", "tiny", "--m", "4"]
    groups = quick_groups(monkeypatch, tmp_path, *what)
    assert groups == {"codes/float32/tiny.sae/m4/k2"}
    assert "k-sparse codes: times faster" in capsys.readouterr().out
