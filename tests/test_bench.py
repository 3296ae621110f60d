"""The bench's own logic: timing, statistics, checks, command line, record and picture."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import bench_sparse24
import gossamer
import machine
import models
import pytest
import rivals
import run
import timing
import torch
import torch.nn.functional as F
from bench_sparse24 import Plan, Weight, check_answer, run_case
from machine import Limits
from record import OURS, Case, Check
from shapes import DTYPES, QUICK_ROWS, ROWS, SHAPES, TOLERANCES, LinearShape, find_shapes
from timing import Contender, Effort, Ratio, Timing, geometric_mean, measure, speedup

TINY = LinearShape("32x64", 32, 64)
HASTE = Effort(budget=0.0, slice=1e-5, least_rounds=2, most_rounds=2)
LIMITS = Limits(2, dict.fromkeys(DTYPES, 1e11), {1024: 2e11, 1024**2: 1e10})


class FakeClock:
    """Time that passes only where a contender says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.ran: list[str] = []

    def __call__(self) -> float:
        return self.now

    def contender(self, name: str, *costs: float) -> Contender:
        """A contender whose calls cost what is listed, the last cost for good."""
        left = list(costs)

        def work() -> None:
            self.ran.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return Contender(name, work)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def test_speedup_cancels_drift() -> None:
    fast, slow = Timing((1.0, 3.0, 2.0), 1), Timing((2.0, 6.0, 4.0), 1)
    assert speedup(fast, slow) == Ratio(2.0, 2.0, 2.0)
    assert speedup(slow, fast).median == 0.5


def test_speedup_uses_rounds_that_both_ran() -> None:
    assert speedup(Timing((1.0, 1.0, 9.0), 1), Timing((4.0, 4.0), 1)).median == 4.0


def test_geometric_mean() -> None:
    assert geometric_mean([0.5, 2.0]) == pytest.approx(1.0)
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert math.isnan(geometric_mean([]))


def test_spread_is_relative_interquartile_range() -> None:
    seconds = Timing((1.0, 2.0, 3.0, 4.0), 1)
    assert seconds.median == 2.5
    assert seconds.spread == pytest.approx((3.5 - 1.5) / 2.5)


def test_measures_what_calls_cost(clock: FakeClock) -> None:
    timings = measure([clock.contender("a", 1e-5), clock.contender("b", 2e-3)], Effort(), clock)
    assert timings["a"].median == pytest.approx(1e-5)
    assert timings["b"].median == pytest.approx(2e-3)
    assert list(timings) == ["a", "b"]


def test_calls_fill_a_slice(clock: FakeClock) -> None:
    effort = Effort(slice=0.004)
    contenders = [clock.contender("short", 1e-5), clock.contender("long", 0.1)]
    timings = measure(contenders, effort, clock)
    assert timings["short"].calls == pytest.approx(effort.slice / 1e-5, rel=0.5)
    assert timings["long"].calls == 1


def test_first_call_is_warm_up(clock: FakeClock) -> None:
    timings = measure([clock.contender("a", 0.01, 1e-4)], Effort(), clock)
    assert timings["a"].median == pytest.approx(1e-4)


def test_rounds_interleave_and_rotate(clock: FakeClock) -> None:
    contenders = [clock.contender(name, 0.006) for name in "abc"]
    measure(contenders, Effort(budget=0, slice=0.006, least_rounds=4, most_rounds=4), clock)
    calibration, rounds = clock.ran[:6], clock.ran[6:]
    assert calibration == ["a", "a", "b", "b", "c", "c"]
    assert rounds == list("abcbcacababc")


def test_session_is_entered_and_not_timed(clock: FakeClock) -> None:
    inside = False

    @contextmanager
    def session() -> Iterator[None]:
        nonlocal inside
        clock.now += 5.0
        inside = True
        yield
        inside = False

    def work() -> None:
        assert inside
        clock.now += 0.006

    timings = measure([Contender("a", work, session)], Effort(), clock)
    assert timings["a"].median == pytest.approx(0.006)


def test_straggling_rival_leaves_but_subject_stays(clock: FakeClock) -> None:
    contenders = [
        clock.contender("subject", 0.5),
        clock.contender("best", 0.1),
        clock.contender("straggler", 0.3),
    ]
    timings = measure(contenders, Effort(budget=0, least_rounds=6, most_rounds=6), clock)
    rounds = {name: len(timing.seconds) for name, timing in timings.items()}
    assert rounds == {"subject": 6, "best": 6, "straggler": timing.STRAGGLER_ROUNDS}


