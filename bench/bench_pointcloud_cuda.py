"""Convolutions over the voxels of a LiDAR scan on a GPU, and a whole network in a CUDA graph.

Kernel maps are made beforehand. What a network pays for them is in ``eager``, of a fresh scan, and
beside it a single 3x3x3 map with the sort of its voxels.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from bench_pointcloud import PLAIN, SHAPES, VoxelShape, coordinates_of, map_of, plain_map
from bench_sparse24_cuda import Bench, check
from cuda_cases import run_each, timed
from cuda_record import CudaCase
from cuda_report import group_table
from cuda_rivals import DENSE, Rivals, clones
from cuda_shapes import DTYPES
from cuda_timing import Contender, Rounds, copies_for
from gossamer import _C, fold_batchnorm, reference
from gossamer import pointcloud as pc
from gossamer.ops import pointcloud as ops
from gossamer.ops import pointcloud_conv
from pointcloud_rivals import gpu_rivals, torch_features
from record import OURS, Check
from torch import Tensor

NETWORK = VoxelShape("MinkUNet18", 3, 1)
CLASSES = 20
# Of a network's answer to that in float32, by norms: it has some 40 layers of 16-bit roundings.
NETWORK_ERROR = {"bf16": 0.1, "fp16": 0.02, "fp32": 1e-4}
EAGER_CALLS = 5

COLUMNS = (
    "job", "channels", "tile", "ours us", "spread", "best rival", "us", "vs rival", "(quartiles)",
    "TFLOP/s", "right",
)  # fmt: skip


@dataclass(frozen=True)
class CudaVoxelCase(CudaCase):
    """One job on a scan; ``rows`` are its voxels, ``flops`` those of the pairs."""

    job: str = "forward"
    channels: int = 0
    outputs: int = 0
    pairs: int = 0
    chosen: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"pointcloud/{self.dtype}/{self.shape}/m{self.rows}/{self.job}/c{self.channels}"

    @property
    def params(self) -> dict[str, Any]:
        sizes = {"job": self.job, "channels": self.channels}
        return super().params | sizes | {"outputs": self.outputs, "pairs": self.pairs}

    def row(self) -> list[str]:
        tile = f"{self.chosen['tile_rows']}x{self.chosen['tile_outputs']}" if self.chosen else "-"
        return [
            self.job,
            str(self.channels or "-"),
            tile,
            *self.timing_cells(),
            f"{self.flops / self.ours.median / 1e12:.1f}" if self.flops else "-",
            "yes" if self.check and self.check.passed else "NO",
        ]


@dataclass(frozen=True)
class CudaVoxelPlan:
    """Which cases to run, and how long; what does not fit into ``most_seconds`` is named."""

    scan: Path | None  # the synthetic street if None
    dtypes: Sequence[str]
    channels: Sequence[int] = (32, 64, 128, 256)
    shapes: Sequence[VoxelShape] = SHAPES
    jobs: Sequence[str] = ("forward", "forward+backward")
    rounds: Rounds = field(default_factory=Rounds)
    most_seconds: float = math.inf
    network: bool = True

    def cases(self) -> Iterator[CudaVoxelCase]:
        """The network first: a goal speaks of it."""
        for dtype in self.dtypes:
            if self.network:
                yield CudaVoxelCase(NETWORK, dtype, 0, 0)
        for dtype in self.dtypes:
            for shape in self.shapes:
                for job in self.jobs:
                    for channels in self.channels:
                        yield CudaVoxelCase(shape, dtype, 0, 0, job=job, channels=channels)


# ---- contenders ---------------------------------------------------------------------------------


@contextmanager
def _without_kernels() -> Iterator[None]:
    """Every convolution tap by tap through torch's products."""
    before, ops.has_kernels = ops.has_kernels, lambda device: False
    try:
        yield
    finally:
        ops.has_kernels = before


