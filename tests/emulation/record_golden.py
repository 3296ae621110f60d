"""Records golden vectors on this machine's GPU, and compares the emulation with them.

    python tests/emulation/record_golden.py OUT.npz

The exit status is 1 if the emulation gives other bits, 3 without a GPU, nvcc or g++. A file that a
GPU has written goes to tests/emulation/golden, where test_golden.py finds it.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from devices import PRIMITIVES, PRIMITIVES_SM90, Device
from emulator import Emulator, KernelLibrary, build_for_gpu, nvcc
from golden import Vector, save, vectors

SOURCES = {"primitives": PRIMITIVES, "primitives_sm90": PRIMITIVES_SM90}


def libraries_of_gpu(folder: Path) -> dict[str, KernelLibrary]:
    """What the GPU can run: wgmma is for 9.0 alone."""
    major, minor = torch.cuda.get_device_capability()
    found = {"primitives": build_for_gpu(PRIMITIVES, folder, f"{major}{minor}")}
    if (major, minor) == (9, 0):
        found["primitives_sm90"] = build_for_gpu(PRIMITIVES_SM90, folder, "90a")
    return found


def record(libraries: dict[str, KernelLibrary], where: str) -> list[Vector]:
    """Every vector that the libraries can run, with what came out."""
    found = []
    for vector in vectors():
        if vector.library in libraries:
            device = Device(libraries[vector.library], where, ("late", 0))
            vector.expected = vector.run(device)
            found.append(vector)
    return found


def differing(found: list[Vector], emulator: Emulator) -> list[str]:
    """The vectors for which the emulation gives other bits."""
    names = []
    for vector in found:
        library = emulator.build(SOURCES[vector.library])
        answer = vector.run(Device(library, "cpu", ("late", 0)))
        if not torch.equal(answer, vector.expected):
            names.append(vector.name)
    return names


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    if not torch.cuda.is_available() or nvcc() is None or Emulator.compiler() is None:
        print("no GPU, no nvcc or no g++ here: nothing to record")
        return 3
    with tempfile.TemporaryDirectory() as folder:
        (gpu := Path(folder) / "gpu").mkdir()
        (host := Path(folder) / "host").mkdir()
        found = record(libraries_of_gpu(gpu), "cuda")
        about = {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
        save(Path(sys.argv[1]), found, about)
        print(f"{len(found)} golden vectors of {about['gpu']} in {sys.argv[1]}")
        names = differing(found, Emulator(host))
    print(f"the emulation gives the same bits for {len(found) - len(names)} of {len(found)}")
    for name in names:
        print(f"  differs: {name}")
    return 1 if names else 0


if __name__ == "__main__":
    sys.exit(main())
