"""Times every way in which a GPU's kernels compute a block-sparse product: a part of tune_cuda.py.

A line a case: the chosen way, the fastest, the fastest of each kernel, and cuDNN or cuBLAS. From
the record, which has them all, the models in csrc/blocksparse/conv_cuda_config.h are set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from bench_blocksparse_cuda import channels_last, problem_of, pruned
from bench_sparse24_cuda import cloned
from cuda_rivals import clones
from cuda_shapes import DTYPES
from cuda_timing import copies_for, first_line
from gossamer import Block
from gossamer.formats import BlockSparse
from gossamer.ops.blocksparse import blocksparse_by_way
from gossamer.ops.blocksparse_choice import Way, blocksparse_choice, blocksparse_ways
from shapes import CONV_SHAPES, GOAL_MODEL, ConvShape, LinearShape, Shape
from torch import Tensor

BLOCKS = ((16, 16), (32, 32), (64, 64))
DENSITIES = (0.25, 0.1)
IMAGES, ROWS = 64, 4096
LINEAR = (LinearShape("bert.up", 3072, 768), LinearShape("llama8b.o", 4096, 4096))
Seconds = Callable[[list[Callable[[], Tensor]]], float]
Case = tuple[Shape, int, tuple[int, int], float]


def block_cases(names: Sequence[str], blocks: Sequence[tuple[int, int]] = BLOCKS) -> Iterator[Case]:
    """The convolutions that the goal speaks of and linear layers; the first densities first."""
    convs = [shape for shape in CONV_SHAPES if shape.model == GOAL_MODEL]
    for density in DENSITIES:
        for shape in (*convs, *LINEAR):
            if shape.name.startswith(tuple(names)):
                for block in blocks:
                    yield shape, IMAGES if isinstance(shape, ConvShape) else ROWS, block, density


def tune_block_case(
    case: Case, dtype: str, device: torch.device, l2: int, seconds: Seconds
) -> dict[str, Any]:
    """Times of all ways, in microseconds."""
    shape, count, block, density = case
    problem = problem_of(shape, count, DTYPES[dtype].dtype, device)
    weight = pruned(problem, Block(*block), density)
    stored = BlockSparse.from_dense(weight, Block(*block), groups=problem.groups)
    x, last = channels_last(problem.x), problem.x.dim() == 4
    expected = problem.matrix(problem.dense(x, channels_last(weight))).float()
    copies = copies_for(stored.nbytes + x.nbytes, l2)
    xs = clones(x, copies)
    weights = [stored, *(cloned(stored) for _ in range(1, copies))]
    chosen = blocksparse_choice(x.shape, stored, **problem.geometry, channels_last=last)
    found: dict[str, Any] = {
        "chosen": [chosen[k] for k in ("kernel", "tile_pixels", "tile_outputs", "cluster")],
        "kept_flops": 2 * expected.shape[0] * int(weight.count_nonzero()),
        "us": [],
        "failed": {},
    }
    for way in blocksparse_ways(x.shape, stored, **problem.geometry, channels_last=last):
        run = partial(blocksparse_by_way, way, **problem.geometry)
        try:
            calls = [partial(run, a, b) for a, b in zip(xs, weights, strict=True)]
            error = (problem.matrix(calls[0]()).float() - expected).norm() / expected.norm()
            if not error < 1e-2:
                found["failed"][str(way)] = f"differs by {error:.2g}"
                continue
            found["us"].append([*way, 1e6 * seconds(calls)])
        except (ValueError, RuntimeError) as error:
            found["failed"][str(way)] = first_line(error)
    kernels = clones(channels_last(weight), copies)
    dense = [partial(problem.dense, a, b) for a, b in zip(xs, kernels, strict=True)]
    found["dense_us"] = 1e6 * seconds(dense)
    return found


def name_of(case: Case, dtype: str) -> str:
    shape, count, block, density = case
    return f"{dtype} {shape} x {count}, {block[0]}x{block[1]}, {density:.0%}"


def block_line(name: str, found: dict[str, Any]) -> str:
    if not found["us"]:
        return f"{name}: no way runs, {found['failed']}"
    times: dict[Way, float] = {tuple(entry[:-1]): entry[-1] for entry in found["us"]}
    ours = times.get(tuple(found["chosen"]))
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
