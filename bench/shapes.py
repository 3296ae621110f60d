"""Linear layers of real models, the batch sizes, and how exact an answer has to be.

A linear layer maps ``in_features`` (K) to ``out_features`` (N) for each of M rows of input.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
QUICK_ROWS = (1, 4, 16, 64, 256, 1024)
FEW_ROWS = 16  # up to here reading the weights decides
MANY_ROWS = 64  # from here on arithmetic does

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


def find_shapes(
    names: list[str] | None, known: tuple[LinearShape, ...] = SHAPES
) -> tuple[LinearShape, ...]:
    """The shapes that the names mean: a shape, a model (all its shapes) or ``NxK``; None means all.

    Raises
    ------
    ValueError
        If a name is none of those.
    """
    if names is None:
        return known
    found: list[LinearShape] = []
    for name in names:
        matches = [s for s in known if name in (s.name, s.model)]
        if size := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", name):
            matches = [LinearShape(name, int(size[1]), int(size[2]))]
        if not matches:
            there = ", ".join(s.name for s in known)
            raise ValueError(f"no shape is called {name!r}; there are {there}, or give NxK")
        found += [s for s in matches if s not in found]
    return tuple(found)
