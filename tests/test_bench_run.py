"""The bench as a command: its options, record and picture, and the models it runs."""

from __future__ import annotations

import importlib
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import bench_sparse24
import command_line
import models
import pytest
import run
import torch
from bench_sparse24 import Plan, Weight, run_case
from machine import Limits
from record import OURS, Case, Check
from shapes import CONV_SHAPES, DTYPES, QUICK_ROWS, ROWS, SHAPES
from tiny_bench import HASTE, LIMITS, TINY


def test_command_line_defaults() -> None:
    options = command_line.parse([])
    assert options.rows == ROWS
    assert options.dtypes == tuple(DTYPES)
    assert options.features == command_line.FEATURES
    assert options.shapes == SHAPES
    assert options.conv_shapes == CONV_SHAPES
    assert options.blocks == ((16, 16), "2:4")
    assert options.threads == torch.get_num_threads()
    assert options.json is None
    assert options.plot is None


def test_command_line_choices() -> None:
    what = ["--feature", "sparse24", "--dtype", "bfloat16,float32", "--shapes", "llama.kv,8x8"]
    how = ["--m", "2,64", "--threads", "1", "--cold", "--json", "--plot", "here.png"]
    options = command_line.parse(["--quick", *what, *how])
    assert options.features == ("sparse24",)
    assert options.dtypes == ("bfloat16", "float32")
    assert [shape.name for shape in options.shapes] == ["llama.kv", "8x8"]
    assert options.conv_shapes == ()
    assert options.rows == (2, 64)
    assert options.threads == 1
    assert options.cold
    assert options.json == command_line.RESULTS
    assert options.plot == Path("here.png")
    assert command_line.parse(["--quick"]).rows == QUICK_ROWS


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--dtype", "float8"], "float8"),
        (["--feature", "voxels"], "voxels"),
        (["--shapes", "gpt5"], "gpt5"),
        (["--m", "0"], "rows"),
        (["--threads", "0"], "thread"),
        (["--block", "16"], "16x16"),
        (["--block", "100x4"], "100x4"),
        (["--block", "16x99"], "at most 64"),
        (["--scan", "nowhere.bin"], "no file nowhere.bin"),
    ],
)
def test_command_line_mistakes(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        command_line.parse(arguments)
    assert stop.value.code == 2
    assert complaint in capsys.readouterr().err


def test_quick_leaves_the_long_feature_out() -> None:
    options = command_line.parse(["--quick", "--block", "16x16,1x4", "--shapes", "resnet50,bert"])
    assert options.features == command_line.FEATURES[:-2]
    assert options.blocks == ((16, 16), (1, 4))
    assert {shape.model for shape in options.conv_shapes} == {"resnet50"}
    assert {shape.model for shape in options.shapes} == {"bert"}


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
        finding = entry["extra_info"]
        limits = finding["dense_limit_seconds"] / finding["limit_seconds"]
        assert finding["ratio_of_limits"] == pytest.approx(limits, rel=1e-5)
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


def test_summary_has_the_mean_ratio_of_limits(capsys: pytest.CaptureFixture[str]) -> None:
    console = pytest.importorskip("rich.console").Console(width=200)
    report = importlib.import_module("report")
    plan = Plan((TINY,), (1,), ("float32",), HASTE)
    case = run_case(Weight(TINY, "float32", cold=False), 1, plan, LIMITS)
    cases = [
        replace(case, rows=rows, limit_seconds=1.0, dense_limit_seconds=ratio)
        for rows, ratio in ((1, 2.0), (16, 8.0), (64, 3.0))
    ]
    report.print_summary(console, cases, [], [], [], [], [])
    assert re.search(r"float32( +\S+){2} +4.00x +3.00x", capsys.readouterr().out)


def test_sentences_are_varied() -> None:
    sentences = models.read_sentences()
    words = [len(sentence.split()) for sentence in sentences]
    assert len(set(sentences)) == len(sentences) >= 90
    assert min(words) <= 5
    assert max(words) >= 40
    assert len(sentences) % max(models.BATCHES) == 0


def test_batches_hold_every_sentence_with_little_padding() -> None:
    def tokenizer(batch: list[str], **options: object) -> dict[str, object]:
        lengths = torch.tensor([len(sentence) for sentence in batch])
        if not options:
            return {"input_ids": [[1] * length for length in lengths.tolist()]}
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
