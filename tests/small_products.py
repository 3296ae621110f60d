"""Every product on a GPU at small shapes, for compute-sanitizer: python tests/small_products.py

Prints a line a dtype; the exit status is 1 for a wrong answer, 3 without a GPU. With
PYTORCH_NO_CUDA_MEMORY_CACHING=1 each tensor has memory of its own, so that an access past its end
is seen.
"""

from __future__ import annotations

import sys

import gossamer
import torch
import torch.nn.functional as F
from gossamer import Block, reference
from gossamer.formats import (
    BlockSparse,
    Sparse24,
    Sparse24Conv,
    Sparse24ConvPanels,
    Sparse24Panels,
)
from gossamer.ops import pointcloud_conv, sparse24_conv
from gossamer.ops.blocksparse import blocksparse_by_way
from gossamer.ops.blocksparse_choice import blocksparse_ways
from gossamer.ops.pointcloud_pool import pointcloud_pool
from gossamer.ops.sparse24_conv import sparse24_conv_by_way, sparse24_conv_ways
from gossamer.pointcloud import Coordinates, voxelize
from torch import Tensor

# (M, N, K): one of everything, tails of every tile, several blocks, more K steps than stages.
SHAPES = ((1, 16, 64), (7, 33, 100), (17, 129, 260), (70, 72, 640), (200, 300, 512))
# What the largest error may be, of the largest entry.
DTYPES = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5}
QUANTISED = {torch.int8: 3e-2, torch.float8_e4m3fn: 1e-1}  # which is mostly the quantisation


