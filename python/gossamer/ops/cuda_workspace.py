"""What a CUDA kernel needs of x, and beside its operands.

Blocks that share a tile of the result leave partial sums in a workspace, made for each call by
torch's caching allocator, and count themselves in at counters, which the kernels leave as zeros:
those are kept, one set a stream, since two streams must not count at the same ones. A graph has its
own, which it zeroes at each replay, because it may be replayed on any stream; nobody can tell when
a graph is gone, so they stay (4 KB a captured graph).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch
from torch import Tensor

from .. import _C

# (device, stream, the graph capture that the stream is in or 0) -> counters
_counters: dict[tuple[int, int, int], Tensor] = {}


def workspace(
    x: Tensor, out_features: int, in_features: int, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """(workspace, counters) for a product with the rows of ``x`` on the device's current stream.

    ``dtype`` is that of the weight's values; uint8 stands for int4.
    """
    rows = x.shape[0]
    if rows == 0:
        return None, None
    device = x.get_device()
    return workspace_of(x, _workspace_bytes(rows, out_features, in_features, dtype, device))


def workspace_of(x: Tensor, nbytes: int) -> tuple[Tensor | None, Tensor | None]:
    """The same of so many bytes, for up to ``_C.cuda_counters`` tiles; (None, None) of none."""
    if nbytes == 0:
        return None, None
    place = (x.get_device(), *_C.cuda_stream(x))
    counters = _counters.get(place)
    if counters is None:
        counters = _outside_pools(x.device)
        if x.is_cuda and not torch.cuda.is_current_stream_capturing():
            # What had this memory before may still be writing to it, on the default stream.
            default = torch.cuda.default_stream(x.device)
            torch.cuda.current_stream(x.device).wait_stream(default)
        _counters[place] = counters.zero_()
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


@lru_cache(maxsize=1 << 14)
def _workspace_bytes(m: int, n: int, k: int, dtype: torch.dtype, device: int) -> int:
    nbytes: int = _C.sparse24_choose_cuda(m, n, k, str(dtype), device)["workspace_bytes"]
    return nbytes


def chosen_config(
    m: int, n: int, k: int, dtype: torch.dtype, device: int
) -> tuple[str, int, int, int, int, int]:
    """How a product is cut up, as ``sparse24_linear_cuda`` can be told to for another one."""
    chosen = _C.sparse24_choose_cuda(m, n, k, str(dtype), device)
    tile = (chosen["tile_n"], chosen["tile_m"])
    return (chosen["kernel"], *tile, chosen["warps_k"], chosen["split_k"], chosen["blocks"])


def aligned_rows(rows: Tensor) -> Tensor:
    """The same matrix with each row at a multiple of 16 bytes, which asynchronous copies need, and
    past the end of the one before, which Hopper's tensor maps need (an expanded x is not)."""
    size, columns, pitch = rows.element_size(), rows.shape[1], rows.stride(0)
    pitch_fits = (pitch * size % 16 == 0 and pitch >= columns) or rows.shape[0] <= 1
    columns_fit = rows.stride(1) == 1 or columns == 1
    if pitch_fits and columns_fit and rows.data_ptr() % 16 == 0:
        return rows
    multiple = 16 // size
    padded = rows.new_empty((rows.shape[0], (columns + multiple - 1) // multiple * multiple))
    return padded[:, :columns].copy_(rows)
