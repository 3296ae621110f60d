"""The bench of grouped linear layers: cases, loads, rivals, and the command that runs it."""

from __future__ import annotations

from pathlib import Path

import bench_grouped
import pytest
import torch
from bench_grouped import GROUPED_MM, LOOP, GroupedCase, GroupedPlan, draw_counts
from record import OURS
from shapes import DTYPES, EXPERT_SHAPES, ExpertShape
from tiny_bench import HASTE, LIMITS, quick_groups

SHAPE = ExpertShape("tiny.up", 4, 24, 16)


@pytest.fixture(scope="module")
def cases() -> list[GroupedCase]:
    plan = GroupedPlan([SHAPE], [1, 3], list(DTYPES), HASTE)
    found = list(bench_grouped.run(plan, LIMITS))
    assert len(found) == len(plan)
    return found


def test_cases_are_right_and_complete(cases: list[GroupedCase]) -> None:
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        assert case.check.passed
        assert case.best_dense in case.timings
        assert case.best_dense != OURS
        assert case.default == LOOP
        assert case.rows == case.tokens * SHAPE.experts
        if case.dtype == "float32" and hasattr(torch.nn.functional, "grouped_mm"):
            assert GROUPED_MM in case.timings


def test_bytes_are_those_of_experts_with_tokens(cases: list[GroupedCase]) -> None:
    for case in cases:
        size = DTYPES[case.dtype].itemsize
        weights, activations = case.active * 24 * 16, case.rows * (24 + 16)
        assert case.nbytes == size * (weights + activations)
        assert case.dense_flops == 2 * case.rows * 24 * 16
        assert (case.active == 4) or case.load == "zipf"


@pytest.mark.parametrize("shape", EXPERT_SHAPES, ids=lambda shape: shape.name)
def test_loads(shape: ExpertShape) -> None:
    for tokens in (1, 8):
        even, zipf = (draw_counts(shape.experts, tokens, load) for load in bench_grouped.LOADS)
        assert int(even.sum()) == int(zipf.sum()) == tokens * shape.experts
        assert int(zipf.max()) >= 2 * tokens
        assert torch.equal(zipf, draw_counts(shape.experts, tokens, "zipf"))


def test_command(
    monkeypatch: pytest.MonkeyPatch,
    threads: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("rich")
    monkeypatch.setattr("command_line.EXPERT_SHAPES", (SHAPE,))
    what = ["--feature", "grouped", "--dtype", "float32", "--shapes", "tiny", "--m", "2"]
    groups = quick_groups(monkeypatch, tmp_path, *what)
    assert groups == {f"grouped/float32/tiny.up/m8/{load}" for load in bench_grouped.LOADS}
    assert "Experts: times faster" in capsys.readouterr().out
