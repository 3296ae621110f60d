"""Memory that a CUDA kernel needs beside its operands, from torch's caching allocator.

Blocks that share a tile of the result leave partial sums in a workspace, made for each call, and
count themselves in at counters, which the kernels leave as zeros: those are kept, one set a stream,
since two streams must not count at the same ones. A graph has its own, which it zeroes at each
replay, because it may be replayed on any stream; nobody can tell when a graph is gone, so they stay
(4 KB a captured graph).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from .. import _C

# (device, stream, the graph capture that the stream is in or 0) -> counters
_counters: dict[tuple[int, int, int], Tensor] = {}


def workspace(x: Tensor, nbytes: int) -> tuple[Tensor | None, Tensor | None]:
    """(workspace, counters) for a kernel on the current stream of the device of ``x``."""
    if nbytes == 0:
        return None, None
    place = (x.get_device(), *_C.cuda_stream(x))
    counters = _counters.get(place)
    if counters is None:
        counters = _counters[place] = _outside_pools(x.device).zero_()
    return torch.empty(nbytes, dtype=torch.uint8, device=x.device), counters


def _outside_pools(device: torch.device) -> Tensor:
    """Counters in memory that torch does not give to anyone else while they are held.

    What is allocated while torch captures a graph, or warms up for one, comes from the graph's
    pool, and torch.compile's graphs reuse all of that but what they returned. A pool takes what its
    thread or its stream allocates: so another thread does it, on the default stream.
    """

    def allocate() -> Tensor:
        _C.cuda_relax_capture()
        return torch.empty(_C.cuda_counters, dtype=torch.int32, device=device)

    with ThreadPoolExecutor(max_workers=1) as other:
        return other.submit(allocate).result()
