"""How convert() measures, decides and reports."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace

import gossamer
import pytest
import torch
from convert_models import MLP, fix_speedup, pruned_copy, small_mlp, small_sample
from gossamer import _C
from gossamer.conversion import timing
from gossamer.conversion.cost_table import worth_swapping
from torch import Tensor, nn


@pytest.fixture
def mlp() -> MLP:
    return small_mlp()


@pytest.fixture
def sample() -> Tensor:
    return small_sample()


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand(())


@pytest.mark.parametrize(("ratio", "swapped"), [(1.04, False), (1.05, True)])
def test_swaps_from_the_threshold_on(
    mlp: MLP, sample: Tensor, monkeypatch: pytest.MonkeyPatch, ratio: float, swapped: bool
) -> None:
    fix_speedup(monkeypatch, ratio)
    report = gossamer.convert(mlp, prune="magnitude", sample_input=sample)
    for layer in report:
        assert layer.swapped == swapped
        assert layer.reason == ("measured" if swapped else "measured 1.04x, below 1.05x")
    forced = gossamer.convert(pruned_copy(mlp), sample_input=sample, force=True)
    assert all(layer.swapped or "already" in layer.reason for layer in forced)


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict"])
def test_sample_forms(mlp: MLP, sample: Tensor, form: str) -> None:
    given = {"tensor": sample, "tuple": (sample, 2.0), "dict": {"x": sample, "scale": 2.0}}[form]
    report = gossamer.convert(mlp, prune="magnitude", sample_input=given)
    assert [layer.rows for layer in report] == [10, 10]
    assert all(layer.dense_seconds > 0 and layer.sparse_seconds > 0 for layer in report)


def test_rows_are_those_of_the_layer(mlp: MLP) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Flatten(0, 1), mlp)
    report = gossamer.convert(model, prune="magnitude", sample_input=torch.randn(3, 5, 64))
    assert [layer.rows for layer in report] == [15, 15, 15]


def test_layer_that_the_sample_misses_stays_dense(mlp: MLP, sample: Tensor) -> None:
    mlp.unused = nn.Linear(64, 64)
    report = gossamer.convert(mlp, prune="magnitude", sample_input=sample)
    assert not report["unused"].swapped
    assert "does not reach" in report["unused"].reason
    assert report["unused"].pruned
    forced = gossamer.convert(mlp, sample_input=sample, include="unused", force=True)
    assert forced["unused"].swapped


def test_sample_run_leaves_no_trace(mlp: MLP, sample: Tensor) -> None:
    model = nn.Sequential(mlp, nn.Dropout(), Noise()).train()
    mlp.up.eval()
    mean, training = mlp.norm.running_mean.clone(), [m.training for m in model.modules()]
    random_state = torch.get_rng_state()
    gossamer.convert(model, prune="magnitude", sample_input=sample, force=True)
    assert torch.equal(mlp.norm.running_mean, mean)
    assert [m.training for m in model.modules()] == training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(not module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_autocast_inside_the_model_is_timed(sample: Tensor) -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.layer(x)

    model = Cast().eval()
    twin = pruned_copy(model)
    report = gossamer.convert(model, prune="magnitude", sample_input=sample, force=True)
    assert model(sample).dtype == torch.bfloat16
    torch.testing.assert_close(model(sample), twin(sample), rtol=3e-2, atol=3e-2)
    assert 1e-5 < report["layer"].error_max < 3e-2  # bfloat16 rounding, which float32 has not


def test_layer_called_repeatedly_counts_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(self.layer(x))[:2])

    rows = []

    def medians(functions: list[Callable[[], Tensor]], clock: object) -> list[float]:
        rows.append(functions[1]().shape[0])
        return [20.0 * rows[-1], 10.0 * rows[-1]]

    monkeypatch.setattr(timing, "_medians", medians)
    report = gossamer.convert(Recurrent(), prune="magnitude", sample_input=torch.randn(5, 64))
    assert sorted(rows) == [2, 5]
    assert report["layer"].rows == 5
    assert report["layer"].dense_seconds == 20.0 * (5 + 5 + 2)
    assert report["layer"].sparse_seconds == 10.0 * (5 + 5 + 2)


@pytest.mark.parametrize(
    ("shape", "dtype", "target", "swapped"),
    [
        ((1024, 1024), "float32", "avx512", True),
        ((1024, 1024), "float32", "serial", False),
        ((1024, 1024), "bfloat16", "amx_bf16", False),
        ((1024, 1024), "float64", "avx512", False),
        ((64, 64), "float32", "avx512", False),
        ((32, 1 << 20), "float32", "avx512", False),
        ((1 << 20, 32), "float32", "avx512", False),
    ],
)
def test_cost_table_is_a_pure_function(
    shape: tuple[int, int], dtype: str, target: str, swapped: bool
) -> None:
    verdict, reason = worth_swapping(*shape, dtype, target)
    assert verdict == swapped
    assert "cost table" in reason


def test_cost_table_of_intel_is_another() -> None:
    assert worth_swapping(512, 512, "float32", "avx512", intel=False)[0]
    assert not worth_swapping(512, 512, "float32", "avx512", intel=True)[0]
    assert worth_swapping(1024, 1024, "float32", "amx_bf16", intel=True)[0]
    assert worth_swapping(512, 512, "bfloat16", "avx2", loops=True)[0]
    assert not worth_swapping(512, 512, "bfloat16", "avx2")[0]


def test_without_a_sample_the_cost_table_decides(cpu_target: str) -> None:
    model = nn.Sequential(nn.Linear(1024, 1024))
    report = gossamer.convert(model, prune="magnitude")
    verdict = worth_swapping(1024, 1024, "float32", cpu_target, _C.intel_cores())
    assert (report["0"].swapped, report["0"].reason) == verdict
    assert report["0"].rows is None
    assert report["0"].pruned


def test_report_for_people_and_machines(mlp: MLP, sample: Tensor) -> None:
    mlp.kept = nn.Linear(8, 8, dtype=torch.float64)
    before = mlp.up.weight.nbytes + mlp.up.bias.nbytes
    report = gossamer.convert(mlp, prune="magnitude", sample_input=sample, force=True)
    rows = json.loads(json.dumps(report.rows()))
    assert [row["name"] for row in rows] == ["up", "down", "kept"]
    up = report["up"]
    assert up.shape == (256, 64)
    assert up.bytes_before == before
    assert up.bytes_after == mlp.up.weight.nbytes + mlp.up.bias.nbytes < before
    assert up.speedup == pytest.approx(up.dense_seconds / up.sparse_seconds)
    text = str(report)
    for word in ("up", "down", "kept", "float64", "256x64", up.kernel, "2 of 3 layers"):
        assert word in text
    with pytest.raises(KeyError):
        report["sideways"]


def test_model_without_linear_layers() -> None:
    report = gossamer.convert(nn.Sequential(nn.ReLU()), prune="magnitude")
    assert len(report) == 0
    assert "0 of 0" in str(report)


def test_clock_of_a_gpu_records_on_the_stream_of_its_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorded = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: object) -> None:
            recorded.append(stream)

        def synchronize(self) -> None: ...

        def elapsed_time(self, end: object) -> float:
            return 1e6

    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: ("stream of", device))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=8)
    )
    assert timing._cuda_clock(cpu)(lambda: torch.zeros(1)) == 1e3
    assert recorded == [("stream of", cpu)] * 2


class Reads(nn.Module):
    """Looks at the weight of a layer that it calls, too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x: Tensor, room: list[int] | None = None) -> Tensor:
        if room is not None:  # as a cache that fills up
            room.pop()
            return self.layer(x)
        return self.layer(x) + self.layer.weight.sum()