def product(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The layer, and what it should be, of operands on the GPU."""
    panels = Sparse24Panels.from_sparse24(Sparse24.from_dense(weight))
    y = gossamer.sparse24_linear(x, panels, bias, "relu").cpu().double()
    want = x.cpu().double() @ weight.cpu().double().t() + bias.cpu().double()
    return y, want.relu()


def quantised_product(x: Tensor, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same of a weight that is quantised, and an x that the layer quantises."""
    if not hasattr(gossamer.formats, "Sparse24Quantized"):
        raise NotImplementedError("this gossamer has no quantised layers")
    name = str(dtype).removeprefix("torch.")
    sparse = Sparse24.from_dense(weight)
    quantised = gossamer.formats.Sparse24Quantized.from_sparse24(sparse, name)
    y = gossamer.sparse24_linear_quantized(x, quantised).cpu().double()
    return y, x.cpu().double() @ weight.cpu().double().t()


# (C_in, C_out, extent, block): whole fragments, tails of every tile, elements without alignment.
CONVS = ((64, 96, 9, 32), (40, 72, 13, 16), (19, 21, 6, 5))


def largest_error_of_blocks(dtype: torch.dtype) -> float:
    """Over CONVS in both memory formats, of the largest entry."""
    worst = 0.0
    for c_in, c_out, extent, size in CONVS:
        dense = torch.randn(c_out, c_in, 3, 3).to(dtype)
        blocks = BlockSparse.from_dense(
            gossamer.prune.magnitude_blocks(dense, Block(size, size), 0.5).cuda(),
            Block(size, size),
        )
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(2, c_in, extent, extent).to(dtype).cuda()
            x = x.contiguous(memory_format=memory_format)
            y = gossamer.blocksparse_conv(x, blocks, padding=1, stride=2).cpu().double()
            weight = blocks.to_dense().cpu().double()
            want = F.conv2d(x.cpu().double(), weight, padding=1, stride=2)
            error = (y - want).abs().max() / want.abs().max()
            worst = max(worst, float(error.nan_to_num(nan=1.0)))
    # Where a pixel sees itself, x comes another way; tiles alone and in clusters.
    for size in (16, 32):
        dense = gossamer.prune.magnitude_blocks(torch.randn(160, 200), Block(size, size), 0.5)
        blocks = BlockSparse.from_dense(dense.to(dtype).cuda(), Block(size, size))
        x = torch.randn(300, 200).to(dtype).cuda()
        want = x.cpu().double() @ blocks.to_dense().cpu().double().t()
        for way in blocksparse_ways(x.shape, blocks):
            y = blocksparse_by_way(way, x, blocks).cpu().double()
            error = (y - want).abs().max() / want.abs().max()
            worst = max(worst, float(error.nan_to_num(nan=1.0)))
    return worst


# C_in, C_out, groups, kernel, extent, stride: what TMA gathers, tails of outputs, a step of the sum
# that ends between channels, a GEMM, every other pixel alone.
CONVS_24 = (
    (64, 96, 1, 3, 9, 1),
    (128, 70, 1, 3, 8, 2),
    (80, 96, 2, 3, 7, 2),
    (72, 50, 1, 1, 6, 1),
    (64, 37, 1, 1, 7, 2),
)


def largest_error_of_convolutions(dtype: torch.dtype) -> float:
    """Over CONVS_24, 2:4, in the way that is chosen, in both memory formats, and every other."""
    worst = 0.0
    for c_in, c_out, groups, kernel, extent, stride in CONVS_24:
        dense = torch.randn(c_out, c_in // groups, kernel, kernel)
        dense = gossamer.prune.magnitude_24(dense, dim=1).to("cuda", dtype)
        panels = Sparse24ConvPanels.from_sparse24(Sparse24Conv.from_dense(dense, groups))
        geometry = {"stride": stride, "padding": kernel // 2}
        x = torch.randn(2, c_in, extent, extent).to("cuda", dtype)
        want = F.conv2d(x.cpu().double(), dense.cpu().double(), **geometry, groups=groups)
        last = x.contiguous(memory_format=torch.channels_last)
        found = [sparse24_conv(given, panels, **geometry) for given in (x, last)]
        for way in sparse24_conv_ways(x.shape, panels, **geometry):
            found.append(sparse24_conv_by_way(way, last, panels, **geometry))
        for y in found:
            error = (y.cpu().double() - want).abs().max() / want.abs().max()
            worst = max(worst, float(error.nan_to_num(nan=1.0)))
    return worst


def largest_error_of_voxels(dtype: torch.dtype) -> float:
    """Copied channels and others, of the result and of the weights' gradient."""
    worst = 0.0
    coords = (torch.rand(1, 9, 8, 7) < 0.5).nonzero().int().cuda()
    map = Coordinates(coords).submanifold(3)
    pairs = map.tensors
    x = torch.randn(len(coords), 5).to("cuda", dtype)
    for reduce in ("max", "mean"):
        got = pointcloud_pool(x, map, reduce)
        want = reference.pointcloud_max_pool(x, *pairs, map.n_out)[0]
        if reduce == "mean":
            want = reference.pointcloud_sum_pool(x, *pairs, map.n_out, True)
        worst = max(worst, float((got - want).abs().max()))
    voxels, _ = voxelize(coords[:, 1:].float(), 1.0, features=x)
    worst = max(worst, float((voxels.feats - x).abs().max()))
    for c_in, c_out in ((40, 136), (3, 17)):
        feats, weight = torch.randn(len(coords), c_in), torch.randn(27, c_in, c_out)
        x, w = (t.to("cuda", dtype).requires_grad_() for t in (feats, weight))
        y = pointcloud_conv(x, w, None, map)
        (dw,) = torch.autograd.grad(y, w, torch.ones_like(y))
        exact = (x.detach().double(), w.detach().double())
        want = reference.pointcloud_conv(*exact, None, *pairs, map.n_out)
        ones = torch.ones_like(want)
        want_dw = reference.pointcloud_conv_weight_grad(ones, exact[0], *pairs)
        for got, right in ((y, want), (dw, want_dw)):
            error = (got.detach().double() - right).abs().max() / right.abs().max()
            worst = max(worst, float(error.nan_to_num(nan=1.0)))
    return worst


def largest_error_of_codes(dtype: torch.dtype) -> float:
    """Rows in pieces and others, of a decoder, its gradients and the selection."""
    worst = 0.0
    for width, d, k in ((70, 264, 33), (1500, 30, 5)):
        w = torch.randn(width, d).to("cuda", dtype)
        dense = torch.randn(9, width).to("cuda", dtype)
        values, indices = torch.empty(9, k).to("cuda", dtype), torch.empty(9, k).long().cuda()
        gossamer._C.topk_select_cuda(values, indices, dense, False)
        want = [dense.double().sort(-1, descending=True, stable=True).values[:, :k]]
        v, w = (t.detach().requires_grad_() for t in (values, w))
        y = gossamer.topk_decode(v, indices, w)
        got = [values, y, *torch.autograd.grad(y, (v, w), torch.ones_like(y))]
        v, w = (t.detach().double().requires_grad_() for t in (v, w))
        y = reference.topk_decode(v, indices, w)
        want += [y, *torch.autograd.grad(y, (v, w), torch.ones_like(y))]
        for a, b in zip(got, want, strict=True):
            error = (a.detach().double() - b.detach()).abs().max() / b.detach().abs().max()
            worst = max(worst, float(error.nan_to_num(nan=1.0)))
    return worst


# Tokens of each expert, N and K: tiles of either size, one without a token; nothing aligned.
EXPERTS = (((70, 0, 200, 3), 136, 264), ((5, 0, 66), 33, 17))


def largest_error_of_experts(dtype: torch.dtype) -> float:
    """Of y, dx and dW, of the largest entry of each."""
    worst = 0.0
    for counts, n, k in EXPERTS:
        ends = torch.tensor(counts).cumsum(0)
        tokens, experts = sum(counts), len(counts)
        sizes = ((tokens, k), (experts, n, k), (tokens, n))
        x, w, dy = (torch.randn(size).to("cuda", dtype).requires_grad_() for size in sizes)
        y = gossamer.grouped_linear(x, w, ends.cuda())
        found = (y, *torch.autograd.grad(y, (x, w), dy.detach()))
        exact = [t.detach().cpu().double().requires_grad_() for t in (x, w, dy)]
        want = reference.grouped_linear(exact[0], exact[1], ends)
        right = (want, *torch.autograd.grad(want, exact[:2], exact[2]))
        for mine, its in zip(found, right, strict=True):
            error = (mine.detach().cpu().double() - its).abs().max() / its.abs().max()
            worst = max(worst, float(error.nan_to_num(nan=1.0)))
    return worst


def largest_error_of_zeros(dtype: torch.dtype) -> float:
    """Each tile of tokens, one and several splits, aligned weights and others; spikes."""
    worst = 0.0
    for m, n, k in ((1, 600, 3000), (1, 33, 70), (4, 264, 900), (16, 264, 500), (3, 8, 9)):
        x, weight = torch.randn(m, k).relu().to("cuda", dtype), torch.randn(k, n).to("cuda", dtype)
        spikes = x != 0
        packed = gossamer.spike_linear(gossamer.pack_spikes(spikes), weight)
        for y, given in ((gossamer.actsparse_linear(x, weight), x), (packed, spikes)):
            want = given.cpu().double() @ weight.cpu().double()
            error = (y.cpu().double() - want).abs().max() / want.abs().max()
            worst = max(worst, float(error.nan_to_num(nan=1.0)))
    for m, n, k in ((1, 700, 600), (4, 90, 1000), (7, 33, 64), (1, 33, 45)):
        x, weight = torch.randn(m, k).to("cuda", dtype), torch.randn(n, k).to("cuda", dtype)
        wanted = torch.rand(m, n, device="cuda") < 0.3
        y = gossamer.actsparse_outputs(x, weight, wanted).cpu().double()
        want = torch.where(wanted.cpu(), x.cpu().double() @ weight.cpu().double().t(), 0)
        error = (y - want).abs().max() / want.abs().max()
        worst = max(worst, float(error.nan_to_num(nan=1.0)))
    return worst


def largest_error(dtype: torch.dtype) -> float:
    """Over the shapes, of the largest entry."""
    worst = 0.0
    for m, n, k in SHAPES:
        kind = torch.bfloat16 if dtype in QUANTISED else dtype
        weight = gossamer.prune.magnitude_24(torch.randn(n, k)).to("cuda", kind)
        x = torch.randn(m, k).to("cuda", kind)
        if dtype in QUANTISED:
            y, want = quantised_product(x, weight, dtype)
        else:
            y, want = product(x, weight, torch.randn(n).to("cuda", kind))
        error = (y - want).abs().max() / want.abs().max()
        worst = max(worst, float(error.nan_to_num(nan=1.0)))
    return worst


def main() -> int:
    if not torch.cuda.is_available():
        print("no GPU here")
        return 3
    wrong = ran = 0
    for dtype, allowed in {**DTYPES, **QUANTISED}.items():
        try:
            error = largest_error(dtype)
        except NotImplementedError as reason:
            print(f"{dtype}: not available: {str(reason).splitlines()[0]}")
            continue
        print(f"{dtype}: largest error {error:.1e}, allowed {allowed:.0e}")
        ran += 1
        wrong += not error <= allowed
    for dtype, allowed in DTYPES.items():
        error = largest_error_of_blocks(dtype)
        print(f"{dtype} blocks: largest error {error:.1e}, allowed {allowed:.0e}")
        wrong += not error <= allowed
        if dtype.itemsize == 2:  # of others they are torch's
            error = largest_error_of_convolutions(dtype)
            print(f"{dtype} 2:4 convolutions: largest error {error:.1e}, allowed {allowed:.0e}")
            wrong += not error <= allowed
        error = largest_error_of_zeros(dtype)
        print(f"{dtype} zero inputs: largest error {error:.1e}, allowed {allowed:.0e}")
        wrong += not error <= allowed
        error = largest_error_of_voxels(dtype)
        print(f"{dtype} voxels: largest error {error:.1e}, allowed {allowed:.0e}")
        wrong += not error <= allowed
        error = largest_error_of_codes(dtype)
        print(f"{dtype} codes: largest error {error:.1e}, allowed {allowed:.0e}")
        wrong += not error <= allowed
        error = largest_error_of_experts(dtype)
        print(f"{dtype} experts: largest error {error:.1e}, allowed {allowed:.0e}")
        wrong += not error <= allowed
    return 1 if wrong or not ran else 0


if __name__ == "__main__":
    sys.exit(main())
