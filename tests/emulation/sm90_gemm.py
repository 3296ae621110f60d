"""What the tests of the Hopper GEMMs share: calls of the kernels, emulated or on a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from cases import integers, sparse_24
from emulator import KernelLibrary
from fragments import fragments_of
from gossamer import reference
from gossamer.formats import Sparse24
from torch import Tensor

WGMMA, STREAM = 2, 4  # of sparse24::CudaKernel
COUNTERS = 1024
DTYPES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3, torch.float8_e4m3fn: 4}
DTYPES[torch.int8] = 5  # csrc/common/dtype.h
ACTIVATIONS = (None, "relu", "gelu", "silu")
TILES = ((128, 256), (256, 128), (128, 128))  # rows of W, rows of x
STREAM_TILES = (16, 32, 64, 128)  # rows of x
GUARD = 64  # elements before and after the result


@dataclass
class Call:
    """Everything that does not change the result, and what is fused."""

    tile: tuple[int, int] = TILES[0]
    blocks: int = 0
    gap: int = 0  # columns of NaN between rows of x, beyond what alignment asks for
    shift: int = 0  # elements by which the result's address misses a multiple of 16 bytes
    bias: Tensor | None = None
    activation: str | None = None
    out_dtype: torch.dtype | None = None
    x_scales: Tensor | None = None
    row_scales: Tensor | None = None
    device: str = "cpu"
    kernel: int = WGMMA

    def run(self, library: KernelLibrary, x: Tensor, values: Tensor, indices: Tensor) -> Tensor:
        """out [m, n], after a look at what lies around it."""
        (m, k), n = x.shape, values.shape[0]
        per_16_bytes = 16 // x.element_size()
        stride = -(-k // per_16_bytes) * per_16_bytes + self.gap
        # After each row lie bytes that are NaN, or for int8 large.
        poisoned = torch.full((m + 1, stride * x.element_size()), 0x7F, dtype=torch.uint8)
        poisoned = poisoned.view(x.dtype)
        poisoned[:m, :k] = x
        out_dtype = self.out_dtype or x.dtype
        guarded = torch.full((m * n + 2 * GUARD,), 77.0, dtype=out_dtype, device=self.device)
        out = guarded[GUARD + self.shift :][: m * n]
        given = (self.bias, self.x_scales, self.row_scales)
        settings = [DTYPES[x.dtype], DTYPES[out_dtype], ACTIVATIONS.index(self.activation)]
        settings += [m, n, k, stride, *self.tile, self.blocks, self.kernel]
        # Two tiles of sums for each block, which may hold anything before.
        sums = 2 * self.blocks * self.tile[0] * self.tile[1] if self.kernel == STREAM else 1
        workspace = torch.full((sums,), torch.nan, device=self.device)
        counters = torch.zeros(COUNTERS, dtype=torch.int32, device=self.device)
        packed = fragments_of(values, indices, k)
        inputs = [torch.zeros(1) if t is None else t for t in given]
        inputs = [t.to(self.device).contiguous() for t in (poisoned, packed, *inputs)]
        has = [t is not None for t in given]
        library.call("gemm_sm90", out, *inputs, workspace, counters, settings, has)
        assert not counters.any(), "left counters behind"
        guarded, out = guarded.cpu(), out.cpu()
        around = torch.cat([guarded[: GUARD + self.shift], guarded[GUARD + self.shift + m * n :]])
        assert bool((around == 77.0).all()), "wrote outside the result"
        return out.view(m, n)


def whole_numbers(m: int, n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Sparse24, Tensor]:
    """x, a weight and their product, which every order of summation gives exactly."""
    weight = sparse_24(n, k, dtype)
    weight = Sparse24(integers(*weight.values.shape, limit=3, dtype=dtype), weight.indices, (n, k))
    # An index past the last column meets no x.
    beyond = reference.sparse24_columns(weight.indices, k) >= k
    weight.values[beyond] = 0
    x = integers(m, k, limit=3, dtype=dtype)
    y = reference.sparse24_linear(x.double(), weight.values.double(), weight.indices, None, k, None)
    return x, weight, y.to(dtype)


def check_whole_numbers(
    library: KernelLibrary, m: int, n: int, k: int, call: Call, dtype: torch.dtype = torch.bfloat16
) -> None:
    x, weight, y = whole_numbers(m, n, k, dtype)
    assert torch.equal(call.run(library, x, weight.values, weight.indices), y)


@dataclass
class Quantized:
    """x and a 2:4 weight of an 8-bit dtype, with scales, and the float64 result."""

    x: Tensor
    values: Tensor
    indices: Tensor
    call: Call
    y: Tensor

    @classmethod
    def of(cls, m: int, n: int, k: int, dtype: torch.dtype, call: Call) -> Quantized:
        weight = sparse_24(n, k, torch.float32)
        limit = 127 if dtype == torch.int8 else 3  # Hopper's sums of E4M3 have about 14 bits
        values = integers(*weight.values.shape, limit=limit, dtype=torch.float32)
        values[reference.sparse24_columns(weight.indices, k) >= k] = 0
        x = integers(m, k, limit=limit, dtype=torch.float32)
        y = reference.sparse24_linear(x.double(), values.double(), weight.indices, None, k, None)
        if call.x_scales is not None:
            y = y * call.x_scales.double().view(-1, 1)
        if call.row_scales is not None:
            y = y * call.row_scales.double()
        if call.bias is not None:
            y = y + call.bias.double()
        y = reference.activate(y, call.activation)
        return cls(x.to(dtype), values.to(dtype), weight.indices, call, y)

    def run(self, library: KernelLibrary) -> Tensor:
        return self.call.run(library, self.x, self.values, self.indices)
