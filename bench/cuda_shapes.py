"""What the GPU's bench measures: the linear layers of three models, rows, dtypes, exactness."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from shapes import LinearShape, Tolerance

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
QUICK_ROWS = (1, 16, 64, 256, 2048, 8192)
DECODE_ROWS = 64  # up to here reading the weights decides: a token each of some sequences
PREFILL_ROWS = 2048  # from here on arithmetic does
MIB = 1024**2
LARGE_WEIGHT = 64 * MIB  # of the dense weight: larger than any L2 so far

SHAPES = (
    # Llama-3-8B: hidden 4096, 32 heads and 8 for k and v of 128, feed-forward 14336. Layers of one
    # input that serving engines compute as one are one here: q, k and v; gate and up.
    LinearShape("llama8b.qkv", 6144, 4096),
    LinearShape("llama8b.o", 4096, 4096),
    LinearShape("llama8b.gate_up", 28672, 4096),
    LinearShape("llama8b.down", 4096, 14336),
    # Llama-3-70B: hidden 8192, 64 heads and 8, feed-forward 28672
    LinearShape("llama70b.qkv", 10240, 8192),
    LinearShape("llama70b.o", 8192, 8192),
    LinearShape("llama70b.gate_up", 57344, 8192),
    LinearShape("llama70b.down", 8192, 28672),
    # Qwen2.5-7B: hidden 3584, 28 heads and 4, feed-forward 18944
    LinearShape("qwen7b.qkv", 4608, 3584),
    LinearShape("qwen7b.o", 3584, 3584),
    LinearShape("qwen7b.gate_up", 37888, 3584),
    LinearShape("qwen7b.down", 3584, 18944),
)
ACTIVE_GPU_MODEL = "llama8b"  # whose layers have zeros among their inputs
QUICK_SHAPES = (
    "llama8b.o",
    "llama8b.gate_up",
    "llama8b.down",
    "llama70b.o",
    "llama70b.down",
    "qwen7b.qkv",
)
# Other dtypes show in a quick run that they work and where they stand.
QUICK_OTHER_SHAPES = ("llama8b.down", "llama70b.down")
QUICK_OTHER_ROWS = (16, 2048)


@dataclass(frozen=True)
class GpuDtype:
    """A dtype of x and the weights, and of the answers.

    ``weights`` is what gossamer keeps of the weights where that is another: int4 of those that
    dense layers have in bfloat16.
    """

    name: str
    dtype: torch.dtype
    out: torch.dtype
    tolerance: Tolerance
    weights: str = ""

    @property
    def quantised(self) -> bool:
        return self.dtype.itemsize == 1


# Whole sums in float32, rounded once, as on a CPU: 2^-8 and 2^-11 of the answer. Tensor cores cut
# off the low bits of every partial sum; in float8 Hopper keeps about 14 of them. float32 is exact.
DTYPES = {
    entry.name: entry
    for entry in (
        GpuDtype("bf16", torch.bfloat16, torch.bfloat16, Tolerance(2**-8, 1e-3)),
        GpuDtype("fp16", torch.float16, torch.float16, Tolerance(2**-11, 1e-3)),
        GpuDtype("fp8", torch.float8_e4m3fn, torch.bfloat16, Tolerance(2**-8, 2e-2)),
        GpuDtype("int8", torch.int8, torch.bfloat16, Tolerance(2**-8, 1e-3)),
        GpuDtype("int4", torch.bfloat16, torch.bfloat16, Tolerance(2**-8, 1e-3), "int4"),
        GpuDtype("fp32", torch.float32, torch.float32, Tolerance(1e-5, 1e-4)),
    )
}
# Of block-sparse layers: images or rows, sizes of blocks and shares of live ones; "2:4" is of
# convolutions.
BLOCK_IMAGES, BLOCK_ROWS = (32, 128), (512, 8192)
BLOCKS = ((16, 16), (32, 32), (64, 64), "2:4")
BLOCK_DENSITIES = (0.5, 0.25, 0.1, 0.05)
BLOCK_DTYPES = ("bf16", "fp16", "fp32")
QUICK_BLOCK_IMAGES, QUICK_BLOCK_ROWS = (64,), (4096,)
QUICK_BLOCKS = ((32, 32), (16, 16), "2:4")
QUICK_BLOCK_DENSITIES = (0.25,)
QUICK_BLOCK_SHAPES = ("llama8b.o", "llama8b.down")  # beside ResNet-50's convolutions

DEFAULT_DTYPES = ("bf16", "fp16", "fp8", "int8", "int4")
