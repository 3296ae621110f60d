"""A 2-D convolution at chosen output positions only: their pixels gathered, then one product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_TOGETHER = 4096  # positions whose pixels are gathered at once


class Taps:
    """Where the pixels of each output position of a convolution lie.

    ``pixels`` [OH OW, kh kw] numbers them row by row in an image that padding gives one more
    pixel: H W, the last one, is the zero that it reads.
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
        self.zeros = int(padding != (0, 0))
        self.size, self.out_size = size, (len(rows), len(columns))
        row, column = rows[:, None, :, None], columns[None, :, None, :]
        inside = (row >= 0) & (row < size[0]) & (column >= 0) & (column < size[1])
        pixels = torch.where(inside, row * size[1] + column, size[0] * size[1])
        self.pixels = pixels.reshape(len(rows) * len(columns), -1)

    def touched(self, pixels: Tensor) -> Tensor:
        """Of [B, H W] marked pixels the output positions [B, OH OW] that see one."""
        padded = F.pad(pixels, (0, self.zeros))
        marked: Tensor = padded[:, self.pixels.flatten()].view(len(pixels), *self.pixels.shape)
        return marked.any(-1)


def conv_at(x: Tensor, weight: Tensor, bias: Tensor | None, taps: Taps, at: Tensor) -> Tensor:
    """The outputs [P, C_out] of a convolution at positions ``at`` [P] of all images' OH OW.

    x [B, C, H, W] and weight [C_out, C, kh, kw]; differentiable by torch.
    """
    images, channels = x.shape[:2]
    outputs, pixels = taps.pixels.shape[0], taps.size[0] * taps.size[1]
    rows = x.permute(0, 2, 3, 1).reshape(images, pixels, channels)
    if taps.zeros:
        rows = F.pad(rows, (0, 0, 0, 1))
    rows = rows.flatten(0, 1)
    product = weight.permute(0, 2, 3, 1).flatten(1).t()
    parts = []
    for some in at.split(_TOGETHER):
        image = some.div(outputs, rounding_mode="floor")
        where = taps.pixels[some - image * outputs] + image.unsqueeze(-1) * (pixels + taps.zeros)
        gathered = rows.index_select(0, where.flatten()).view(len(some), product.shape[0])
        parts.append(gathered @ product if bias is None else torch.addmm(bias, gathered, product))
    return torch.cat(parts)
