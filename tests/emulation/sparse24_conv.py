"""2:4 convolutions for the kernels of a GPU: operands, and what should come out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from cases import integers
from conv_cases import ConvCase
from emulator import CSRC, HERE, Emulator, KernelLibrary
from fragment_gemm import ACTIVATION_CODES, DTYPE_CODES
from fragments import fragments_of
from gossamer import _C
from gossamer.formats import Sparse24Conv, Sparse24ConvPanels
from gossamer.ops.conv_operands import as_5d
from gossamer.ops.sparse24_conv import sparse24_conv_ways
from gossamer.ops.sparse24_conv_product import Way
from gossamer.prune import magnitude_24
from torch import Tensor

KERNELS = ("decode", "prefill", "wgmma", "float32", "stream")  # of enum CudaKernel
MARGIN = 8  # elements around x and y: 16 bytes


def build(emulator: Emulator) -> KernelLibrary:
    parts = (CSRC / "sparse24" / f"conv_{name}.cu" for name in ("sm90", "sm90_stream"))
    return emulator.build(HERE / "kernels" / "sparse24_conv.cu", *parts)


@dataclass
class Conv24:
    """A convolution with its operands, of whole numbers, so that every sum is exact."""

    case: ConvCase
    weight: Sparse24Conv
    x: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, case: ConvCase) -> Conv24:
        x = case.x()
        x.copy_(integers(*x.shape, limit=4, dtype=case.dtype))
        dense = magnitude_24(integers(*case.shape, limit=4, dtype=case.dtype), dim=1)
        bias = integers(case.shape[0], limit=9, dtype=case.dtype) if case.bias else None
        return cls(case, Sparse24Conv.from_dense(dense, case.groups), x, bias)

    def expected(self) -> Tensor:
        """In float64."""
        bias = None if self.bias is None else self.bias.double()
        return self.case.dense(self.x.double(), self.weight.to_dense().double(), bias)

    def ways(self, capability: int) -> list[Way]:
        """How a GPU of that compute capability, with four multiprocessors, may compute it."""
        device = {
            "capability": capability,
            "multiprocessors": 4,
            "shared_bytes": 227 << 10,
            "l2_bytes": 50 << 20,
        }
        panels = Sparse24ConvPanels.from_sparse24(self.weight)  # of which it takes the sizes
        return sparse24_conv_ways(self.x.shape, panels, **self.case.geometry, device=device)

    def run(self, library: KernelLibrary, way: Way, activation: str | None = None) -> Tensor:
        """The kernel's result. Around x lie NaNs, around y and in the counters what must stay."""
        case, y = self.case, self.expected()
        x5, y5 = (as_5d(t, True) for t in (self.x, y))
        steps = [getattr(case, name) for name in ("kernel", "stride", "padding", "dilation")]
        filled = [
            [*(fill,) * (3 - len(numbers)), *numbers]
            for numbers, fill in zip(steps, (1, 1, 0, 1), strict=True)
        ]
        memory = torch.full((x5.numel() + 2 * MARGIN,), torch.nan).to(case.dtype)
        memory[MARGIN:-MARGIN] = x5.flatten()
        out = torch.full((y5.numel() + 2 * MARGIN,), 77.0, dtype=case.dtype)
        matrix = self.weight.matrix
        tiles = case.groups * -(-case.group_out // way[1]) * -(-y5[..., 0].numel() // way[2])
        parts = 2 * way[5] if way[0] == "stream" else tiles * way[4]
        workspace = torch.full((parts * way[1] * way[2],), torch.nan)
        counters = torch.zeros(_C.cuda_counters, dtype=torch.int32)
        library.call(
            "conv",
            DTYPE_CODES[case.dtype],
            [
                *(case.batch, case.groups, self.x.shape[1], case.shape[0]),
                *(n for numbers in filled for n in numbers),
                *(*x5.shape[1:4], *y5.shape[1:4]),
            ],
            fragments_of(matrix.values, matrix.indices, matrix.in_features),
            memory[MARGIN:],
            *(0 if self.bias is None else self.bias, ACTIVATION_CODES[activation]),
            *(out[MARGIN:], [KERNELS.index(way[0]), *way[1:]], workspace, counters),
        )
        assert not counters.any()
        assert bool((torch.cat((out[:MARGIN], out[-MARGIN:])) == 77).all())
        y5.copy_(out[MARGIN:-MARGIN].view(y5.shape))
        return y
