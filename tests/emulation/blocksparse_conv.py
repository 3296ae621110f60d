"""Block-sparse convolutions for the kernels of a GPU: operands, and what should come out."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from cases import integers
from conv_cases import ConvCase
from emulator import CSRC, HERE, Emulator, KernelLibrary
from fragment_gemm import ACTIVATION_CODES, DTYPE_CODES
from gossamer.formats import BlockSparse
from gossamer.ops.conv_geometry import prepare
from gossamer.ops.conv_operands import Geometry, as_5d, empty_result, is_channels_last
from torch import Tensor

BLOCKSPARSE = HERE / "kernels" / "blocksparse.cu"
CODES = {**DTYPE_CODES, torch.float64: 0}
# Pixels and outputs of kConvTiles, in its order.
TILES = ((128, 256), (256, 128), (128, 64), (64, 64), (16, 64))
# Outputs and blocks of a cluster of kWgmmaTiles.
WGMMA_TILES = ((256, 2), (256, 1), (128, 1), (64, 1))
MMA, FMA, WGMMA = range(3)
MARGIN = 8  # elements before x, y and the values: 16 bytes of the smallest


def build(emulator: Emulator) -> KernelLibrary:
    parts = (CSRC / "blocksparse" / f"conv_{name}.cu" for name in ("sm80", "sm90"))
    return emulator.build(BLOCKSPARSE, *parts)


@dataclass
class BlockConv:
    """A convolution with its operands."""

    case: ConvCase
    weight: BlockSparse
    x: Tensor
    bias: Tensor | None
    activation: str | None = None
    residual: Tensor | None = None  # as y

    @classmethod
    def of(cls, case: ConvCase, residual: bool = False) -> BlockConv:
        """Of whole numbers, so that every sum is exact."""
        x, weight = case.x(), case.weight()
        x.copy_(integers(*x.shape, limit=4, dtype=case.dtype))
        ones = replace(weight, values=torch.ones_like(weight.values)).to_dense()
        inside = BlockSparse.from_dense(ones, weight.block, groups=weight.groups).values != 0
        values = integers(*weight.values.shape, limit=4, dtype=case.dtype) * inside
        bias = integers(case.shape[0], limit=9, dtype=case.dtype) if case.bias else None
        conv = cls(case, replace(weight, values=values), x, bias)
        if residual:
            y = conv._prepared()[0]
            conv.residual = y.copy_(integers(*y.shape, limit=9, dtype=case.dtype))
        return conv

    def expected(self) -> Tensor:
        """In float64, without the activation."""
        bias = None if self.bias is None else self.bias.double()
        x, dense = self.x.double(), self.weight.to_dense().double()
        linear = len(self.case.kernel) == 0
        y = F.linear(x, dense, bias) if linear else self.case.dense(x, dense, bias)
        return y if self.residual is None else y + self.residual.double()

    def sizes(self) -> list[int]:
        """What the kernels are told of the convolution (kernels/blocksparse.cu)."""
        case, weight = self.case, self.weight
        _, x5, y5, geometry, last = self._prepared()
        first = 1 if last else 2
        extents = (*x5.shape[first : first + 3], *y5.shape[first : first + 3])
        return [
            *(case.groups, case.group_out, case.group_in, *weight.values.shape[1:]),
            *(weight.values.shape[0], *(n for axis in geometry.in_3d() for n in axis)),
            *(*extents, x5.shape[0], int(last)),
        ]

    def run(
        self,
        library: KernelLibrary,
        tile: int = -1,
        margin: int = MARGIN,
        kernel: int = MMA,
        capability: int = 80,
    ) -> Tensor:
        """The kernel's result, in the shape and memory format of the operation's.

        Without a tile, of the kernel that is chosen for a GPU of that compute capability.

        Before x and the values lie NaNs, after them nothing; around y something that must stay.
        """
        case, weight = self.case, self.weight
        y, x5, y5, *_ = self._prepared()
        kernel = kernel if case.dtype.itemsize == 2 else FMA
        out = torch.full((y5.numel() + 2 * margin,), 77.0, dtype=case.dtype)
        library.call(
            "conv",
            *(CODES[case.dtype], self.sizes(), weight.crow_indices, weight.col_indices),
            *(_after(margin, weight.values), _after(margin, x5)),
            *(0 if self.bias is None else self.bias, self._residual(margin)),
            ACTIVATION_CODES[self.activation],
            *(out[margin:], capability, kernel, tile),
        )
        assert bool((out[:margin] == 77).all())
        assert bool((out[margin + y5.numel() :] == 77).all())
        y5.copy_(out[margin : margin + y5.numel()].view(y5.shape))
        return y

    def _residual(self, margin: int) -> Tensor | int:
        if self.residual is None:
            return 0
        return _after(margin, as_5d(self.residual, self._prepared()[-1]))

    def _prepared(self) -> tuple[Tensor, Tensor, Tensor, Geometry, bool]:
        """Room for y, x and that room in five dimensions, and whether their channels are last."""
        case, x, steps = self.case, self.x, ((), (), ())
        if len(case.kernel) > 0:  # no linear layer
            given = (case.stride, case.padding, case.dilation)
            conv = prepare("conv", x, case.shape, case.groups, *given, "zeros")
            x, steps = conv.x, (conv.stride, conv.padding, conv.dilation)
        geometry, last = Geometry(case.shape, case.groups, *steps), is_channels_last(x)
        y = empty_result("blocksparse_conv", x, None, geometry)
        return y, as_5d(x if last else x.contiguous(), last), as_5d(y, last), geometry, last


def _after(margin: int, t: Tensor) -> Tensor:
    """The same elements in memory that ends with them, and has NaNs before."""
    memory = torch.full((margin + t.numel(),), torch.nan).to(t.dtype)
    memory[margin:] = t.flatten()
    return memory[margin:]
