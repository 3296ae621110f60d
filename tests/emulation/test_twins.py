"""The wrappers and their host twins are two files that must say the same."""

from __future__ import annotations

import re
from pathlib import Path

from emulator import CSRC, HERE

TWINS = HERE / "twins"


def functions(*paths: Path) -> set[str]:
    """The functions that namespace gossamer::ptx defines there: they begin a line."""
    names: set[str] = set()
    for path in paths:
        for body in re.findall(
            r"^namespace gossamer::ptx \{$(.*?)^\}  // namespace", path.read_text(), re.M | re.S
        ):
            names |= set(re.findall(r"^(?:__device__|inline|\w+) [^(=;]*?\b(\w+)\(", body, re.M))
    return names


def test_twins_name_the_same_functions() -> None:
    real = functions(*(CSRC / "common").glob("ptx*.cuh"))
    twin = functions(*TWINS.rglob("*.h"), *TWINS.rglob("*.cuh"))
    assert {"ldmatrix", "mma_sp_m16n8k32", "from_float", "wgmma_sp", "tma_load_2d"} <= real
    assert real - {"shared_address"} == twin  # a pointer is as good on the host


def test_inline_assembly_is_in_the_wrappers_only() -> None:
    with_assembly = {
        path.name
        for pattern in ("*.cu", "*.cuh")
        for folder in (CSRC, HERE)
        for path in folder.rglob(pattern)
        if re.search(r"\basm\b *(volatile)? *\(", path.read_text())
    }
    assert with_assembly <= {"ptx.cuh", "ptx_sm90.cuh", "ptx_wgmma.cuh"}