def _layer(case: CudaVoxelCase, coords: Tensor, map: pc.KernelMap, bench: Bench) -> Any:
    """The case with its sizes, the contenders, and the answer."""
    assert isinstance(case.shape, VoxelShape)
    dtype, taps, width = DTYPES[case.dtype], map.taps, case.channels
    generator = torch.Generator(bench.device).manual_seed(width)

    def drawn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=bench.device)

    feats, dy = (drawn(n, width).to(dtype.dtype) for n in (map.n_in, map.n_out))
    weight = (drawn(taps, width, width) / math.sqrt(taps * width)).to(dtype.dtype)
    training = case.job == "forward+backward"
    products = 3 if training else 1
    flops = products * 2 * map.pairs * width**2
    nbytes = products * (feats.nbytes + dy.nbytes + weight.nbytes)
    limit = bench.limits.seconds(case.dtype, flops, nbytes)
    case = dataclasses.replace(
        case, rows=map.n_in, outputs=map.n_out, pairs=map.pairs, flops=flops, nbytes=nbytes,
        dense_bytes=nbytes, limit=limit, dense_limit=limit,
        chosen=_chosen(dtype.dtype, map.n_out, width, bench.device),
    )  # fmt: skip
    pairs = (map.in_index, map.out_index, map.tap_offsets, map.in_order, map.out_order)
    wide = (feats.float(), weight.float(), dy.float())
    if training:
        expected = reference.pointcloud_conv_weight_grad(wide[2], wide[0], *pairs).flatten(0, 1)
    else:
        expected = reference.pointcloud_conv(*wide[:2], None, *pairs, map.n_out)

    def call(way: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
        if not training:
            return way(x, weight)
        x, w = x.detach().requires_grad_(), weight.detach().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(way(x, w), (x, w), dy)[1].flatten(0, 1)

    ways = {OURS: lambda x, w: pointcloud_conv(x, w, None, map), PLAIN: torch_features(map)}
    rivals, copies = Rivals(), clones(feats, copies_for(nbytes, bench.limits.l2))
    for name, way in ways.items():
        family = "ours" if name == OURS else DENSE
        contender = Contender(name, family, [partial(call, way, x) for x in copies])
        rivals.attempt(name, lambda contender=contender: contender)
    if not training and case.shape.stride == 1:
        for name, make in gpu_rivals(coords, copies, weight, case.shape.kernel).items():
            rivals.attempt(name, lambda name=name, make=make: Contender(name, DENSE, make()))
    return case, rivals, lambda answer: check(answer, expected, dtype)


def _chosen(dtype: torch.dtype, outputs: int, width: int, device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {}
    name = str(dtype).removeprefix("torch.")
    return _C.pointcloud_conv_choose_cuda(name, outputs, width, device.index)


def _network(case: CudaVoxelCase, coords: Tensor, bench: Bench) -> Any:
    """The same of a network with its BatchNorms folded, and what a fresh scan costs."""
    dtype = DTYPES[case.dtype].dtype
    torch.manual_seed(0)
    net = pc.models.MinkUNet18(4, CLASSES).eval()
    fold_batchnorm(net)
    net = net.to(bench.device)
    generator = torch.Generator(bench.device).manual_seed(0)
    feats = torch.randn(len(coords), 4, generator=generator, device=bench.device)
    x = pc.SparseTensor(coords, feats)
    with _without_kernels():
        expected = net(x).feats
    net = copy.deepcopy(net).to(dtype)
    given = x.replace_feats(feats.to(dtype))

    def call() -> Tensor:
        return net(given).feats

    rivals = Rivals()
    for name, family in ((OURS, "ours"), (PLAIN, DENSE)):
        session: dict[str, Any] = {} if name == OURS else {"session": _without_kernels}
        contender = Contender(name, family, [call], **session)
        rivals.attempt(name, lambda contender=contender: contender)

    def fresh() -> Tensor:
        return net(pc.SparseTensor(coords, given.feats)).feats

    eager = {}
    ways: dict[str, Callable[[], Any]] = {
        OURS: call,
        "with maps": fresh,
        "a map": lambda: map_of(coords, SHAPES[0]),
        "that by plain torch": lambda: plain_map(coords, SHAPES[0]),
    }
    for name, way in ways.items():
        seconds = []
        for _ in range(EAGER_CALLS):
            bench.synchronise()
            begin = perf_counter()
            way()
            bench.synchronise()
            seconds.append(perf_counter() - begin)
        eager[name] = statistics.median(seconds)
    nbytes = sum(p.nbytes for p in net.parameters()) + feats.nbytes
    limit = bench.limits.seconds(case.dtype, 0, nbytes)
    case = dataclasses.replace(
        case, rows=len(coords), outputs=len(coords), nbytes=nbytes, dense_bytes=nbytes,
        limit=limit, dense_limit=limit, eager=eager,
    )  # fmt: skip

    def right(answer: Tensor) -> Check:
        error = float((answer.float() - expected).norm() / expected.norm())
        return Check(error, error / NETWORK_ERROR[case.dtype])

    return case, rivals, right


# ---- a case -------------------------------------------------------------------------------------


def run_case(
    case: CudaVoxelCase, coords: Tensor, maps: dict[str, pc.KernelMap], rounds: Rounds, bench: Bench
) -> CudaVoxelCase:
    """Check one case, then time it."""
    if case.shape is NETWORK:
        case, rivals, right = _network(case, coords, bench)
    else:
        assert isinstance(case.shape, VoxelShape)
        if str(case.shape) not in maps:
            maps[str(case.shape)] = map_of(coords, case.shape)
        case, rivals, right = _layer(case, coords, maps[str(case.shape)], bench)
    if OURS in rivals.missing:
        return dataclasses.replace(case, unavailable=rivals.missing[OURS], failed=True)
    case = dataclasses.replace(case, check=right(rivals.contenders[0].calls[0]()))
    # Bytes alone would let a graph hold dozens of networks.
    return timed(case, rivals, right, rounds, bench, floor=case.eager.get(OURS, 0.0) / 2)


def run(
    plan: CudaVoxelPlan, bench: Bench, clock: Callable[[], float] = perf_counter
) -> Iterator[CudaVoxelCase]:
    """All cases of the plan in its order; those after ``most_seconds`` come out as left out."""
    coords, maps = coordinates_of(plan.scan).to(bench.device), dict[str, pc.KernelMap]()
    each = partial(run_case, coords=coords, maps=maps, rounds=plan.rounds, bench=bench)
    return run_each(plan.cases(), each, plan.most_seconds, clock)


def voxel_table(cases: Sequence[CudaVoxelCase]) -> str:
    """The cases of one shape and dtype; below, what is missing and why."""
    first = cases[0]
    head = f"pointcloud {first.dtype} {first.shape}, {first.rows} voxels, {first.pairs} pairs"
    eager = [
        ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in case.eager.items())
        for case in cases
    ]
    return group_table(head, COLUMNS, cases, notes=[f"eager: {times}" for times in eager if times])
