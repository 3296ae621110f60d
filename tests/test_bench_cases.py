"""The bench's cases: shapes, rivals, checks against dense, and what is known of the machine."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import bench_sparse24
import gossamer
import machine
import pytest
import rivals
import torch
import torch.nn.functional as F
from bench_sparse24 import Plan, Weight, check_answer, run_case
from gossamer import _C
from record import OURS
from shapes import DTYPES, SHAPES, TOLERANCES, LinearShape, find_shapes
from tiny_bench import HASTE, LIMITS, TINY


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
    tiles = dtype == "bfloat16" and "amx_bf16" in _C.machine_targets()  # multiply the zeros
    assert case.dense_flops == 2 * 3 * 32 * 64 == (1 if tiles else 2) * case.real_flops
    assert case.share_of_peak == pytest.approx(case.real_flops / case.ours.median / 1e11)
    assert case.limit_seconds == pytest.approx(LIMITS.seconds(dtype, case.real_flops, case.nbytes))


def test_limits_of_both_sides() -> None:
    # Bound by bytes, then by arithmetic. 32 x 64 weights of 4 bytes are 8192, packed 17/32 of that.
    slow_reads = replace(LIMITS, read={1: 1e9})
    slow_adds = replace(LIMITS, flops={"float32": 1e6})
    with torch.no_grad():
        weight = Weight(TINY, "float32", cold=False)
        bytes_bound = run_case(weight, 3, _plan(), slow_reads)
        flops_bound = run_case(weight, 3, _plan(), slow_adds)
    around = 4 * 3 * (32 + 64)
    assert bytes_bound.limit_seconds == pytest.approx((4352 + around) / 1e9)
    assert bytes_bound.dense_limit_seconds == pytest.approx((8192 + around) / 1e9)
    assert bytes_bound.ratio_of_limits == pytest.approx((8192 + around) / (4352 + around))
    assert flops_bound.dense_limit_seconds == pytest.approx(2 * 3 * 32 * 64 / 1e6)
    assert flops_bound.ratio_of_limits == pytest.approx(2.0)


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