def test_disturbed_round_does_not_turn_best_rival_away(clock: FakeClock) -> None:
    contenders = [
        clock.contender("subject", 0.1),
        clock.contender("best", 0.1, 0.9, 0.9, 0.1),
        clock.contender("other", 0.15),
    ]
    timings = measure(contenders, Effort(budget=0, least_rounds=6, most_rounds=6), clock)
    assert len(timings["best"].seconds) == 6


def test_unsettled_case_gets_more_time(clock: FakeClock) -> None:
    effort = Effort(budget=1.0, slice=0.1, least_rounds=5, most_rounds=1000)
    steady = measure([clock.contender("a", 0.1)], effort, clock)["a"]
    restless = measure([clock.contender("a", *(0.1, 0.2) * 500)], effort, clock)["a"]
    assert sum(steady.seconds) == pytest.approx(effort.budget, rel=0.3)
    assert sum(restless.seconds) == pytest.approx(timing.PATIENCE * effort.budget, rel=0.3)


def test_garbage_collection_comes_back_after_an_error() -> None:
    def fail() -> None:
        raise RuntimeError("broken contender")

    with pytest.raises(RuntimeError, match="broken contender"):
        measure([Contender("a", fail)], HASTE)
    assert gc.isenabled()


def test_shapes_by_name_model_and_size() -> None:
    assert find_shapes(None) == SHAPES
    assert [s.name for s in find_shapes(["bert.up", "minilm"])] == [
        "bert.up",
        "minilm.attention",
        "minilm.up",
        "minilm.down",
    ]
    assert find_shapes(["33x7"]) == (LinearShape("33x7", 33, 7),)
    assert find_shapes(["vit.qkv", "vit"]) == find_shapes(["vit"])


@pytest.mark.parametrize("name", ["gpt5", "0x4", "4x", "llama.sideways"])
def test_rejects_unknown_shape(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        find_shapes([name])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_check_accepts_rounding_and_nothing_else(dtype: torch.dtype) -> None:
    x, weight = torch.randn(8, 256).to(dtype), torch.randn(24, 256).to(dtype) / 16
    reference = F.linear(x.float(), weight.float())
    answer = reference.to(dtype)
    assert check_answer(answer, reference, TOLERANCES[dtype]).passed
    for wrong in (answer[3, 5] + 0.05, torch.tensor(math.nan), torch.tensor(math.inf)):
        broken = answer.clone()
        broken[3, 5] = wrong
        assert not check_answer(broken, reference, TOLERANCES[dtype]).passed
    assert not check_answer(answer[:7], reference, TOLERANCES[dtype]).passed


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("rows", [1, 5])
def test_rivals_compute_the_same(dtype: torch.dtype, rows: int) -> None:
    x = torch.randn(rows, 64).to(dtype)
    weight = gossamer.prune.magnitude_24(torch.randn(32, 64)).to(dtype)
    contenders = rivals.dense_linears([weight], x)
    if dtype is torch.float32:
        contenders.append(rivals.sparse_csr([weight], x))
    names = [contender.name for contender in contenders]
    assert names[0] == rivals.DEFAULT
    assert len(set(names)) == len(names) >= 2
    for contender in contenders:
        with contender.session():
            torch.testing.assert_close(
                contender.run().float(), F.linear(x.float(), weight.float()), rtol=2e-2, atol=2e-2
            )


def test_without_onednn_is_put_back_after_an_error() -> None:
    before = torch.backends.mkldnn.enabled

    def fail_inside() -> None:
        with rivals.without_onednn():
            assert not torch.backends.mkldnn.enabled
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert torch.backends.mkldnn.enabled == before


def test_packed_model_answers_as_before() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 48), torch.nn.GELU(), torch.nn.Linear(48, 8))
    x = torch.randn(5, 64)
    with torch.no_grad():
        expected = model(x)
        packed = rivals.pack_linears(model)
        if packed is None:
            pytest.skip("this torch has no oneDNN to pack for")
        assert not any(type(m) is torch.nn.Linear for m in packed.modules())
        torch.testing.assert_close(packed(x), expected)


