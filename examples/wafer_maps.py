"""Tell defect patterns of wafers apart: binary images of 20,000 x 20,000 pixels, a few hundred set.

A dense network would need 400 million pixels an image; here only the dies that failed are voxels.

    python examples/wafer_maps.py --steps 100
"""

from __future__ import annotations

import argparse
import math
import time

import torch
from gossamer import pointcloud as pc
from torch import Tensor, nn

PATTERNS = ("random", "scratch", "ring", "cluster")


def wafer(pattern: str, size: int, generator: torch.Generator) -> Tensor:
    """int32 [N, 2], the pixels that failed, all of them on the disc of the wafer."""

    def uniform(low: float, high: float, count: int = 1) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    radius, turn = uniform(0, 1, 150).sqrt(), uniform(0, 2 * math.pi, 150)
    parts = [torch.stack([radius * turn.cos(), radius * turn.sin()], 1)]
    if pattern == "scratch":
        along, angle = uniform(-0.4, 0.4, 200), uniform(0, math.pi)
        line = torch.stack([along * angle.cos(), along * angle.sin()], 1)
        parts.append(line + uniform(-0.4, 0.4, 2))
    elif pattern == "ring":
        turn, radius = uniform(0, 2 * math.pi, 200), uniform(0.5, 0.9)
        parts.append(radius * torch.stack([turn.cos(), turn.sin()], 1))
    elif pattern == "cluster":
        blob = 0.05 * torch.randn(200, 2, generator=generator)
        parts.append(blob + uniform(-0.5, 0.5, 2))
    place = torch.cat(parts)
    place = place[place.norm(dim=1) < 1]
    return ((place + 1) / 2 * (size - 1)).int().unique(dim=0)


def batch(count: int, size: int, generator: torch.Generator) -> tuple[pc.SparseTensor, Tensor]:
    """Wafers of drawn patterns, a feature of 1 at each of their pixels; and which patterns."""
    labels = torch.randint(len(PATTERNS), (count,), generator=generator)
    pixels = [wafer(PATTERNS[int(label)], size, generator) for label in labels]
    x = pc.collate([(p, torch.ones(len(p), 1)) for p in pixels])
    return x, labels


class WaferNet(nn.Sequential):
    """Pooling brings the failed pixels together until convolutions see their pattern."""

    def __init__(self, size: int, channels: int = 24) -> None:
        levels = max(int(math.log2(size / 24) / 2), 1)  # each makes the image four times smaller
        layers: list[nn.Module] = [pc.functional.wrap(nn.Linear(1, channels))]
        for _ in range(levels):
            layers += [
                pc.SubmanifoldConv2d(channels, channels, 3, bias=False),
                pc.BatchNorm(channels),
                pc.ReLU(),
                pc.MaxPool2d(4, outputs="floor"),
            ]
        layers += [
            pc.Conv2d(channels, channels, 3, 2, 1),
            pc.BatchNorm(channels),
            pc.ReLU(),
            pc.Conv2d(channels, 2 * channels, 3, 2, 1),
            pc.ReLU(),
            pc.GlobalMaxPool(),
            nn.Linear(2 * channels, len(PATTERNS)),
        ]
        super().__init__(*layers)


def main(arguments: list[str] | None = None) -> float:
    """Train, and return the share of new wafers that are told right."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=20_000, help="pixels along an edge")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = WaferNet(args.size)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    start = time.perf_counter()
    for step in range(args.steps):
        x, labels = batch(args.batch, args.size, generator)
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 9:
            seconds = (time.perf_counter() - start) / (step + 1)
            print(f"step {step + 1}: loss {loss.item():.3f}, {1000 * seconds:.0f} ms a step")
    model.eval()
    with torch.no_grad():
        x, labels = batch(64, args.size, generator)
        right = float((model(x).argmax(1) == labels).float().mean())
    print(f"{len(x)} pixels of 64 wafers: {100 * right:.0f} % told right")
    return right


if __name__ == "__main__":
    main()
