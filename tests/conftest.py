"""Fixtures: a fixed seed, every target this machine runs, and the process's thread count."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from typing import Any

# Before torch: teams of several processes share the cores, and must not spin while they wait.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import gossamer
import pytest
import torch
from cases import ACTSPARSE_TARGETS, BLOCKSPARSE_TARGETS, CSR_TARGETS
from gossamer import _C

assert gossamer.__version__  # torch is imported first, through the package
with warnings.catch_warnings():  # of versions of torch that prefer another name
    warnings.simplefilter("ignore")
    # Or its float32 convolutions, which some tests compare with, round their operands on a GPU.
    torch.backends.cudnn.allow_tf32 = False


SLOWEST = ("test_sanitized.py", "test_sass.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``-n``: file by file, in the order of collection, since a file shares what it builds."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


def _repeats(item: pytest.Item) -> bool:
    """Whether a block-sparse test on amx_bf16 is of a dtype for which it runs avx512's kernels."""
    callspec = getattr(item, "callspec", None)
    params = {} if callspec is None else callspec.params
    if params.get("blocksparse_target") != "amx_bf16":
        return False
    dtype = params.get("dtype", getattr(params.get("case"), "dtype", torch.bfloat16))
    return dtype != torch.bfloat16


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.hook.pytest_deselected(items=[item for item in items if _repeats(item)])
    items[:] = [item for item in items if not _repeats(item)]
    if hasattr(config, "workerinput"):  # else one worker would be left with these in the end
        items.sort(key=lambda item: item.path.name not in SLOWEST)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="torch sees no GPU"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _forced(name: str) -> Iterator[str]:
    before = _C.target()
    _C.force_target(name)
    yield name
    _C.force_target(before)


GPU = [pytest.param("cuda", marks=pytest.mark.cuda)] if torch.cuda.is_available() else []


@pytest.fixture(params=_C.machine_targets())
def cpu_target(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each target in turn, in force for one test."""
    yield from _forced(request.param)


@pytest.fixture(params=[*_C.machine_targets(), *GPU])
def target(request: pytest.FixtureRequest) -> Iterator[str]:
    """The same and "cuda", where the test makes its tensors, for what a GPU has to do alike."""
    if request.param == "cuda":
        with torch.device("cuda"):
            yield "cuda"
    else:
        yield from _forced(request.param)


@pytest.fixture(params=[name for name in BLOCKSPARSE_TARGETS if name in _C.machine_targets()])
def blocksparse_target(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each target that computes blocks in a way of its own, in turn, in force for one test."""
    yield from _forced(request.param)


@pytest.fixture(params=[name for name in ACTSPARSE_TARGETS if name in _C.machine_targets()])
def actsparse_target(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each target that skips zero activations in a way of its own, in turn, in force for one."""
    yield from _forced(request.param)


@pytest.fixture(params=[*(name for name in CSR_TARGETS if name in _C.machine_targets()), *GPU])
def csr_target(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each target that runs unstructured weights in a way of its own, and "cuda", as ``target``."""
    if request.param == "cuda":
        with torch.device("cuda"):
            yield "cuda"
    else:
        yield from _forced(request.param)


@pytest.fixture
def serial_target() -> Iterator[str]:
    """The readable definition, the only one with float64."""
    yield from _forced("serial")


@pytest.fixture
def threads() -> Iterator[int]:
    """The number of threads torch uses, put back after the test."""
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)
