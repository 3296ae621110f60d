"""Fixtures: the emulator, its kernel libraries, and the schedules that every kernel has to pass."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from devices import (
    CLUSTER_SUMS,
    DEVICES,
    GEMM_SM90,
    PRIMITIVES,
    PRIMITIVES_SM90,
    Device,
    Sanitizers,
)
from emulated_gpu import PARTS, TABLE, Gpu, as_on_a_gpu
from emulator import Emulator, KernelLibrary, build_for_gpu, nvcc
from fragment_gemm import GEMM_SM80
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


@pytest.fixture(autouse=True)
def one_thread(threads: int) -> None:
    """The emulation has one, and torch's others would spin beside it after every small sum."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def emulator(_sanitizers: Sanitizers, tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    if Emulator.compiler() is None:
        if "CI" in os.environ:
            pytest.fail("no g++: the CUDA kernels would go untested")
        pytest.skip("no g++ to compile the CUDA kernels for the host with")
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ and not _sanitizers.on:
        folder = folder.parent  # which all workers of this run have
    return Emulator(folder / "emulation", _sanitizers.on)


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


@pytest.fixture(scope="session")
def clusters(emulator: Emulator) -> KernelLibrary:
    return emulator.build(CLUSTER_SUMS)


@pytest.fixture(scope="session")
def gemm_sm90(emulator: Emulator) -> KernelLibrary:
    return emulator.build(GEMM_SM90)


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


@pytest.fixture(params=DEVICES)
def device_clusters(request: pytest.FixtureRequest) -> Device:
    return _device(request, "clusters")


@pytest.fixture
def emulated(primitives: KernelLibrary) -> Device:
    return Device(primitives, "cpu", ("late", 0))


@pytest.fixture
def emulated_sm90(primitives_sm90: KernelLibrary) -> Device:
    return Device(primitives_sm90, "cpu", ("late", 0))


@pytest.fixture(scope="session")
def kernel_table(emulator: Emulator) -> KernelLibrary:
    return emulator.build(TABLE, *PARTS)


@pytest.fixture
def gpu(kernel_table: KernelLibrary, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """A GPU of compute capability 8.0 for this test, or of what it describes."""
    with as_on_a_gpu(kernel_table, monkeypatch) as gpu:
        yield gpu


# ---- the same kernel files, built by nvcc for the GPU of this machine ----------------------------


def _build_for_gpu(
    source: Path, factory: pytest.TempPathFactory, wanted: tuple[int, int], suffix: str = ""
) -> KernelLibrary:
    """For a GPU of at least the ``wanted`` capability, or of just that with the suffix "a"."""
    if not torch.cuda.is_available() or nvcc() is None:
        pytest.skip("no GPU" if nvcc() is not None else "no nvcc")
    have = torch.cuda.get_device_capability()
    if have < wanted or (suffix and have != wanted):
        pytest.skip(f"the GPU is sm_{have[0]}{have[1]}")
    return build_for_gpu(source, factory.mktemp("gpu"), f"{have[0]}{have[1]}{suffix}")


@pytest.fixture(scope="session")
def gpu_primitives(tmp_path_factory: pytest.TempPathFactory) -> KernelLibrary:
    return _build_for_gpu(PRIMITIVES, tmp_path_factory, (8, 9))


@pytest.fixture(scope="session")
def gpu_primitives_sm90(tmp_path_factory: pytest.TempPathFactory) -> KernelLibrary:
    return _build_for_gpu(PRIMITIVES_SM90, tmp_path_factory, (9, 0), "a")


@pytest.fixture(scope="session")
def gpu_samples(tmp_path_factory: pytest.TempPathFactory) -> KernelLibrary:
    return _build_for_gpu(SAMPLE_GEMM, tmp_path_factory, (8, 0))


@pytest.fixture(scope="session")
def gpu_samples_sm90(tmp_path_factory: pytest.TempPathFactory) -> KernelLibrary:
    return _build_for_gpu(SAMPLE_GEMM_SM90, tmp_path_factory, (9, 0), "a")


@pytest.fixture(scope="session")
def gpu_clusters(tmp_path_factory: pytest.TempPathFactory) -> KernelLibrary:
    return _build_for_gpu(CLUSTER_SUMS, tmp_path_factory, (9, 0), "a")


@pytest.fixture(scope="session")
def gpu_gemm_sm90(tmp_path_factory: pytest.TempPathFactory) -> KernelLibrary:
    return _build_for_gpu(GEMM_SM90, tmp_path_factory, (9, 0), "a")


@pytest.fixture(scope="session")
def gpu_gemm_sm80(tmp_path_factory: pytest.TempPathFactory) -> KernelLibrary:
    return _build_for_gpu(GEMM_SM80, tmp_path_factory, (8, 0))
