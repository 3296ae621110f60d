"""From gossamer.sparse24_linear down to the kernels, as on a GPU, with the kernels emulated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Oracle, sparse_24
from emulated_gpu import DECODE, FLOAT32, PREFILL, STREAM, WGMMA, Gpu
from gossamer import _C, _self_check, sparse24_linear
from gossamer.formats import Sparse24, Sparse24Panels
from gossamer.ops import cuda_workspace, sparse24
from gossamer.ops.cuda_workspace import aligned_rows
from torch.utils._python_dispatch import TorchDispatchMode


def check(m: int, n: int, k: int, dtype: torch.dtype, activation: str | None = "silu") -> None:
    weight = sparse_24(n, k, dtype)
    x, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
    oracle = Oracle(x, weight, bias, activation)
    for layout in (weight, Sparse24Panels.from_sparse24(weight)):
        oracle.check(sparse24_linear(x, layout, bias, activation))


@pytest.mark.parametrize(
    ("capability", "m", "dtype", "kernel"),
    [
        (80, 1, torch.bfloat16, DECODE),
        (90, 20, torch.float16, STREAM),
        (80, 70, torch.bfloat16, PREFILL),
        (90, 130, torch.bfloat16, WGMMA),
        (100, 70, torch.float16, PREFILL),
        (80, 5, torch.float32, FLOAT32),
        (90, 70, torch.float32, FLOAT32),
    ],
    ids=str,
)
def test_matches_dense(gpu: Gpu, capability: int, m: int, dtype: torch.dtype, kernel: int) -> None:
    gpu.describe(capability)
    check(m, 50, 300, dtype)
    assert gpu.kernel == kernel


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_many_rows_of_few_tiles(gpu: Gpu, dtype: torch.dtype) -> None:
    for multiprocessors in (4, 40):
        for capability, kernel in ((80, DECODE), (90, STREAM)):
            gpu.describe(capability, multiprocessors)
            check(130, 50, 1030, dtype)
            assert gpu.kernel == kernel


def test_blocks_that_share_a_tile_leave_their_counters_as_zeros(gpu: Gpu) -> None:
    gpu.describe(multiprocessors=64)
    chosen = _C.sparse24_choose_cuda(3, 16, 8000, "bfloat16", 0)
    assert chosen["split_k"] > 1
    assert chosen["workspace_bytes"] > 0
    check(3, 16, 8000, torch.bfloat16)
    check(2, 16, 8000, torch.bfloat16)  # the same counters again
    (((_, _, made_in), counters),) = cuda_workspace._counters.items()
    assert made_in == 0
    assert not counters.any()


def test_each_graph_counts_at_its_own_counters(gpu: Gpu) -> None:
    for capture in (0, 7, 7, 8, 0):
        gpu.describe(multiprocessors=64, capture=capture)
        check(3, 16, 8000, torch.bfloat16)
    assert [capture for _, _, capture in cuda_workspace._counters] == [0, 7, 8]
    assert len({counters.data_ptr() for counters in cuda_workspace._counters.values()}) == 3


def test_counters_do_not_come_from_the_pool_of_a_graph(gpu: Gpu) -> None:
    """torch.compile's graphs take back what the thread that makes them allocates."""
    gpu.describe(multiprocessors=64, capture=7)
    made: list[tuple[int, torch.dtype]] = []

    class Allocations(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            y = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.empty.memory_format:
                made.append((y.numel(), y.dtype))
            return y

    nbytes = _C.sparse24_choose_cuda(3, 16, 8000, "bfloat16", 0)["workspace_bytes"]
    x = torch.randn(3, 8000)
    with Allocations():
        workspace, counters = cuda_workspace.workspace(x, 16, 8000, torch.bfloat16)
    assert made == [(nbytes, torch.uint8)]
    assert workspace is not None
    assert counters is not None
    assert counters.shape == (_C.cuda_counters,)
    assert not counters.any()


@pytest.mark.parametrize("k", [1, 5, 63, 300])
def test_rows_of_any_stride(gpu: Gpu, k: int) -> None:
    weight, wide = sparse_24(33, k, torch.bfloat16), torch.randn(9, k + 5).bfloat16()
    for x in (
        wide[:, 1 : k + 1],
        wide[:, :k],
        wide.t()[:k].t(),
        wide[::2, :k],
        wide[:1, 3 : k + 3],
    ):
        Oracle(x, weight).check(sparse24_linear(x, weight))
    for rows, capability in ((4, 80), (70, 90)):  # Hopper's tensor maps take no rows that overlap
        gpu.describe(capability)
        same = wide[0, :k].expand(rows, k)
        Oracle(same, weight).check(sparse24_linear(same, weight))


def test_layouts_are_those_of_the_cpu(gpu: Gpu) -> None:
    dense = sparse_24(33, 70).to_dense()
    weight = Sparse24.from_dense(dense).validate()
    assert torch.equal(weight.to_dense(), dense)
    back = Sparse24Panels.from_sparse24(weight).to_sparse24()
    assert torch.equal(back.values, weight.values)
    assert torch.equal(back.indices, weight.indices)


def test_bad_weights_are_reported_as_on_the_cpu(gpu: Gpu) -> None:
    dense = torch.zeros(3, 12)
    dense[1, 4:7] = 1.0
    with pytest.raises(ValueError, match=r"1 of 9 groups.*row 1, columns 4 to 7"):
        Sparse24.from_dense(dense)
    weight = sparse_24(20, 64)
    weight.indices[3, 2] = 0xFF
    with pytest.raises(ValueError, match=r"row 3, group 4 \(byte 255\)"):
        weight.validate()


def test_devices_that_differ_are_named(gpu: Gpu) -> None:
    x, panels = torch.randn(2, 300), torch.empty(3, 2, 1152, dtype=torch.int32, device="meta")
    with pytest.raises(ValueError, match="x is on cpu, the weight on meta"):
        sparse24._linear_native_cuda(x, panels, None, None, 300, 33, "none")


def test_panels_off_alignment_are_refused(gpu: Gpu) -> None:
    """On a GPU they would end the process's use of it."""
    weight = Sparse24Panels.from_sparse24(sparse_24(33, 300, torch.bfloat16))
    words = torch.cat((torch.zeros(1, dtype=torch.int32), weight.panels.flatten()))
    panels = Sparse24Panels(words[1:].view_as(weight.panels), weight.shape, weight.dtype)
    with pytest.raises(ValueError, match="no multiple of 16 bytes"):
        sparse24_linear(torch.randn(2, 300).bfloat16(), panels)


def test_gpu_too_old_is_named(gpu: Gpu) -> None:
    gpu.describe(capability=75)
    with pytest.raises(ValueError, match=r"compute capability 7\.5, the kernels need 8\.0"):
        check(1, 16, 32, torch.bfloat16)


def test_cuda_tensors_without_the_module_are_named() -> None:
    with pytest.raises(ValueError, match="the CUDA module is not loaded"):
        _C.sparse24_choose_cuda(1, 16, 32, "bfloat16", 0)


def test_kernels_are_checked_on_each_gpu(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    native, right = _C.sparse24_linear_cuda, sparse24._linear_native_cuda
    ran = set()

    def noting_the_kernel(*args: Any) -> None:
        native(*args)
        ran.add(gpu.kernel)

    monkeypatch.setattr(_C, "sparse24_linear_cuda", noting_the_kernel)
    for capability, kernels in ((80, {DECODE, PREFILL}), (90, {STREAM, WGMMA})):
        gpu.describe(capability, multiprocessors=132)  # many, of which the small product fills few
        ran.clear()
        assert _self_check.wrong_results.__wrapped__(torch.device("cpu")) is None
        assert ran == {*kernels, FLOAT32}

    def wrong_for_many_rows(x: torch.Tensor, *args: object) -> torch.Tensor:
        y: torch.Tensor = right(x, *args)  # type: ignore[arg-type]
        return y if x.dtype == torch.float32 or x.shape[0] < 64 else -y

    monkeypatch.setattr(sparse24, "_linear", wrong_for_many_rows)
    with torch.device("meta"):  # whatever the default device is
        fault = _self_check.wrong_results.__wrapped__(torch.device("cpu"))
    assert fault is not None
    assert "(torch.bfloat16 of 300 rows, torch.float16 of 300 rows)" in fault


def test_a_given_way_to_cut_up_is_taken_or_refused(gpu: Gpu) -> None:
    gpu.describe(90)
    m, n, k = 9, 50, 1100
    weight = sparse_24(n, k, torch.bfloat16)
    x = aligned_rows(torch.randn(m, k).bfloat16())
    panels = Sparse24Panels.from_sparse24(weight).panels
    bytes_of = torch.empty(1 << 20, dtype=torch.uint8)
    counters = torch.zeros(_C.cuda_counters, dtype=torch.int32)

    def multiply(*config: Any) -> None:
        out = torch.full((m, n), torch.nan, dtype=torch.bfloat16)
        _C.sparse24_linear_cuda(out, x, panels, None, "none", bytes_of, counters, config)
        Oracle(x, weight, None, None).check(out)

    for config, kernel in (
        (("decode", 64, 16, 2, 1, 0), DECODE),
        (("decode", 32, 16, 4, 3, 0), DECODE),
        (("prefill", 128, 128, 1, 1, 0), PREFILL),
        (("wgmma", 128, 128, 1, 1, 2), WGMMA),
    ):
        multiply(*config)
        assert gpu.kernel == kernel
    for wrong in (
        ("decode", 64, 16, 4, 1, 0),  # four warps along K leave 32 rows
        ("decode", 32, 16, 4, 6, 0),  # of five records
        ("wgmma", 64, 64, 1, 1, 0),
        ("nothing", 64, 16, 2, 1, 0),
    ):
        with pytest.raises(ValueError, match=f"sparse24.*{wrong[1]} x {wrong[2]}"):
            multiply(*wrong)