def test_a_model_that_does_not_run_with_sparse_layers_stays_dense(sample: Tensor) -> None:
    model = Reads()
    twin, layer = pruned_copy(model), model.layer
    report = gossamer.convert(model, prune="magnitude", sample_input=sample, force=True)
    assert model.layer is layer
    assert not report["layer"].swapped
    assert "does not run with sparse layers: AttributeError: Sparse24" in report["layer"].reason
    assert "has no 'sum': it is the sparse weight of a layer" in report["layer"].reason
    assert torch.equal(model(sample), twin(sample))
    assert gossamer.convert(Reads(), prune="magnitude", force=True)["layer"].swapped


class Closed(nn.Module):
    """Takes no other layer under one of its names."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.closed = nn.Linear(64, 64), nn.Linear(64, 64)

    def __setattr__(self, name: str, value: object) -> None:
        if name == "closed" and "closed" in self.__dict__.get("_modules", {}):
            raise AttributeError("closed")
        super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.closed(self.open(x))


def test_a_model_that_takes_no_other_layer_stays_whole(sample: Tensor) -> None:
    model = Closed()
    before = dict(model.named_modules())
    report = gossamer.convert(model, prune="magnitude", sample_input=sample, force=True)
    assert dict(model.named_modules()) == before
    assert all("sparse layers: AttributeError: closed" in row.reason for row in report)


def test_a_sample_that_runs_once_alone_decides_nothing_more(sample: Tensor) -> None:
    given = {"x": sample, "room": [1]}
    report = gossamer.convert(Reads(), prune="magnitude", sample_input=given, force=True)
    assert report["layer"].swapped
