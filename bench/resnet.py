"""A whole ResNet-50 in blocks: dense against block-sparse, answers and images per second.

The sparse model applies activations and adds residuals in its layers where it can
(``fuse_activations``).

The weights are random ones, so nothing is said of what pruning costs in quality; BatchNorm has the
statistics of the random images, so that activations have the size that they have in a trained one.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import gossamer
import torch
from conv_rivals import CONV_DEFAULT
from gossamer import Block
from models import ModelResult, Speed, differences, prune_like
from record import OURS
from shapes import DTYPES
from timing import Contender, Effort, measure
from torch import Tensor, nn

NAME = "ResNet-50"
IMAGES = (1, 8)
EXTENT = 224
BLOCK, DENSITY = Block(16, 16), 0.25
# The logits are the head's, which sums its 512 live products in one chain, MKL in several: on equal
# features it is 3 times as far from float64. The convolutions are no further than dense ones.
ROUNDING = 4.0
STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))  # width and number of bottlenecks


def _conv_norm(channels: int, out: int, kernel: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False)
    # No momentum: the statistics are the mean over all images seen.
    return nn.Sequential(conv, nn.BatchNorm2d(out, momentum=None))


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 with the stride, 1 x 1 to four times the width, beside a shortcut."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.reduce = _conv_norm(channels, width, 1)
        self.conv = _conv_norm(width, width, 3, stride)
        self.expand = _conv_norm(width, out, 1)
        same = channels == out and stride == 1
        self.shortcut = nn.Identity() if same else _conv_norm(channels, out, 1, stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.conv(self.relu(self.reduce(x))))
        z: Tensor = self.relu(self.expand(y) + self.shortcut(x))
        return z


class ResNet50(nn.Module):
    """He et al., "Deep Residual Learning for Image Recognition", 2016."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv_norm(3, 64, 7, 2)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, 2, 1)
        blocks, channels = [], 64
        for width, count in STAGES:
            for index in range(count):
                stride = 2 if index == 0 and width > 64 else 1
                blocks.append(Bottleneck(channels, width, stride))
                channels = 4 * width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.pool(self.relu(self.stem(x))))
        y: Tensor = self.head(x.mean((2, 3)))
        return y


def images(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 3, EXTENT, EXTENT, generator=generator).to(dtype)


def load_model() -> nn.Module:
    """For inference, BatchNorm folded into the convolutions."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ResNet50()
    model(images(max(IMAGES)))
    model.eval()
    gossamer.fold_batchnorm(model)
    return model


def prune(weight: Tensor) -> Tensor:
    pruned = gossamer.prune.magnitude_blocks(weight, BLOCK, DENSITY)
    assert isinstance(pruned, Tensor)
    return pruned


def run(dtype: str, effort: Effort) -> ModelResult:
    """Convert the model, compare the answers, and time every batch size."""
    last = torch.channels_last
    with torch.no_grad():
        original = load_model().to(DTYPES[dtype])
        sample = images(max(IMAGES), DTYPES[dtype])
        report = gossamer.convert(
            copy.deepcopy(original).to(memory_format=last),
            pattern=BLOCK,
            prune="magnitude",
            density=DENSITY,
            sample_input=sample.to(memory_format=last),
        )
        sparse = gossamer.fuse_activations(report.model).model
        pruned = prune_like(original, report, prune)
        pruned_last = copy.deepcopy(pruned).to(memory_format=last)
        exact = copy.deepcopy(pruned).double()(sample.double())
        answers = replace(
            differences(sparse(sample).double(), pruned(sample).double(), exact), allowed=ROUNDING
        )
        speeds = []
        for count in IMAGES:
            x = images(count, DTYPES[dtype])
            x_last = x.to(memory_format=last)
            contenders = [
                Contender(OURS, lambda x=x_last: sparse(x)),
                Contender(CONV_DEFAULT, lambda x=x: pruned(x)),
                Contender("torch channels_last", lambda x=x_last: pruned_last(x)),
            ]
            speeds.append(Speed(count, count, measure(contenders, effort), CONV_DEFAULT))
    pattern = f"in {BLOCK} blocks, {DENSITY:.0%} of them live"
    data = f"random images of {EXTENT} x {EXTENT}, random weights"
    return ModelResult(NAME, dtype, report.rows(), answers, speeds, pattern, "images", data)
