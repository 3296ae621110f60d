"""A 2-D convolution at chosen output positions only, as one over a point cloud of its pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..pointcloud.kernel_map import KernelMap
from .operands import without_autocast
from .pointcloud_layout import vouch

Steps = tuple[Sequence[int], Sequence[int], Sequence[int]]  # stride, padding, dilation: a pair each


def out_size(size: Sequence[int], kernel: Sequence[int], steps: Steps) -> tuple[int, int]:
    """Height and width of the output."""
    height, width = (
        max((extent + 2 * pad - apart * (k - 1) - 1) // step + 1, 0)
        for extent, k, step, pad, apart in zip(size, kernel, *steps, strict=True)
    )
    return height, width


class Taps:
    """Where the pixels of each output position of a convolution lie.

    ``pixels`` [OH OW, kh kw] numbers them row by row in an image; H W is one in the padding.
    """

    def __init__(
        self,
        size: tuple[int, int],
        kernel: tuple[int, ...],
        steps: Steps,
        device: torch.device,
    ) -> None:
        ways = []
        for outputs, k, step, pad, apart in zip(
            out_size(size, kernel, steps), kernel, *steps, strict=True
        ):
            first = torch.arange(outputs, device=device) * step - pad
            ways.append(first.view(-1, 1) + apart * torch.arange(k, device=device))
        rows, columns = ways
        self.size, self.out_size, self.kernel = size, (len(rows), len(columns)), kernel
        self.steps = steps
        row, column = rows[:, None, :, None], columns[None, :, None, :]
        inside = (row >= 0) & (row < size[0]) & (column >= 0) & (column < size[1])
        pixels = torch.where(inside, row * size[1] + column, size[0] * size[1])
        self.pixels = pixels.reshape(len(rows) * len(columns), -1)

    def touched(self, given: Tensor) -> Tensor:
        """Of [B, H, W] marked pixels the output positions [B, OH, OW] that see one."""
        ones = torch.ones((1, 1, *self.kernel), device=given.device)
        with without_autocast(given):
            counts = F.conv2d(given.unsqueeze(1).float(), ones, None, *self.steps)
        return counts.squeeze(1) > 0.5

    def map_at(self, at: Tensor, given: Tensor) -> KernelMap:
        """From the pixels that are given, of [B, H W], to ascending positions ``at`` of B OH OW."""
        image = at.div(self.pixels.shape[0], rounding_mode="floor")
        padded = F.pad(given, (0, 1))
        # A row a tap, as pairs are sorted.
        seen = self.pixels[at - image * self.pixels.shape[0]].t() + image * padded.shape[1]
        marked = padded.flatten()
        ranks_in, ranks_out = (
            marked.cumsum(0, dtype=torch.int32) - 1,
            torch.arange(len(at), dtype=torch.int32, device=at.device),
        )
        inside = marked[seen]
        counts = inside.sum(1, dtype=torch.int64).cpu()
        made = KernelMap(
            in_index=ranks_in[seen[inside]],
            out_index=ranks_out.expand_as(seen)[inside],
            tap_offsets=F.pad(counts.cumsum(0), (1, 0)),
            in_order=None,
            out_order=None,
            n_in=int(given.sum()),
            n_out=len(at),
            kernel_size=self.kernel,
        )
        if at.is_cuda:  # which would be waited for to see that the map is right
            for way in (made, made.transposed()):
                vouch(way)
        return made


def taps_for(x: Tensor, kernel: Sequence[int], steps: Steps, known: Taps | None) -> Taps:
    """Those of images of this size: the known ones, if they are."""
    size = (x.shape[-2], x.shape[-1])
    if known is not None and known.size == size and known.pixels.device == x.device:
        return known
    return Taps(size, tuple(kernel), steps, x.device)


def weight_by_tap(weight: Tensor) -> Tensor:
    """[C_out, C, kh, kw] as [kh kw, C, C_out]."""
    return weight.flatten(2).permute(2, 1, 0).contiguous()
