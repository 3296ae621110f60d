"""A 2-D convolution at chosen output positions only, by a kernel map of them: nothing is copied."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..pointcloud.kernel_map import KernelMap
from .pointcloud import pointcloud_conv


class Taps:
    """Where the pixels of each output position of a convolution lie.

    ``pixels`` [OH OW, kh kw] numbers them row by row in an image; H W is one in the padding.
    """

    def __init__(
        self,
        size: tuple[int, int],
        kernel: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        device: torch.device,
    ) -> None:
        ways = []
        for extent, k, step, pad, apart in zip(
            size, kernel, stride, padding, dilation, strict=True
        ):
            outputs = (extent + 2 * pad - apart * (k - 1) - 1) // step + 1
            first = torch.arange(max(outputs, 0), device=device) * step - pad
            ways.append(first.view(-1, 1) + apart * torch.arange(k, device=device))
        rows, columns = ways
        self.size, self.out_size, self.kernel = size, (len(rows), len(columns)), kernel
        row, column = rows[:, None, :, None], columns[None, :, None, :]
        inside = (row >= 0) & (row < size[0]) & (column >= 0) & (column < size[1])
        pixels = torch.where(inside, row * size[1] + column, size[0] * size[1])
        self.pixels = pixels.reshape(len(rows) * len(columns), -1)

    def touched(self, pixels: Tensor) -> Tensor:
        """Of [B, H W] marked pixels the output positions [B, OH OW] that see one."""
        marked: Tensor = F.pad(pixels, (0, 1))[:, self.pixels.flatten()]
        return marked.view(len(pixels), *self.pixels.shape).any(-1)

    def map_at(self, at: Tensor, images: int) -> KernelMap:
        """From the pixels of so many images to ascending positions ``at`` [P] of their OH OW."""
        outputs, pixels = self.pixels.shape[0], self.size[0] * self.size[1]
        image = at.div(outputs, rounding_mode="floor")
        seen = self.pixels[at - image * outputs].t()  # a row a tap, as pairs are sorted
        inside = seen < pixels
        ranks = torch.arange(len(at), dtype=torch.int32, device=at.device)
        counts = inside.sum(1, dtype=torch.int64).cpu()
        return KernelMap(
            in_index=(seen + image * pixels)[inside].int(),
            out_index=ranks.expand_as(seen)[inside],
            tap_offsets=F.pad(counts.cumsum(0), (1, 0)),
            in_order=None,
            out_order=None,
            n_in=images * pixels,
            n_out=len(at),
            kernel_size=self.kernel,
        )


def weight_by_tap(weight: Tensor) -> Tensor:
    """[C_out, C, kh, kw] as [kh kw, C, C_out]."""
    return weight.flatten(2).permute(2, 1, 0).contiguous()


def conv_at(x: Tensor, by_tap: Tensor, bias: Tensor | None, map: KernelMap) -> Tensor:
    """The outputs [P, C_out] of a convolution of x [B, C, H, W] at the positions of a map."""
    return pointcloud_conv(x.permute(0, 2, 3, 1).reshape(map.n_in, x.shape[1]), by_tap, bias, map)
