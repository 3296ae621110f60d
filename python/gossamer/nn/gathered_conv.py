"""What the convolutions that compute some output positions only have in common."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..ops.conv_at import Taps

# Above this share of the positions the dense convolution of torch takes less time, measured on two
# cores of an Emerald Rapids for 3x3 kernels; for 1x1 kernels it always does in channels-last.
MOST_GATHERED = 0.35


def check_gathered(op: str, conv: nn.Conv2d) -> None:
    """Refuse what ``conv_at`` does not compute."""
    if conv.groups != 1 or isinstance(conv.padding, str) or conv.padding_mode != "zeros":
        raise ValueError(
            f"{op}: groups are {conv.groups}, padding is {conv.padding!r} and padding_mode "
            f"{conv.padding_mode!r}, expected one group and a number of zeros"
        )


def conv_arguments(conv: nn.Conv2d) -> tuple[Any, ...]:
    """The constructor's positional arguments of a dense convolution, up to the padding's mode."""
    if not isinstance(conv, nn.Conv2d):
        raise TypeError(f"the layer is {type(conv).__name__}, expected torch.nn.Conv2d")
    size = (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    rest = (conv.groups, conv.bias is not None, conv.padding_mode)
    return conv.in_channels, conv.out_channels, *size, *rest


def taps_of(conv: nn.Conv2d, x: Tensor, known: Taps | None) -> Taps:
    """The pixels of each output position for images of this size."""
    height, width = x.shape[-2:]
    if known is not None and known.size == (height, width) and known.pixels.device == x.device:
        return known
    kernel, stride, padding, dilation = (
        (int(way[0]), int(way[1]))
        for way in (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    )
    return Taps((height, width), kernel, stride, padding, dilation, x.device)
