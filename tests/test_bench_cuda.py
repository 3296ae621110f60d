"""The GPU's bench on a CPU: the same code with a stopwatch and rivals that need no GPU."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import bench_sparse24_cuda
import cuda_rivals
import cuda_timing
import cusparselt
import gossamer
import pytest
import run
import run_cuda
import torch
from bench_sparse24_cuda import Bench, CudaPlan, Weight, raw_numbers, reference, run_case
from cuda_machine import GpuLimits, Sensors, gpu_name
from cuda_record import CudaCase, goals
from cuda_report import cases_table, summary_text
from cuda_rivals import Operands, Rivals
from cuda_shapes import DTYPES, QUICK_OTHER_SHAPES, QUICK_SHAPES, ROWS, SHAPES
from cuda_timing import (
    CACHES_FULL,
    Contender,
    Replay,
    Rounds,
    copies_for,
    eager_seconds,
    measure,
    repeats_for,
)
from cusparselt import Algorithm, CusparseLt, add_cusparselt, sweep
from machine import cpu_name, describe_commit
from record import OURS, Check, default_path
from shapes import LinearShape
from timing import Timing
from torch import Tensor

TINY = LinearShape("tiny.up", 32, 64)
CPU = torch.device("cpu")
LIMITS = GpuLimits(l2=20_000, dram=1e12, dense_flops={"bf16": 1e14}, sparse_flops={"bf16": 1.5e14})
HASTE = Rounds(budget=0.0, least=3, most=3)
PLAN = CudaPlan([("bf16", TINY, 4)], HASTE)


@dataclass
class HostReplay:
    contender: Contender
    repeats: int
    calls: int
    last: Tensor
    eager: str | None = None

    def run(self) -> None:
        for _ in range(self.repeats):
            for call in self.contender.calls:
                self.last = call()


class HostStopwatch:
    """Runs what it is given, and says that it took what a table says, by name."""

    def __init__(self, costs: dict[str, float] | None = None) -> None:
        self.costs = costs or {}
        self.order: list[str] = []

    def prepare(self, contender: Contender, repeats: int) -> Replay:
        calls = repeats * len(contender.calls)
        return HostReplay(contender, repeats, calls, torch.full((1, 1), math.nan))

    def seconds(self, replays: Sequence[tuple[Replay, int]]) -> list[float]:
        taken = []
        for replay, _ in replays:
            replay.run()
            name = replay.contender.name
            self.order.append(name)
            taken.append(self.costs.get(name, 1e-5) * replay.calls)
        return taken


def bench(costs: dict[str, float] | None = None) -> Bench:
    return Bench(CPU, LIMITS, lambda: nullcontext(HostStopwatch(costs)), lambda: {"sm_mhz": 1980})


def case(
    rows: int, ours: float, dense: float, shape: LinearShape = TINY, **more: object
) -> CudaCase:
    timings = {OURS: Timing((ours,) * 3, 1), "F.linear": Timing((dense,) * 3, 1)}
    return CudaCase(
        shape, "bf16", rows, 1000, 100, 2e-6, 60, 1e-6, Check(0.0, 0.5),
        timings, {OURS: "ours", "F.linear": "dense"}, **more,
    )  # fmt: skip


# ---- copies, rounds ------------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [1000, 7000, 59_999, 60_000, 10**9])
def test_copies_outgrow_the_cache_and_no_more(nbytes: int) -> None:
    copies = copies_for(nbytes, 20_000)
    assert copies * nbytes >= CACHES_FULL * 20_000 or copies == 64
    assert copies == 1 or (copies - 1) * nbytes <= CACHES_FULL * 20_000


def test_graph_has_as_many_calls_as_fill_a_slice() -> None:
    assert repeats_for(copies=1, least_seconds=1.0) == 1
    assert repeats_for(copies=10, least_seconds=1e-5) == 4
    assert repeats_for(copies=3, least_seconds=1e-9) == 32


def test_rounds_interleave_and_divide_by_calls() -> None:
    stopwatch = HostStopwatch({"a": 2e-5, "b": 4e-5})
    y = torch.zeros(1, 1)
    replays = {
        name: stopwatch.prepare(Contender(name, "dense", [lambda: y] * 2), 3) for name in "ab"
    }
    timings = measure(replays, stopwatch, HASTE)
    assert stopwatch.order == list("ab" + "ab" + "ba" + "ab")
    assert timings["a"].seconds == pytest.approx((2e-5,) * 3)
    assert timings["b"].median == pytest.approx(4e-5)
    assert timings["a"].calls % 6 == 0


def test_eager_time_is_the_least_round() -> None:
    now, costs = [0.0], iter([*[1.0] * 3, *[4.0] * 2, *[3.0] * 2])

    def call() -> Tensor:
        now[0] += next(costs)
        return torch.zeros(1)

    assert eager_seconds(call, lambda: None, 2, 2, lambda: now[0]) == 3.0


class FakeGraph:
    """Runs nothing at a replay; refuses the captures whose number is in ``refused``."""

    made = 0
    refused: tuple[int, ...] = ()

    def __init__(self) -> None:
        FakeGraph.made += 1
        self.number, self.replays = FakeGraph.made, 0

    def capture_begin(self, pool: object, capture_error_mode: str) -> None:
        assert (pool, capture_error_mode) == ("pool", "relaxed")

    def capture_end(self) -> None:
        if self.number in self.refused:
            raise RuntimeError("the capture is void\nmore")

    def replay(self) -> None:
        self.replays += 1

    def reset(self) -> None:
        self.replays = -1


class FakeEvent:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: object) -> None:
        self.stream = stream

    def elapsed_time(self, end: FakeEvent) -> float:
        assert end.stream is self.stream
        return 6.0


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> cuda_timing.GraphStopwatch:
    monkeypatch.setattr(FakeGraph, "made", 0)
    for name, fake in {
        "Stream": lambda device: object(), "graph_pool_handle": lambda: "pool",
        "CUDAGraph": FakeGraph, "Event": FakeEvent, "stream": nullcontext,
        "synchronize": lambda device: None, "empty_cache": lambda: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    return cuda_timing.GraphStopwatch(CPU)


def test_graph_holds_every_copy_and_is_replayed(graphs: cuda_timing.GraphStopwatch) -> None:
    ran: list[int] = []

    def call(copy: int) -> Tensor:
        ran.append(copy)
        return torch.tensor(copy)

    contender = Contender("a", "dense", [partial(call, 0), partial(call, 1)])
    replay = graphs.prepare(contender, 2)
    assert ran == [0, 0, 1, 0, 1]  # the first one outside, to warm up
    assert (replay.calls, int(replay.last), replay.eager) == (4, 1, None)
    assert graphs.seconds([(replay, 3), (replay, 1)]) == pytest.approx([2e-3, 6e-3])
    assert replay.graph.replays == 1 + 3 + 1 + 1
    assert len(ran) == 5
    graphs.drop(replay)
    graphs.close()
    assert replay.graph.replays == -1


@pytest.mark.parametrize("where", ["call", "end"])
def test_what_cannot_be_captured_is_timed_by_calls(
    graphs: cuda_timing.GraphStopwatch, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    ran = 0

    def call() -> Tensor:
        nonlocal ran
        ran += 1
        if where == "call" and ran == 2:
            raise RuntimeError("not while capturing")
        return torch.zeros(1)

    monkeypatch.setattr(FakeGraph, "refused", (2,) if where == "end" else ())
    stream = graphs.stream
    replay = graphs.prepare(Contender("a", "dense", [call]), 3)
    reason = "not while capturing" if where == "call" else "the capture is void"
    assert replay.eager == f"RuntimeError: {reason}"
    assert graphs.stream is not stream
    before = ran
    graphs.seconds([(replay, 2)])
    assert ran - before == 3 * (1 + 2)


# ---- numbers and checks --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=lambda d: d.name)
def test_raw_numbers_are_24_and_quantise_to_themselves(dtype: cuda_rivals.GpuDtype) -> None:
    weight = raw_numbers((32, 64), dtype, CPU, 0, pruned=True)
    kept = weight.double().view(32, 16, 4).ne(0).sum(-1)
    assert weight.dtype == dtype.dtype
    assert kept.max() == 2
    assert kept.double().mean() > 1.8
    if dtype.quantised:
        most = bench_sparse24_cuda.RAW_MOST[dtype.dtype]
        assert torch.equal(weight.double().abs().amax(1), torch.full((32,), float(most)).double())


def test_check_in_parts_is_the_check_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_sparse24_cuda, "CHUNK", 100)
    x, weight = torch.randn(9, 64), torch.randn(32, 64)
    expected = reference(x, weight)
    bf16 = DTYPES["bf16"]
    assert bench_sparse24_cuda.check(expected.bfloat16(), expected, bf16).passed
    for wrong in (5.0, math.nan, math.inf):
        answer = expected.bfloat16()
        answer[8, 31] += wrong
        assert not bench_sparse24_cuda.check(answer, expected, bf16).passed
    assert not bench_sparse24_cuda.check(expected[:8], expected, bf16).passed


# ---- cases ---------------------------------------------------------------------------------------


def weight_of(dtype: str = "bf16") -> Weight:
    return Weight(TINY, DTYPES[dtype], CPU)


def run_tiny(dtype: str = "bf16", rows: int = 4, costs: dict[str, float] | None = None) -> CudaCase:
    with torch.no_grad():
        return run_case(weight_of(dtype), rows, PLAN, bench(costs), {})


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_case_is_right_and_names_what_is_missing(dtype: str) -> None:
    found = run_tiny(dtype, costs={OURS: 1e-5, "F.linear": 2e-5})
    assert found.passed
    assert found.check is not None
    assert found.check.passed
    assert found.best("dense") == "F.linear"
    assert found.against("dense").median == pytest.approx(2.0)
    assert found.against("cusparselt") is None
    assert {"cuSPARSELt", "torch CUTLASS"} <= set(found.missing)
    assert all(": " in why for why in found.missing.values())
    assert set(found.eager) == {OURS, "F.linear"}
    assert found.sensors["before"] == {"sm_mhz": 1980}
    assert found.nbytes < found.dense_bytes


def test_eager_times_only_few_rows() -> None:
    assert run_tiny(rows=17).eager == {}


def test_wrong_kernel_fails_the_case(monkeypatch: pytest.MonkeyPatch) -> None:
    right = gossamer.sparse24_linear
    monkeypatch.setattr(gossamer, "sparse24_linear", lambda x, weight: right(x, weight) * 1.1)
    assert not run_tiny().passed


def test_wrong_replay_fails_the_case(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgetful(HostStopwatch):
        def seconds(self, replays: Sequence[tuple[Replay, int]]) -> list[float]:
            taken = super().seconds(replays)
            for replay, _ in replays:
                if replay.contender.name == OURS:
                    replay.last = torch.zeros_like(replay.last)
            return taken

    with torch.no_grad():
        where = replace(bench(), stopwatch=lambda: nullcontext(Forgetful()))
        found = run_case(weight_of(), 4, PLAN, where, {})
    assert found.timings
    assert not found.passed


def test_wrong_rival_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def add_wrong(rivals: Rivals, o: Operands, copies: int) -> None:
        y = torch.zeros(o.rows, 32)
        rivals.attempt("zeros", lambda: Contender("zeros", "dense", [lambda: y]))

    monkeypatch.setattr(bench_sparse24_cuda, "add_dense", add_wrong)
    found = run_tiny()
    assert found.passed
    assert found.missing["zeros"] == "wrong result"
    assert list(found.timings) == [OURS]


@pytest.mark.parametrize(("error", "failed"), [(NotImplementedError, False), (ValueError, True)])
@pytest.mark.parametrize("where", ["pack", "call"])
def test_absent_kernel_is_recorded_and_a_fault_fails(
    monkeypatch: pytest.MonkeyPatch, where: str, error: type[Exception], failed: bool
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error("no such thing\nsecond line")

    if where == "pack":
        monkeypatch.setattr(bench_sparse24_cuda, "pack", refuse)
    else:
        monkeypatch.setattr(gossamer, "sparse24_linear", refuse)
    found = run_tiny()
    assert found.unavailable == f"{error.__name__}: no such thing"
    assert found.failed is failed
    assert found.passed is not failed
    assert found.timings == {}
    word = "FAILED" if failed else "not available"
    assert f"{word}: {error.__name__}: no such thing" in cases_table([found], LIMITS)


def test_cases_past_the_time_limit_are_named() -> None:
    now = iter([0.0, 1.0, 99.0])
    plan = replace(PLAN, cases=[("bf16", TINY, 1), ("bf16", TINY, 2)], most_seconds=10)
    first, second = bench_sparse24_cuda.run(plan, bench(), lambda: next(now))
    assert first.timings
    assert second.unavailable == "left out: no time"
    assert "1 cases from sparse24/bf16/tiny.up/m2 on: left out" in summary_text([first, second])


def test_case_that_breaks_down_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(bench_sparse24_cuda, "run_case", broken)
    plan = replace(PLAN, cases=[("bf16", TINY, 1), ("bf16", TINY, 2)])
    found = list(bench_sparse24_cuda.run(plan, bench()))
    assert [case.rows for case in found] == [1, 2]
    assert not any(case.passed for case in found)


def test_tables_come_shape_by_shape(capsys: pytest.CaptureFixture[str]) -> None:
    other = LinearShape("tiny.down", 64, 32)
    cases = [case(1, 1e-6, 2e-6), case(2, 1e-6, 2e-6), case(1, 1e-6, 2e-6, other)]
    table = partial(cases_table, limits=LIMITS)
    assert run_cuda.print_tables(iter(cases), table) == cases
    out = capsys.readouterr().out
    assert out.count("sparse24 bf16 tiny.") == 2
    assert out.count("2.00x") == 3


# ---- cuSPARSELt ----------------------------------------------------------------------------------


class FakeLt(CusparseLt):
    """Algorithm 1 is wrong, 3 does not exist, 2 is the fastest."""

    @classmethod
    def make(cls, o: Operands, copies: int) -> FakeLt:
        return cls(o.dtype, o.rows, [o.weight] * copies, [o.x] * copies)

    def calls(self, algorithm: Algorithm) -> list[Callable[[], Tensor]]:
        def product() -> Tensor:
            if algorithm.alg_id >= 3:
                raise RuntimeError("invalid value\nmore")
            y = self.xs[0] @ self.packed[0].t() * (1 if algorithm.alg_id != 1 else 0.5)
            return y if algorithm.transpose_result else y.t()

        return [product] * len(self.xs)

    def search(self, transposed: bool) -> tuple[Algorithm, int]:
        return Algorithm(0, 2, 0, transposed), 5


class AlgorithmStopwatch(HostStopwatch):
    def seconds(self, replays: Sequence[tuple[Replay, int]]) -> list[float]:
        super().seconds(replays)
        settings = [replay.contender.settings or {} for replay, _ in replays]
        return [
            (1e-5 if s["alg_id"] == 2 and s["transpose_result"] else 2e-5) * replay.calls
            for s, (replay, _) in zip(settings, replays, strict=True)
        ]


def fake_lt_operands() -> tuple[Operands, Callable[[Tensor], bool]]:
    dtype = DTYPES["fp32"]
    weight = raw_numbers((32, 64), dtype, CPU, 0, pruned=True)
    operands = Operands(dtype, weight, raw_numbers((5, 64), dtype, CPU, 1))
    expected = reference(operands.x, weight)
    return operands, lambda y: bench_sparse24_cuda.check(y, expected, dtype).passed


def test_cusparselt_best_is_the_fastest_that_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cusparselt, "CusparseLt", FakeLt)
    operands, right = fake_lt_operands()
    rivals = Rivals()
    trials = add_cusparselt(rivals, operands, 2, right, AlgorithmStopwatch(), 1)
    by_name = {c.name: c.settings for c in rivals.contenders}
    assert by_name["cuSPARSELt best"] == Algorithm(2, transpose_result=True).as_dict()
    assert by_name["cuSPARSELt default"] == Algorithm().as_dict()
    assert by_name["cuSPARSELt search"] == Algorithm(0, 2, 0).as_dict()
    failures = {trial.algorithm.alg_id: trial.failure for trial in trials if trial.failure}
    assert failures[1] == cuda_rivals.WRONG
    summary = cusparselt.summarise(trials)
    assert summary["tried"] == 12
    assert summary["failures"] == {cuda_rivals.WRONG: 2, "RuntimeError: invalid value": 4}
    assert summary["fastest"][0]["alg_id"] == 2
    assert failures[3] == failures[4] == "RuntimeError: invalid value"
    assert len(trials) == 12  # five ids in both orders and the search's two splits
    for contender in rivals.contenders:
        assert right(contender.answer(contender.calls[0]()))


def test_sweep_stops_when_out_of_time() -> None:
    operands, right = fake_lt_operands()
    left = iter([False, True])
    library = FakeLt.make(operands, 1)
    algorithms = [Algorithm(0), Algorithm(2)]
    trials = sweep(library, algorithms, right, AlgorithmStopwatch(), 1, lambda: next(left))
    assert [trial.algorithm.alg_id for trial in trials] == [0]


def test_cusparselt_without_a_right_algorithm_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cusparselt, "CusparseLt", FakeLt)
    operands, _ = fake_lt_operands()
    rivals = Rivals()
    add_cusparselt(rivals, operands, 1, lambda y: False, AlgorithmStopwatch(), 1)
    assert rivals.contenders == []
    assert "wrong result" in rivals.missing["cuSPARSELt"]


@pytest.mark.parametrize("rows", [1, 8, 13])
def test_x_is_padded_to_what_cusparselt_wants(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(torch, "_cslt_compress", lambda weight: weight)
    for name, least in (("bf16", 8), ("int8", 16), ("fp8", 16)):
        dtype = DTYPES[name]
        x = raw_numbers((rows, 64), dtype, CPU, 1)
        library = CusparseLt.make(Operands(dtype, x, x), 3)
        padded = library.xs[2]
        assert padded.shape[0] == math.ceil(rows / least) * least
        assert torch.equal(padded[:rows].double(), x.double())
        assert padded[rows:].double().abs().sum() == 0
        assert len(library.packed) == 3


# ---- the record, the tables, the command ---------------------------------------------------------


def test_goals_by_regime_and_losses_by_name() -> None:
    large = LinearShape("big", 8192, 4096)
    cases = [
        case(1, 1.0, 2.0), case(64, 1.0, 0.5), case(16, 1.0, 3.0, large), case(2048, 1.0, 1.5),
        case(128, 1.0, 1.0),
    ]  # fmt: skip
    found = goals(cases)
    means = {mean["regime"]: mean["against_dense"] for mean in found["means"]}
    assert means == pytest.approx(
        {"decode, large weights": 3.0, "decode, small weights": 1.0, "between": 1.0, "prefill": 1.5}
    )
    assert found["slower_than_dense"] == [{"case": "sparse24/bf16/tiny.up/m64", "ratio": 0.5}]
    assert found["slower_than_cusparselt"] == []
    text = summary_text(cases)
    assert "sparse24/bf16/tiny.up/m64 0.50x" in text
    assert "Slower than the best cusparselt: never." in text


def test_record_and_tables_hold_the_case() -> None:
    found = case(2, 1e-6, 2e-6, eager={OURS: 1e-5}, missing={"cuSPARSELt": "RuntimeError: none"})
    ours, dense = found.entries(LIMITS)
    extra = ours["extra_info"]
    assert extra["against_best_dense"]["median"] == pytest.approx(2.0)
    assert extra["ratio_of_limits"] == pytest.approx(2.0)
    assert extra["share_of_limit"] == pytest.approx(1.0)
    assert extra["share_of_dram"] == pytest.approx(60 / 1e-6 / 1e12)
    assert extra["dense_counted_tflops"] == pytest.approx(1e-3)
    assert extra["share_of_sparse_peak"] == pytest.approx(1000 / 1e-6 / 1.5e14)
    assert extra["missing"] == {"cuSPARSELt": "RuntimeError: none"}
    assert dense["stats"]["median"] == 2e-6
    table = cases_table([found], LIMITS)
    assert "2.00x" in table
    assert "cuSPARSELt: RuntimeError: none" in table


def test_keep_writes_record_and_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    absent = CudaCase(TINY, "fp8", 1, 0, unavailable="NotImplementedError: none")
    arguments = ["--device", "cuda", "--commit", "abcdef0123", "--json", str(tmp_path)]
    options = run.parse([*arguments, "--plot", str(tmp_path)])
    cases = [case(m, 1e-5, 2e-5) for m in (1, 16)]
    gpu = {"name": "NVIDIA H200"}
    run_cuda.keep(options, arguments, gpu, LIMITS, [*cases, absent])
    (record,) = tmp_path.glob("*.json")
    assert record.name.split("-")[3] == "h200"
    assert record.name.split("-")[4].startswith("abcdef0")
    assert len(list(tmp_path.glob("*-h200-abcdef0*.png"))) == 1
    found = json.loads(record.read_text(), parse_constant=pytest.fail)
    assert found["commit_info"]["id"] == "abcdef0123"
    assert found["machine_info"]["gpu"] == gpu
    assert len(found["benchmarks"]) == 4
    assert found["gossamer"]["not_available"][0]["unavailable"] == "NotImplementedError: none"
    assert found["gossamer"]["goals"]["means"][0]["against_dense"] == pytest.approx(2.0)


def test_records_are_not_written_over(tmp_path: Path) -> None:
    commit = {"id": "0123456789", "dirty": False}
    first = default_path(tmp_path, "h200", commit, ".json")
    assert first.name.endswith("-h200-0123456.json")
    first.touch()
    assert default_path(tmp_path, "h200", commit, ".json").name.endswith("-0123456-2.json")
    assert default_path(tmp_path / "x.json", "h200", commit, ".json") == tmp_path / "x.json"
    assert "-dirty" in default_path(tmp_path, "h200", commit | {"dirty": True}, ".json").name


def test_short_names_of_machines() -> None:
    assert gpu_name("NVIDIA H200") == "h200"
    assert gpu_name("NVIDIA H100 80GB HBM3") == "h100"
    assert gpu_name("NVIDIA A100-SXM4-80GB") == "a100"
    assert gpu_name("NVIDIA GeForce RTX 4090") == "geforce-rtx-4090"
    assert cpu_name({"vendor_id_raw": "AuthenticAMD", "family": 25, "model": 1}) == "cpu-zen3"
    assert cpu_name({"vendor_id_raw": "AuthenticAMD", "family": 26}) == "cpu-zen5"
    assert cpu_name({"brand_raw": "Apple M3 (Pro)"}) == "cpu-apple-m3-pro"
    assert cpu_name({}) == "cpu-unknown"


def test_command_line_for_a_gpu() -> None:
    options = run.parse(["--device", "cuda", "--seconds", "100"])
    assert options.dtypes == ("bf16", "fp16", "fp8", "int8", "int4")
    assert options.shapes == SHAPES
    assert len(run_cuda.plan_of(options)) == 5 * len(SHAPES) * len(ROWS)
    assert run_cuda.plan_of(options).most_seconds == 100
    quick = run_cuda.plan_of(run.parse(["--device", "cuda", "--quick"])).cases
    assert {shape.name for name, shape, _ in quick if name == "bf16"} == set(QUICK_SHAPES)
    assert {shape.name for name, shape, _ in quick if name == "int8"} == set(QUICK_OTHER_SHAPES)
    assert [name for name, _, _ in quick] == sorted(
        (name for name, _, _ in quick), key=list(DTYPES).index
    )
    few = ["--quick", "--dtype", "fp8", "--shapes", "llama8b.o,64x128", "--m", "3"]
    plan = run_cuda.plan_of(run.parse(["--device", "cuda", *few]))
    assert [(name, str(shape), m) for name, shape, m in plan.cases] == [
        ("fp8", "llama8b.o 4096x4096", 3),
        ("fp8", "64x128", 3),
    ]


@pytest.mark.parametrize(
    ("more", "complaint"),
    [(["--dtype", "float64"], "float64"), (["--feature", "model"], "model")],
)
def test_command_line_mistakes_for_a_gpu(
    more: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run.parse(["--device", "cuda", *more])
    assert complaint in capsys.readouterr().err


def test_without_a_gpu_the_bench_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.main(["--device", "cuda", "--quick"]) == 2
    assert "no GPU" in capsys.readouterr().err


def test_sensors_without_nvml_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    assert Sensors(0)() == {}


def test_commit_is_that_of_the_checkout() -> None:
    assert len(describe_commit()["id"]) in (40, len("unversioned"))
