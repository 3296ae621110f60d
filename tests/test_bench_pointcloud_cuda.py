"""The GPU's bench of point clouds on a CPU: the same code with a stopwatch that needs no GPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import bench_pointcloud_cuda
import lidar
import pytest
import run
import run_cuda
import torch
from bench_pointcloud import PLAIN, SHAPES
from bench_pointcloud_cuda import CudaVoxelCase, CudaVoxelPlan
from cuda_rivals import DENSE
from gossamer import pointcloud as pc
from record import OURS
from test_bench_cuda import HASTE, LIMITS, bench


@pytest.fixture(autouse=True)
def little_to_do(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    torch.set_num_threads(1)  # a team would have to meet after each of many small products
    points = lidar.scene(beams=12, azimuths=40)
    monkeypatch.setattr(lidar, "scene", lambda: points)
    planes, full = (4, 4, 4, 8, 8, 4, 4, 4), pc.models.MinkUNet18
    monkeypatch.setattr(pc.models, "MinkUNet18", lambda *given: full(*given, None, planes, 4))


PLAN = CudaVoxelPlan(None, ["bf16"], (8,), SHAPES[:2], rounds=HASTE, network=False)


def cases_of(plan: CudaVoxelPlan, costs: dict[str, float] | None = None) -> list[CudaVoxelCase]:
    return list(bench_pointcloud_cuda.run(plan, bench(costs)))


def test_layers_are_checked_compared_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = cases_of(PLAN, {OURS: 1e-5, PLAIN: 3e-5})
    assert len({case.name for case in cases}) == len(cases) == 4
    for case in cases:
        assert case.passed, case.name
        assert case.best(DENSE) == PLAIN
        assert case.against(DENSE).median == pytest.approx(3.0)  # type: ignore[union-attr]
        assert case.flops == (3 if "back" in case.job else 1) * 2 * case.pairs * 64
    assert "No module" in cases[0].missing["TorchSparse"]
    absent = replace(cases[0], timings={}, unavailable="left out: no time", check=None)
    run_cuda.print_tables([*cases, absent], bench_pointcloud_cuda.voxel_table)
    printed = capsys.readouterr().out
    assert "forward+backward" in printed
    assert "left out: no time" in printed
    arguments = ["--device", "cuda", "--commit", "abcdef0123", "--json", str(tmp_path / "r.json")]
    run_cuda.keep(run.parse(arguments), arguments, {"name": "NVIDIA H200"}, LIMITS, [], cases)
    found = json.loads((tmp_path / "r.json").read_text(), parse_constant=pytest.fail)
    mine = [entry for entry in found["benchmarks"] if entry["name"].endswith(OURS)]
    assert [entry["params"]["job"] for entry in mine] == [case.job for case in cases]


def test_a_network_is_checked_and_its_maps_are_timed_apart() -> None:
    (case,) = cases_of(replace(PLAN, network=True, shapes=()))
    assert case.passed, case
    assert {OURS, PLAIN} == set(case.timings)
    assert set(case.eager) == {OURS, "with maps", "a map", "that by plain torch"}


def test_wrong_answers_and_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    one = replace(PLAN, shapes=SHAPES[:1], jobs=("forward",))

    def wrong(x: torch.Tensor, *rest: object) -> torch.Tensor:
        return torch.ones_like(x)

    monkeypatch.setattr(bench_pointcloud_cuda, "pointcloud_conv", wrong)
    assert not cases_of(one)[0].passed

    def broken(*args: object) -> torch.Tensor:
        raise RuntimeError("broken")

    monkeypatch.setattr(bench_pointcloud_cuda, "pointcloud_conv", broken)
    (case,) = cases_of(one)
    assert not case.passed
    assert case.unavailable == "RuntimeError: broken"
    now = iter([0.0, 3.0])
    late = next(
        bench_pointcloud_cuda.run(replace(one, most_seconds=2.0), bench(), lambda: next(now))
    )
    assert late.unavailable == "left out: no time"


def test_command_line() -> None:
    every = run_cuda.voxel_plan_of(run.parse(["--device", "cuda", "--feature", "pointcloud"]))
    assert set(every.dtypes) == {"bf16", "fp16"}
    quick = run_cuda.voxel_plan_of(
        run.parse(["--device", "cuda", "--quick", "--feature", "pointcloud", "--seconds", "60"])
    )
    assert (quick.dtypes, quick.most_seconds) == (["bf16"], 60)
