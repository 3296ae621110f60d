"""Drawn layers over voxels, and torch's dense layers as their oracle."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from itertools import product
from typing import Any

import gossamer.pointcloud as pc
import torch
from cases import DTYPES, SumOracle, one_thread
from gossamer.pointcloud.convolution_base import Convolution, from_torch
from gossamer.pointcloud.transposed import generative_padding
from torch import Tensor, nn

KINDS = ("submanifold", "conv", "floor", "transpose", "inverse", "generative")
CHANNELS = (1, 3, 4, 8, 17)


@dataclass(frozen=True)
class LayerCase:
    kind: str
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    extra: tuple[int, ...]  # output_padding
    groups: int
    channels: tuple[int, int]
    bias: bool
    shape: tuple[int, ...]
    density: float
    dtype: torch.dtype
    apart: bool  # the columns of the features

    @property
    def dims(self) -> int:
        return len(self.kernel)

    def layer(self) -> Convolution:
        some: dict[str, Any] = {"groups": self.groups, "bias": self.bias, "dtype": self.dtype}
        of = (*self.channels, self.kernel)
        if self.kind == "submanifold":
            return pc.SubmanifoldConv(*of, self.dilation, **some)
        if self.kind in ("conv", "floor"):
            rule = "floor" if self.kind == "floor" else "dense"
            return pc.Conv(*of, self.stride, self.padding, self.dilation, outputs=rule, **some)
        if self.kind == "inverse":
            return pc.InverseConv(*of, self.stride, **some)
        if self.kind == "generative":
            return pc.GenerativeConvTranspose(*of, self.stride, self.dilation, **some)
        window = (self.stride, self.padding, self.extra)
        return pc.ConvTranspose(*of, *window, dilation=self.dilation, **some)

    def partner(self) -> pc.Conv:
        """What an inverse layer returns from."""
        window = (self.kernel, self.stride, self.padding, self.dilation)
        return pc.Conv(2, self.channels[0], *window, dtype=self.dtype)

    def tensor(self, channels: int) -> pc.SparseTensor:
        """Three samples, the second of them empty, in no order of rows; strided features."""
        mask = torch.rand(3, *self.shape) < self.density
        mask[1] = False
        coords = mask.nonzero().int()
        coords = coords[torch.randperm(len(coords))]
        wide = torch.randn(2 * len(coords) + 1, channels + 3).to(self.dtype)
        feats = wide[1::2, 1 : 1 + channels]
        if self.apart:
            feats = wide.t().contiguous().t()[1::2, 1 : 1 + channels]
        return pc.SparseTensor(coords, feats, spatial_shape=self.shape, batch_size=3)


def draw(kind: str, dims: int, seed: str) -> LayerCase:
    of = random.Random(f"{kind} {dims} {seed}")
    kernel = tuple(of.choice((1, 2, 3, 3, 4, 5) if dims < 4 else (1, 2, 3)) for _ in range(dims))
    stride = tuple(of.choice((1, 2, 2, 3)) for _ in range(dims))
    dilation = tuple(of.choice((1, 1, 2, 3)) for _ in range(dims))
    if kind == "submanifold":  # that torch can pad alike
        dilation = tuple(d if k % 2 else 1 for k, d in zip(kernel, dilation, strict=True))
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    padding = tuple(of.randint(0, max(r // 2, 0)) for r in reach)
    extra = tuple(of.randint(0, max(s, d) - 1) for s, d in zip(stride, dilation, strict=True))
    shape = tuple(of.randint(r + 1, r + 5) for r in reach)
    groups = of.choice((1, 1, 1, 2, 3, 4))
    c_in, c_out = of.choice(CHANNELS), of.choice(CHANNELS)
    if of.random() < 0.15:  # depthwise, and with a multiplier
        groups, c_out = c_in, c_in * of.choice((1, 2))
    else:
        c_in, c_out = -(-c_in // groups) * groups, -(-c_out // groups) * groups
    if dims == 3 and of.random() < 0.1:  # wider than any tile
        groups, (c_in, c_out) = 1, of.choice(((513, 3), (3, 513), (130, 129)))
    density = of.choice((0.02, 0.1, 0.3, 1.0) if dims < 4 else (0.02, 0.1))
    bias, dtype = of.random() < 0.7, of.choice(DTYPES)
    window, channels = (kernel, stride, padding, dilation, extra), (c_in, c_out)
    apart = of.random() < 0.5
    return LayerCase(kind, *window, groups, channels, bias, shape, density, dtype, apart)


def check(case: LayerCase) -> None:
    """The voxels, values and gradients of a layer are those of torch's dense one."""
    layer = case.layer()
    first = case.tensor(2 if case.kind == "inverse" else case.channels[0])
    x = case.partner()(first).detach() if case.kind == "inverse" else first
    feats = x.feats.detach().requires_grad_()
    y = layer(x.replace_feats(feats))
    _check_voxels(case, first, x, y)
    g = torch.randn(y.feats.shape).to(case.dtype)
    got = (y.feats, *torch.autograd.grad((y.feats * g).sum(), (feats, *layer.parameters())))
    run = _by_search if case.dims == 4 else _densely
    with one_thread():
        want, size = (run(case, layer, x, y, g, absolute) for absolute in (False, True))
    taps = math.prod(case.kernel)
    products = (taps * case.channels[0], taps * case.channels[1], len(y), len(y))
    for actual, value, bound, terms in zip(got, want, size, products, strict=False):
        SumOracle(value, bound, terms + 1, case.dtype).check(actual)


