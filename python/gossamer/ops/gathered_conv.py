"""When convolutions compute some output positions only, and what they keep from call to call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import _C
from .conv_at import Taps, weight_by_tap
from .operands import autocast_dtype

# In channels-last, and where the pixels of a channel lie together.
_MOST = {
    torch.float32: (0.5, 0.5),
    torch.bfloat16: (0.25, 0.35),
    torch.float16: (0.5, 0.5),
}
_MOST_OF_FEW_CHANNELS = {torch.float32: 0.12, torch.bfloat16: 0.0, torch.float16: 0.2}


def most_gathered(
    dtype: torch.dtype,
    channels: int,
    taps: int,
    positions: int,
    channels_last: bool,
    target: str,
) -> float:
    """The share of a convolution's positions up to which to compute them alone.

    Above it torch's convolution of all takes less time. Measured on two cores of an Emerald Rapids
    for the layers of a ResNet-50; on a GPU nobody has measured it.

    Parameters
    ----------
    dtype : torch.dtype
        In which it is computed.
    channels, taps : int
        Of the input, and of the kernel.
    positions : int
        Of all images, those that are left out, too.
    channels_last : bool
        Of the input. Other pixels are brought there, all of them, which takes longer than a 1x1
        kernel does.
    target : str
        Of the CPU, or "cuda".
    """
    if target == "cuda":
        return 0.35
    if target == "serial" or dtype not in _MOST or (taps == 1 and not channels_last):
        return 0.0
    if dtype == torch.bfloat16 and positions < 512:  # making the weights ready takes too long
        return 0.0
    if channels < 16:
        return _MOST_OF_FEW_CHANNELS[dtype]
    return _MOST[dtype][0 if channels_last else 1]


def most_gathered_of(x: Tensor, taps: Taps) -> float:
    """The same of images x [B, C, H, W]."""
    positions, in_kernel = taps.pixels.shape
    if not (x.is_cpu or x.is_cuda):
        return -1.0  # there are no kernels
    autocast = autocast_dtype(x)
    return most_gathered(
        x.dtype if autocast is None else autocast,
        x.shape[1],
        in_kernel,
        len(x) * positions,
        x.is_contiguous(memory_format=torch.channels_last),
        "cuda" if x.is_cuda else _C.target(),
    )


def changes_pay(x: Tensor, kernel: tuple[int, ...], out_size: tuple[int, int]) -> bool:
    """Whether few changes of images x take less time than the dense convolution of all of x.

    What is found and remembered takes some passes over x in any case, and looking at the weight one
    over that. Measured on two cores of an Emerald Rapids with 2 % of the pixels changed; without
    tiles in bfloat16, and on a GPU, nobody has measured it.
    """
    if not x.is_cpu:
        return True
    autocast = autocast_dtype(x)
    dtype, target = x.dtype if autocast is None else autocast, _C.target()
    if target == "serial" or (dtype == torch.bfloat16 and target == "amx_bf16"):
        return False
    positions = len(x) * out_size[0] * out_size[1]
    if kernel == (1, 1) or x.shape[1] < 64 or positions < 256:
        return False
    last = x.is_contiguous(memory_format=torch.channels_last)
    return most_gathered(dtype, x.shape[1], kernel[0] * kernel[1], positions, last, target) > 0


T = TypeVar("T")

_MOST_KEPT = 8  # numbers of images, of one mask


class Kept:
    """What was made of a tensor, for as long as that holds the same.

    On a CPU its entries are compared. A GPU would have to be waited for, so there its versions are,
    of which writes through ``.data`` make none. It is neither copied nor saved with the layer that
    has it.
    """

    kept: tuple[Tensor, Any, dict[Any, Any]] | None = None

    def of(self, source: Tensor, rest: Any, make: Callable[[], T]) -> T:
        """``make()``, or its result of last time, if the rest it was made of is the same, too."""
        kept = self.kept  # once: another thread may replace it
        state = _state(source)
        if kept is None or kept[1] != state or not _same(kept[0], source):
            kept = (_copy(source), state, {})
        made: T | None = kept[2].get(rest)
        if made is None:
            # Outside inference mode, or it could never be saved for a backward.
            with torch.inference_mode(False), torch.no_grad():
                made = make()
            if len(kept[2]) >= _MOST_KEPT:
                kept[2].clear()
            kept[2][rest] = made
        self.kept = kept
        return made

    def __getstate__(self) -> dict[str, Any]:
        return {}


def _state(t: Tensor) -> tuple[Any, ...]:
    version = None if t.is_cpu or t.is_inference() else (id(t), t.data_ptr(), t._version)
    return t.dtype, t.device, t.shape, version


def _copy(t: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return t.clone() if t.is_cpu else t  # which is held, so that no other has its id


def _same(known: Tensor, t: Tensor) -> bool:
    if not t.is_cpu:
        return not t.is_inference()  # nobody counts its versions
    return torch.equal(known, t)


class GatheredWeight:
    """The weight of a convolution as the point clouds' kernels want it."""

    def __init__(self) -> None:
        self._by_tap = Kept()

    def by_tap(self, weight: Tensor) -> Tensor:
        """[kh kw, C, C_out], differentiable where that is wanted."""
        if not weight.is_cpu or (torch.is_grad_enabled() and weight.requires_grad):
            return weight_by_tap(weight)
        return self._by_tap.of(weight, (), lambda: weight_by_tap(weight.detach()))
