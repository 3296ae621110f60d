"""The emulation against vectors that a GPU has recorded (record_golden.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from devices import PRIMITIVES, PRIMITIVES_SM90, Device
from emulator import HERE, Emulator
from golden import load, save, vectors
from record_golden import differing, record

FILES = sorted((HERE / "golden").glob("*.npz"))


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_emulation_does_what_the_gpu_did(emulator: Emulator, file: Path) -> None:
    assert differing(load(file), emulator) == []


def test_vectors_survive_a_file_and_a_wrong_bit_shows(emulator: Emulator, tmp_path: Path) -> None:
    libraries = {
        "primitives": emulator.build(PRIMITIVES),
        "primitives_sm90": emulator.build(PRIMITIVES_SM90),
    }
    recorded = record(libraries, "cpu")
    assert len(recorded) == len(list(vectors())) == 29
    save(tmp_path / "x.npz", recorded, {"gpu": "none: the emulation itself"})
    read = load(tmp_path / "x.npz")
    assert [vector.name for vector in read] == [vector.name for vector in recorded]
    assert differing(read, emulator) == []
    for vector in read:
        assert vector.expected is not None
        assert vector.expected.any()
    assert read[7].expected is not None
    read[7].expected[5] ^= 1
    assert differing(read, emulator) == [read[7].name]


def test_vectors_are_drawn_the_same_each_time() -> None:
    for one, other in zip(vectors(), vectors(), strict=True):
        for a, b in zip(one.arguments, other.arguments, strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_metadata_decides_the_result(emulated: Device) -> None:
    """A vector of a sparse product with other metadata gives other bits: it does pin them."""
    for vector in vectors():
        if vector.name.startswith("mma_sp_"):
            words = vector.arguments[3]
            assert isinstance(words, torch.Tensor)
            before = vector.run(emulated)
            vector.arguments[3] = words.roll(4)
            assert not torch.equal(vector.run(emulated), before)
