"""Fixtures: the emulator, its kernel libraries, and the schedules that every kernel has to pass."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from devices import DEVICES, PRIMITIVES, PRIMITIVES_SM90, Device, Sanitizers
from emulator import Emulator, KernelLibrary, nvcc, run_nvcc
from sample_gemm import SAMPLE_GEMM, SAMPLE_GEMM_SM90


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--sanitize",
        metavar="LOG",
        help="build kernels with AddressSanitizer and UBSan, which write to LOG.<process> "
        "(test_sanitized.py sets up the environment that this needs)",
    )


@pytest.fixture(scope="session")
def _sanitizers(request: pytest.FixtureRequest) -> Sanitizers:
    # The option is unknown where pytest was not started on this folder.
    return Sanitizers(request.config.getoption("--sanitize", default=None))


@pytest.fixture(autouse=True)
def sanitizers(_sanitizers: Sanitizers) -> Iterator[Sanitizers]:
    """Fails a test that leaves a report of theirs untaken."""
    yield _sanitizers
    assert _sanitizers.take() == ""


@pytest.fixture(scope="session")
def emulator(_sanitizers: Sanitizers, tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    if Emulator.compiler() is None:
        if "CI" in os.environ:
            pytest.fail("no g++: the CUDA kernels would go untested")
        pytest.skip("no g++ to compile the CUDA kernels for the host with")
    return Emulator(tmp_path_factory.mktemp("emulation"), _sanitizers.on)


@pytest.fixture(scope="session")
def primitives(emulator: Emulator) -> KernelLibrary:
    return emulator.build(PRIMITIVES)


@pytest.fixture(scope="session")
def primitives_sm90(emulator: Emulator) -> KernelLibrary:
    return emulator.build(PRIMITIVES_SM90)


@pytest.fixture(scope="session")
def samples(emulator: Emulator) -> KernelLibrary:
    return emulator.build(SAMPLE_GEMM)


@pytest.fixture(scope="session")
def samples_sm90(emulator: Emulator) -> KernelLibrary:
    return emulator.build(SAMPLE_GEMM_SM90)


@pytest.fixture(params=["samples", "samples_sm90"])
def sample(request: pytest.FixtureRequest) -> KernelLibrary:
    """Each sample GEMM in turn."""
    library: KernelLibrary = request.getfixturevalue(request.param)
    return library


def _device(request: pytest.FixtureRequest, library: str) -> Device:
    if request.param == "cuda":
        return Device(request.getfixturevalue(f"gpu_{library}"), "cuda", ("late", 0))
    schedule = ("late", 7) if request.param == "shuffled" else (request.param, 0)
    return Device(request.getfixturevalue(library), "cpu", schedule)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Device:
    return _device(request, "primitives")


@pytest.fixture(params=DEVICES)
def device_sm90(request: pytest.FixtureRequest) -> Device:
    return _device(request, "primitives_sm90")


@pytest.fixture
def emulated(primitives: KernelLibrary) -> Device:
    return Device(primitives, "cpu", ("late", 0))


@pytest.fixture
def emulated_sm90(primitives_sm90: KernelLibrary) -> Device:
    return Device(primitives_sm90, "cpu", ("late", 0))


def _build_for_gpu(
    source: Path, folder: Path, capability: tuple[int, int], arch: str
) -> KernelLibrary:
    if not torch.cuda.is_available() or nvcc() is None:
        pytest.skip("no GPU" if nvcc() is not None else "no nvcc")
    if torch.cuda.get_device_capability() < capability:
        pytest.skip(f"the GPU is older than sm_{capability[0]}{capability[1]}")
    path = folder / f"lib{source.stem}.so"
    flags = ["-std=c++17", "-shared", "-Xcompiler=-fPIC", "-cudart=static"]
    run_nvcc(
        *flags, "-gencode", f"arch=compute_{arch},code=sm_{arch}", "-o", str(path), str(source)
    )
    return KernelLibrary(path, source)


@pytest.fixture(scope="session")
def gpu_primitives(tmp_path_factory: pytest.TempPathFactory) -> KernelLibrary:
    """The same kernel file, built by nvcc for the GPU of this machine."""
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    folder = tmp_path_factory.mktemp("gpu")
    return _build_for_gpu(PRIMITIVES, folder, (8, 9), f"{major}{minor}")


@pytest.fixture(scope="session")
def gpu_primitives_sm90(tmp_path_factory: pytest.TempPathFactory) -> KernelLibrary:
    if torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("not a Hopper GPU")
    return _build_for_gpu(PRIMITIVES_SM90, tmp_path_factory.mktemp("gpu"), (9, 0), "90a")
