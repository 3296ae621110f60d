"""The whole way of a product on a GPU, with its kernels emulated.

Tensors in host memory stand for those of a GPU: ``_C`` takes the CUDA way where the table of
kernels says so, and ``as_on_a_gpu`` makes Python do the same.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from emulator import CSRC, HERE, KernelLibrary
from gossamer import _C
from gossamer.formats import sparse24 as sparse24_format
from gossamer.formats import sparse24_conv_panels
from gossamer.formats import sparse24_quantized_panels as quantized_panels
from gossamer.ops import (
    actsparse,
    actsparse_cuda,
    blocksparse_product,
    cuda_workspace,
    grouped,
    grouped_cuda,
    grouped_gradient,
    pointcloud,
    sparse24,
    sparse24_conv_product,
    sparse24_layout,
    sparse24_quantized,
    spikes,
    topk,
    topk_encoder,
    topk_gradient,
)
from gossamer.pointcloud import native

TABLE = HERE / "kernels" / "cuda_table.cu"
PARTS = sorted(CSRC.glob("*/*.cu"))
DECODE, PREFILL, WGMMA, FLOAT32, STREAM = range(5)


class Gpu:
    """The emulated device, as ``_C`` sees it."""

    def __init__(self, library: KernelLibrary) -> None:
        self.library = library
        self.describe()

    def describe(self, capability: int = 80, multiprocessors: int = 1, capture: int = 0) -> None:
        table = torch.zeros(1, dtype=torch.int64, device="cpu")
        self.library.call("describe_device", capability, multiprocessors, capture, table)
        _C.attach_cuda(int(table))
        sparse24_conv_product.choose_cuda.cache_clear()

    @property
    def kernel(self) -> int:
        """Which one ran last."""
        kernel = torch.zeros(1, dtype=torch.int64, device="cpu")
        self.library.call("kernel_that_ran", kernel)
        return int(kernel)

    @property
    def launches(self) -> int:
        """Of products that skip zero activations, so far."""
        count = torch.zeros(1, dtype=torch.int64, device="cpu")
        self.library.call("launches", count)
        return int(count)


@contextmanager
def as_on_a_gpu(library: KernelLibrary, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """Every product and layout of host tensors runs as for CUDA tensors in here."""
    shape_on = sparse24_format.sparse24_panels_shape
    for module in (sparse24_format, sparse24_layout, quantized_panels):
        monkeypatch.setattr(
            module,
            "sparse24_panels_shape",
            lambda n, k, dtype, device: shape_on(n, k, dtype, torch.device("cuda")),
        )
    monkeypatch.setattr(sparse24_layout, "_status", lambda t: t.new_empty(2, dtype=torch.int64))
    # Tensors of a GPU do not go straight to the CPU's kernel, nor may those that stand for them.
    for module in (sparse24, sparse24_quantized):
        monkeypatch.setattr(module, "calls_cpu_kernel", lambda *tensors: False)
    monkeypatch.setattr(sparse24, "_linear", sparse24._linear_native_cuda)
    monkeypatch.setattr(sparse24_quantized, "_linear", sparse24_quantized._native_cuda)
    monkeypatch.setattr(sparse24_conv_product, "_op", sparse24_conv_product._native_cuda)
    monkeypatch.setattr(sparse24_conv_panels, "_has_pairs", lambda t: False)
    # In gossamer.ops its name is that of the function.
    convolutions = importlib.import_module("gossamer.ops.sparse24_conv")
    monkeypatch.setattr(convolutions, "gpu_of", lambda device: 0)
    monkeypatch.setattr(convolutions, "on_cuda", lambda op, native: native)
    monkeypatch.setattr(blocksparse_product, "_is_cuda", lambda t: True)
    monkeypatch.setattr(pointcloud, "calls_cpu_kernel", lambda *tensors: False)
    monkeypatch.setattr(pointcloud, "has_kernels", lambda device: True)
    monkeypatch.setattr(pointcloud, "_op", pointcloud._native_cuda)
    monkeypatch.setattr(pointcloud, "_weight_op", pointcloud._weight_native_cuda)
    for codes in (topk, topk_encoder, topk_gradient):
        monkeypatch.setattr(codes, "has_cuda_kernel", lambda t: t.dtype != torch.float64)
    for codes in (topk, topk_encoder):
        monkeypatch.setattr(codes, "calls_cpu_kernel", lambda *tensors: False)
    monkeypatch.setattr(topk, "_decode", topk._decode_cuda)
    monkeypatch.setattr(topk_encoder, "_encode", topk_encoder._encode_cuda)
    monkeypatch.setattr(topk_gradient, "_values", topk_gradient._values_cuda)
    monkeypatch.setattr(topk_gradient, "_weight", topk_gradient._weight_cuda)
    monkeypatch.setattr(grouped, "calls_cpu_kernel", lambda *tensors: False)
    monkeypatch.setattr(grouped, "_op", grouped._native_cuda)
    monkeypatch.setattr(grouped_cuda, "has_kernels", lambda device: True)
    monkeypatch.setattr(grouped_gradient, "_input", grouped_gradient._input_native_cuda)
    monkeypatch.setattr(grouped_gradient, "_weight", grouped_gradient._weight_native_cuda)
    monkeypatch.setattr(native, "on_gpu", lambda coords: True)
    outputs = importlib.import_module("gossamer.ops.actsparse_outputs")
    for module in (actsparse, outputs, spikes):
        monkeypatch.setattr(module, "calls_cpu_kernel", lambda *tensors: False)
    monkeypatch.setattr(actsparse_cuda, "has_kernels", lambda device: True)
    monkeypatch.setattr(actsparse, "_op", actsparse._native_cuda)
    monkeypatch.setattr(outputs, "_op", outputs._native_cuda)
    monkeypatch.setattr(spikes, "_linear", spikes._linear_cuda)
    monkeypatch.setattr(cuda_workspace, "_counters", {})
    cuda_workspace._workspace_bytes.cache_clear()
    grouped_cuda._kernel.cache_clear()
    yield Gpu(library)
    cuda_workspace._workspace_bytes.cache_clear()
    grouped_cuda._kernel.cache_clear()
    _C.attach_cuda(0)