def _plan(**changes: object) -> Plan:
    return replace(Plan((TINY,), (1, 3), ("float32",), HASTE), **changes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_case_is_right_and_complete(dtype: str) -> None:
    with torch.no_grad():
        case = run_case(Weight(TINY, dtype, cold=False), 3, _plan(), LIMITS)
    assert case.check.passed
    assert case.best_dense in case.timings
    assert case.best_dense not in (OURS, rivals.CSR)
    assert (rivals.CSR in case.timings) == (dtype == "float32")
    assert case.dense_flops == 2 * 3 * 32 * 64 == 2 * case.real_flops
    assert case.share_of_peak == pytest.approx(case.real_flops / case.ours.median / 1e11)
    assert case.limit_seconds == pytest.approx(LIMITS.seconds(dtype, 6144, case.nbytes))


def test_wrong_kernel_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = gossamer.sparse24_linear
    monkeypatch.setattr(gossamer, "sparse24_linear", lambda x, weight: right(x, weight) * 1.01)
    with torch.no_grad():
        case = run_case(Weight(TINY, "float32", cold=False), 3, _plan(), LIMITS)
    assert not case.check.passed


def test_hopeless_rivals_are_left_out_but_never_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench_sparse24, "HOPELESS", 0.0)
    monkeypatch.setattr(bench_sparse24, "HOPELESS_FROM", 3)
    weight = Weight(TINY, "float32", cold=False)
    with torch.no_grad():
        assert len(run_case(weight, 2, _plan(), LIMITS).timings) > 2
        assert len(run_case(weight, 3, _plan(), LIMITS).timings) > 2
        assert list(run_case(weight, 4, _plan(), LIMITS).timings) == [OURS, rivals.DEFAULT]


def test_cold_weights_outgrow_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_sparse24, "last_level_cache", lambda: 100_000)
    weight = Weight(TINY, "float32", cold=True)
    for copies in (weight.dense, [w.panels for w in weight.packed]):
        assert sum(copy.nbytes for copy in copies) >= 200_000
        assert len({copy.data_ptr() for copy in copies}) == len(copies)
        assert all(torch.equal(copy, copies[0]) for copy in copies)


def test_quick_limits_leave_cases_out_by_name() -> None:
    plan = _plan(rows=(1, 1000), most_gflop=2 * 32 * 64 * 999 / 1e9)
    assert plan.rows_of(TINY) == [1]
    assert plan.left_out() == ["32x64 at 1000 rows"]
    assert len(plan) == 1


def test_read_bandwidth_is_interpolated_between_sizes() -> None:
    assert LIMITS.read_at(1) == 2e11
    assert LIMITS.read_at(1e9) == 1e10
    assert LIMITS.read_at(32 * 1024) == pytest.approx(math.sqrt(2e11 * 1e10))
    assert LIMITS.seconds("float32", 1e11, 1) == 1.0
    assert LIMITS.seconds("float32", 1, 1024**2) == pytest.approx(1024**2 / 1e10)
    assert LIMITS.seconds("float32", 1, 1024, cold=True) == pytest.approx(1024 / 1e10)


def test_caches_are_read_from_the_system(tmp_path: Path) -> None:
    for index, parts in enumerate(("1 Data 48K", "1 Instruction 32K", "3 Unified 32768K")):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        for name, text in zip(("level", "type", "size"), parts.split(), strict=True):
            (folder / name).write_text(text + "\n")
    assert machine.caches(tmp_path) == {"L1d": 48 * 1024, "L3": 32 * 1024**2}
    assert machine.caches(tmp_path / "nowhere") == {}


def test_commit_outside_git(tmp_path: Path) -> None:
    assert machine.describe_commit(tmp_path)["id"] == "unversioned"


def test_command_line_defaults() -> None:
    options = run.parse([])
    assert options.rows == ROWS
    assert options.dtypes == tuple(DTYPES)
    assert options.features == run.FEATURES
    assert options.shapes == SHAPES
    assert options.threads == torch.get_num_threads()
    assert options.json is None
    assert options.plot is None


