"""What the layers that compute some output positions only have in common."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .._wide import conv_in_float32, has_loops_only
from ..ops.conv_at import Steps


class WideConv2d(nn.Conv2d):
    """torch's layer, in float32 where torch has only loops for a 16-bit type."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not has_loops_only(input):
            return super()._conv_forward(input, weight, bias)
        return conv_in_float32(super()._conv_forward, input, weight, bias)


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


def steps_of(conv: nn.Conv2d) -> Steps:
    """Stride, padding and dilation."""
    assert not isinstance(conv.padding, str)
    return conv.stride, conv.padding, conv.dilation
