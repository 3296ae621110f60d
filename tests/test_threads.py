"""Threads: torch's count is obeyed everywhere, callers may share a layer, a fork still works."""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cases import dense_24, sparse_24
from gossamer import _C, Block, blocksparse_linear, grouped_linear, sparse24_linear
from gossamer.formats import BlockSparse, Sparse24, Sparse24Panels
from gossamer.nn import SparseLinear
from gossamer.prune import magnitude_blocks

# Large enough for a team in every regime.
LARGE, FEW, MANY = 1024, 8, 128


@pytest.mark.parametrize("wanted", [1, 2, 3])
def test_torch_thread_count_is_obeyed(threads: int, wanted: int) -> None:
    torch.set_num_threads(wanted)
    assert _C.parallel_team(torch.get_num_threads()) == wanted
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: _C.parallel_team(torch.get_num_threads())).result() == wanted


def _cpu_seconds(run: Callable[[], object]) -> tuple[float, float]:
    """CPU time of the process, and of the calling thread alone."""
    process, thread = time.process_time(), time.thread_time()
    run()
    return time.process_time() - process, time.thread_time() - thread


@pytest.mark.parametrize("fresh", [False, True])
def test_one_thread_does_all_the_work_when_told_to(threads: int, fresh: bool) -> None:
    layer = SparseLinear(LARGE, LARGE).eval().pack()
    x = torch.randn(MANY, LARGE)

    def run() -> None:
        with torch.no_grad():
            for _ in range(200):
                layer(x)

    torch.set_num_threads(2)
    run()
    torch.set_num_threads(1)
    time.sleep(0.3)  # idle workers of the earlier team spin for a while
    if fresh:
        with ThreadPoolExecutor(1) as pool:
            process, thread = pool.submit(_cpu_seconds, run).result()
    else:
        process, thread = _cpu_seconds(run)
    assert process < 1.3 * thread + 0.02


def thread_count() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs procfs")
def test_process_gains_no_threads(threads: int) -> None:
    torch.set_num_threads(2)
    layer = SparseLinear(LARGE, LARGE)
    x = torch.randn(MANY, LARGE)
    # Torch's own team, and whatever its autograd engine starts, exist from here on.
    torch.mm(x, x.t().requires_grad_()).sum().backward()
    before = thread_count()
    for _ in range(5):
        layer(x).sum().backward()
        layer.eval().pack()(x)
        layer.unpack().train()
        Sparse24.from_dense(layer.to_dense().weight)
    assert thread_count() == before


@pytest.mark.parametrize("packed", [False, True])
def test_callers_share_a_layer(threads: int, packed: bool) -> None:
    torch.set_num_threads(2)
    layer = SparseLinear(300, 200).eval()
    if packed:
        layer.pack()
    inputs = [torch.randn(m, 300) for m in (1, 7, 40, 200)]
    with torch.no_grad():
        expected = [layer(x) for x in inputs]

    def run(worker: int) -> bool:
        with torch.no_grad():
            return all(
                torch.equal(layer(inputs[(worker + i) % 4]), expected[(worker + i) % 4])
                for i in range(40)
            )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(4)))


def test_callers_train_at_once(threads: int) -> None:
    layer = SparseLinear(64, 48)
    x = torch.randn(4, 20, 64)
    expected = [torch.autograd.grad(layer(rows).sum(), layer.values)[0] for rows in x]

    def run(rows: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(layer(rows).sum(), layer.values)[0]

    with ThreadPoolExecutor(4) as pool:
        for got, want in zip(pool.map(run, x), expected, strict=True):
            torch.testing.assert_close(got, want)


def in_forked_child(check: Callable[[], bool], seconds: float = 30) -> int:
    """The exit code of a child that runs ``check``; -1 where it hangs."""
    with warnings.catch_warnings():
        # Newer Pythons warn of any fork with threads, which is what is tested here.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        code = 2
        try:
            code = 0 if check() else 1
        finally:
            os._exit(code)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_works_serially(threads: int) -> None:
    torch.set_num_threads(2)
    sparse, dense = sparse_24(LARGE, LARGE), dense_24(LARGE, LARGE)
    inputs = [torch.randn(m, LARGE) for m in (FEW, MANY)]
    weights = (sparse, Sparse24Panels.from_sparse24(sparse))
    blocks = BlockSparse.from_dense(magnitude_blocks(dense, Block(16, 16), 0.05), Block(16, 16))

    experts, ends = torch.randn(2, 64, LARGE), torch.tensor([MANY // 4, MANY])

    def results() -> list[bytes]:
        # Compared as bytes: torch's own parallel loops hang in a forked child.
        found = [sparse24_linear(x, w) for x in inputs for w in weights]
        found.append(blocksparse_linear(inputs[0], blocks))
        found.append(grouped_linear(inputs[1], experts, ends))
        return [y.numpy().tobytes() for y in found]

    expected = results()  # and the team exists from here on

    def check() -> bool:
        Sparse24.from_dense(dense).validate()
        return results() == expected and _C.parallel_team(2) == 1

    assert in_forked_child(check) == 0
    assert _C.parallel_team(2) == 2  # the parent still has its team
