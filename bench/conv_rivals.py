"""The dense ways torch has to compute a convolution on a CPU."""

from __future__ import annotations

import copy

import torch
from rivals import THROUGH_FLOAT32, has_instructions_for
from timing import Contender
from torch import Tensor, nn

CONV_DEFAULT = "torch NCHW"  # what a model runs if nobody does anything about it


def dense_convs(conv: nn.Conv2d, x: Tensor) -> list[Contender]:
    """Every dense way to compute ``conv(x)`` that this torch and machine have.

    Parameters
    ----------
    conv : torch.nn.Conv2d
        In the dtype of ``x``, for inference.
    x : Tensor
        [batch, C_in, h, w], contiguous. The memory format that a way asks for is given to it: what
        it costs to come from another one is not timed.
    """
    last = x.to(memory_format=torch.channels_last)
    conv_last = copy.deepcopy(conv).to(memory_format=torch.channels_last)
    contenders = [
        Contender(CONV_DEFAULT, lambda: conv(x)),
        Contender("torch channels_last", lambda: conv_last(last)),
    ]
    if not has_instructions_for(x.dtype):
        wide = copy.deepcopy(conv_last).float()
        contenders.append(Contender(THROUGH_FLOAT32, lambda: wide(last.float()).to(x.dtype)))
    for name, make in {"to_mkldnn": _to_mkldnn, "oneDNN packed": _onednn_packed}.items():
        try:
            contender = make(name, conv_last, x if name == "to_mkldnn" else last)
            contender.run()
        except (RuntimeError, AttributeError, NotImplementedError):
            continue  # no such library in this build, or no such instruction on this machine
        contenders.append(contender)
    return contenders


def _to_mkldnn(name: str, conv: nn.Conv2d, x: Tensor) -> Contender:
    """Weights, x and y in oneDNN's own layouts."""
    from torch.utils.mkldnn import to_mkldnn

    packed = to_mkldnn(copy.deepcopy(conv).to(memory_format=torch.contiguous_format), x.dtype)
    own = x.to_mkldnn()
    return Contender(name, lambda: packed(own))


def _onednn_packed(name: str, conv: nn.Conv2d, x: Tensor) -> Contender:
    """The weight packed for oneDNN, as torch.compile's freezing packs it."""
    steps = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)
    packed = torch.ops.mkldnn._reorder_convolution_weight(conv.weight, *steps, list(x.shape))
    convolution = torch.ops.mkldnn._convolution_pointwise
    return Contender(name, lambda: convolution(x, packed, conv.bias, *steps, "none", [], ""))
