"""The bench of zero activations: cases, break-even, the picture, and the model it trains."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import bench_actsparse
import pytest
import relu_lm
import torch
from bench_actsparse import INPUT_MAJOR, NOTHING_ZERO, ActiveCase, ActivePlan, break_even
from record import OURS
from shapes import DTYPES
from timing import Timing
from tiny_bench import HASTE, LIMITS, TINY, quick_groups


@pytest.fixture(scope="module")
def cases() -> list[ActiveCase]:
    plan = ActivePlan([TINY], [1, 3], list(DTYPES), [0.0, 0.5, 0.9], HASTE)
    found = list(bench_actsparse.run(plan, LIMITS))
    assert len(found) == len(plan)
    return found


def test_cases_are_right_and_complete(cases: list[ActiveCase]) -> None:
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        assert case.check.passed
        assert case.best_dense not in (OURS, NOTHING_ZERO)
        assert {OURS, NOTHING_ZERO, INPUT_MAJOR, case.default} <= set(case.timings)
        size, (n, k) = DTYPES[case.dtype].itemsize, (TINY.out_features, TINY.in_features)
        assert case.nbytes == round(case.read * n * k * size) + case.rows * (n + k) * size
        # Tokens draw their zeros by themselves, and share what is read.
        expected = 1 - case.sparsity**case.rows
        assert case.read == pytest.approx(expected, abs=0.12)
        assert case.finding()["rows_read"] == case.read


def test_break_even(cases: list[ActiveCase]) -> None:
    def timed(sparsity: float, seconds: float) -> ActiveCase:
        timings = {OURS: Timing((seconds,) * 3, 1), "dense": Timing((1.0,) * 3, 1)}
        return replace(cases[0], sparsity=sparsity, timings=timings, best_dense="dense")

    assert break_even([timed(0.0, 1.5), timed(0.5, 0.5), timed(0.9, 0.1)]) == (
        "",
        pytest.approx(0.25),
    )
    assert break_even([timed(0.0, 0.9), timed(0.5, 0.5)]) == ("<", 0.0)
    assert break_even([timed(0.0, 3.0), timed(0.5, 1.5)]) == (">", 0.5)


def test_command(
    monkeypatch: pytest.MonkeyPatch,
    threads: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("rich")
    what = ["--feature", "actsparse", "--dtype", "float32", "--shapes", "32x64", "--m", "2"]
    groups = quick_groups(monkeypatch, tmp_path, *what)
    assert groups == {f"actsparse/float32/32x64/m2/{zeros}" for zeros in ("0%", "50%", "90%")}
    assert "As fast as dense from so many zeros on" in capsys.readouterr().out


def test_picture(cases: list[ActiveCase], tmp_path: Path) -> None:
    for name in ("rich", "matplotlib"):
        pytest.importorskip(name)
    import active_report  # needs both

    active_report.draw(tmp_path / "zeros.png", cases, "tiny")
    assert (tmp_path / "zeros.png").stat().st_size > 10_000


def test_model_keeps_its_loss() -> None:
    """The kernels may differ from dense by rounding alone, whatever convert() would choose."""
    text = relu_lm.read_text()
    model = relu_lm.train(text, relu_lm.TINY)
    batch = relu_lm.windows(text, relu_lm.TINY, torch.Generator().manual_seed(1))
    with torch.no_grad():
        loss = relu_lm.loss_of(model, batch)
        dense = relu_lm.decode(model, text[:8], text[8:16])
        zeros = relu_lm.share_of_zeros(model, batch)
        report = relu_lm.convert(model, text, force=True)
        assert len(report.swapped) == len(report) == 4 * relu_lm.TINY.layers + 1
        torch.testing.assert_close(relu_lm.loss_of(model, batch), loss)
        torch.testing.assert_close(relu_lm.decode(model, text[:8], text[8:16]), dense)
    assert all(0.3 < share < 1 for share in zeros)


def test_model_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relu_lm, "DECODED", 4)
    result = relu_lm.run("float32", HASTE, relu_lm.TINY)
    assert result.answers.passed
    assert result.speeds[0].amount == 4
    assert "loss" in result.data
