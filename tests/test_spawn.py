"""Layers that are handed to a process as it starts, packed ones too."""

from __future__ import annotations

import gossamer
import pytest
import torch
import torch.multiprocessing as mp
from gossamer.nn import SparseConv2d, SparseLinear
from torch import Tensor, nn


def answer_again(_: int, layers: list[nn.Module], xs: list[Tensor], ys: list[Tensor]) -> None:
    with torch.no_grad():
        for layer, x, y in zip(layers, xs, ys, strict=True):
            assert torch.equal(layer(x), y), layer


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_process_that_starts_gets_packed_layers(method: str) -> None:
    if method not in mp.get_all_start_methods():
        pytest.skip(f"no {method} here")
    torch.manual_seed(0)
    linears = [
        SparseLinear.from_dense(nn.Linear(64, 96), pattern, prune="magnitude", density=density)
        for pattern, density in (
            ("2:4", None),
            (gossamer.Block(8, 8), 0.5),
            (gossamer.Unstructured(), 0.5),
        )
    ]
    conv = SparseConv2d.from_dense(
        nn.Conv2d(16, 16, 3), gossamer.Block(8, 8), prune="magnitude", density=0.5
    )
    quantized = [gossamer.quantize(linears[0], kind) for kind in ("int8", "float8_e4m3fn", "int4")]
    layers = [*linears, *quantized, conv]
    for layer in layers:
        layer.eval()
        if _can_pack(layer):
            layer.pack()
    xs = [torch.randn(4, 64)] * 6 + [torch.randn(2, 16, 8, 8)]
    with torch.no_grad():
        ys = [layer(x) for layer, x in zip(layers, xs, strict=True)]
    mp.start_processes(answer_again, (layers, xs, ys), nprocs=2, start_method=method)


def _can_pack(layer: nn.Module) -> bool:
    return gossamer._C.target() != "serial" and not isinstance(
        getattr(layer, "pattern", None), gossamer.Unstructured
    )
