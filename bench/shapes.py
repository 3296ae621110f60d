"""Layers of real models, the batch sizes, and how exact an answer has to be.

A linear layer maps ``in_features`` (K) to ``out_features`` (N) for each of M rows of input.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

import torch

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
QUICK_ROWS = (1, 4, 16, 64, 256, 1024)
FEW_ROWS = 16  # up to here reading the weights decides
MANY_ROWS = 64  # from here on arithmetic does

# Of block-sparse layers, whose cases have densities and sizes of blocks as well.
BLOCK_ROWS = (1, 16, 128)
QUICK_BLOCK_ROWS = (16,)
IMAGES = (1, 8)
QUICK_IMAGES = (8,)

# Of layers whose input is partly zero, of the model whose layers they are.
ACTIVE_MODEL = "llama"
ACTIVE_ROWS = (1, 2, 4, 8, 16, 32)
QUICK_ACTIVE_ROWS = (1, 8)
SPARSITIES = (0.0, 0.3, 0.5, 0.7, 0.9, 0.95)
QUICK_SPARSITIES = (0.0, 0.5, 0.9)

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class LinearShape:
    """A named [N, K] weight."""

    name: str
    out_features: int
    in_features: int

    @property
    def model(self) -> str:
        return self.name.partition(".")[0]

    @property
    def sizes(self) -> dict[str, Any]:
        return {"out_features": self.out_features, "in_features": self.in_features}

    def __str__(self) -> str:
        size = f"{self.out_features}x{self.in_features}"
        return size if self.name == size else f"{self.name} {size}"


SHAPES = (
    # all-MiniLM-L6-v2: hidden 384, feed-forward 1536
    LinearShape("minilm.attention", 384, 384),
    LinearShape("minilm.up", 1536, 384),
    LinearShape("minilm.down", 384, 1536),
    # BERT-base and ViT-B: hidden 768, feed-forward 3072; ViT computes q, k and v in one layer
    LinearShape("bert.attention", 768, 768),
    LinearShape("bert.up", 3072, 768),
    LinearShape("bert.down", 768, 3072),
    LinearShape("vit.qkv", 2304, 768),
    # Llama-3-8B: hidden 4096, 8 of 32 heads for k and v, feed-forward 14336
    LinearShape("llama.attention", 4096, 4096),
    LinearShape("llama.kv", 1024, 4096),
    LinearShape("llama.up", 14336, 4096),
    LinearShape("llama.down", 4096, 14336),
)


@dataclass(frozen=True)
class ConvShape:
    """A named 2-D convolution on square images that keeps its extents but for the stride."""

    name: str
    out_channels: int
    in_channels: int
    kernel: int
    extent: int  # of x
    stride: int = 1
    groups: int = 1

    @property
    def model(self) -> str:
        return self.name.partition(".")[0]

    @property
    def padding(self) -> int:
        return self.kernel // 2

    @property
    def out_extent(self) -> int:
        return (self.extent + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def sizes(self) -> dict[str, Any]:
        sizes = asdict(self)
        del sizes["name"]
        return sizes

    def __str__(self) -> str:
        rest = f", stride {self.stride}" * (self.stride > 1)
        rest += f", {self.groups} groups" * (self.groups > 1)
        return (
            f"{self.name} {self.in_channels} -> {self.out_channels} channels on "
            f"{self.extent}x{self.extent}{rest}"
        )


def _conv(name: str, out: int, channels: int, kernel: int, extent: int, **rest: int) -> ConvShape:
    return ConvShape(
        f"{name}.{kernel}x{kernel}.{extent}.{channels}", out, channels, kernel, extent, **rest
    )


CONV_SHAPES = (
    # ResNet-50, of each stage: the 3 x 3, the 1 x 1 before it and the one behind it
    *(
        shape
        for extent, width in ((56, 64), (28, 128), (14, 256), (7, 512))
        for shape in (
            _conv("resnet50", width, width, 3, extent),
            _conv("resnet50", width, 4 * width, 1, extent),
            _conv("resnet50", 4 * width, width, 1, extent),
        )
    ),
    # and what halves the extents between two stages: the 3 x 3 and the 1 x 1 beside it
    *(
        shape
        for extent, width in ((56, 128), (28, 256), (14, 512))
        for shape in (
            _conv("resnet50-strided", width, width, 3, extent, stride=2),
            _conv("resnet50-strided", 4 * width, 2 * width, 1, extent, stride=2),
        )
    ),
    # ResNeXt-50 32x4d, the 3 x 3 of its third stage; MobileNetV2, a depthwise one
    _conv("resnext50", 512, 512, 3, 14, groups=32),
    _conv("mobilenet", 192, 192, 3, 28, groups=192),
)


@dataclass(frozen=True)
class ExpertShape:
    """A named [N, K] weight of each of so many experts."""

    name: str
    experts: int
    out_features: int
    in_features: int

    @property
    def model(self) -> str:
        return self.name.partition(".")[0]

    @property
    def sizes(self) -> dict[str, Any]:
        sizes = asdict(self)
        del sizes["name"]
        return sizes

    def __str__(self) -> str:
        return f"{self.name} {self.experts} experts {self.out_features}x{self.in_features}"


EXPERT_SHAPES = (
    # Mixtral-8x7B's 14336x4096 and 4096x14336, at a fifth of their widths
    ExpertShape("mixtral-fifth.up", 8, 2816, 1024),
    ExpertShape("mixtral-fifth.down", 8, 1024, 2816),
    # OLMoE-1B-7B: hidden 2048, feed-forward 1024
    ExpertShape("olmoe.up", 64, 1024, 2048),
    ExpertShape("olmoe.down", 64, 2048, 1024),
)
EXPERT_TOKENS = (1, 8, 64)  # an expert, on average

# What the goals of block-sparse convolutions speak of.
GOAL_MODEL = "resnet50"

Shape = LinearShape | ConvShape | ExpertShape


@dataclass(frozen=True)
class Tolerance:
    """An error may reach ``relative`` times the answer plus ``of_rms`` times the answers' RMS."""

    relative: float
    of_rms: float


# float32 sums of K products in another order differ by some roundings of 2^-24 of the RMS. The
# 16-bit types round the answer once more, by up to 2^-8 and 2^-11 of itself.
TOLERANCES = {
    torch.float32: Tolerance(relative=1e-5, of_rms=5e-5),
    torch.bfloat16: Tolerance(relative=2**-8, of_rms=5e-4),
    torch.float16: Tolerance(relative=2**-11, of_rms=2e-4),
}


def find_shapes(names: list[str] | None, known: tuple[Shape, ...] = SHAPES) -> tuple[Shape, ...]:
    """The shapes that the names mean: a shape, a model (all its shapes) or ``NxK``; None means all.

    Raises
    ------
    ValueError
        If a name is none of those.
    """
    if names is None:
        return known
    found: list[Shape] = []
    for name in names:
        matches = [s for s in known if name in (s.name, s.model)]
        if size := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", name):
            matches = [LinearShape(name, int(size[1]), int(size[2]))]
        if not matches:
            there = ", ".join(s.name for s in known)
            raise ValueError(f"no shape is called {name!r}; there are {there}, or give NxK")
        found += [s for s in matches if s not in found]
    return tuple(found)
