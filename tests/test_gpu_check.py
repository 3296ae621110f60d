"""bench/gpu_check.sh: its options, and what it makes of a part's exit status."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "bench" / "gpu_check.sh"

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


def run(tmp_path: Path, *arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    """The script with a python3 that sees no GPU and ends as told."""
    python = tmp_path / "bin" / "python3"
    python.parent.mkdir(exist_ok=True)
    python.write_text(f'#!/bin/sh\ncase $1 in -c) exit 1 ;; esac\necho "did | $*"\nexit {status}\n')
    python.chmod(0o755)
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path},
        timeout=60,
    )


@pytest.mark.parametrize(
    ("status", "code", "verdict"),
    [(0, 0, "passed"), (3, 3, "could not run"), (7, 1, "**failed** (status 7)")],
)
def test_exit_status_says_what_parts_did(
    tmp_path: Path, status: int, code: int, verdict: str
) -> None:
    out = tmp_path / "out"
    done = run(tmp_path, str(out), "--only", "golden", "--commit", "abc", status=status)
    assert done.returncode == code, done.stderr
    summary = (out / "summary.md").read_text()
    assert f"| golden | {verdict} |" in summary
    assert "did / tests/emulation/record_golden.py" in summary
    assert "| tests | not run |" in summary
    assert "commit abc" in summary
    assert "no GPU" in summary
    assert "record_golden.py" in (out / "checks.log").read_text()


@pytest.mark.parametrize("arguments", [[], ["a", "b"], ["a", "--only", "tea"], ["a", "--sideways"]])
def test_mistakes_end_it_at_once(tmp_path: Path, arguments: list[str]) -> None:
    done = run(tmp_path, *arguments)
    assert done.returncode == 2
    assert "gpu_check.sh OUTDIR" in done.stderr


def given_to_pytest(part: str) -> list[Path]:
    """The files that a part hands to pytest where there is a GPU."""
    function = re.search(rf"^{part}\(\) {{.*?^}}", SCRIPT.read_text(), re.MULTILINE | re.DOTALL)
    assert function is not None
    shell = f'{function[0]}\ngpu=yes\npytest_here() {{ printf "%s\\n" "$@"; }}\n{part}'
    done = subprocess.run(
        ["bash", "-uc", shell], capture_output=True, text=True, cwd=ROOT, check=True, timeout=60
    )
    return [ROOT / line for line in done.stdout.splitlines() if line.startswith("tests/")]


@pytest.mark.parametrize("part", ["part_emulation", "part_tests"])
def test_parts_name_files_that_are_there(part: str) -> None:
    files = given_to_pytest(part)
    assert files
    assert all(file.is_file() for file in files), files


def test_a_gpu_gets_the_tests_of_every_target() -> None:
    """Those that take the fixture get its "cuda" there."""
    names = {file.name for file in given_to_pytest("part_tests")}
    assert {"test_cuda.py", "test_sparse24.py", "test_sparse24_gradient.py"} <= names
