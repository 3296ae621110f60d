"""The bench of convolutions over point clouds: cases, answers, and the command that runs it."""

from __future__ import annotations

from pathlib import Path

import bench_pointcloud
import lidar
import pytest
import run
import torch
from bench_pointcloud import JOBS, PLAIN, VoxelPlan
from record import OURS
from tiny_bench import HASTE, LIMITS, quick_groups


@pytest.fixture
def few_voxels(monkeypatch: pytest.MonkeyPatch) -> None:
    points = lidar.scene(beams=12, azimuths=60)
    monkeypatch.setattr(lidar, "scene", lambda: points)


def test_cases_are_right_and_complete(few_voxels: None) -> None:
    plan = VoxelPlan(None, ["float32", "bfloat16"], HASTE, channels=(5,))
    cases = list(bench_pointcloud.run(plan, LIMITS))
    assert len(cases) == len(plan)
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        assert case.check.passed, case.name
        assert {OURS, PLAIN} <= set(case.timings)
        assert case.best_dense != OURS
        products = {"map": 0, "forward": 1, "forward+backward": 3}[case.job]
        assert case.dense_flops == max(1, products * 2 * case.pairs * case.channels**2)
        assert case.outputs == case.rows or case.shape.stride > 1


def test_command(
    few_voxels: None,
    monkeypatch: pytest.MonkeyPatch,
    threads: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    picture = tmp_path / "plot.png"
    what = ["--feature", "pointcloud", "--dtype", "float32", "--plot", str(picture)]
    groups = quick_groups(monkeypatch, tmp_path, *what)
    assert len(groups) == 1 + (len(JOBS) - 1) * len(run.QUICK_CHANNELS)
    assert picture.with_stem("plot-scene").stat().st_size > 10_000
    assert "Point clouds: times faster" in capsys.readouterr().out


def test_scan_from_a_file(tmp_path: Path) -> None:
    points = torch.rand(50, 4) * 9
    (tmp_path / "scan.bin").write_bytes(points.numpy().tobytes())
    assert bench_pointcloud.coordinates_of(tmp_path / "scan.bin").shape[1] == 4
