"""What the layers that compute some output positions only have in common."""

from __future__ import annotations

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


def steps_of(conv: nn.Conv2d) -> Steps:
    """Stride, padding and dilation."""
    assert not isinstance(conv.padding, str)
    return conv.stride, conv.padding, conv.dilation
