"""Other ways to convolve the voxels of a point cloud: torch's own products, spconv, TorchSparse.

spconv's CPU build runs on one thread: with more, rows of its results are wrong, others on each run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

import torch
from gossamer._wide import has_loops_only
from gossamer.pointcloud import KernelMap
from timing import Contender
from torch import Tensor

SPCONV = "spconv, 1 thread"


def torch_features(map: KernelMap) -> Callable[[Tensor, Tensor], Tensor]:
    """A tap at a time: gather, multiply, add. The rows are looked up beforehand.

    Types for which torch has only loops on this CPU go through float32.
    """
    sizes = map.tap_offsets.diff().tolist()

    def rows(index: Tensor, order: Tensor | None) -> tuple[Tensor, ...]:
        return (index if order is None else order[index.long()]).long().split(sizes)

    taps = list(
        zip(rows(map.in_index, map.in_order), rows(map.out_index, map.out_order), strict=True)
    )

    def run(feats: Tensor, weight: Tensor) -> Tensor:
        if has_loops_only(feats):
            return run(feats.float(), weight.float()).to(feats.dtype)
        y = feats.new_zeros(map.n_out, weight.shape[2])
        for (rows_in, rows_out), tap in zip(taps, weight, strict=True):
            y.index_add_(0, rows_out, feats.index_select(0, rows_in) @ tap)
        return y

    return run


def _spconv() -> ModuleType | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import spconv.pytorch
    except ImportError:
        return None
    module: ModuleType = spconv.pytorch
    return module


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _extents(coords: Tensor) -> list[int]:
    return (coords[:, 1:].amax(0) + 1).tolist()


def spconv_map(coords: Tensor, kernel: int, stride: int) -> list[Contender]:
    """Its hash table and pairs, where it is installed."""
    spconv = _spconv()
    if spconv is None:
        return []
    padding = (kernel - 1) // 2

    def run() -> object:
        return spconv.ops.get_indice_pairs(
            *(coords, 1, _extents(coords), spconv.ConvAlgo.Native),
            *([kernel] * 3, [stride] * 3, [padding] * 3, [1] * 3, [0] * 3),
            subm=stride == 1,
        )

    return [Contender(SPCONV, run, _one_thread)]


def spconv_features(coords: Tensor, feats: Tensor, weight: Tensor, kernel: int) -> list[Contender]:
    """A submanifold layer whose pairs are kept; its strided ones make theirs at every call."""
    spconv = _spconv()
    if spconv is None:
        return []
    channels = weight.shape[1:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = spconv.SubMConv3d(
            *channels, kernel, bias=False, indice_key="pairs", algo=spconv.ConvAlgo.Native
        )
    with torch.no_grad():
        taps = weight.unflatten(0, (kernel,) * 3)
        layer.weight.copy_(taps.permute(4, 0, 1, 2, 3))
    first = spconv.SparseConvTensor(feats, coords, _extents(coords), 1)

    def run() -> Tensor:
        with torch.no_grad():
            y: Tensor = layer(first).features
            return y

    with _one_thread():
        first.indice_dict = layer(first).indice_dict
    return [Contender(SPCONV, run, _one_thread)]


# ---- on a GPU -----------------------------------------------------------------------------------


def gpu_rivals(
    coords: Tensor, copies: Sequence[Tensor], weight: Tensor, kernel: int
) -> dict[str, Callable[[], list[Callable[[], Tensor]]]]:
    """Calls of a submanifold layer with its pairs kept, by library; an error where there is none.

    ``copies`` of the features, a call each.
    """

    def spconv() -> list[Callable[[], Tensor]]:
        import spconv.pytorch as library

        layer = library.SubMConv3d(*weight.shape[1:], kernel, bias=False, indice_key="pairs")
        layer = layer.to(weight.device, weight.dtype)
        layer.weight.copy_(weight.unflatten(0, (kernel,) * 3).permute(4, 0, 1, 2, 3))
        pairs = layer(library.SparseConvTensor(copies[0], coords, _extents(coords), 1)).indice_dict

        def of(feats: Tensor) -> Callable[[], Tensor]:
            x = library.SparseConvTensor(feats, coords, _extents(coords), 1)
            x.indice_dict = pairs
            return lambda: layer(x).features

        return [of(feats) for feats in copies]

    def torchsparse() -> list[Callable[[], Tensor]]:
        import torchsparse as library

        layer = library.nn.Conv3d(*weight.shape[1:], kernel).to(weight.device, weight.dtype)
        # Its taps count with the first axis fastest.
        taps = weight.unflatten(0, (kernel,) * 3).permute(2, 1, 0, 3, 4)
        layer.kernel.copy_(taps.flatten(0, 2))
        tensors = [library.SparseTensor(feats, coords) for feats in copies]
        layer(tensors[0])
        for x in tensors[1:]:
            x._caches = tensors[0]._caches
        return [lambda x=x: layer(x).feats for x in tensors]

    return {"spconv": spconv, "TorchSparse": torchsparse}
