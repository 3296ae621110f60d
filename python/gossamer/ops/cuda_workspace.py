"""Memory that a CUDA kernel needs beside its operands, from torch's caching allocator.

Blocks that share a tile of the result leave partial sums in a workspace, made for each call, and
count themselves in at counters, which the kernels leave as zeros: those are kept, one set a stream,
since two streams must not count at the same ones. A graph has its own, which it zeroes at each
replay, because it may be replayed on any stream.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _C

# (device, stream) -> (the graph capture that it was made in or 0, counters)
_counters: dict[tuple[int, int], tuple[int, Tensor]] = {}


def workspace(x: Tensor, nbytes: int) -> tuple[Tensor | None, Tensor | None]:
    """(workspace, counters) for a kernel on the current stream of the device of ``x``."""
    if nbytes == 0:
        return None, None
    stream, capture = _C.cuda_stream(x)
    place = (x.get_device(), stream)
    made_in, counters = _counters.get(place, (-1, x))
    if made_in != capture:
        counters = torch.zeros(_C.cuda_counters, dtype=torch.int32, device=x.device)
        _counters[place] = capture, counters
    return torch.empty(nbytes, dtype=torch.uint8, device=x.device), counters
