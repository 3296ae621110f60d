"""A bench that takes no time: one small shape, the least effort, a made-up machine."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import run
from machine import Limits
from shapes import DTYPES, LinearShape
from timing import Effort

TINY = LinearShape("32x64", 32, 64)
HASTE = Effort(budget=0.0, slice=1e-5, least_rounds=2, most_rounds=2)
LIMITS = Limits(2, dict.fromkeys(DTYPES, 1e11), {1024: 2e11, 1024**2: 1e10})


def quick_groups(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> set[str]:
    """The groups in the record of ``run.py --quick``, which leaves threads as they are told."""
    monkeypatch.setattr(run, "QUICK_EFFORT", HASTE)
    monkeypatch.setattr(Limits, "measure", lambda dtypes, threads: replace(LIMITS, threads=threads))
    record = folder / "record.json"
    assert run.main(["--quick", *arguments, "--json", str(record)]) == 0
    found = json.loads(record.read_text(), parse_constant=pytest.fail)
    return {entry["group"] for entry in found["benchmarks"]}
