"""Convolutions over the voxels of a LiDAR scan, against plain torch and other libraries.

Kernel maps and features are timed apart: a network makes its maps once a scan and uses them in many
layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lidar
import torch
from bench_sparse24 import check_answer
from gossamer import _C, reference
from gossamer.ops import pointcloud_conv
from gossamer.pointcloud import KernelMap, SparseTensor, plain
from machine import Limits
from pointcloud_rivals import spconv_features, spconv_map, torch_features
from record import OURS, Case, Check
from shapes import DTYPES, TOLERANCES
from timing import Contender, Effort, measure
from torch import Tensor

PLAIN = "plain torch"
CHANNELS = (16, 32, 64, 128)
JOBS = ("map", "forward", "forward+backward")


@dataclass(frozen=True)
class VoxelShape:
    """A convolution by its kernel and stride, on the voxels of one scan."""

    name: str
    kernel: int
    stride: int  # 1: submanifold

    @property
    def model(self) -> str:
        return self.name.partition(".")[0]

    @property
    def sizes(self) -> dict[str, Any]:
        return {"kernel": self.kernel, "stride": self.stride}

    def __str__(self) -> str:
        return self.name


SHAPES = (
    VoxelShape("submanifold 3x3x3", 3, 1),
    VoxelShape("3x3x3, stride 2", 3, 2),
    VoxelShape("2x2x2, stride 2", 2, 2),
)


@dataclass(frozen=True)
class VoxelCase(Case):
    """One job on a scan; ``rows`` are its voxels."""

    job: str
    channels: int
    outputs: int
    pairs: int

    @property
    def name(self) -> str:
        return f"{super().name}/{self.job}/c{self.channels}"

    @property
    def default(self) -> str:
        return PLAIN

    @property
    def place(self) -> str:
        sizes = f"{self.rows} voxels to {self.outputs}, {self.pairs} pairs"
        return f"{self.dtype} {self.shape} {self.job}, {sizes}"

    @property
    def point(self) -> tuple[str, str]:
        return str(self.channels), "channels"

    @property
    def params(self) -> dict[str, Any]:
        sizes = {"job": self.job, "channels": self.channels}
        return super().params | sizes | {"outputs": self.outputs, "pairs": self.pairs}


@dataclass(frozen=True)
class VoxelPlan:
    """Which cases to run, and how."""

    scan: Path | None  # the synthetic street if None
    dtypes: Sequence[str]
    effort: Effort
    channels: Sequence[int] = CHANNELS
    shapes: Sequence[VoxelShape] = SHAPES
    jobs: Sequence[str] = JOBS

    def __len__(self) -> int:
        features = sum(job != "map" for job in self.jobs) * len(self.channels) * len(self.dtypes)
        return len(self.shapes) * (features + ("map" in self.jobs))


def coordinates_of(scan: Path | None) -> Tensor:
    """int32 [N, 4], in an order drawn once: files and sensors have one of their own."""
    return lidar.shuffled_voxels(lidar.scene() if scan is None else lidar.scan(scan))


def map_of(coords: Tensor, shape: VoxelShape) -> KernelMap:
    """The map of a fresh coordinate set, with its sort."""
    coordinates = SparseTensor(
        coords, torch.empty(len(coords), 0, device=coords.device)
    ).coordinates
    if shape.stride == 1:
        return coordinates.submanifold(shape.kernel)
    padding = (shape.kernel - 1) // 2
    return coordinates.strided(shape.kernel, shape.stride, padding)[1]


def plain_map(coords: Tensor, shape: VoxelShape) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs by torch's sort and a search for each tap."""
    box = plain.bounds(coords)
    order, _, _ = plain.sort(coords, box)
    ordered = coords if order is None else coords[order.long()]
    kernel, step, ones = (shape.kernel,) * 3, (shape.stride,) * 3, (1, 1, 1)
    padding = ((shape.kernel - 1) // 2,) * 3
    outputs = ordered
    if shape.stride > 1:
        outputs = plain.outputs(ordered, kernel, step, padding, ones, "reached", None)
    return plain.match(outputs, ordered, box, kernel, step, padding, ones)


def _map_case(coords: Tensor, map: KernelMap, shape: VoxelShape, plan: VoxelPlan) -> dict[str, Any]:
    given, wanted = (map.out_index, map.in_index, map.tap_offsets), plain_map(coords, shape)
    wrong = float(not all(torch.equal(a, b) for a, b in zip(given, wanted, strict=True)))
    contenders = [
        Contender(OURS, partial(map_of, coords, shape)),
        Contender(PLAIN, partial(plain_map, coords, shape)),
        *spconv_map(coords, shape.kernel, shape.stride),
    ]
    return {
        "kernel": "map",
        "check": Check(wrong, 2 * wrong),
        "timings": measure(contenders, plan.effort),
        "dense_flops": 1,  # nothing is multiplied
        "nbytes": coords.nbytes + sum(t.nbytes for t in given),
    }


def _feature_case(
    coords: Tensor,
    map: KernelMap,
    shape: VoxelShape,
    plan: VoxelPlan,
    dtype: str,
    job: str,
    channels: int,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(channels)
    taps, training = shape.kernel**3, job == "forward+backward"

    def drawn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    feats, dy = (drawn(n, channels).to(DTYPES[dtype]) for n in (map.n_in, map.n_out))
    weight = (drawn(taps, channels, channels) / (taps * channels) ** 0.5).to(DTYPES[dtype])
    ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        OURS: lambda x, w: pointcloud_conv(x, w, None, map),
        PLAIN: torch_features(map),
    }
    pairs = (map.in_index, map.out_index, map.tap_offsets, map.in_order, map.out_order)
    if training:
        feats, weight = feats.requires_grad_(), weight.requires_grad_()

        def train(way: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
            return torch.autograd.grad(way(feats, weight), (feats, weight), dy)

        contenders = [Contender(name, partial(train, way)) for name, way in ways.items()]
        got = train(ways[OURS])[1]
        wanted = reference.pointcloud_conv_weight_grad(dy.float(), feats.detach().float(), *pairs)
    else:
        contenders = [Contender(name, partial(way, feats, weight)) for name, way in ways.items()]
        if dtype == "float32" and shape.stride == 1:
            contenders += spconv_features(coords, feats, weight, shape.kernel)
        got = ways[OURS](feats, weight)
        wanted = reference.pointcloud_conv(feats.float(), weight.float(), None, *pairs, map.n_out)
    products = 3 if training else 1
    index_bytes = map.in_index.nbytes + map.out_index.nbytes
    chosen = _C.pointcloud_conv_choose(dtype, channels, channels)
    return {
        "kernel": f"{chosen['target']}/{chosen['kernel']}",
        "check": check_answer(got, wanted, TOLERANCES[DTYPES[dtype]]),
        "timings": measure(contenders, plan.effort),
        "dense_flops": products * 2 * map.pairs * channels**2,
        "nbytes": products * (feats.nbytes + weight.nbytes + dy.nbytes + index_bytes),
    }


def _case(
    found: dict[str, Any],
    map: KernelMap,
    shape: VoxelShape,
    limits: Limits,
    dtype: str,
    job: str,
    channels: int,
) -> VoxelCase:
    limit = limits.seconds(dtype, found["dense_flops"], found["nbytes"])
    timings = found["timings"]
    return VoxelCase(
        feature="pointcloud",
        shape=shape,
        dtype=dtype,
        rows=map.n_in,
        best_dense=min((n for n in timings if n != OURS), key=lambda name: timings[name].median),
        real_flops=found["dense_flops"],
        peak_flops=limits.flops[dtype],
        limit_seconds=limit,
        dense_limit_seconds=limit,
        job=job,
        channels=channels,
        outputs=map.n_out,
        pairs=map.pairs,
        **found,
    )


def run(plan: VoxelPlan, limits: Limits) -> Iterator[VoxelCase]:
    """All cases of the plan, those of one job together."""
    coords = coordinates_of(plan.scan)
    for shape in plan.shapes:
        map = map_of(coords, shape)
        if "map" in plan.jobs:
            found = _map_case(coords, map, shape, plan)
            yield _case(found, map, shape, limits, plan.dtypes[0], "map", 0)
        jobs = [job for job in plan.jobs if job != "map"]
        for what in itertools.product(plan.dtypes, jobs, plan.channels):
            found = _feature_case(coords, map, shape, plan, *what)
            yield _case(found, map, shape, limits, *what)