def _check_voxels(
    case: LayerCase, first: pc.SparseTensor, x: pc.SparseTensor, y: pc.SparseTensor
) -> None:
    if case.kind in ("submanifold", "inverse"):
        assert y.coordinates.is_same(first.coordinates)
        return
    if case.kind == "floor":
        cells = x.coords.div(torch.tensor([1, *case.stride]), rounding_mode="floor")
    elif case.dims == 4:
        return  # torch has no layer that would say
    else:  # every cell to which a dense layer of ones brings a voxel
        window: dict[str, Any] = {"stride": case.stride, "dilation": case.dilation}
        if case.kind != "generative":
            window["padding"] = case.padding
        if case.kind == "transpose":
            window["output_padding"] = case.extra
        kind = getattr(nn, f"Conv{'' if case.kind == 'conv' else 'Transpose'}{case.dims}d")
        dense = kind(1, 1, case.kernel, bias=False, dtype=torch.float64, **window)
        nn.init.ones_(dense.weight)
        mask = x.replace_feats(torch.ones(len(x), 1, dtype=torch.float64)).dense()
        cells = (dense(mask)[:, 0] > 0.5).nonzero()
        if case.kind == "generative":
            cells = cells - torch.tensor([0, *generative_padding(case.kernel, case.dilation)])
    assert torch.equal(y.coordinates.sorted().long(), cells.long().unique(dim=0))


def _densely(
    case: LayerCase,
    layer: Convolution,
    x: pc.SparseTensor,
    y: pc.SparseTensor,
    g: Tensor,
    absolute: bool,
) -> tuple[Tensor, ...]:
    """Torch's layer in float64 at the voxels of y, and the gradients for g; or their sizes."""
    names = ("stride", "padding", "dilation") if case.kind == "inverse" else ()
    dense: Any = layer.to_dense(**{name: getattr(case, name) for name in names}).double()
    feats, g = x.feats.detach().double(), g.double()
    if absolute:
        feats, g = feats.abs(), g.abs()
        for parameter in dense.parameters():
            parameter.data.abs_()
    at, shape = y.coords.long(), list(x.spatial_shape or ())
    if case.kind == "generative":  # without what torch would cut off before the cell 0
        at = at + torch.tensor([0, *dense.padding])
        dense.padding = (0,) * case.dims
    elif case.kind in ("floor", "inverse"):  # nor after the last
        margins = zip(case.kernel, case.dilation, case.stride, case.padding, strict=True)
        shape = [n + k * d + s + p for n, (k, d, s, p) in zip(shape, margins, strict=True)]
    feats.requires_grad_()
    grid = dense(x.replace_feats(feats).dense(shape)).movedim(1, -1)
    result = grid[tuple(at.unbind(1))]
    gradients = torch.autograd.grad((result * g).sum(), (feats, *dense.parameters()))
    dw = from_torch(gradients[1], case.groups, layer.transposed)
    return result.detach(), gradients[0], dw, *gradients[2:]


def _by_search(
    case: LayerCase,
    layer: Convolution,
    x: pc.SparseTensor,
    y: pc.SparseTensor,
    g: Tensor,
    absolute: bool,
) -> tuple[Tensor, ...]:
    """The same by comparing every input with every output under every tap."""
    feats, g = x.feats.detach().double(), g.double()
    parameters = [p.detach().double() for p in layer.parameters()]
    if absolute:
        feats, g, parameters = feats.abs(), g.abs(), [p.abs() for p in parameters]
    leaves = [leaf.requires_grad_() for leaf in (feats, *parameters)]
    weight = leaves[1].flatten(0, case.dims - 1)
    result = torch.zeros(len(y), case.channels[1], dtype=torch.float64)
    result = result + (leaves[2] if case.bias else 0.0)
    narrow, wide = (y, x) if layer.transposed else (x, y)  # narrow = wide * stride + offset
    stride = case.stride
    padding = case.padding
    if case.kind == "submanifold":
        stride = (1,) * case.dims
        padding = tuple((k - 1) // 2 * d for k, d in zip(case.kernel, case.dilation, strict=True))
    if case.kind == "generative":
        padding = generative_padding(case.kernel, case.dilation)
    for tap, w in zip(product(*map(range, case.kernel)), weight, strict=True):
        offset = [t * d - p for t, d, p in zip(tap, case.dilation, padding, strict=True)]
        wanted = wide.coords.long() * torch.tensor([1, *stride]) + torch.tensor([0, *offset])
        meet = (wanted[:, None] == narrow.coords.long()[None]).all(2).nonzero().unbind(1)
        i, j = meet if layer.transposed else meet[::-1]
        parts = zip(feats[i].chunk(case.groups, 1), w.chunk(case.groups, 1), strict=True)
        result = result.index_add(0, j, torch.cat([a @ b for a, b in parts], 1))
    return result.detach(), *torch.autograd.grad((result * g).sum(), leaves)