def test_command_line_choices() -> None:
    what = ["--feature", "sparse24", "--dtype", "bfloat16,float32", "--shapes", "llama.kv,8x8"]
    how = ["--m", "2,64", "--threads", "1", "--cold", "--json", "--plot", "here.png"]
    options = run.parse(["--quick", *what, *how])
    assert options.features == ("sparse24",)
    assert options.dtypes == ("bfloat16", "float32")
    assert [shape.name for shape in options.shapes] == ["llama.kv", "8x8"]
    assert options.rows == (2, 64)
    assert options.threads == 1
    assert options.cold
    assert options.json == run.RESULTS
    assert options.plot == Path("here.png")
    assert run.parse(["--quick"]).rows == QUICK_ROWS


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--dtype", "float8"], "float8"),
        (["--feature", "pointcloud"], "pointcloud"),
        (["--shapes", "gpt5"], "gpt5"),
        (["--m", "0"], "rows"),
        (["--threads", "0"], "thread"),
        (["--device", "cuda"], "CUDA"),
    ],
)
def test_command_line_mistakes(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run.parse(arguments)
    assert stop.value.code == 2
    assert complaint in capsys.readouterr().err


@pytest.fixture
def tiny_run(monkeypatch: pytest.MonkeyPatch, threads: int) -> list[str]:
    """Arguments of a run that takes no time; the thread count is put back after it."""
    monkeypatch.setattr(run, "QUICK_EFFORT", HASTE)
    monkeypatch.setattr(Limits, "measure", lambda dtypes, threads: replace(LIMITS, threads=threads))
    what = ["--feature", "sparse24", "--dtype", "float32", "--shapes", "32x64"]
    return ["--quick", *what, "--m", "1,3"]


def test_run_leaves_record_and_picture(tiny_run: list[str], tmp_path: Path) -> None:
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    record, picture = tmp_path / "deep" / "record.json", tmp_path / "picture.png"
    command = [*tiny_run, "--json", str(record), "--plot", str(picture)]
    assert run.main(command) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")

    found = json.loads(record.read_text(), parse_constant=pytest.fail)
    assert found["gossamer"]["command"] == command
    assert found["gossamer"]["limits"]["flops"]["float32"] == 1e11
    assert found["machine_info"]["cores"] >= 1
    assert "node" not in found["machine_info"]
    assert found["commit_info"]["id"]
    groups = {entry["group"] for entry in found["benchmarks"]}
    assert groups == {"sparse24/float32/32x64/m1", "sparse24/float32/32x64/m3"}
    ours = [entry for entry in found["benchmarks"] if entry["name"].endswith(f"/{OURS}")]
    assert [entry["params"]["rows"] for entry in ours] == [1, 3]
    for entry in ours:
        assert entry["extra_info"]["check"]["passed"]
        assert entry["extra_info"]["against_best_dense"]["median"] > 0
        assert len(entry["stats"]["data"]) == entry["stats"]["rounds"] == 2


def test_wrong_answer_fails_the_run(
    tiny_run: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich")
    right = bench_sparse24.run_case

    def wrong_at_three(weight: Weight, rows: int, plan: Plan, limits: Limits) -> Case:
        case = right(weight, rows, plan, limits)
        return replace(case, check=Check(1.0, math.nan)) if rows == 3 else case

    monkeypatch.setattr(bench_sparse24, "run_case", wrong_at_three)
    assert run.main(tiny_run) == 1
    out = capsys.readouterr().out
    assert "1 of 2 cases" in out
    assert "sparse24/float32/32x64/m3" in out


def test_sentences_are_varied() -> None:
    sentences = models.read_sentences()
    words = [len(sentence.split()) for sentence in sentences]
    assert len(set(sentences)) == len(sentences) >= 90
    assert min(words) <= 5
    assert max(words) >= 40
    assert len(sentences) % max(models.BATCHES) == 0


def test_batches_hold_every_sentence_with_little_padding() -> None:
    def tokenizer(batch: list[str], **_: object) -> dict[str, torch.Tensor]:
        lengths = torch.tensor([len(sentence) for sentence in batch])
        return {"attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long()}

    sentences = ["a" * length for length in (9, 1, 8, 2, 7)]
    batches = models.make_batches(tokenizer, sentences, 2)
    assert [tuple(batch["attention_mask"].shape) for batch in batches] == [(2, 2), (2, 8), (1, 9)]
    assert models.count_tokens(batches) == 27


def test_answers_may_differ_by_rounding_only() -> None:
    close = models.Answers(1e-6, 1e-7, 2e-7, 1.5e-7, 0.7, 0.5)
    assert close.passed
    assert not replace(close, sparse_rounding=1e-5).passed
    assert not replace(close, sparse_rounding=math.nan).passed
