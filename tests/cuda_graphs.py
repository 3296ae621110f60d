"""Calls in CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def captured(call: Callable[[], Tensor]) -> Tensor:
    """What a graph's second replay leaves."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # which makes the maps and their tables
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    for _ in range(2):
        y.fill_(77.0)
        graph.replay()
    torch.cuda.synchronize()
    return y
