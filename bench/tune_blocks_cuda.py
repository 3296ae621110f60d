"""Times every way in which a GPU's kernels compute a block-sparse product or a 2:4 convolution.

A part of tune_cuda.py. A line a case: the chosen way, the fastest, the fastest of each kernel, and
cuDNN or cuBLAS. From the record, which has them all, the models in
csrc/blocksparse/conv_cuda_config.h and csrc/sparse24/choose_conv_cuda.h are set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from bench_blocksparse_cuda import channels_last, problem_of, product_of, pruned, stored_as
from bench_sparse24_cuda import cloned
from cuda_block_case import Pattern, pattern_name
from cuda_rivals import clones
from cuda_shapes import DTYPES
from cuda_timing import copies_for, first_line
from gossamer.ops.blocksparse import blocksparse_by_way
from gossamer.ops.blocksparse_choice import blocksparse_choice, blocksparse_ways
from gossamer.ops.sparse24_conv import (
    sparse24_conv_by_way,
    sparse24_conv_choice,
    sparse24_conv_ways,
)
from shapes import CONV_SHAPES, GOAL_MODEL, ConvShape, LinearShape, Shape
from torch import Tensor

BLOCKS = ((16, 16), (32, 32), (64, 64))
DENSITIES = (0.25, 0.1)
IMAGES, ROWS = 64, 4096
IMAGES_24 = (32, 1, 8, 128)  # of 2:4 convolutions
BLOCK_WAY = ("kernel", "tile_pixels", "tile_outputs", "cluster")
WAY_24 = ("kernel", "tile_n", "tile_m", "warps_k", "split_k", "blocks")
LINEAR = (LinearShape("bert.up", 3072, 768), LinearShape("llama8b.o", 4096, 4096))
CONVS = tuple(shape for shape in CONV_SHAPES if shape.model == GOAL_MODEL)
Seconds = Callable[[list[Callable[[], Tensor]]], float]
Case = tuple[Shape, int, Pattern, float]
Way = tuple[Any, ...]


def block_cases(names: Sequence[str], blocks: Sequence[tuple[int, int]] = BLOCKS) -> Iterator[Case]:
    """The convolutions that the goal speaks of and linear layers; the first densities first."""
    for density in DENSITIES:
        for shape in (*CONVS, *LINEAR):
            if shape.name.startswith(tuple(names)):
                for block in blocks:
                    yield shape, IMAGES if isinstance(shape, ConvShape) else ROWS, block, density


def conv24_cases(names: Sequence[str]) -> Iterator[Case]:
    """2:4 convolutions of few images and many; a number of images after the other."""
    for images in IMAGES_24:
        for shape in CONVS:
            if shape.name.startswith(tuple(names)):
                yield shape, images, "2:4", 0.5


def tune_block_case(
    case: Case, dtype: str, device: torch.device, l2: int, seconds: Seconds
) -> dict[str, Any]:
    """Times of all ways, in microseconds."""
    shape, count, block, density = case
    problem = problem_of(shape, count, DTYPES[dtype].dtype, device)
    weight = pruned(problem, block, density)
    stored = stored_as(problem, weight, block)
    x, last = channels_last(problem.x), problem.x.dim() == 4
    expected = problem.matrix(problem.dense(x, channels_last(weight))).float()
    copies = copies_for(stored.nbytes + x.nbytes, l2)
    xs = clones(x, copies)
    weights = [stored, *(cloned(stored) for _ in range(1, copies))]
    about: dict[str, Any] = {**problem.geometry, "channels_last": last}
    if block == "2:4":
        choice = sparse24_conv_choice(x.shape, stored, **about)
        chosen = [choice.get(name) for name in WAY_24]
        ways = sparse24_conv_ways(x.shape, stored, **problem.geometry)
        by_way = sparse24_conv_by_way
    else:
        choice = blocksparse_choice(x.shape, stored, **about)
        chosen = [choice[name] for name in BLOCK_WAY]
        ways = blocksparse_ways(x.shape, stored, **about)
        by_way = blocksparse_by_way
    found: dict[str, Any] = {
        "chosen": chosen,
        "kept_flops": 2 * expected.shape[0] * int(weight.count_nonzero()),
        "us": [],
        "failed": {},
    }

    def microseconds(name: str, run: Callable[..., Tensor]) -> float | None:
        """None of what cannot run or is wrong, whose fault is kept."""
        try:
            calls = [partial(run, a, b) for a, b in zip(xs, weights, strict=True)]
            error = (problem.matrix(calls[0]()).float() - expected).norm() / expected.norm()
            if error < 1e-2:
                return 1e6 * seconds(calls)
            found["failed"][name] = f"differs by {error:.2g}"
        except (ValueError, RuntimeError) as error:
            found["failed"][name] = first_line(error)
        return None

    # By itself: where each pixel sees itself, the GEMM of 2:4 weights is none of the ways.
    found["chosen_us"] = microseconds("chosen", product_of(problem, stored))
    for way in ways:
        us = microseconds(str(way), partial(by_way, way, **problem.geometry))
        if us is not None:
            found["us"].append([*way, us])
    kernels = clones(channels_last(weight), copies)
    dense = [partial(problem.dense, a, b) for a, b in zip(xs, kernels, strict=True)]
    found["dense_us"] = 1e6 * seconds(dense)
    return found


def name_of(case: Case, dtype: str) -> str:
    shape, count, block, density = case
    return f"{dtype} {shape} x {count}, {pattern_name(block)}, {density:.0%}"


def block_line(name: str, found: dict[str, Any]) -> str:
    if not found["us"]:
        return f"{name}: no way runs, {found['failed']}"
    times: dict[Way, float] = {tuple(entry[:-1]): entry[-1] for entry in found["us"]}
    ours = found["chosen_us"]
    best: dict[str, Way] = {}  # of each kernel
    for way in sorted(times, key=times.__getitem__):
        best.setdefault(way[0], way)
    fastest = ", ".join(f"{' '.join(map(str, w))} {times[w]:.1f} us" for w in best.values())
    least = min(times.values())
    return (
        f"{name}: {' '.join(map(str, found['chosen']))} "
        f"{'failed' if ours is None else f'{ours:.1f} us'}, best {fastest} "
        f"({found['kept_flops'] / least * 1e-6:.0f} TFLOP/s), dense {found['dense_us']:.1f} us "
        f"({found['dense_us'] / least:.2f}x)"
        + (f", {len(found['failed'])} failed" if found["failed"] else "")
    )
